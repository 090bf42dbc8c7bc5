"""Engines run a function over items and give what came of each, in the order they finish.

A study knows one method, `run`. The local pool is the only engine now; one that runs cells on a cluster has the
same method and nothing else.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What came of an item: a result, or the error that ended it."""

    item: Item
    result: Result | None = None
    error: BaseException | None = None


class Engine(Protocol):
    """Runs a picklable function over picklable items, each in one process with one thread."""

    def run(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Outcome[Item, Result]]:
        """Outcomes as they finish; an item that fails, or takes its process down, does not stop the others."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """A pool of processes on this machine, one thread each; None takes as many as there are cores."""

    num_workers: int | None = None

    @property
    def workers(self) -> int:
        """Processes that will be used."""
        return self.num_workers or len(os.sched_getaffinity(0))

    def run(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Outcome[Item, Result]]:
        """See `Engine`. Interrupting the iteration kills the running items."""
        suspects: list[Item] = []
        yield from self._run_pool(function, list(items), self.workers, suspects)
        # A process that dies (out of memory, say) takes the pool down, and which item it was is not known:
        # those that were running are tried once more, each alone.
        for item in suspects:
            died: list[Item] = []
            yield from self._run_pool(function, [item], 1, died)
            if died:
                yield Outcome(item, error=RuntimeError("the process that ran this cell died; was it out of memory?"))

    def _run_pool(
        self, function: Callable[[Item], Result], waiting: list[Item], workers: int, suspects: list[Item]
    ) -> Iterator[Outcome[Item, Result]]:
        while waiting:
            pool = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(os.getpid(),),
            )
            running: dict[Future[Result], Item] = {}
            try:
                while waiting or running:
                    # No more than one item a worker is handed over, so that a broken pool has few suspects.
                    while waiting and len(running) < workers:
                        item = waiting.pop(0)
                        running[pool.submit(function, item)] = item
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        item = running[future]
                        error = future.exception()
                        if isinstance(error, BrokenProcessPool):
                            raise error
                        del running[future]
                        yield Outcome(item, error=error) if error else Outcome(item, result=future.result())
            except BrokenProcessPool:
                suspects.extend(running.values())
            finally:
                for process in (pool._processes or {}).values():
                    process.terminate()
                pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(parent: int) -> None:
    """One thread, no answer to Ctrl-C (the parent's business), and an end when the parent is gone."""
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
