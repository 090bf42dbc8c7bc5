"""`bitlaw ladder train`: rebuild the built-in models from nothing.

    features    the feature network of the ladder's metrics          |  side by side
    tokenizer   the autoencoder of VAR and DiT                       |
    latents     a pool of training images, encoded once              after the tokenizer
    ddpm-*, var-*, dit-*                                             side by side, longest first
    reference   feature statistics of real and reconstructed images  after features and tokenizer
    card        full-precision scores of every model                 last

Every job is resumable and runs in one process with one thread; two run at a time.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitlaw.engine import LocalEngine
from bitlaw.files import write_json, write_with
from bitlaw.ladder import data
from bitlaw.ladder.feature_training import feature_loss
from bitlaw.ladder.model_training import (
    DDPM_RECIPES,
    DIT_RECIPES,
    SIZES,
    VAR_RECIPES,
    train_ddpm,
    train_dit,
    train_var,
    write_latents,
)
from bitlaw.ladder.tokenizer_training import TokenizerTraining
from bitlaw.metrics.evaluation import RECONSTRUCTION_PREFIX, cyclic_labels, evaluate, load_reference, mean_loss
from bitlaw.metrics.features import NUM_FEATURES, LadderFeatureNet, LadderFeatures, extract_features
from bitlaw.metrics.fid import FeatureStatistics, frechet_distance
from bitlaw.metrics.samples import write_npz
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.generator import ImageGenerator
from bitlaw.models.loading import load
from bitlaw.models.parts.pixels import to_uint8
from bitlaw.models.storage import load_tensors, read_json, read_tensors
from bitlaw.names import unknown_name
from bitlaw.training import Recipe, Report, of_loss, train, training_seconds

TOKENIZER = VQTokenizerConfig(
    vocab_size=512,
    latent_channels=8,
    ch=16,
    ch_mult=(1, 2, 4),
    num_res_blocks=1,
    patch_nums=(1, 2, 3, 4, 6),
    norm_groups=0,
    attention=False,
)
TOKENIZER_RECIPE = Recipe(steps=4000, lr=2e-3, warmup_steps=100, weight_decay=0.0)
FEATURES_RECIPE = Recipe(steps=3000, lr=3e-3, warmup_steps=100, weight_decay=0.02)


def train_features(out: Path, work: Path, report: Report) -> None:
    """The feature network, as `features.safetensors` in float16."""
    torch.manual_seed(0)
    net = LadderFeatureNet(num_factors=data.NUM_CONTINUOUS_FACTORS)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_at(step: int) -> Tensor:
        return feature_loss(
            net, data.draw("features", step * FEATURES_RECIPE.batch_size, FEATURES_RECIPE.batch_size), step
        )

    weights = train("features", net, FEATURES_RECIPE, of_loss(loss_at), work, report).weights
    net.load_state_dict(weights)
    _calibrate_norms(net)
    save_half(out / "features.safetensors", net.state_dict())


def _calibrate_norms(net: LadderFeatureNet, num_images: int = 8192) -> None:
    """Measure the BatchNorm statistics anew: those of training belong to the weights, not to their average."""
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
    net.train()
    with torch.no_grad():
        for batch in data.batches("features", num_images, first=10_000_000):
            net(data.to_float(batch.images_BCHW))
    net.eval()


def train_tokenizer(out: Path, work: Path, report: Report) -> None:
    """The autoencoder, as `tokenizer.safetensors` in float16."""
    torch.manual_seed(0)
    training = TokenizerTraining(VQTokenizer(TOKENIZER))  # channels_last already

    def loss_at(step: int) -> Tensor:
        batch = data.draw("train", step * TOKENIZER_RECIPE.batch_size, TOKENIZER_RECIPE.batch_size)
        x = data.to_float(batch.images_BCHW).contiguous(memory_format=torch.channels_last)
        return training.loss(x, step)

    weights = train("tokenizer", training, TOKENIZER_RECIPE, of_loss(loss_at), work, report).weights
    prefix = "tokenizer."
    save_half(
        out / "tokenizer.safetensors", {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )


def save_half(path: Path, tensors: dict[str, Tensor]) -> None:
    """Floating tensors as float16, contiguous, atomically."""
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()}
    write_with(path, lambda temporary: save_file(half, temporary))


# ---- the models, their reference, their scores ------------------------------------------------------------

MODELS = ("ddpm-s", *(f"{family}-{size}" for size in ("l", "m", "s", "xs") for family in ("var", "dit")))
GUIDANCES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
GUIDANCE_SIZES = ("s", "l")
GUIDANCE_SEED, GUIDANCE_IMAGES = 1_000, 1_500
REFERENCE_IMAGES, REFERENCE_VECTORS = 50_000, 5_000
SCORE_IMAGES, SCORE_SEEDS = 2_500, (101, 102, 103)


def load_tokenizer(out: Path) -> VQTokenizer:
    """The trained tokenizer, frozen."""
    tokenizer = VQTokenizer(TOKENIZER)
    load_tensors(tokenizer, read_tensors(out / "tokenizer.safetensors"), "tokenizer")
    return tokenizer.eval().requires_grad_(False)


def encode_latents(out: Path, work: Path, report: Report) -> None:
    """The pool of training images, encoded once."""
    write_latents(load_tokenizer(out), work, report)


def train_model(name: str, out: Path, work: Path, report: Report) -> None:
    """One model, as a checkpoint directory in float16."""
    family, size = name.split("-")
    model: ImageGenerator[Any]
    if family == "ddpm":
        model = train_ddpm(name, DDPM_RECIPES[size], work, report)
    else:
        tokenizer = load_tokenizer(out)
        if family == "var":
            model = train_var(name, VAR_RECIPES[size], tokenizer, work, report)
        else:
            model = train_dit(name, DIT_RECIPES[size], tokenizer, work, report)
        model.class_names = tuple(data.SHAPES)
    model.storage_dtype = torch.float16
    model.save(out / name)


@torch.inference_mode()
def measure_reference(out: Path, report: Report) -> None:
    """Feature statistics of real images, and of what the tokenizer makes of them for each family."""
    network, tokenizer = LadderFeatures(out / "features.safetensors"), load_tokenizer(out)
    pooled, spatial = FeatureStatistics(NUM_FEATURES), None
    reconstructed = {"var": FeatureStatistics(NUM_FEATURES), "dit": FeatureStatistics(NUM_FEATURES)}
    kept: list[Tensor] = []
    for number, batch in enumerate(data.batches("reference", REFERENCE_IMAGES, 250)):
        features = network(batch.images_BCHW)
        assert features.spatial_BS is not None
        spatial = spatial or FeatureStatistics(features.spatial_BS.shape[1])
        pooled.update(features.pooled_BD)
        spatial.update(features.spatial_BS)
        if sum(map(len, kept)) < REFERENCE_VECTORS:
            kept.append(features.pooled_BD.half())
        latents = tokenizer.encode(data.to_float(batch.images_BCHW))
        for family, latent in (("var", tokenizer.latent_to_tokens(latents).latents[-1]), ("dit", latents)):
            reconstructed[family].update(network(to_uint8(tokenizer.decode(latent))).pooled_BD)
        if number % 40 == 39:
            report(f"reference: {pooled.count}/{REFERENCE_IMAGES} images")
    assert spatial is not None
    arrays = pooled.arrays() | spatial.arrays("_s") | {"features": torch.cat(kept).numpy()}
    for family, part in reconstructed.items():
        arrays |= part.arrays(f"_{RECONSTRUCTION_PREFIX}{family}")
    write_npz(out / "reference.npz", arrays)
    for family, part in reconstructed.items():
        report(f"reference: FD of {family}'s reconstructions to real images {frechet_distance(part, pooled):.3f}")


def choose_guidance(family: str, out: Path, report: Report) -> None:
    """The guidance of least Fréchet distance, geometric mean over two sizes, on seeds and images of its own.

    It is written into the configuration of every size, and holds at every precision.
    """
    network = LadderFeatures(out / "features.safetensors")
    target = FeatureStatistics(NUM_FEATURES)
    for batch in data.batches("guidance", 20_000, 250):
        target.update(network(batch.images_BCHW).pooled_BD)
    labels = cyclic_labels(GUIDANCE_IMAGES, data.NUM_CLASSES)
    distances: dict[str, float] = {}
    for guidance in GUIDANCES:
        logs = []
        for size in GUIDANCE_SIZES:
            images = load(out / f"{family}-{size}").generate(labels, GUIDANCE_SEED, guidance=guidance)
            features = torch.cat([f.pooled_BD for f in extract_features(network, images)])
            logs.append(math.log(frechet_distance(FeatureStatistics.of(features), target)))
        distances[str(guidance)] = math.exp(sum(logs) / len(logs))
        report(f"guidance: {family} at {guidance}: FD {distances[str(guidance)]:.3f}")
    best = min(distances, key=lambda key: distances[key])
    for size in SIZES:
        path = out / f"{family}-{size}" / "config.json"
        config = read_json(path)
        config["sampling"]["guidance"] = float(best)
        write_json(path, config)
    write_json(out / f"guidance-{family}.json", {"chosen": float(best), "fd": distances})


def score_model(name: str, out: Path, work: Path, report: Report) -> None:
    """Full-precision scores over several seeds, written beside the weights as metrics.json."""
    network = LadderFeatures(out / "features.safetensors")
    reference = load_reference(out / "reference.npz")
    model = load(out / name)
    runs = []
    for seed in SCORE_SEEDS:
        scores = evaluate(model, reference, SCORE_IMAGES, seed=seed, features=network)
        runs.append({metric: score.value for metric, score in scores.items()})
    validation = data.draw("validation", 0, 2048)
    loss, _ = mean_loss(model, validation.images_BCHW, validation.labels_B)
    distances = torch.tensor([run["fd"] for run in runs])
    report(f"score: {name}: FD {distances.mean():.3f} +- {distances.std():.3f} over seeds, loss {loss:.4f}")
    content = {
        "parameters": sum(p.numel() for p in model.net.parameters()),
        "training_cpu_seconds": round(training_seconds(name, work)),
        "num_images": SCORE_IMAGES,
        "seeds": list(SCORE_SEEDS),
        "loss": loss,
        "runs": runs,
    }
    write_json(out / name / "metrics.json", content)


def run_job(job: tuple[str, Path]) -> None:
    """One job by its name, in a process of its own."""
    name, out = job
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    kind, _, rest = name.partition(":")

    def report(text: str) -> None:
        print(text, flush=True)

    match kind:
        case "features":
            train_features(out, work, report)
        case "tokenizer":
            train_tokenizer(out, work, report)
        case "latents":
            encode_latents(out, work, report)
        case "reference":
            measure_reference(out, report)
        case "guidance":
            choose_guidance(rest, out, report)
        case "score":
            score_model(rest, out, work, report)
        case "train":
            train_model(rest, out, work, report)
        case _:
            raise ValueError(f"unknown ladder job '{name}'")


# Jobs of a phase run side by side; each is done when its file is there.
PHASES: tuple[dict[str, str], ...] = (
    {"tokenizer": "tokenizer.safetensors", "features": "features.safetensors"},
    {"latents": "work/latents.npy", "reference": "reference.npz"},
    {f"train:{name}": f"{name}/config.json" for name in MODELS},
    {f"guidance:{family}": f"guidance-{family}.json" for family in ("var", "dit")},
    {f"score:{name}": f"{name}/metrics.json" for name in MODELS},
)


def train_ladder(out: Path, workers: int | None = None, only: Sequence[str] = ()) -> None:
    """Run what is missing, two processes at a time on two cores. ValueError for a job that does not exist."""
    known = [job for phase in PHASES for job in phase]
    if unknown := [job for job in only if job not in known]:
        raise unknown_name(unknown[0], known, "ladder job")
    engine, started = LocalEngine(workers), time.monotonic()
    for phase in PHASES:
        jobs = [job for job, file in phase.items() if not (out / file).exists() and (not only or job in only)]
        for outcome in engine.run(run_job, [(job, out) for job in jobs]):
            if outcome.error is not None:
                raise RuntimeError(f"ladder job {outcome.item[0]} failed: {outcome.error}") from outcome.error
            print(f"{outcome.item[0]}: done after {(time.monotonic() - started) / 60:.1f} min", flush=True)
