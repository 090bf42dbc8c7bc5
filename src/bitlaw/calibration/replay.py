"""Run a network block by block over the steps of recorded rollouts, so that each block sees what quantized ones give.

The states between steps are recorded once, in full precision. A replay runs the network from them again: blocks that
are done are skipped, what the last of them gave being kept; the block at hand runs and is observed; what comes after it
is left out. So a pass over all blocks costs about two rollouts, however many blocks there are. Where blocks are no
chain (UNets, MAR's head) everything up to the block runs each time.
"""

import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitlaw.calibration.collect import Collector, Progress, as_calibrated, batches
from bitlaw.calibration.settings import Calibration
from bitlaw.models.generator import Extracted, ImageGenerator, rollout
from bitlaw.models.parts.key_values import LayerKeyValues


@dataclass(frozen=True)
class RecordedStep:
    """A step of a recorded rollout: the state before it, without what a cache holds, and the features of the network.

    features: None where no block runs in `reconstruct`
    """

    index: int
    state: Any
    features: Tensor | None


@dataclass(frozen=True)
class Recording:
    """Rollouts of the full-precision model: for each batch its steps, some of them where there are many.

    has_cache: whether a step needs what the steps before left; all steps are there then
    late_blocks: the blocks that run in `reconstruct`, and how often they do in a step
    """

    batches: tuple[tuple[RecordedStep, ...], ...]
    has_cache: bool
    late_blocks: Mapping[str, int]

    @property
    def num_calls(self) -> int:
        """Steps in all batches."""
        return sum(map(len, self.batches))


def record(model: ImageGenerator[Any], settings: Calibration, progress: Progress | None = None) -> Recording:
    """Draw the images of `settings` and keep the states between steps.

    Of the steps of a model without a cache, `max_calls` are kept in all, spread evenly and for each batch at others.
    """
    model = as_calibrated(model, settings)
    late: Counter[str] = Counter()

    def notice(name: str) -> Callable[..., None]:
        return lambda *_: late.update([name])

    num_batches = ceil(settings.num_images / settings.batch_size)
    kept: list[tuple[RecordedStep, ...]] = []
    has_cache = False
    for number, (labels_B, noise) in enumerate(batches(model, settings)):
        chosen = _chosen_steps(model.num_steps, number, num_batches, settings.max_calls)
        steps = []
        for step in rollout(model, labels_B, noise):
            if number == 0 and step.index == 0:
                # Which blocks run in `reconstruct` is seen on the first step once more.
                has_cache = step.extracted.cache is not None
                hooks = [model.net.get_submodule(n).register_forward_pre_hook(notice(n)) for n in model.blocks]
                with torch.inference_mode():
                    model.reconstruct(step.before, step.extracted, 0)
                for hook in hooks:
                    hook.remove()
            if has_cache or step.index in chosen:
                features = step.extracted.features.cpu() if late else None
                steps.append(RecordedStep(step.index, model.with_cache(step.before, None), features))
            if progress is not None:
                progress("recording", number * model.num_steps + step.index + 1, num_batches * model.num_steps)
        kept.append(tuple(steps))
    return Recording(tuple(kept), has_cache, dict(late))


def _chosen_steps(num_steps: int, batch: int, num_batches: int, max_calls: int) -> set[int]:
    """The steps of a batch that are kept; with those of the other batches they lie as evenly as can be."""
    count = max(1, min(num_steps, max_calls // num_batches))
    spacing = num_steps / count
    return {min(num_steps - 1, int((i + (batch + 0.5) / num_batches) * spacing)) for i in range(count)}


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: its inputs, what it gave (or is to give), and the step of the rollout."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor
    step: int


@dataclass(eq=False)
class _Store:
    """Tensors in memory up to a limit, beyond it in a temporary file that the system maps."""

    limit: int
    tensors: list[Tensor] = field(default_factory=list)
    held: int = 0
    folder: Path | None = None

    def append(self, x: Tensor) -> None:
        x = x.detach().cpu()
        if self.held + x.nbytes <= self.limit:
            self.held += x.nbytes
            self.tensors.append(x.clone() if x._is_view() else x)
            return
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="bitlaw-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        mapped = torch.from_file(
            str(self.folder / str(len(self.tensors))), shared=True, size=x.numel(), dtype=x.dtype
        ).view(x.shape)
        mapped.copy_(x)
        self.tensors.append(mapped)


class _Stop(Exception):
    """The block at hand has run; nothing that follows is needed."""


class Replay:
    """Runs a model's blocks one at a time over a recording, in order; between two runs, blocks may be quantized.

    A block that `run` has passed must not change any more once a later one has been run.
    """

    def __init__(self, model: ImageGenerator[Any], recording: Recording, settings: Calibration):
        self.model = as_calibrated(model, settings)
        self.recording, self.settings = recording, settings
        self.names = self.model.blocks
        self._done = -1  # the block whose outputs are stored
        self._stored = _Store(settings.memory_limit)

    def run(self, block: int, collector: Collector | None = None, keep: bool = False) -> list[BlockCall]:
        """Run block number `block` behind those before it. The calls of it, if they are to be kept.

        collector: observes its layers
        """
        watching = collector.watching() if collector is not None else nullcontext()
        calls: list[BlockCall] = []
        with torch.no_grad(), watching, self._patched(block, calls if keep else None) as new:
            for steps in self.recording.batches:
                first = len(calls)
                self._run_batch(steps, self.names[block] in self.recording.late_blocks)
                if keep:
                    calls[first:] = _frozen(calls[first:])
        if new is not None:
            self._stored, self._done = new, block - 1
        return calls

    def _run_batch(self, steps: tuple[RecordedStep, ...], is_late: bool) -> None:
        cache = None
        for recorded in steps:
            index = recorded.index
            self.model.clock.step = index
            state = self.model.with_cache(recorded.state, cache)
            try:
                if not is_late:
                    cache = self.model.extract(state, index).cache
                else:
                    assert recorded.features is not None
                    features = recorded.features.to(self.model.device)
                    self.model.reconstruct(state, Extracted(features), index)
            except _Stop:
                pass

    @contextmanager
    def _patched(self, block: int, calls: list[BlockCall] | None) -> Iterator[_Store | None]:
        """The network with the forward of its blocks replaced; gives the store of what the block before gives now."""
        late = self.recording.late_blocks
        is_chain = self.model.blocks_are_chained and self.names[block] not in late
        modules = [self.model.net.get_submodule(name) for name in self.names]
        new: _Store | None = None
        patched: list[nn.Module] = []

        def patch(module: nn.Module, forward: Callable[..., Any]) -> None:
            module.forward = forward
            patched.append(module)

        try:
            if is_chain and block >= 1:
                for module in modules[: max(self._done, 0)]:
                    patch(module, _pass_on)
                if self._done >= 0:
                    patch(modules[self._done], _give_back(self._stored.tensors))
                if block - 1 > self._done:
                    new = _Store(self.settings.memory_limit)
                    patch(modules[block - 1], _keep_output(modules[block - 1], new))
            may_stop = not self.recording.has_cache and self.names[block] not in late
            num_calls = self.recording.num_calls * late.get(self.names[block], 1)
            patch(modules[block], self._observed(modules[block], num_calls, calls, may_stop))
            if is_chain and self.recording.has_cache:
                for module in modules[block + 1 :]:
                    patch(module, _pass_on)
            yield new
        finally:
            for module in patched:
                del module.forward

    def _observed(
        self, module: nn.Module, num_calls: int, calls: list[BlockCall] | None, may_stop: bool
    ) -> Callable[..., Any]:
        run = module.forward
        # Of the calls within a step some are kept; steps that have a cache are few, or their calls small.
        every = (
            1 if self.recording.has_cache else ceil(num_calls / max(self.settings.max_calls, self.recording.num_calls))
        )
        count = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            out = run(*args, **kwargs)
            if calls is not None and count % every == 0:
                target = out if isinstance(out, Tensor) else out[0]
                calls.append(BlockCall(args, kwargs, target, self.model.clock.step))
            count += 1
            if may_stop:
                raise _Stop
            return out

        return forward


def _pass_on(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _give_back(tensors: list[Tensor]) -> Callable[..., Tensor]:
    given = iter(tensors)

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return next(given).to(x.device)

    return forward


def _keep_output(module: nn.Module, store: _Store) -> Callable[..., Any]:
    run = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        store.append(out)
        return out

    return forward


def _frozen(calls: list[BlockCall]) -> list[BlockCall]:
    """The calls of a batch with tensors that stay as they are, and keys and values of earlier steps as constants.

    Keys and values are written one behind the other into one place, of which a single copy is made.
    """
    copies: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def freeze(x: Any) -> Any:
        if isinstance(x, LayerKeyValues):
            where = (x.key_values.data_ptr(), tuple(x.key_values.shape))
            if where not in copies:
                copies[where] = x.key_values.detach().clone()
            return LayerKeyValues(copies[where], x.length, keeps=False)
        if isinstance(x, Tensor):
            return x.detach().clone() if x.is_inference() else x.detach()
        return x

    return [
        BlockCall(map_leaves(c.args, freeze), map_leaves(c.kwargs, freeze), freeze(c.target), c.step) for c in calls
    ]


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments of a call with all that is no container changed; keys and values of earlier steps are one thing."""
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list) and not isinstance(value, LayerKeyValues):
        items = [map_leaves(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value)
