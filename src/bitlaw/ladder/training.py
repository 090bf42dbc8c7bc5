"""The one training loop of the ladder: AdamW, warm-up and cosine, an average of the weights, exact resume.

A batch is a function of the step, and so is every random number, so a run that was killed and resumed takes
the same steps as one that was not.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bitlaw.files import write_with

SECONDS_BETWEEN_SAVES = 60.0

Report = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one network of the ladder is trained."""

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
        """A half-life that grows with the run until it is `ema_half_life` of it."""
        half_life = max(1.0, min(self.ema_half_life * self.steps, step / 4))
        return 0.5 ** (1 / half_life)


def train(
    name: str,
    module: nn.Module,
    recipe: Recipe,
    loss_at: Callable[[int], Tensor],
    work_dir: Path,
    report: Report = print,
) -> dict[str, Tensor]:
    """Train `module` by `loss_at(step)` and return the averaged weights (buffers as they are at the end).

    Progress goes to `report`; the state is saved in `work_dir/<name>.pt` every minute and at the end.
    """
    parameters = {key: p for key, p in module.named_parameters() if p.requires_grad}
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=recipe.betas,
    )
    average = {key: p.detach().clone() for key, p in parameters.items()}
    step, cpu_seconds = 0, 0.0
    path = work_dir / f"{name}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step, cpu_seconds = saved["average"], saved["step"], saved["cpu_seconds"]
        report(f"{name}: resumed at step {step} of {recipe.steps}")

    def save() -> None:
        state = {
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
            "cpu_seconds": cpu_seconds + time.process_time() - started,
        }
        write_with(path, lambda temporary: torch.save(state, temporary))

    module.train()
    started, last_save, last_report, losses = time.process_time(), time.monotonic(), time.monotonic(), []
    first_step, wall_start = step, time.monotonic()
    while step < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        loss = loss_at(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{name}: loss is {loss.item()} at step {step}; lower the learning rate {recipe.lr}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
        optimizer.step()
        step += 1
        weight = 1 - recipe.ema_decay_at(step)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), weight)
        losses.append(loss.item())
        now = time.monotonic()
        if now - last_report > 10 or step == recipe.steps:
            left = (now - wall_start) / (step - first_step) * (recipe.steps - step)
            report(
                f"{name}: step {step}/{recipe.steps}  loss {sum(losses) / len(losses):.4f}  {left / 60:.1f} min left"
            )
            last_report, losses = now, []
        if now - last_save > SECONDS_BETWEEN_SAVES or step == recipe.steps:
            save()
            last_save = time.monotonic()
    module.eval()
    return {**module.state_dict(), **average}


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
