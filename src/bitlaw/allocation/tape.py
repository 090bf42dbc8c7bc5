"""What a network computed in a step, so that a run that differs from some layer on starts there.

A first run of a step records what modules give. In a later one, of which one layer, the target, computes something
else, every module that was over before the target began gives what it gave then, without computing it: whole blocks,
and layers before the target in its own block. What comes after it runs. So the output is, bit for bit, that of a full
run.

A module that ends with the target, as attention does with its projection, begins there: the target gets the input that
was recorded, and attention itself is not computed.

A target of a block may be called before it, even in another step (a modulation of VAR, computed with the first stage).
It is felt in its block at the earliest: what a block needs beside its first input depends on no other block
(`ImageGenerator.blocks`). Of one in no block, nothing is known in a step that does not call it: everything runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitlaw.calibration.replay import map_leaves


class _Kept:
    """What a module got or gave, by reference; it must stay as it was then."""

    def __init__(self, value: Any):
        self._value, self._versions = value, _versions(value)

    def get(self, name: str) -> Any:
        """It, of the module `name`."""
        assert self._versions == _versions(self._value), f"{name}: its input or output has been written to"
        return self._value

    def is_same(self, other: "_Kept | None") -> bool:
        """Whether it is the very object that another one keeps."""
        return other is not None and self._value is other._value


@dataclass
class _Call:
    """A call of a module.

    end: how many calls of the step had begun when it was over
    output: what it gave; None once no target begins after it
    last: index of the call of a target inside of it whose output is its own; None if there is none
    inputs: of a target
    """

    name: str
    end: int = 0
    output: _Kept | None = None
    last: int | None = None
    inputs: _Kept | None = None


class _Stop(Exception):
    """All targets have been called; nothing that follows is needed."""


class Tape:
    """Calls of a network's modules, step by step.

    names: modules whose outputs are recorded, of which some may be inside of others
    blocks: of the network; what is inside of those without a target is not recorded
    targets: layers that will compute something else, and the block of each, None if it is in none
    """

    def __init__(self, net: nn.Module, names: Iterable[str], blocks: Iterable[str], targets: Mapping[str, str | None]):
        self.net, self.targets = net, targets
        self._blocks = {block for block in targets.values() if block is not None}
        self._ends = {*targets, *self._blocks}
        self._closed = set(blocks) - self._blocks
        self.names = list(dict.fromkeys([*names, *blocks, *targets]))
        self.steps: dict[int, list[_Call]] = {}
        self._recording: list[_Call] | None = None
        self._may_stop = False
        self._calls: list[_Call] = []
        self._begin: int | None = None  # the call from which on everything runs; None once it has begun
        self._next = 0
        self._target = ""
        self._compute: Callable[..., Any] | None = None

    @contextmanager
    def patched(self) -> Iterator[None]:
        """While it is open, modules of the network are recorded, or give what was recorded."""
        modules = {name: self.net.get_submodule(name) for name in self.names}
        try:
            for name, module in modules.items():
                module.forward = self._forward(name, module.forward)
            yield
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)

    @contextmanager
    def recording(self, step: int, may_stop: bool = False) -> Iterator[None]:
        """The step that runs inside is recorded under this number.

        may_stop: whether it may end, without a result, when the blocks of all targets are over
        """
        self._recording, self._begin, self._may_stop = [], None, may_stop
        calls = self._recording
        try:
            with suppress(_Stop):
                yield
            begins = [begin for target in self.targets if (begin := self._first_of(calls, target)) is not None]
            latest = max(begins, default=0)
            lasts = {call.last for call in calls}
            for index, call in enumerate(calls):
                if not call.end:  # stopped inside of it
                    call.end = len(calls)
                if call.end > latest:
                    call.output = None
                if index not in lasts:
                    call.inputs = None
            self.steps[step] = calls[: latest + 1]
        finally:
            self._recording = None

    def calls_in(self, step: int, target: str) -> bool:
        """Whether a step calls a target."""
        return any(call.name == target for call in self.steps[step])

    @contextmanager
    def replaying(self, step: int, target: str, compute: Callable[..., Any]) -> Iterator[None]:
        """In the step that runs inside, `compute` stands for a target, and what it does not change is not run."""
        self._calls, self._next = self.steps[step], 0
        self._begin = self._first_of(self._calls, target)
        self._target, self._compute = target, compute
        try:
            yield
            assert self._begin is None, f"step {step} has not reached {target}, or what it changes"
        finally:
            self._begin, self._compute = None, None

    def _first_of(self, calls: list[_Call], target: str) -> int | None:
        """Index of the first call that a target may change; None if that is every one."""
        own, block = _index(calls, target), _index(calls, self.targets[target])
        if own is None or (block is not None and own < block):
            return block
        return own

    def _forward(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._recording is not None:
                return self._record(name, run, args, kwargs)
            if self._begin is not None and (known := self._known(name)) is not None:
                return known
            if self._compute is not None and name == self._target:
                return self._compute(*args, **kwargs)
            return run(*args, **kwargs)

        return forward

    def _record(self, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls = self._recording
        assert calls is not None
        call = _Call(name, inputs=_Kept((args, kwargs)) if name in self.targets else None)
        calls.append(call)
        first = len(calls)
        self._recording = None if name in self._closed else calls
        out = run(*args, **kwargs)
        self._recording = calls
        call.end, call.output = len(calls), _Kept(out)
        inside = range(first, call.end)
        call.last = next((i for i in inside if calls[i].inputs and call.output.is_same(calls[i].output)), None)
        if self._may_stop and name in self._blocks and self._ends <= {call.name for call in calls}:
            raise _Stop
        return out

    def _known(self, name: str) -> Any:
        """What a module gives that is called next; None if it has to run."""
        assert self._begin is not None
        index = _index(self._calls, name, self._next)
        assert index is not None, f"{name}: called now and not then"
        call, begin = self._calls[index], self._calls[self._begin]
        self._next = index + 1
        if index == self._begin:
            self._begin = None
        elif name == self._target:
            pass
        elif call.end <= self._begin:
            assert call.output is not None
            self._next = call.end
            return call.output.get(name)
        elif call.last == self._begin and begin.name == self._target:
            assert begin.inputs is not None and self._compute is not None
            self._begin = None
            args, kwargs = begin.inputs.get(begin.name)
            return self._compute(*args, **kwargs)
        return None


def _index(calls: Sequence[_Call], name: str | None, first: int = 0) -> int | None:
    """Index of a module's first call from number `first` on."""
    return next((index for index in range(first, len(calls)) if calls[index].name == name), None)


def _versions(value: Any) -> tuple[int, ...]:
    """How often tensors have been written to."""
    versions: list[int] = []
    map_leaves(value, lambda leaf: versions.append(leaf._version) if isinstance(leaf, Tensor) else None)
    return tuple(versions)
