"""What a network computed in a step, so that a run that differs from some layer on starts there.

A first run of a step records what modules give. In a later one, of which one layer, the target, computes something
else, every module that was over before the target began gives what it gave then, without computing it: whole blocks,
and layers before the target in its own block. What comes after it runs. So the output is, bit for bit, that of a full
run.

A target of a block may be called before it, even in another step (a modulation of VAR, computed with the first stage).
It is felt in its block at the earliest: what a block needs beside its first input depends on no other block
(`ImageGenerator.blocks`). Of one in no block, nothing is known in a step that does not call it: everything runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitlaw.calibration.replay import map_leaves


@dataclass
class _Call:
    """A call of a module.

    end: how many calls of the step had begun when it was over
    output: what it gave; None once no target begins after it
    versions: how often its tensors had been written to
    """

    name: str
    end: int = 0
    output: Any = None
    versions: tuple[int, ...] = ()


class Tape:
    """Calls of a network's modules, step by step.

    names: modules whose outputs are recorded, of which some may be inside of others
    blocks: of the network; what is inside of those without a target is not recorded
    targets: layers that will compute something else, and the block of each, None if it is in none
    """

    def __init__(self, net: nn.Module, names: Iterable[str], blocks: Iterable[str], targets: Mapping[str, str | None]):
        self.net, self.targets = net, targets
        self._closed = set(blocks) - set(targets.values())
        self.names = list(dict.fromkeys([*names, *blocks, *targets]))
        self.steps: dict[int, list[_Call]] = {}
        self._recording: list[_Call] | None = None
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
    def recording(self, step: int) -> Iterator[None]:
        """The step that runs inside is recorded under this number."""
        self._recording, self._begin = [], None
        try:
            yield
            calls, self._recording = self._recording, None
            begins = [begin for target in self.targets if (begin := self._first_of(calls, target)) is not None]
            latest = max(begins, default=0)
            for call in calls:
                if call.end > latest:
                    call.output = None
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
            if (calls := self._recording) is not None:
                call = _Call(name)
                calls.append(call)
                self._recording = None if name in self._closed else calls
                call.output = run(*args, **kwargs)
                self._recording = calls
                call.end, call.versions = len(calls), _versions(call.output)
                return call.output
            if self._begin is not None and (before := self._recorded(name)) is not None:
                return before.output
            if self._compute is not None and name == self._target:
                return self._compute(*args, **kwargs)
            return run(*args, **kwargs)

        return forward

    def _recorded(self, name: str) -> _Call | None:
        """The call of a module that comes next, if it was over before that from which on everything runs."""
        assert self._begin is not None
        index = _index(self._calls, name, self._next)
        assert index is not None, f"{name}: called now and not then"
        call = self._calls[index]
        if index == self._begin:
            self._begin = None
        elif name == self._target:
            self._next = index + 1
        elif call.end <= self._begin:
            self._next = call.end
            assert call.versions == _versions(call.output), f"{name}: its output has been written to"
            return call
        else:
            self._next = index + 1
        return None


def _index(calls: Sequence[_Call], name: str | None, first: int = 0) -> int | None:
    """Index of a module's first call from number `first` on."""
    return next((index for index in range(first, len(calls)) if calls[index].name == name), None)


def _versions(output: Any) -> tuple[int, ...]:
    versions: list[int] = []
    map_leaves(output, lambda leaf: versions.append(leaf._version) if isinstance(leaf, Tensor) else None)
    return tuple(versions)
