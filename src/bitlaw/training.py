"""The one training loop: Adam, warm-up and cosine, an average of the weights, exact resume.

A batch is a function of the step, and so is every random number, so a run that was killed and resumed takes the same
steps as one that was not. The ladder's models are trained with it, and quantized ones are distilled.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from bitlaw.files import write_with

SECONDS_BETWEEN_SAVES = 60.0

Report = Callable[[str], None]
Optimizer = Literal["adamw", "adafactor"]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one network is trained."""

    steps: int
    lr: float
    batch_size: int = 64
    warmup_steps: int = 100
    final_lr_ratio: float = 0.01
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema_half_life: float = 0.02  # as a share of the run

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine from `lr` to `final_lr_ratio * lr`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (self.final_lr_ratio + (1 - self.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share)))

    def ema_decay_at(self, step: int) -> float:
        """A half-life that grows with the run until it is `ema_half_life` of it; 0 is for no average."""
        if self.ema_half_life == 0:
            return 0.0
        half_life = max(1.0, min(self.ema_half_life * self.steps, step / 4))
        return 0.5 ** (1 / half_life)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that are trained at `lr_ratio` times the recipe's learning rate."""

    parameters: Mapping[str, nn.Parameter]
    lr_ratio: float = 1.0
    weight_decay: float = 0.0


def default_groups(module: nn.Module, recipe: Recipe) -> list[ParameterGroup]:
    """Every parameter that requires a gradient; those of two dimensions or more decay."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return [
        ParameterGroup({name: p for name, p in parameters.items() if p.ndim >= 2}, weight_decay=recipe.weight_decay),
        ParameterGroup({name: p for name, p in parameters.items() if p.ndim < 2}),
    ]


@dataclass(frozen=True)
class Watch:
    """An error on held-out data that is looked at during training, and decides which weights are kept.

    error: of the module with the averaged weights in it, which it has while this is called
    every: steps between two looks; there is one at the start and one at the end as well
    patience: stop after so many looks without a new least error; 0 never stops
    """

    error: Callable[[], float]
    every: int
    patience: int = 0


class Events(Protocol):
    """What is told of numbers during training (`torch.utils.tensorboard.SummaryWriter`, for one)."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """A number at a step."""
        ...


class Processes(Protocol):
    """The processes that train together, each on its share of every batch."""

    @property
    def rank(self) -> int:
        """Which of them this is; 0 writes files."""
        ...

    def wait(self) -> None:
        """Until all have come here."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0

    def wait(self) -> None:
        """Nothing to wait for."""


@dataclass
class Trained:
    """What came of a training.

    weights: averaged ones, and buffers as they are at the end; where there was a `Watch`, those of the least error
    step: after which the weights were as they are here
    errors: on held-out data, by step
    """

    weights: dict[str, Tensor]
    step: int
    errors: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


def of_loss(loss_at: Callable[[int], Tensor]) -> Callable[[int], float]:
    """Gradients of a loss that one pass gives."""

    def gradients_at(step: int) -> float:
        loss = loss_at(step)
        if torch.isfinite(loss):
            loss.backward()
        return float(loss.detach())

    return gradients_at


def train(
    name: str,
    module: nn.Module,
    recipe: Recipe,
    gradients_at: Callable[[int], float],
    work_dir: Path,
    report: Report = print,
    *,
    groups: Sequence[ParameterGroup] = (),
    watch: Watch | None = None,
    optimizer: Optimizer = "adamw",
    events: Events | None = None,
    processes: Processes | None = None,
    explain: Callable[[int], str] | None = None,
) -> Trained:
    """Train `module`: `gradients_at(step)` gives a step's loss, and adds its gradients to the parameters'.

    Progress goes to `report`; the state is saved in `work_dir/<name>.pt` every minute and at the end, and a run that
    finds it there goes on from it. A loss that is not finite is a FloatingPointError, with what `explain` says of the
    step; the state that was saved last stays.
    """
    processes = processes or Alone()
    groups = [group for group in groups or default_groups(module, recipe) if group.parameters]
    parameters = {key: p for group in groups for key, p in group.parameters.items()}
    adam = _optimizer(optimizer, groups, recipe)
    average = {key: p.detach().clone() for key, p in parameters.items()}
    step, cpu_seconds = 0, 0.0
    errors: dict[int, float] = {}
    best: dict[str, Tensor] | None = None
    path = work_dir / f"{name}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=next(iter(parameters.values())).device)
        module.load_state_dict(saved["module"])
        adam.load_state_dict(saved["optimizer"])
        average, step, cpu_seconds = saved["average"], saved["step"], saved["cpu_seconds"]
        errors, best = saved.get("errors", {}), saved.get("best")
        report(f"{name}: resumed at step {step} of {recipe.steps}")

    def save() -> None:
        if processes.rank == 0:
            state = {
                "module": module.state_dict(),
                "optimizer": adam.state_dict(),
                "average": average,
                "step": step,
                "cpu_seconds": cpu_seconds + time.process_time() - started,
                "errors": errors,
                "best": best,
            }
            write_with(path, lambda temporary: torch.save(state, temporary))

    def look() -> None:
        """Measure the held-out error, and keep the weights if it is the least."""
        nonlocal best
        assert watch is not None
        with _in_place(parameters, average):
            error = watch.error()
        if not math.isfinite(error):
            raise FloatingPointError(f"{name}: held-out error is {error} after step {step}; lower the learning rate")
        if not errors or error < min(errors.values()):
            best = {key: value.clone() for key, value in average.items()}
        errors[step] = error
        if events is not None:
            events.add_scalar("held_out", error, step)

    def waited() -> int:
        """Looks since the least error."""
        return len(errors) - 1 - list(errors.values()).index(min(errors.values()))

    module.train()
    started, last_save, last_report, losses = time.process_time(), time.monotonic(), time.monotonic(), []
    first_step, wall_start = step, time.monotonic()
    if watch is not None and not errors:
        look()
    while step < recipe.steps and not (watch and 0 < watch.patience <= waited()):
        lr = recipe.lr_at(step)
        for options in adam.param_groups:
            options["lr"] = lr * options["lr_ratio"]
        adam.zero_grad(set_to_none=True)
        loss = gradients_at(step)
        if not math.isfinite(loss):
            why = f"; {explain(step)}" if explain else ""
            raise FloatingPointError(f"{name}: loss is {loss} at step {step}{why}; lower the learning rate {recipe.lr}")
        nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
        adam.step()
        step += 1
        weight = 1 - recipe.ema_decay_at(step)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), weight)
        losses.append(loss)
        if events is not None:
            events.add_scalar("loss", loss, step)
            events.add_scalar("learning_rate", lr, step)
        ends = step == recipe.steps
        if watch is not None and (ends or step % watch.every == 0):
            look()
            ends = ends or 0 < watch.patience <= waited()
        now = time.monotonic()
        if now - last_report > 10 or ends:
            left = (now - wall_start) / (step - first_step) * (recipe.steps - step)
            held_out = f"  held out {errors[max(errors)]:.4f}" if errors else ""
            mean = sum(losses) / len(losses)
            report(f"{name}: step {step}/{recipe.steps}  loss {mean:.4f}{held_out}  {left / 60:.1f} min left")
            last_report, losses = now, []
        if now - last_save > SECONDS_BETWEEN_SAVES or ends:
            save()
            last_save = time.monotonic()
    processes.wait()
    module.eval()
    found = average if best is None else best
    at = step if best is None else min(errors, key=lambda at: errors[at])
    seconds = cpu_seconds + time.process_time() - started
    return Trained({**module.state_dict(), **found}, at, errors, seconds)


def _optimizer(name: Optimizer, groups: Sequence[ParameterGroup], recipe: Recipe) -> torch.optim.Optimizer:
    """Adafactor keeps a row and a column for the second moments of a matrix, and no first ones."""
    options = [
        {"params": list(group.parameters.values()), "weight_decay": group.weight_decay, "lr_ratio": group.lr_ratio}
        for group in groups
    ]
    if name == "adafactor":
        return torch.optim.Adafactor(options, lr=recipe.lr)
    return torch.optim.AdamW(options, lr=recipe.lr, betas=recipe.betas)


@contextmanager
def _in_place(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other numbers in parameters for a while."""
    own = {key: p.data for key, p in parameters.items()}
    try:
        for key, p in parameters.items():
            p.data = values[key]
        yield
    finally:
        for key, p in parameters.items():
            p.data = own[key]


def training_seconds(name: str, work_dir: Path) -> float:
    """CPU seconds that the finished run `name` took."""
    return float(torch.load(work_dir / f"{name}.pt", weights_only=True)["cpu_seconds"])


def batch_indices(step: int, batch_size: int, pool: int, seed: int = 0) -> Tensor:
    """Rows (batch_size,) of a pool for a step: every row once an epoch, in an order that depends on the epoch."""
    per_epoch = pool // batch_size
    epoch, position = divmod(step, per_epoch)
    return _epoch_order(epoch, pool, seed)[position * batch_size : (position + 1) * batch_size]


_ORDERS: dict[tuple[int, int, int], Tensor] = {}


def _epoch_order(epoch: int, pool: int, seed: int) -> Tensor:
    key = (epoch, pool, seed)
    if key not in _ORDERS:
        _ORDERS.clear()
        _ORDERS[key] = torch.randperm(pool, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return _ORDERS[key]


def step_generator(step: int, seed: int = 0) -> torch.Generator:
    """The random numbers of a training step."""
    return torch.Generator().manual_seed(seed * 1_000_000_007 + step)
