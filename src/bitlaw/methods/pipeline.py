"""Carry out a chain of methods on a model: calibrate, transform, and choose codes layer by layer or block by block.

What is done is kept in a folder when it is done, so that an interrupted run goes on where it was.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.calibration.cache import calibrate, fingerprint
from bitlaw.calibration.collect import Collector, Progress, expected_rows, in_words
from bitlaw.calibration.histogram import static_range
from bitlaw.calibration.replay import BlockCall, Recording, Replay, record
from bitlaw.calibration.settings import Calibration
from bitlaw.files import write_with
from bitlaw.formats import Params
from bitlaw.install import SiteParts, install_site, is_changed
from bitlaw.methods.chain import Chain
from bitlaw.methods.method import BlockMethod, BlockResult, BlockTask, LayerMethod, Note, Rescaling
from bitlaw.methods.rescale import rescale
from bitlaw.methods.rtn import RTN
from bitlaw.models.generator import ImageGenerator, Site
from bitlaw.packing import pack, static_format, unpack
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import ActivationSpec, QuantizedTensor, WeightSpec

HELD_OUT = 8
"""One call in so many is held out from what a block method learns from."""


class Pipeline:
    """One run of a chain over a model.

    model: the full-precision model, which stays as it is
    twin: a copy with a network of its own, which becomes the quantized one
    work: folder for what is done, None to keep nothing
    """

    def __init__(
        self,
        model: ImageGenerator[Any],
        twin: ImageGenerator[Any],
        plan: BitPlan,
        chain: Chain,
        settings: Calibration,
        work: Path | None = None,
        progress: Progress | None = None,
    ):
        self.model, self.twin, self.plan, self.chain = model, twin, plan, chain
        self.settings, self.progress = settings, progress
        self.sites = [site for site in model.sites() if site.name in plan.sites and is_changed(plan, site.name)]
        self.ranges: dict[str, Params] = {}
        self.notes: dict[str, Note] = {site.name: {} for site in self.sites}
        self.work = None
        if work is not None:
            self.work = work / fingerprint(model, settings, plan.to_json(), repr(chain))
            self.work.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Note]:
        """Quantize the twin; what was done to each site, in plain values."""
        self._transform()
        final = self.chain.final
        if isinstance(final, BlockMethod) or final.sequential:
            self._find_ranges()
            self._by_blocks()
        else:
            stats = self._find_ranges(final.needs | {"rows_RI"})  # in one pass, if there are any to find
            self._quantize_now("all", self.sites, final, stats)
        return self.notes

    # ---- what comes before the codes -------------------------------------------------------------

    def _transform(self) -> None:
        for transform in self.chain.transforms:
            name = type(transform).__name__.lower()
            stats = self._calibrate(self.sites, transform.needs)
            if transform is self.chain.transforms[0]:
                self._note_rtn(stats)
            started = time.perf_counter()
            notes = transform.apply(self.twin.net, self.model.sites(), self._whole_plan(), stats)
            seconds = (time.perf_counter() - started) / max(1, len(notes))
            for site, note in notes.items():
                self.notes[site][name] = {**note, "seconds": round(seconds, 4)}

    def _whole_plan(self) -> BitPlan:
        """The plan with full precision for sites that it leaves out.

        Transforms are told of them: a scale cannot be folded where one of them would get it too.
        """
        nothing = (Precision(),) * len(self.plan.step_groups)
        return BitPlan({**{s.name: nothing for s in self.model.sites()}, **self.plan.sites}, self.plan.step_groups)

    def _find_ranges(self, more: frozenset[str] = frozenset()) -> dict[str, InputStats]:
        """Find static ranges. If there are any, the statistics of all sites, with what more is needed of them."""
        static = [site.name for site in self.sites if static_format(self.plan, site.name)]
        if not static:
            return {}
        names, needs = [site.name for site in self.sites] if more else static, more | {"histograms_S"}
        stats = calibrate(self.twin, self.settings, names, needs, self.plan.step_groups, self.progress)
        for name in static:
            self.ranges[name] = self._ranges_of(name, stats[name])
        return stats

    def _ranges_of(self, name: str, stats: InputStats) -> Params:
        assert stats.histograms_S is not None
        format = static_format(self.plan, name)
        assert format is not None
        rows = []
        for precision, histogram in zip(self.plan[name], stats.histograms_S, strict=True):
            if precision.is_static and precision.activation is not None and histogram.total:
                own = precision.activation.format  # widths may differ between step groups
                rows.append(static_range(histogram, own, self.settings.ranges, self.settings.percentile))
            else:  # no range to find: not static here, or not called (a modulation that is computed once, say)
                rows.append(format.fit(torch.tensor([[-1.0, 1.0]])))
        return {param: torch.cat([row[param] for row in rows]) for param in format.param_names}

    def _calibrate(self, sites: Sequence[Site], needs: frozenset[str]) -> dict[str, InputStats]:
        names = [site.name for site in sites]
        if not names:
            return {}
        return calibrate(self.twin, self.settings, names, needs | {"rows_RI"}, (0,), self.progress)

    # ---- codes, layer by layer -------------------------------------------------------------------

    def _quantize_now(
        self, unit: str, sites: Sequence[Site], method: LayerMethod, stats: Mapping[str, InputStats] | None = None
    ) -> None:
        """Quantize sites by what enters them in full precision; `stats` if that is known."""
        result = self._read(unit)
        if result is None:
            if not stats and (method.needs or self.chain.transforms or self.ranges):
                stats = self._calibrate(sites, method.needs)
            result = self._layers(sites, method, stats or {})
            self._write(unit, result)
        self._install(sites, result)

    def _layers(self, sites: Sequence[Site], method: LayerMethod, stats: Mapping[str, InputStats]) -> BlockResult:
        weights: dict[str, QuantizedTensor] = {}
        notes: dict[str, Note] = {}
        for number, site in enumerate(sites):
            precision = self.plan.weight(site.name)
            if precision is None:
                continue
            weight, spec = self._weight(site), WeightSpec.of(precision)
            seen = stats.get(site.name, InputStats())
            started = time.perf_counter()
            chosen = weights[site.name] = method.quantize_layer(weight, seen, spec)
            note: Note = {"seconds": round(time.perf_counter() - started, 4)}
            before: Note = {}
            if seen.rows_RI is not None:
                note["error"] = self._error(site, chosen, seen)
                if not isinstance(method, RTN):
                    before = {"before": {"error": self._error(site, spec.quantize(weight), seen)}}
            notes[site.name] = {**before, type(method).__name__.lower(): note}
            if self.progress is not None and not isinstance(method, RTN):
                self.progress("quantizing layers", number + 1, len(sites))
        return BlockResult(weights, notes=notes)

    def _note_rtn(self, stats: Mapping[str, InputStats]) -> None:
        """Note what rounding to nearest would lose as the network is."""
        for site in self.sites:
            if (precision := self.plan.weight(site.name)) is not None:
                chosen = WeightSpec.of(precision).quantize(self._weight(site))
                self.notes[site.name]["rtn"] = {"error": self._error(site, chosen, stats[site.name])}

    def _weight(self, site: Site) -> Tensor:
        """A site's weight, as transforms and blocks have left it."""
        return self.twin.net.get_parameter(f"{site.name}.weight").detach()

    def _error(
        self, site: Site, chosen: QuantizedTensor, stats: InputStats, rescaling: Rescaling | None = None
    ) -> float:
        """|Q(x) Wq - x W|^2 / |x W|^2 over the sampled rows, inputs quantized as in the first step group that does.

        rescaling: of the rows, which were sampled before it; the weight is one behind it
        """
        assert stats.rows_RI is not None
        x_RI = stats.rows_RI
        if rescaling is not None:
            x_RI = (x_RI if rescaling.shift_C is None else x_RI - rescaling.shift_C) / rescaling.scale_C
        exact = x_RI.double() @ self._weight(site).float().double().flatten(1).T
        quantized = x_RI
        activations = [precision.activation for precision in self.plan[site.name]]
        group = next((index for index, activation in enumerate(activations) if activation is not None), None)
        if group is not None and (activation := activations[group]) is not None:
            spec = ActivationSpec.of(activation)
            ranges = {key: value[group : group + 1] for key, value in self.ranges.get(site.name, {}).items()}
            if spec.range_of != "static":
                ranges = {}
            elif not ranges:
                # Static ranges are found behind the transforms; before that a range for each row stands in for them.
                spec = ActivationSpec(activation.format)
            quantized = spec.fake(x_RI, ranges or None)
        error = (quantized.double() @ chosen.decode().double().flatten(1).T - exact).square().sum()
        return float(error / exact.square().sum().clamp_min(1e-300))

    def _install(self, sites: Sequence[Site], result: BlockResult) -> None:
        for site in sites:
            parts = SiteParts(result.weights.get(site.name), self.ranges.get(site.name, {}))
            install_site(self.twin.net, self.plan, site.name, parts, self.twin.clock)
            self.notes[site.name] |= result.notes.get(site.name, {})

    # ---- codes, block by block -------------------------------------------------------------------

    def _by_blocks(self) -> None:
        final = self.chain.final
        names = self.model.blocks
        by_block = {name: [s for s in self.sites if s.name.startswith(f"{name}.")] for name in names}
        inside = {site.name for sites in by_block.values() for site in sites}
        outside = [site for site in self.sites if site.name not in inside]
        method = final.outside if isinstance(final, BlockMethod) else final
        if outside:
            # Those behind the blocks stay as they are while the blocks are run.
            self._quantize_now("outside", outside, method)
        if self.progress is not None and inside:
            self.progress(self._describe_memory([sites for sites in by_block.values() if sites]), 0, 0)
        replay = Replay(self.twin, self.recording, self.settings)
        full = Replay(self.model, self.recording, self.settings) if isinstance(final, BlockMethod) else None
        for number, name in enumerate(names):
            sites = by_block[name]
            if not sites:
                continue
            done = self._read(f"block-{number:03d}")
            result, stats = (done, {}) if done is not None else self._block(number, sites, replay, full)
            if result.rescalings:
                rescale(self.twin.net, self.model.sites(), result.rescalings)
            if done is None:
                # Modulations that are computed before the blocks run may have absorbed a rescaling just now.
                rest = [site for site in sites if site.name not in result.notes]
                other = self._layers(rest, method, stats)
                result = replace(
                    result,
                    weights={**result.weights, **other.weights},
                    notes={**self._with_errors(sites, result, stats), **other.notes},
                )
                self._write(f"block-{number:03d}", result)
            self._install(sites, result)
            if self.progress is not None:
                self.progress("quantizing blocks", number + 1, len(names))

    def _with_errors(
        self, sites: Sequence[Site], result: BlockResult, stats: Mapping[str, InputStats]
    ) -> dict[str, Note]:
        """The notes of a block method with the error of each site, behind rescalings if there are any."""
        notes = dict(result.notes)
        stage = type(self.chain.final).__name__.lower()
        for site in sites:
            if (chosen := result.weights.get(site.name)) is not None:
                error = self._error(site, chosen, stats[site.name], result.rescalings.get(site.name))
                notes[site.name] = {**notes[site.name], stage: {"error": error, **notes[site.name][stage]}}
        return notes

    @cached_property
    def recording(self) -> Recording:
        """The states that blocks are run from; drawn when the first block needs them."""
        return record(self.model, self.settings, self.progress)

    def _block(
        self, number: int, sites: Sequence[Site], replay: Replay, full: Replay | None
    ) -> tuple[BlockResult, dict[str, InputStats]]:
        """What is chosen for the sites that run when the block is called, and what enters all of its sites."""
        collector = self._collector(sites, self._rows_in_replay(sites))
        if full is None:
            replay.run(number, collector)
            return BlockResult(), collector.stats()
        calls, exact = replay.run(number, collector, keep=True), full.run(number, keep=True)
        stats = collector.stats()
        return self._reconstructed(number, sites, stats, calls, exact), stats

    def _collector(self, sites: Sequence[Site], expected: Mapping[str, float] | None = None) -> Collector:
        final = self.chain.final
        needs = final.needs | {"rows_RI"}
        if isinstance(final, BlockMethod):
            needs |= final.outside.needs
        return Collector(self.twin, [site.name for site in sites], needs, self.settings, (0,), expected)

    def _describe_memory(self, blocks: Sequence[Sequence[Site]]) -> str:
        """What is held while blocks are quantized, in words."""
        largest = max((self._collector(sites) for sites in blocks), key=Collector.num_bytes)
        text = f"calibration holds up to {largest.describe_memory()} of a block"
        if isinstance(self.chain.final, BlockMethod):
            text += ", what enters and leaves the block"
        if self.model.blocks_are_chained:
            # Those behind the last block and behind the one before it; also in full precision where that is compared.
            limit = self.settings.memory_limit * (4 if isinstance(self.chain.final, BlockMethod) else 2)
            text += f", and up to {in_words(limit)} of hidden states (what is more goes to a temporary file)"
        return text

    def _rows_in_replay(self, sites: Sequence[Site]) -> dict[str, float]:
        """Rows that will enter each site while a replay runs: those of the steps that are kept."""
        total = self.twin.num_steps * len(self.recording.batches)
        share = self.recording.num_calls / total
        rows = expected_rows(self.twin, self.settings)
        return {site.name: rows[site.name] * share for site in sites}

    def _reconstructed(
        self,
        number: int,
        sites: Sequence[Site],
        stats: Mapping[str, InputStats],
        calls: Sequence[BlockCall],
        exact: Sequence[BlockCall],
    ) -> BlockResult:
        final, name = self.chain.final, self.twin.blocks[number]
        assert isinstance(final, BlockMethod)
        module = self.twin.net.get_submodule(name)
        together = [
            replace(call, target=in_full_precision.target) for call, in_full_precision in zip(calls, exact, strict=True)
        ]
        held_out = together[HELD_OUT - 1 :: HELD_OUT] or together[-1:]
        chosen_from = [c for c in together if not any(c is h for h in held_out)] or together
        called = _called(module, name, sites, together[0])
        task = BlockTask(
            name=name,
            module=module,
            sites=tuple(called),
            plan=self.plan,
            stats=stats,
            calls=chosen_from,
            held_out=held_out,
            ranges={site.name: self.ranges[site.name] for site in called if site.name in self.ranges},
            seed=self.settings.seed + number,
        )
        started = time.perf_counter()
        block = final.quantize_block(task)
        seconds = time.perf_counter() - started
        stage, share = type(final).__name__.lower(), round(seconds / len(called), 4)
        notes: dict[str, Note] = {}
        for site in called:
            note = {stage: {"seconds": share, **block.notes.get(site.name, {})}}
            if (precision := self.plan.weight(site.name)) is not None:
                nearest = WeightSpec.of(precision).quantize(self._weight(site))
                note = {"before": {"error": self._error(site, nearest, stats[site.name])}, **note}
            notes[site.name] = note
        return replace(block, notes=notes)

    # ---- what is done ----------------------------------------------------------------------------

    def _write(self, unit: str, result: BlockResult) -> None:
        if self.work is None:
            return
        tensors: dict[str, Tensor] = {}
        for name, weight in result.weights.items():
            tensors |= pack(name, weight)
        for name, rescaling in result.rescalings.items():
            tensors[f"{name}.rescaling_scale"] = rescaling.scale_C
            if rescaling.shift_C is not None:
                tensors[f"{name}.rescaling_shift"] = rescaling.shift_C
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        metadata = {"notes": json.dumps(dict(result.notes))}
        write_with(self.work / f"{unit}.safetensors", lambda path: save_file(contiguous, path, metadata))

    def _read(self, unit: str) -> BlockResult | None:
        if self.work is None or not (path := self.work / f"{unit}.safetensors").is_file():
            return None
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            notes = json.loads(file.metadata()["notes"])
        weights: dict[str, QuantizedTensor] = {}
        rescalings: dict[str, Rescaling] = {}
        for key in tensors:
            name, _, kind = key.rpartition(".")
            if kind == "weight_shape":
                precision = self.plan.weight(name)
                assert precision is not None
                weights[name] = unpack(name, tensors, WeightSpec.of(precision))
            elif kind == "rescaling_scale":
                rescalings[name] = Rescaling(tensors[key], tensors.get(f"{name}.rescaling_shift"))
        return BlockResult(weights, rescalings, notes)


def _called(module: nn.Module, name: str, sites: Sequence[Site], call: BlockCall) -> list[Site]:
    """The sites whose layers run when the block's module is called."""
    reached: set[str] = set()
    hooks = []
    for site in sites:
        layer = module.get_submodule(site.name.removeprefix(f"{name}."))
        hooks.append(layer.register_forward_pre_hook(lambda *_, reached=reached, name=site.name: reached.add(name)))
    try:
        with torch.no_grad():
            module(*call.args, **call.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return [site for site in sites if site.name in reached]
