"""Draw images with a model and record statistics of what enters its layers.

Legend: R rows, I inputs of an output channel, C input channels, B images, H height, W width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.calibration.draws import RowDraws
from bitlaw.calibration.extremes import Extremes
from bitlaw.calibration.histogram import Histograms
from bitlaw.calibration.moments import Moments
from bitlaw.calibration.settings import Calibration
from bitlaw.calibration.stats import InputStats
from bitlaw.models.generator import ImageGenerator, Noise, rollout
from bitlaw.precision import step_group
from bitlaw.quantized import QuantConv2d

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; of 0 where it is only something to know."""

CONVOLUTIONS = (nn.Conv2d, QuantConv2d)

_WORDS = {
    "hessian_II": "Hessians",
    "second_moment_I": "second moments",
    "low_C": "extremes",
    "high_C": "extremes",
    "ends_S2": "extremes",
    "rows_RI": "sampled rows",
    "histograms_S": "histograms",
}

_FROM_EXTREMES = frozenset({"low_C", "high_C", "ends_S2", "histograms_S"})


def num_inputs(layer: nn.Module) -> int:
    """I of a linear or convolution."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight[0].numel()


@dataclass
class _Seen:
    """What has been seen enter one layer.

    share: of its rows, those that go to the moments
    """

    share: float
    moments: Moments | None = None
    extremes: Extremes | None = None
    histograms: Histograms | None = None
    rows: list[Tensor] = field(default_factory=list)
    num_sampled: int = 0
    calls: int = 0
    owed: float = 0.0
    """Rows that earlier calls were to give to the moments and did not, being whole."""


class Collector:
    """Observes layers of a model while they run.

    needs: fields of InputStats
    expected_rows: of each layer, rows that will enter it in all; with them, rows for the moments are sampled
    """

    def __init__(
        self,
        model: ImageGenerator[Any],
        names: Sequence[str],
        needs: frozenset[str],
        settings: Calibration,
        step_groups: Sequence[int] = (0,),
        expected_rows: Mapping[str, float] | None = None,
    ):
        self.model, self.needs, self.settings, self.step_groups = model, needs, settings, tuple(step_groups)
        self.layers = {name: model.net.get_submodule(name) for name in names}
        self.expected_rows = dict(expected_rows or {})
        self.seen = {name: self._nothing(name) for name in self.layers}
        self._draws = RowDraws(settings.seed)

    def _nothing(self, name: str) -> _Seen:
        width = num_inputs(self.layers[name])
        seen = _Seen(min(1.0, self.settings.rows_per_input * width / max(self.expected_rows.get(name, 0.0), 1.0)))
        if {"second_moment_I", "hessian_II"} & self.needs:
            seen.moments = Moments(width, hessian="hessian_II" in self.needs)
        if not self.needs.isdisjoint(_FROM_EXTREMES):
            seen.extremes = Extremes(len(self.step_groups))
        if "histograms_S" in self.needs:
            seen.histograms = Histograms(len(self.step_groups))
        return seen

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the layers run inside of it, their inputs are recorded."""
        hooks = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        seen, is_convolution = self.seen[name], isinstance(self.layers[name], CONVOLUTIONS)

        def see(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if (scaling := getattr(layer, "scaling", None)) is not None:
                x = scaling.of_images(x) if is_convolution else scaling(x)
            # Models run in inference mode; what is kept of them may be differentiated through later.
            with torch.inference_mode(False), torch.no_grad():
                if seen.extremes is not None:
                    group = step_group(self.step_groups, self.model.clock.step)
                    seen.extremes.add(x, group, (0, 2, 3) if is_convolution else tuple(range(x.ndim - 1)))
                    if seen.histograms is not None:
                        seen.histograms.add(x, group)
                self._take_rows(name, layer, x)
            seen.calls += 1

        return see

    def _take_rows(self, name: str, layer: nn.Module, x: Tensor) -> None:
        seen, settings = self.seen[name], self.settings
        left = settings.sample_rows - seen.num_sampled if "rows_RI" in self.needs else 0
        if seen.moments is None and not left:
            return
        count = _num_rows(layer, x)
        if seen.moments is not None:
            seen.owed += count * seen.share
            wanted = min(count, int(seen.owed + 1e-6))
            seen.owed -= wanted
            if wanted:
                weight = 1.0 / wanted if settings.balanced_steps else count / wanted
                for rows_RI, chosen in _rows(layer, x, self._draws.choose(count, wanted)):
                    seen.moments.add(rows_RI, weight, chosen)
        if left:
            expected = max(self.expected_rows.get(name, 0.0), count)
            wanted = min(count, ceil(settings.sample_rows * count / expected), left)
            seen.num_sampled += wanted
            for rows_RI, chosen in _rows(layer, x, self._draws.choose(count, wanted)):
                # Copied: where all are chosen, they are a view of what entered.
                taken = rows_RI.clone() if chosen is None else rows_RI.index_select(0, chosen)
                seen.rows.append(taken.float())

    def num_bytes(self) -> int:
        """Bytes that the statistics take when all has been seen, and `stats` has been called."""
        return sum(map(self._num_bytes, self.layers))

    def _num_bytes(self, name: str) -> int:
        layer, seen = self.layers[name], self.seen[name]
        width, size = num_inputs(layer), Histograms.num_bytes(len(self.step_groups)) if seen.histograms else 0
        if (moments := seen.moments) is not None:
            size += Moments.num_bytes(width, moments.hessian) + 4 * width * (1 + width * moments.hessian)
        if seen.extremes is not None:
            num_channels = int(layer.in_channels) if isinstance(layer, CONVOLUTIONS) else width
            size += Extremes.num_bytes(num_channels, len(self.step_groups))
        if "rows_RI" in self.needs:
            size += 4 * width * self.settings.sample_rows
        return size

    def describe_memory(self) -> str:
        """What the statistics will take, in words."""
        kinds = dict.fromkeys(word for need, word in _WORDS.items() if need in self.needs)
        return f"{in_words(self.num_bytes())} of {', '.join(kinds)} at {len(self.layers)} layers"

    def stats(self) -> dict[str, InputStats]:
        """What was seen. ValueError names every layer that nothing entered."""
        unreached = [name for name, seen in self.seen.items() if not seen.calls]
        if unreached:
            raise ValueError(
                "\n".join(
                    f"{name}: no calibration sample reached it; draw other labels, or protect it" for name in unreached
                )
            )
        return {name: self._stats(seen) for name, seen in self.seen.items()}

    def _stats(self, seen: _Seen) -> InputStats:
        moments, extremes = seen.moments, seen.extremes
        by_channel = not self.needs.isdisjoint({"low_C", "high_C"})
        if extremes is not None:
            extremes.fold()
        return InputStats(
            second_moment_I=moments.second_moment_I if moments else None,
            hessian_II=moments.hessian_II if moments and "hessian_II" in self.needs else None,
            low_C=extremes.low_C if extremes and by_channel else None,
            high_C=extremes.high_C if extremes and by_channel else None,
            ends_S2=extremes.ends_S2 if extremes and "ends_S2" in self.needs else None,
            rows_RI=torch.cat(seen.rows) if seen.rows else None,
            histograms_S=seen.histograms.counted_S(extremes.ends_S2) if seen.histograms and extremes else None,
            num_rows=moments.num_rows if moments else 0,
        )


def in_words(num_bytes: int) -> str:
    """A size as people say it."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _num_rows(layer: nn.Module, x: Tensor) -> int:
    """Rows of an input: one for each position of a linear's, one for each window of a convolution's."""
    if not isinstance(layer, CONVOLUTIONS):
        return x.numel() // x.shape[-1]
    return len(x) * _positions(layer, x)


def _positions(layer: Any, x_BCHW: Tensor) -> int:
    sides = []
    for i, size in enumerate(x_BCHW.shape[2:]):
        reach = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        sides.append((size + 2 * layer.padding[i] - reach) // layer.stride[i] + 1)
    return sides[0] * sides[1]


def _rows(layer: Any, x: Tensor, chosen: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Parts of the rows (R, I) of an input and which of them are chosen, None for all.

    Of a convolution they come image by image, as windows are many times what they are made of.
    """
    if chosen is not None:
        chosen = chosen.to(x.device)
    if not isinstance(layer, CONVOLUTIONS):
        yield x.reshape(-1, x.shape[-1]), chosen
        return
    per_image = _positions(layer, x)
    for i, image in enumerate(x):
        mine = None
        if chosen is not None:
            mine = chosen[(chosen >= i * per_image) & (chosen < (i + 1) * per_image)] - i * per_image
        if mine is None or len(mine):
            reach: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            yield F.unfold(image[None], *reach)[0].T, mine


def batches(model: ImageGenerator[Any], settings: Calibration) -> Iterator[tuple[Any, Noise]]:
    """Labels and noise of each batch of the images that calibration draws. ValueError for a model of texts without."""
    given: Sequence[int | str] = settings.labels
    if not given:
        if not model.num_classes:
            raise ValueError("calibrating a model of texts needs prompts: Calibration(labels=(...))")
        given = range(model.num_classes)
    for begin in range(0, settings.num_images, settings.batch_size):
        ids = range(begin, min(begin + settings.batch_size, settings.num_images))
        labels_B = model.check_labels([given[i % len(given)] for i in ids])
        yield labels_B, Noise(settings.seed, ids, model.device)


def as_calibrated(model: ImageGenerator[Any], settings: Calibration) -> ImageGenerator[Any]:
    """The model under the sampler settings of its calibration. ValueError for one whose layers cannot be watched."""
    if model.is_compiled:
        raise ValueError("the model is compiled, so that nothing inside can be observed; load it anew, compile last")
    return model.with_sampling(guidance=settings.guidance, **settings.sampling)


def expected_rows(model: ImageGenerator[Any], settings: Calibration) -> dict[str, float]:
    """Rows that will enter each site while calibration draws, about: both branches of guidance where there are two."""
    branches = 2 if getattr(model.sampling, "guidance", 1) != 1 else 1
    return {site.name: float(site.uses * settings.num_images * branches) for site in model.sites()}


def collect(
    model: ImageGenerator[Any],
    settings: Calibration,
    names: Sequence[str],
    needs: frozenset[str],
    step_groups: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> dict[str, InputStats]:
    """Statistics of what enters the layers `names` while the model draws the images of `settings`.

    Raises ValueError naming every layer that nothing entered.
    """
    model = as_calibrated(model, settings)
    collector = Collector(model, names, needs, settings, step_groups, expected_rows(model, settings))
    total = model.num_steps * ceil(settings.num_images / settings.batch_size)
    done = 0
    if progress is not None:
        progress(f"calibration holds up to {collector.describe_memory()}", 0, 0)
    with collector.watching():
        for labels_B, noise in batches(model, settings):
            for _ in rollout(model, labels_B, noise):
                done += 1
                if progress is not None:
                    progress("calibrating", done, total)
    return collector.stats()
