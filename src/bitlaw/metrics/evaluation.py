"""Score a model's images: draw them, extract features, compare with a reference.

Legend: N images, B images of a batch, C classes, D features, S spatial features, M reference images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitlaw.metrics.features import FeatureNetwork, Features, InceptionTorchScript, LadderFeatures, extract_features
from bitlaw.metrics.fid import FeatureStatistics, frechet_distance, frechet_interval
from bitlaw.metrics.inception_score import inception_score, inception_score_interval
from bitlaw.metrics.kid import kernel_distance
from bitlaw.metrics.precision_recall import precision_recall
from bitlaw.metrics.protocol import Interval, Protocol, Score
from bitlaw.metrics.samples import read_npz, read_samples
from bitlaw.models.generator import ImageGenerator, Labels, Noise

LADDER_REFERENCE = "reference.npz"
RECONSTRUCTION_PREFIX = "reconstruction_"
NORMAL_95 = 1.959964
FEATURE_BATCH = 250  # images that go through a feature network together


@dataclass(frozen=True)
class Reference:
    """What images are compared with.

    pooled, spatial: statistics of features for FID and sFID; features_MD: vectors for KID and precision/recall
    reconstructions: for each family the statistics of the real images after its own autoencoder; a
    family's distance to these is what its network adds to what its autoencoder loses
    """

    name: str
    pooled: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features_MD: Tensor | None = None
    reconstructions: Mapping[str, FeatureStatistics] = field(default_factory=dict)


def load_reference(source: str | Path, network: FeatureNetwork | None = None) -> Reference:
    """A reference by name ("ladder"), statistics or ADM batch (`.npz`), or folder of images.

    A folder, or a `.npz` that has images but no statistics, goes through `network`. ValueError names the file.
    """
    if str(source) == "ladder":
        with resources.as_file(resources.files("bitlaw") / "ladder" / "weights" / LADDER_REFERENCE) as path:
            return _read_statistics(path, "ladder")
    path = Path(source)
    if path.suffix == ".npz":
        try:
            return _read_statistics(path, path.name)
        except ValueError:
            if network is None:
                raise
    if not path.exists():
        raise ValueError(f"{path}: no such reference; give a .npz, a folder of images, or 'ladder'")
    if network is None:
        raise ValueError(f"{path}: a folder of images needs a feature network")
    features = _collect(network, read_samples(path))
    return Reference(
        path.name,
        FeatureStatistics.of(features.pooled_BD),
        None if features.spatial_BS is None else FeatureStatistics.of(features.spatial_BS),
        features.pooled_BD,
    )


def _read_statistics(path: Path, name: str) -> Reference:
    with np.load(path, allow_pickle=False) as file:
        keys = list(file.files)
    prefix = f"mu_{RECONSTRUCTION_PREFIX}"
    families = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    features = read_npz(path, required=("features",))["features"] if "features" in keys else None
    return Reference(
        name,
        FeatureStatistics.load(path),
        FeatureStatistics.load(path, suffix="_s") if "mu_s" in keys else None,
        None if features is None else torch.from_numpy(features.astype(np.float32)),
        {family: FeatureStatistics.load(path, suffix=f"_{RECONSTRUCTION_PREFIX}{family}") for family in families},
    )


def feature_network(name: str) -> FeatureNetwork:
    """ "ladder", or the path of the Inception-v3 TorchScript file."""
    return LadderFeatures() if name == "ladder" else InceptionTorchScript(name)


def cyclic_labels(num_images: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., C - 1, 0, 1, ...: balanced, and the same for every model of as many classes."""
    return torch.arange(num_images) % num_classes


def draw_features(
    model: ImageGenerator[Any],
    network: FeatureNetwork,
    labels: Labels,
    seed: int,
    *,
    batch_size: int = 64,
    num_kept: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Features, Tensor]:
    """The features of a model's images, and the first `num_kept` images, which alone are kept.

    Images are drawn a few thousand at a time, as many as make whole batches of drawing and of features: 50,000 images
    of 512 pixels would take 40 GB, and these are the same features.
    """
    at_a_time = math.lcm(batch_size, FEATURE_BATCH)
    drawn, kept = [], []
    for begin in range(0, len(labels), at_a_time):
        part = labels[begin : begin + at_a_time]
        images = model.generate(part, seed, batch_size=batch_size, first_image=begin, progress=progress)
        drawn.append(_collect(network, images))
        kept.append(images[: max(0, num_kept - begin)])
    return _joined(drawn), torch.cat(kept)


def score_images(
    images_NCHW: Tensor, network: FeatureNetwork, reference: Reference, family: str | None = None
) -> dict[str, tuple[float, Interval | None]]:
    """`score_features` of images that are there."""
    return score_features(_collect(network, images_NCHW), reference, family)


def score_features(
    features: Features, reference: Reference, family: str | None = None
) -> dict[str, tuple[float, Interval | None]]:
    """Every metric that the features and the reference allow: name -> (value, 95 % interval or None).

    fd, sfd: Fréchet distances; fd_reconstruction: to the family's own reconstructions of real images; is; kid;
    precision and recall. sfd is left out where images are too few for its wider covariance.
    ValueError if there are too few images for a covariance of the network's width.
    """
    scores: dict[str, tuple[float, Interval | None]] = {}

    def add_distance(name: str, features_ND: Tensor, statistics: FeatureStatistics) -> None:
        value = frechet_distance(FeatureStatistics.of(features_ND), statistics)
        scores[name] = (value, frechet_interval(features_ND, statistics))

    add_distance("fd", features.pooled_BD, reference.pooled)
    if family is not None and family in reference.reconstructions:
        add_distance("fd_reconstruction", features.pooled_BD, reference.reconstructions[family])
    spatial_NS, spatial = features.spatial_BS, reference.spatial
    if spatial_NS is not None and spatial is not None and len(spatial_NS) > spatial.num_features:
        # No interval: resampling a few hundred features 200 times costs more than drawing the images.
        scores["sfd"] = (frechet_distance(FeatureStatistics.of(spatial_NS), spatial), None)
    if features.logprobs_BC is not None:
        interval = inception_score_interval(features.logprobs_BC)
        scores["is"] = (inception_score(features.logprobs_BC, num_splits=1).mean, interval)
    if reference.features_MD is not None:
        kid = kernel_distance(features.pooled_BD, reference.features_MD)
        margin = NORMAL_95 * kid.standard_error
        scores["kid"] = (kid.value, Interval(kid.value - margin, kid.value + margin))
        real_MD = reference.features_MD[: len(features.pooled_BD)]
        both = precision_recall(features.pooled_BD, real_MD)
        scores["precision"], scores["recall"] = (both.precision, None), (both.recall, None)
    return scores


def mean_loss(
    model: ImageGenerator[Any], images_NCHW: Tensor, labels_N: Tensor, batch_size: int = 128
) -> tuple[float, Interval]:
    """The model's validation loss over images, and its interval. Timesteps and noise are the same for every model."""
    losses: list[Tensor] = []
    with torch.inference_mode():
        for begin in range(0, len(images_NCHW), batch_size):
            part = slice(begin, min(begin + batch_size, len(images_NCHW)))
            noise = Noise(0, range(part.start, part.stop), model.device)
            losses.append(model.loss(images_NCHW[part], labels_N[part], noise).double().cpu())
    loss_N = torch.cat(losses)
    mean, error = float(loss_N.mean()), float(loss_N.std()) / len(loss_N) ** 0.5
    return mean, Interval(mean - NORMAL_95 * error, mean + NORMAL_95 * error)


def protocol_of(
    model: ImageGenerator[Any],
    num_images: int,
    seed: int,
    network: FeatureNetwork,
    reference: Reference,
    labels: str = "cyclic",
) -> Protocol:
    """The protocol under which `evaluate` scores a model."""
    sampling = model.sampling
    return Protocol(
        num_images=num_images,
        seed=seed,
        labels=labels,
        guidance=sampling.guidance,
        num_steps=model.num_steps,
        sampler=model.sampler_name,
        rounding=sampling.rounding,
        features=network.name,
        features_fingerprint=network.fingerprint,
        reference=reference.name,
        num_reference=reference.pooled.count,
        recipe=model.recipe,
    )


def evaluate(
    model: ImageGenerator[Any],
    reference: str | Path | Reference = "ladder",
    num_samples: int = 5000,
    *,
    seed: int = 0,
    features: str | FeatureNetwork = "ladder",
    batch_size: int = 64,
    prompts: Sequence[str] | None = None,
    progress: Callable[[int], Any] | None = None,
    **sampling: Any,
) -> dict[str, Score]:
    """Draw `num_samples` images with cyclic labels and score them: metric name -> `Score` with interval and protocol.

    prompts: for a text-conditional model, which has no classes; they are taken in turn
    Further keywords (guidance, recipe, ...) replace the sampler's settings. ValueError before any image is drawn if
    `num_samples` is too few for a covariance of the network's width, or the prompts are missing.
    """
    network = feature_network(features) if isinstance(features, str) else features
    target = reference if isinstance(reference, Reference) else load_reference(reference, network)
    needed = target.pooled.num_features + 1
    if num_samples < needed:
        raise ValueError(
            f"{num_samples} samples are too few for a covariance of {needed - 1} features ({network.name}); "
            f"at least {needed} are needed, and many more for a stable distance"
        )
    model = model.with_sampling(**sampling)
    labels: Labels
    if model.num_classes:
        labels, named = cyclic_labels(num_samples, model.num_classes), "cyclic"
    elif prompts:
        labels, named = [prompts[i % len(prompts)] for i in range(num_samples)], f"{len(prompts)} prompts"
    else:
        raise ValueError(f"this {model.family} draws from text: give prompts")
    drawn, _ = draw_features(model, network, labels, seed, batch_size=batch_size, progress=progress)
    protocol = protocol_of(model, num_samples, seed, network, target, named)
    return {
        name: Score(name, value, interval, protocol)
        for name, (value, interval) in score_features(drawn, target, model.family).items()
    }


def _collect(network: FeatureNetwork, images_NCHW: Tensor) -> Features:
    return _joined(list(extract_features(network, images_NCHW, FEATURE_BATCH)))


def _joined(batches: Sequence[Features]) -> Features:
    spatial = [b.spatial_BS for b in batches if b.spatial_BS is not None]
    logprobs = [b.logprobs_BC for b in batches if b.logprobs_BC is not None]
    return Features(
        torch.cat([b.pooled_BD for b in batches]),
        torch.cat(spatial) if spatial else None,
        torch.cat(logprobs) if logprobs else None,
    )
