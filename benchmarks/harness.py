"""One way to time things, shared by every benchmark here.

Contenders run in one process on one thread, one after the other in every round and in turned order, so that what the
machine does meanwhile meets them alike. Time is the process's CPU time. What counts is the ratio to the baseline
within a round; its median over rounds is reported.

A benchmark is a script that calls `one_thread()`, then `compare(...)`, then `finish(...)`.
"""

import argparse
import gc
import os
import platform
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bitlaw.files import write_json

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Comparison:
    """CPU seconds of every contender in every round, and what each gave in the last one."""

    title: str
    baseline: str
    seconds: dict[str, list[float]]
    results: dict[str, Any]

    def median_seconds(self, name: str) -> float:
        return median(self.seconds[name])

    def speedup(self, name: str) -> float:
        """How many times faster than the baseline: the median of the rounds' ratios."""
        return median(slow / fast for slow, fast in zip(self.seconds[self.baseline], self.seconds[name], strict=True))

    def table(self) -> str:
        """One line a contender: median CPU seconds, median ratio and the rounds' range of ratios."""
        lines = [self.title, f"  {'':32}{'CPU s':>10}{'times faster':>14}   over rounds"]
        for name, seconds in self.seconds.items():
            ratios = [slow / fast for slow, fast in zip(self.seconds[self.baseline], seconds, strict=True)]
            over_rounds = f"{min(ratios):.2f} to {max(ratios):.2f}"
            lines.append(f"  {name:32}{median(seconds):>10.4f}{self.speedup(name):>14.2f}   {over_rounds}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        contenders = {
            name: {"cpu_seconds": seconds, "median": self.median_seconds(name), "times_faster": self.speedup(name)}
            for name, seconds in self.seconds.items()
        }
        return {"title": self.title, "baseline": self.baseline, "contenders": contenders}


def one_thread() -> None:
    """Hold every numerical library to one thread; call it first.

    BLAS libraries read the environment when they are loaded, so the script is started anew if that was not set.
    """
    if any(os.environ.get(name) != "1" for name in THREAD_VARIABLES):
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    torch.set_num_threads(1)


def arguments(description: str | None, name: str, rounds: int) -> argparse.Namespace:
    """The options every benchmark has: `--rounds` and `--out`."""
    return _parser(description, name, rounds).parse_args()


def official_arguments(description: str | None, name: str, rounds: int) -> argparse.Namespace:
    """`arguments` for a script that runs an official repository beside bitlaw; its folders are put on the path.

    Official code is neither part of the project nor installed by it: give a checkout, and what it imports (timm).
    """
    parser = _parser(description, name, rounds)
    parser.add_argument("--official", type=Path, nargs="+", required=True, help="its checkout, and packages it needs")
    options = parser.parse_args()
    if missing := [str(folder) for folder in options.official if not folder.is_dir()]:
        parser.error(f"no such folder: {', '.join(missing)}")
    sys.path[:0] = [str(folder) for folder in options.official]
    return options


def stub_torchvision() -> None:
    """Let `import torchvision` succeed where there is none, with every module and name, none of which works.

    For official code, and timm, that import it for what is not used here. Import what asks whether there is a
    torchvision (diffusers) before this.
    """
    sys.meta_path.append(_TorchvisionStub())


class _Anything(type):
    """A class that has every attribute, each such a class again."""

    def __getattr__(cls, name: str) -> type:
        return _anything(name)


def _anything(name: str) -> type:
    """Such a class; AttributeError for the names that Python asks for by itself."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})


class _TorchvisionStub(MetaPathFinder, Loader):
    """Finds torchvision and all its modules, with anything in them."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _anything
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _parser(description: str | None, name: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measured rounds (default {rounds})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{name}.json")
    return parser


def compare(
    title: str, contenders: Mapping[str, Callable[[], Any]], *, baseline: str, rounds: int, warmup: int = 1
) -> Comparison:
    """Time every contender once a round, after `warmup` rounds that do not count; prints the table."""
    if baseline not in contenders or rounds < 1:
        raise ValueError(f"baseline '{baseline}' must be one of {', '.join(contenders)}, and rounds at least 1")
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, Any] = {}
    for index in range(-warmup, rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            begin = time.process_time()
            results[name] = contenders[name]()
            elapsed = time.process_time() - begin
            if index >= 0:
                seconds[name].append(elapsed)
    comparison = Comparison(title, baseline, seconds, results)
    print(comparison.table(), flush=True)
    return comparison


def finish(out: Path, comparisons: Sequence[Comparison], requirements: Mapping[str, bool]) -> int:
    """Write the JSON, with the hardware; print which requirements hold. The exit status: 0 if all do."""
    versions = {name: version(name) for name in ("torch", "numpy", "scipy")}
    record = {
        "hardware": hardware(),
        "software": {"python": platform.python_version(), **versions},
        "comparisons": [comparison.record() for comparison in comparisons],
        "requirements": dict(requirements),
    }
    write_json(out, record)
    for requirement, holds in requirements.items():
        print(f"{'met   ' if holds else 'FAILED'}  {requirement}")
    print(f"{record['hardware']['processor']}, one thread; written to {out}")
    return 0 if all(requirements.values()) else 1


def hardware() -> dict[str, Any]:
    """The processor's name, the cores that this process may use, and the memory of the machine in bytes."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
