"""Rollouts of the full-precision model, on whose states other models are compared with it step by step.

Legend: B images of a batch, N images in all, S steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from bitlaw.allocation.curves import CurveSettings
from bitlaw.allocation.distortion import Comparison, measure_for
from bitlaw.calibration.cache import fingerprint_of
from bitlaw.calibration.collect import Progress, as_calibrated, batches
from bitlaw.calibration.replay import map_leaves
from bitlaw.calibration.settings import Calibration
from bitlaw.models.generator import Extracted, ImageGenerator, Noise, Site
from bitlaw.precision import check_step_groups, unprotected


@dataclass(frozen=True)
class PathStep:
    """A step of a full-precision rollout: the state before it, without what a cache holds, and its output.

    No tensor of them is one of inference mode.
    """

    index: int
    state: Any
    output: Tensor


@dataclass(frozen=True)
class PathBatch:
    """The rollout of some images: what they were drawn for, and every step."""

    labels_B: Any
    noise: Noise
    steps: tuple[PathStep, ...]


class Paths:
    """Rollouts of `settings.num_images` images, labels in turn, by the full-precision model under these settings.

    model: it, under the settings' sampler
    measure_name, measure: of distortion
    has_cache: whether a step needs what the steps before left; if not, none feels what another one did
    output_is_drawn: whether part of the network runs while a step draws: then what a step adds to `encoded_of` is its
                     output, and otherwise its features
    Raises ValueError for settings that do not go with the model.
    """

    def __init__(self, model: ImageGenerator[Any], settings: CurveSettings, progress: Progress | None = None):
        images = images_of(settings)
        self.settings = settings
        self.model = as_calibrated(model, images)
        self.measure_name, self.measure = measure_for(model, settings.measure)
        check_step_groups(settings.step_groups, self.model.num_steps)
        self.has_cache = self.output_is_drawn = False
        drawn: list[PathBatch] = []
        num_steps = self.model.num_steps
        total = num_steps * ceil(settings.num_images / settings.batch_size)
        for labels_B, noise in batches(self.model, images):
            steps = []
            for step in self._rollout(labels_B, noise):
                steps.append(step)
                if progress is not None:
                    progress("drawing paths", len(drawn) * num_steps + len(steps), total)
            drawn.append(PathBatch(labels_B, noise, tuple(steps)))
        self.batches = tuple(drawn)

    @property
    def num_steps(self) -> int:
        """S."""
        return self.model.num_steps

    @torch.no_grad()
    def _rollout(self, labels_B: Any, noise: Noise) -> Iterator[PathStep]:
        model = self.model
        state = model.start(labels_B, noise)
        for index in range(model.num_steps):
            model.clock.step = index
            extracted = model.extract(state, index)
            if index == 0:
                self.has_cache = extracted.cache is not None
                self.output_is_drawn = _runs_while_drawing(model, state, extracted)
            after = model.reconstruct(state, extracted, index)
            output = model.encoded_of(after) - model.encoded_of(state) if self.output_is_drawn else extracted.features
            yield PathStep(index, _detached(model.with_cache(state, None)), _detached(output))
            state = after

    def run(self, model: ImageGenerator[Any], step: PathStep, cache: Any = None) -> Extracted:
        """The output of a model in a step, from the state of the full-precision rollout, and the cache it has grown.

        cache: what this model's steps before have left; None in the first
        """
        model.clock.step = step.index
        state = model.with_cache(step.state, cache)
        extracted = model.extract(state, step.index)
        if not self.output_is_drawn:
            return extracted
        after = model.reconstruct(state, extracted, step.index)
        return Extracted(model.encoded_of(after) - model.encoded_of(state), extracted.cache)

    def as_drawn(self, twin: ImageGenerator[Any]) -> ImageGenerator[Any]:
        """Another model under the settings' sampler. ValueError for one of other steps than the paths have."""
        twin = as_calibrated(twin, images_of(self.settings))
        if (twin.family, twin.num_steps) != (self.model.family, self.num_steps):
            raise ValueError(
                f"a {twin.family} of {twin.num_steps} steps cannot be compared on paths of a {self.model.family} of "
                f"{self.num_steps}"
            )
        return twin

    @torch.no_grad()
    def distortion_of_images(self, twin: ImageGenerator[Any]) -> Tensor:
        """(S, N), float64: distortion of each image in each step; see `distortion`."""
        twin = self.as_drawn(twin)
        parts = []
        for batch in self.batches:
            cache, rows = None, []
            for step in batch.steps:
                output, cache = self.run(twin, step, cache)
                rows.append(self.comparison(step)(output))
            parts.append(torch.stack(rows))
        return torch.cat(parts, 1)

    def distortion(self, twin: ImageGenerator[Any]) -> Tensor:
        """(S,), float64: distortion of a model's output in each step, mean over images.

        It runs step by step on the states of the full-precision rollout, but with a cache of its own: a quantized
        weight changes keys and values of earlier steps, too. ValueError if its output is not finite.
        """
        return self.distortion_of_images(twin).mean(1)

    def comparison(self, step: PathStep) -> Comparison:
        """The distortion of outputs in a step, (B,) float64. It raises ValueError for one that is not finite."""
        compare = self.measure.to(step.output)

        def distortion(output: Tensor) -> Tensor:
            distortion_B = compare(output)
            if not distortion_B.isfinite().all():
                raise ValueError(f"step {step.index}: the quantized model's output is NaN or Inf, or beyond float64")
            return distortion_B

        return distortion


def images_of(settings: CurveSettings) -> Calibration:
    """The images of the settings' paths, in the words of calibration."""
    return replace(
        calibration_of(settings), num_images=settings.num_images, seed=settings.seed, batch_size=settings.batch_size
    )


def calibration_of(settings: CurveSettings) -> Calibration:
    """What methods are calibrated with beside these paths: other images, drawn in the same way."""
    return Calibration(labels=settings.labels, guidance=settings.guidance, sampling=settings.sampling)


def curve_sites(model: ImageGenerator[Any], settings: CurveSettings) -> list[Site]:
    """The sites that get curves: those that the settings do not protect, in order of execution."""
    return unprotected(model.sites(), settings.protect)


def model_fingerprint(model: ImageGenerator[Any]) -> str:
    """A name for a model's numbers and its sampler, as `RateDistortion.fingerprint`."""
    return fingerprint_of({"config": model.to_config(), "sampling": repr(model.sampling)}, model.net)


def _runs_while_drawing(model: ImageGenerator[Any], state: Any, extracted: Extracted) -> bool:
    """Whether `reconstruct` calls a site."""
    called = []
    sites = [model.net.get_submodule(site.name) for site in model.sites()]
    hooks = [module.register_forward_pre_hook(lambda *_: called.append(True)) for module in sites]
    try:
        model.reconstruct(state, extracted, 0)
    finally:
        for hook in hooks:
            hook.remove()
    return bool(called)


def _detached(value: Any) -> Any:
    """A state or output whose tensors later steps do not change."""
    return map_leaves(value, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)
