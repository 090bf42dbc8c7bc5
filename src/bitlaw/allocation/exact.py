"""Rate-distortion curves with every point measured.

Algorithm 1 of paper 004 runs the model once for every tensor and width. Here a run begins at the tensor: what lies
upstream of it is that of the full-precision model, and was recorded once (`tape`). Networks without a cache run, for
inputs in a group of steps, in these steps only: the others do not feel it. Results are those of full runs, bit for bit.

Tensors go block by block. Of a batch of images, the outputs of all blocks, and of the layers of the block at hand, are
held for one step, or for all steps of a network with a cache; beside them, the weights of the block at all widths.

Legend: B images of a batch, N images in all, S steps, W widths.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitlaw.allocation.choices import Choices
from bitlaw.allocation.curves import CurveSettings, RateDistortion, TensorKey, tensor_keys
from bitlaw.allocation.distortion import Comparison
from bitlaw.allocation.kept import kept_curves
from bitlaw.allocation.paths import Paths, PathStep, curve_sites, images_of, model_fingerprint
from bitlaw.allocation.tape import Tape
from bitlaw.calibration.cache import fingerprint_of
from bitlaw.calibration.collect import Progress, as_calibrated
from bitlaw.files import write_json
from bitlaw.install import SiteParts, quantized_layer
from bitlaw.methods.quantize import check_each, quantize
from bitlaw.models.generator import ImageGenerator
from bitlaw.precision import BitPlan, Precision, step_group
from bitlaw.quantized import ActivationSpec, FakeQuant, QuantLayer

log = logging.getLogger(__name__)

Values = dict[TensorKey, Tensor]
"""Of each tensor (W, S): distortion of the output of each step at each width, mean over images; float64."""


def measure_curves(
    model: ImageGenerator[Any],
    settings: CurveSettings,
    *,
    work: Path | str | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> RateDistortion:
    """The curves of a full-precision model, every point measured; they are kept, and not measured twice.

    A method that does more than choose the codes of a layer (a transform, a block method) is carried out anew for every
    point, on a plan in which only this tensor is quantized; nothing is reused then. All others see calibration of the
    full-precision model.

    work: a folder for finished blocks, so that an interrupted run goes on; by default in the cache (`BITLAW_CACHE`)
    progress: told of every point in every batch
    name: of the model, to be noted
    Raises one ValueError naming every site that cannot be quantized so, before anything is measured.
    """
    plans = check_curves(model, settings)
    fingerprint = model_fingerprint(model)
    key = fingerprint_of({"curves": "exact", "model": fingerprint, **settings.to_json()}, model.autoencoder)
    sites = [site.name for site in curve_sites(model, settings)]

    def measure(folder: Path | None) -> RateDistortion:
        values = _Measuring(model, settings, plans, folder, progress).run(sites)
        by_step = {tensor: tuple(map(tuple, values[tensor].tolist())) for tensor in tensor_keys(settings, sites)}
        return RateDistortion(by_step, settings, "exact", name, fingerprint)

    return kept_curves(key, work, name, measure)


def check_curves(model: ImageGenerator[Any], settings: CurveSettings) -> dict[int, BitPlan]:
    """For every width the plan of all sites at it, as the settings' method means it.

    Raises one ValueError naming every site that cannot be quantized so.
    """
    sites = curve_sites(model, settings)
    if not sites:
        raise ValueError("all sites are protected: there is nothing to measure")
    plans = {}
    for bits in settings.widths:
        precision = Precision(
            settings.weight_precision(bits) if settings.what != "inputs" else None,
            settings.input_precision(bits) if settings.what != "weights" else None,
        )
        plans[bits] = BitPlan(dict.fromkeys((site.name for site in sites), (precision,)))
    return check_each(model, plans, settings.method)


@dataclass(frozen=True)
class _Point:
    """A tensor at a width: what is computed in the place of its site's layer.

    input_quant: what `layer`, which all widths of an input share, quantizes its input with; None of a weight
    """

    tensor: TensorKey
    width: int
    layer: QuantLayer
    input_quant: FakeQuant | None = None


class _Recorded(NamedTuple):
    """A step of a chain, what full-precision steps before have left for it, and how its outputs are compared."""

    step: PathStep
    cache: Any
    distortion: Comparison


class _Measuring:
    """One measurement.

    plans: for every width the plan of all sites at it
    work: folder of finished blocks, None to keep nothing
    """

    def __init__(
        self,
        model: ImageGenerator[Any],
        settings: CurveSettings,
        plans: Mapping[int, BitPlan],
        work: Path | None,
        progress: Progress | None,
    ):
        self.original, self.settings, self.plans, self.work, self.progress = model, settings, plans, work, progress
        self.done = 0

    def run(self, sites: Sequence[str]) -> Values:
        """(W, S) of every tensor of the sites."""
        values: Values = {}
        units = _units(self.original, sites)
        missing = []
        for number, unit in enumerate(units):
            known = self._read(number, unit)
            if known is None:
                missing.append(number)
            else:
                values |= known
        if not missing:
            return values
        self.paths = Paths(self.original, self.settings, self.progress)
        self.model = self.paths.model
        self.total = len(tensor_keys(self.settings, sites)) * len(self.settings.widths) * len(self.paths.batches)
        self.done = len(values) * len(self.settings.widths) * len(self.paths.batches)
        # Of all sites, whatever is done already: which rows calibration samples depends on what it looks at.
        self.choices = Choices(self.original, self.settings, self.plans, sites, self.progress)
        for number in missing:
            unit = units[number]
            if self.choices.by_layer:
                with torch.inference_mode(False), torch.no_grad():
                    measured = self._unit(unit)
            else:
                measured = self._anew(unit)
            if self.work is not None:
                _write(self.work / f"{number:03d}.json", measured)
            values |= measured
        return values

    # ---- tensors of which only a layer differs ---------------------------------------------------

    def _unit(self, unit: Mapping[str, str | None]) -> Values:
        """(W, S) of every tensor of some sites."""
        model, paths = self.model, self.paths
        points = list(self._points(list(unit)))
        tape = Tape(model.net, self._recorded(unit), model.blocks, unit)
        parts: list[Tensor] = []
        with tape.patched():
            for batch in paths.batches:
                # Steps that feel each other are one chain, others one each.
                chains = [batch.steps] if paths.has_cache else [(step,) for step in batch.steps]
                rows = torch.zeros(len(points), paths.num_steps, len(batch.noise), dtype=torch.float64)
                for chain in chains:
                    recorded = [*self._record(tape, chain)]
                    for index, point in enumerate(points):
                        self._run(tape, recorded, point, rows[index])
                        if chain is chains[-1]:
                            self._tell()
                    tape.steps.clear()
                parts.append(rows)
        means = torch.cat(parts, 2).mean(2)
        return _by_tensor(points, means)

    def _record(self, tape: Tape, chain: Sequence[PathStep]) -> Iterator[_Recorded]:
        """Record steps in full precision."""
        cache = None
        for step in chain:
            yield _Recorded(step, cache, self.paths.comparison(step))
            with tape.recording(step.index, may_stop=not self.paths.has_cache):
                cache = self.paths.run(self.model, step, cache).cache

    def _run(self, tape: Tape, chain: Sequence[_Recorded], point: _Point, out_SB: Tensor) -> None:
        """Distortions of a point in the steps of a chain."""
        site = point.tensor.site
        if point.input_quant is not None:
            point.layer.input_quant = point.input_quant
        cache, is_felt = None, False
        for step, exact_cache, distortion in chain:
            if not is_felt:
                if not self._changes(point.tensor, step.index) or not tape.calls_in(step.index, site):
                    continue
                cache, is_felt = exact_cache, True
            with tape.replaying(step.index, site, point.layer):
                output, cache = self.paths.run(self.model, step, cache)
            try:
                out_SB[step.index] = distortion(output)
            except ValueError as error:
                raise ValueError(f"{point.tensor} at {point.width} bits: {error}") from error

    def _changes(self, tensor: TensorKey, step: int) -> bool:
        return tensor.what == "weight" or step_group(self.settings.step_groups, step) == tensor.group

    def _recorded(self, unit: Mapping[str, str | None]) -> list[str]:
        """All sites, and what has parameters inside of the blocks of these."""
        inside = [
            f"{block}.{name}"
            for block in dict.fromkeys(unit.values())
            if block is not None
            for name, module in self.model.net.get_submodule(block).named_modules()
            if name and _is_called(module)
        ]
        return [*(site.name for site in self.model.sites()), *inside]

    # ---- what is computed in a layer's place -----------------------------------------------------

    def _points(self, sites: Sequence[str]) -> Iterator[_Point]:
        for tensor in tensor_keys(self.settings, sites):
            layer = self.model.net.get_submodule(tensor.site)
            if tensor.what == "weight":
                for bits in self.settings.widths:
                    precision, chosen = self.plans[bits][tensor.site][0], self.choices.weight(tensor.site, bits)
                    only_weight = replace(precision, activation=None)
                    twin = self._twin(layer, tensor.site, only_weight, SiteParts(chosen))
                    yield _Point(tensor, bits, twin)
                continue
            plain = self._twin(layer, tensor.site, Precision(), SiteParts())
            for bits in self.settings.widths:
                yield _Point(tensor, bits, plain, self._input_quant(plain, tensor, bits))

    def _twin(self, layer: nn.Module, site: str, precision: Precision, parts: SiteParts) -> QuantLayer:
        return quantized_layer(layer, parts, BitPlan({site: (precision,)}), site, self.model.clock)

    def _input_quant(self, layer: QuantLayer, tensor: TensorKey, bits: int) -> FakeQuant:
        """Quantizes the inputs of a layer in the steps of the tensor's group, and in no other."""
        precision = self.settings.input_precision(bits)
        assert precision is not None
        spec = ActivationSpec.of(precision, layer.range_of)
        num_groups = len(self.settings.step_groups)
        specs = [spec if group == tensor.group else None for group in range(num_groups)]
        found = self.choices.ranges(tensor.site, tensor.group, bits)
        ranges = {name: value.expand(num_groups, 1) for name, value in found.items()}
        quant = FakeQuant(specs, self.settings.step_groups, self.model.clock, ranges or None)
        return quant.to(layer.weight.device)

    # ---- methods that do more --------------------------------------------------------------------

    def _anew(self, unit: Mapping[str, str | None]) -> Values:
        """(W, S) of every tensor of some sites, each point by full runs of a model of its own."""
        settings = self.settings
        num_groups = len(settings.step_groups)
        values: Values = {}
        for tensor in tensor_keys(settings, list(unit)):
            rows = []
            for bits in settings.widths:
                precision = settings.precision(tensor.what, bits)
                groups = [
                    precision if tensor.what == "weight" or group == tensor.group else Precision()
                    for group in range(num_groups)
                ]
                plan = BitPlan({tensor.site: tuple(groups)}, settings.step_groups)
                twin = quantize(self.original, plan, settings.method, calibration=self.choices.calibration)
                try:
                    rows.append(self.paths.distortion(twin))
                except ValueError as error:
                    raise ValueError(f"{tensor} at {bits} bits: {error}") from error
                for _ in self.paths.batches:
                    self._tell()
            values[tensor] = torch.stack(rows)
        return values

    # ---- what is done ----------------------------------------------------------------------------

    def _tell(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress("measuring curves", self.done, self.total)

    def _read(self, number: int, unit: Mapping[str, str | None]) -> Values | None:
        """A finished unit; None if it is not there, or damaged."""
        if self.work is None:
            return None
        shape = (len(self.settings.widths), as_calibrated(self.original, images_of(self.settings)).num_steps)
        with suppress(OSError, ValueError, TypeError, AttributeError):
            stored = json.loads((self.work / f"{number:03d}.json").read_text(encoding="utf-8"))
            values = {TensorKey.parse(key): torch.tensor(rows, dtype=torch.float64) for key, rows in stored.items()}
            if list(values) == tensor_keys(self.settings, list(unit)) and all(
                v.shape == shape for v in values.values()
            ):
                return values
        return None


def _by_tensor(points: Sequence[_Point], means: Tensor) -> Values:
    """(W, S) of every tensor, of those of all points in turn."""
    rows: dict[TensorKey, list[Tensor]] = {}
    for point, mean_S in zip(points, means, strict=True):
        rows.setdefault(point.tensor, []).append(mean_S)
    return {tensor: torch.stack(of_tensor) for tensor, of_tensor in rows.items()}


def _is_called(module: nn.Module) -> bool:
    """Whether recording what a module gives saves something; lists are not called."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict) and next(module.parameters(), None) is not None


def _block_of(site: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if site.startswith(f"{block}.")), None)


def _units(model: ImageGenerator[Any], sites: Sequence[str]) -> list[dict[str, str | None]]:
    """The sites that are measured together, with the block of each: those of a block, and those outside of all."""
    blocks = model.blocks
    units: dict[str | None, dict[str, str | None]] = {}
    for site in sites:
        block = _block_of(site, blocks)
        units.setdefault(block, {})[site] = block
    return list(units.values())


def _write(path: Path, values: Values) -> None:
    try:
        write_json(path, {str(tensor): rows.tolist() for tensor, rows in values.items()})
    except OSError as error:
        log.warning("a finished block is not kept: %s", error)
