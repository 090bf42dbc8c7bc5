"""Processes that train one student together, each on its share of every batch; `accelerate launch` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitlaw.models.generator import ImageGenerator
from bitlaw.training import Alone

ModelT = TypeVar("ModelT", bound=ImageGenerator[Any])


class One(Alone):
    """A process of its own."""

    count: int = 1

    def share(self, module: nn.Module) -> nn.Module:
        """The module as it is."""
        return module

    @contextmanager
    def adding_up(self, module: nn.Module, is_last: bool) -> Iterator[None]:
        """A part of a step's batch; nothing to exchange."""
        yield

    def mean(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def placed(self, model: ModelT) -> ModelT:
        """The model where this process computes."""
        return model

    @contextmanager
    def first(self) -> Iterator[None]:
        """What one process is to do before the others, who then find its files."""
        yield


class Several(One):
    """Processes of torch.distributed, set up by accelerate from the environment that it was launched with."""

    def __init__(self) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ValueError("several processes need accelerate: pip install 'bitlaw[train]'") from error
        self.accelerator: Any = Accelerator(cpu=not torch.cuda.is_available())
        super().__init__(self.accelerator.process_index)
        self.count = self.accelerator.num_processes

    def wait(self) -> None:
        """Until all have come here."""
        self.accelerator.wait_for_everyone()

    def share(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the processes in every backward pass."""
        shared: nn.Module = self.accelerator.prepare_model(module)
        return shared

    @contextmanager
    def adding_up(self, module: nn.Module, is_last: bool) -> Iterator[None]:
        """A part of a step's batch: gradients are exchanged with the last one only."""
        if is_last:
            yield
            return
        with self.accelerator.no_sync(module):
            yield

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the processes."""
        averaged: Tensor = self.accelerator.reduce(x, "mean")
        return averaged

    def placed(self, model: ModelT) -> ModelT:
        """The model on this process's device."""
        return model.to(self.accelerator.device)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Process 0 before the others."""
        with self.accelerator.main_process_first():
            yield


def processes() -> One:
    """Those that this one was started with."""
    return Several() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else One()
