"""Distillation: a quantized student learns to give what its full-precision teacher gives.

Legend: B images, L tokens, N = B L, V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitlaw.calibration.cache import cache_folder, fingerprint_of
from bitlaw.calibration.collect import Progress
from bitlaw.calibration.settings import Calibration
from bitlaw.distill.data import open_examples, source_of
from bitlaw.distill.examples import Batch, Examples
from bitlaw.distill.losses import Divergence, make_loss
from bitlaw.distill.processes import One, processes
from bitlaw.distill.qat import freeze, parameter_groups, quantized_layers, student_of
from bitlaw.distill.settings import CONTINUOUS_LOSSES, Distillation
from bitlaw.install import plan_of
from bitlaw.methods.quantize import Protect, check_quantizable, quantize
from bitlaw.models.generator import ImageGenerator, Noise
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import Clock
from bitlaw.training import Events, Recipe, Report, Trained, Watch, train

ModelT = TypeVar("ModelT", bound=ImageGenerator[Any])

HELD_OUT_SEED = 2**23
"""Of the noise under which held-out images are looked at."""

LARGEST_HELD_OUT = 2**28
"""Bytes of the teacher's held-out predictions up to which they are kept."""


def silent(text: str) -> None:
    """For progress that nobody reads."""


def distill(
    teacher: ModelT,
    precision: Precision | str | BitPlan,
    settings: Distillation | None = None,
    *,
    protect: Protect = "first-last",
    calibration: Calibration | None = None,
    step_groups: int = 1,
    work: Path | str | None = None,
    progress: Progress | None = None,
    report: Report = silent,
    events: Events | None = None,
) -> ModelT:
    """A quantized copy of a model, trained to give what the model gives: `quantize` by `settings.start`, then `train`.

    work: a folder where finished blocks, encoded images and the state of the training are kept, so that an interrupted
        run goes on; it may be removed afterwards
    progress: told what is being done before the training; report: given lines on the training; events: its numbers

    Raises the ValueErrors of `quantize` and `distill_from`, before any work.
    """
    settings = settings or Distillation()
    check_distillable(teacher, precision, settings, protect, step_groups)
    together = processes()
    teacher = together.placed(teacher)
    with together.first():
        start = quantize(
            teacher,
            precision,
            settings.start,
            protect,
            calibration=calibration,
            step_groups=step_groups,
            work=None if work is None else Path(work) / "start",
            progress=progress,
        )
    return distill_from(start, teacher, settings, work=work, progress=progress, report=report, events=events)


def check_distillable(
    teacher: ImageGenerator[Any],
    precision: Precision | str | BitPlan,
    settings: Distillation,
    protect: Protect = "first-last",
    step_groups: int = 1,
) -> BitPlan:
    """The plan that will be carried out. Raises the ValueError that `distill` would raise."""
    loss_of(teacher, settings)
    source_of(teacher, settings)
    plan = check_quantizable(teacher, precision, protect, settings.start, step_groups)
    if all(p.is_full for name in plan for p in plan[name]):
        what = "the plan" if isinstance(precision, BitPlan) else f"precision {precision}"
        raise ValueError(f"{what}: nothing is quantized, so there is nothing to train; give fewer bits")
    _check_step_groups(teacher, plan)
    return plan


def loss_of(model: ImageGenerator[Any], settings: Distillation) -> Divergence | None:
    """The loss on logits that settings mean for a model, with K; None for a model that predicts no categories.

    ValueError for a loss that the model's outputs do not allow, or a K above its vocabulary.
    """
    if model.vocab_size is None:
        name = settings.loss or "mse"
        if name not in CONTINUOUS_LOSSES:
            raise ValueError(
                f"loss '{name}': {model.family} predicts no categories; use {' or '.join(CONTINUOUS_LOSSES)}"
            )
        if settings.top_k is not None or settings.temperature != 1:
            raise ValueError(f"top_k and temperature are for losses of categories, and {model.family} predicts none")
        return None
    name, top_k = settings.loss or "topkld", settings.top_k
    if name == "task":
        name = "ce"
    if name == "ce" and settings.cache_teacher:
        raise ValueError("cache_teacher: ce has no teacher; leave one of both out")
    if name.startswith("topkld") and top_k is None:
        # Beyond the sampler's choice the paper has no rule; VAR's own is 22 % of its vocabulary.
        top_k = getattr(model.sampling, "top_k", 0) or model.vocab_size // 4
    return make_loss(name, vocab_size=model.vocab_size, top_k=top_k, temperature=settings.temperature)


def distill_from(
    start: ModelT,
    teacher: ModelT,
    settings: Distillation | None = None,
    *,
    work: Path | str | None = None,
    progress: Progress | None = None,
    report: Report = silent,
    events: Events | None = None,
) -> ModelT:
    """A quantized model, trained further towards a teacher; the result is what a checkpoint holds.

    The weights of the least held-out loss are kept, be they those of the start. The same settings give the same result,
    whether or not the run was interrupted and resumed, and to rounding in any number of processes.

    Raises ValueError if teacher and start are not of one family with one tokenizer, and for settings that cannot be
    carried out; FloatingPointError, naming step and layer, where the loss is not finite.
    """
    settings = settings or Distillation()
    _check_alike(start, teacher)
    if (plan := plan_of(start.net)) is not None:
        _check_step_groups(teacher, plan)
    loss, together = loss_of(teacher, settings), processes()
    if settings.batch_size % (settings.accumulate * together.count):
        raise ValueError(
            f"batch_size {settings.batch_size} is no multiple of {settings.accumulate * together.count}, the number of "
            f"its parts ({together.count} processes times accumulate {settings.accumulate})"
        )
    teacher, start = together.placed(teacher), together.placed(start)
    student = student_of(start, teacher, trainable=settings.trainable, scales=settings.scales)
    if settings.checkpointing:
        checkpoint_blocks(student)
    lesson = Lesson(student, loss, settings)
    cache = cache_folder()
    with nullcontext(work) if work is not None else TemporaryDirectory(prefix="bitlaw-") as folder:
        shared = cache.parent / "examples" if cache and work is None else None
        examples = open_examples(teacher, settings, Path(folder), shared, progress)
        described = {"distillation": settings.to_json(), "plan": repr(plan_of(start.net)), "data": examples.data.key}
        key = fingerprint_of(described, teacher.net, start.net)[:16]
        trainer = Trainer(lesson, teacher, examples, settings, together)
        trained = trainer.run(Path(folder) / key, report if together.rank == 0 else silent, events)
    lesson.load_state_dict(trained.weights)
    for name in student.blocks if settings.checkpointing else ():
        del student.net.get_submodule(name).forward
    frozen = freeze(student, teacher)
    given = {**settings.to_json(), "loss": settings.loss or ("mse" if loss is None else "topkld")}
    del given["start"]  # what was done before is said beside it
    if loss is not None and hasattr(loss, "top_k"):
        given["top_k"] = loss.top_k
    frozen.provenance = {
        **start.provenance,
        "distillation": {
            **given,
            "data": examples.name,
            "held_out_loss": {str(step): error for step, error in trained.errors.items()},
            "kept_step": trained.step,
            "seconds": round(trained.seconds, 1),
        },
    }
    return frozen


class Lesson(nn.Module):
    """What a student is to give for a batch: the loss of each image, in one module, which processes can share."""

    def __init__(self, student: ImageGenerator[Any], loss: Divergence | None, settings: Distillation):
        super().__init__()
        self.student, self.loss = student, loss
        self.is_task = settings.loss == "task"
        self.dtype = getattr(torch, settings.autocast)
        self.net = student.net

    def train(self, mode: bool = True) -> "Lesson":
        """Nothing is dropped at random: the teacher's outputs are those of the whole network."""
        return super().train(False)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares with a teacher."""
        return self.loss.needs_teacher if self.loss else not self.is_task

    def predict(self, model: ImageGenerator[Any], batch: Any) -> dict[str, Tensor]:
        """What a model gives, in the type of arithmetic that was asked for."""
        with torch.autocast(model.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return model.predict(batch)

    def forward(self, batch: Any, encoded: Tensor, expected: dict[str, Tensor] | None) -> Tensor:
        """The loss of each image (B,). `expected` is what the teacher predicts, None where there is no need."""
        predicted = self.predict(self.student, batch)
        if self.loss is not None:
            logits_NV = predicted["logits"].flatten(0, 1)
            teacher_NV = None if expected is None else expected["logits"].flatten(0, 1)
            return self.loss(logits_NV, teacher_NV, encoded.flatten()).view(len(encoded), -1).mean(1)
        if expected is None:
            return self.student.training_loss(batch, predicted)
        errors = [(predicted[name].float() - expected[name].float()).square() for name in expected]
        return torch.stack([error.flatten(1).mean(1) for error in errors]).sum(0)


class Trainer:
    """The steps of a distillation."""

    def __init__(
        self,
        lesson: Lesson,
        teacher: ImageGenerator[Any],
        examples: Examples,
        settings: Distillation,
        together: One,
    ):
        self.lesson, self.teacher, self.examples, self.settings = lesson, teacher, examples, settings
        self.together, self.shared = together, together.share(lesson)
        self.kept: dict[int, dict[str, Tensor]] = {}
        self._keeps = self._held_out_bytes() <= LARGEST_HELD_OUT

    def run(self, work: Path, report: Report, events: Events | None) -> Trained:
        settings = self.settings
        recipe = Recipe(
            steps=settings.steps,
            lr=settings.lr,
            batch_size=settings.batch_size,
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            ema_half_life=settings.ema_half_life,
        )
        work.mkdir(parents=True, exist_ok=True)
        return train(
            "student",
            self.lesson,
            recipe,
            self.gradients_at,
            work,
            report,
            groups=parameter_groups(
                self.lesson, scale_lr_ratio=settings.scale_lr_ratio, weight_decay=settings.weight_decay
            ),
            watch=Watch(self.held_out_loss, max(1, settings.steps // settings.evaluations), settings.patience),
            optimizer=settings.optimizer,
            events=events if self.together.rank == 0 else None,
            processes=self.together,
            explain=self.explain,
        )

    def gradients_at(self, step: int) -> float:
        """Add the gradients of a step; its loss."""
        parts = self.settings.accumulate
        total = torch.zeros((), device=self.lesson.student.device)
        for part in range(parts):
            batch, encoded, expected = self._part(step, part)
            with self.together.adding_up(self.shared, is_last=part == parts - 1):
                loss = self.shared(batch, encoded, expected).mean() / parts
                loss.backward()
            total += loss.detach()
        return float(self.together.mean(total))

    def _part(self, step: int, part: int) -> tuple[Any, Tensor, dict[str, Tensor] | None]:
        """Of a step's batch what goes through the network at once: part `part` of this process."""
        settings, together = self.settings, self.together
        parts = settings.accumulate * together.count
        index = together.rank * settings.accumulate + part
        given = self.examples.batch(step, settings.batch_size, rank=index, world=parts)
        return self._asked(given, Noise(settings.seed, given.image_ids, self.teacher.device))

    def _asked(
        self, given: Batch, noise: Noise, known: dict[str, Tensor] | None = None
    ) -> tuple[Any, Tensor, dict[str, Tensor] | None]:
        """What the student is asked, and what the teacher says to it, if that is not `known` and is needed."""
        device = self.teacher.device
        encoded, labels_B = given.encoded.to(device), given.labels_B.to(device)
        batch = self.teacher.teacher_forced(encoded, labels_B, noise)
        if known is not None or not self.lesson.needs_teacher:
            return batch, encoded, known
        if given.logits_BLV is not None:
            return batch, encoded, {"logits": given.logits_BLV.to(device)}
        with torch.no_grad():
            return batch, encoded, self.lesson.predict(self.teacher, batch)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss over the held-out images; the same in every process."""
        total, examples = 0.0, self.examples
        size = max(1, self.settings.batch_size // self.settings.accumulate)
        for index, given in enumerate(examples.held_out(size)):
            noise = Noise(HELD_OUT_SEED, given.image_ids, self.teacher.device)
            batch, encoded, expected = self._asked(given, noise, self.kept.get(index))
            if self._keeps and expected is not None:
                self.kept[index] = expected
            total += float(self.lesson(batch, encoded, expected).double().sum())
        return total / examples.num_held_out

    def _held_out_bytes(self) -> int:
        """Bytes of the teacher's predictions for all held-out images, at most about."""
        of_image = self.examples.example_numel * (self.teacher.vocab_size or 3)
        return 4 * of_image * self.examples.num_held_out

    def explain(self, step: int) -> str:
        """Which layer a loss that is not finite comes from."""
        broken: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                if isinstance(out, Tensor) and not out.isfinite().all():
                    broken.append(name)

            return hook

        layers = quantized_layers(self.lesson.net)
        handles = [layer.register_forward_hook(look(name)) for name, layer in layers]
        with torch.no_grad():
            for part in range(self.settings.accumulate):
                self.lesson(*self._part(step, part))
        for handle in handles:
            handle.remove()
        return (
            f"the first layer whose output is not finite is {broken[0]}" if broken else "every layer's output is finite"
        )


def checkpoint_blocks(model: ImageGenerator[Any]) -> None:
    """Let the blocks of a model's network be computed anew in the backward pass."""
    for name in model.blocks:
        block = model.net.get_submodule(name)
        block.forward = _Checkpointed(block.forward, model.clock)


@dataclass(frozen=True)
class _Checkpointed:
    """A block's forward pass whose insides are computed anew when gradients need them, at the step they were at."""

    inside: Callable[..., Any]
    clock: Clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._at, self.clock.step, *args, use_reentrant=False, **kwargs)

    def _at(self, step: int, *args: Any, **kwargs: Any) -> Any:
        now, self.clock.step = self.clock.step, step
        try:
            return self.inside(*args, **kwargs)
        finally:
            self.clock.step = now


def _check_step_groups(teacher: ImageGenerator[Any], plan: BitPlan) -> None:
    if teacher.vocab_size is not None and len(plan.step_groups) > 1:
        raise ValueError(
            f"{len(plan.step_groups)} step groups: a {teacher.family} is trained on all of its steps in one pass, "
            "which cannot tell them apart; use one group"
        )


def _check_alike(start: ImageGenerator[Any], teacher: ImageGenerator[Any]) -> None:
    """ValueError for a student and a teacher that do not speak of the same things."""
    if plan_of(teacher.net) is not None:
        raise ValueError("the teacher is quantized itself; give the full-precision model")
    if start.family != teacher.family:
        raise ValueError(f"the student is a {start.family} and the teacher a {teacher.family}; give two of one family")
    sizes = [
        {key: value for key, value in model.to_config().items() if key != "sampling"} for model in (start, teacher)
    ]
    if sizes[0] != sizes[1]:
        different = sorted(key for key in sizes[1] if sizes[0].get(key) != sizes[1][key])
        raise ValueError(f"student and teacher are of different {' and '.join(different)}: {sizes[0]} and {sizes[1]}")
    codecs = start.autoencoder, teacher.autoencoder
    if codecs[0] is not codecs[1] and fingerprint_of({}, codecs[0]) != fingerprint_of({}, codecs[1]):
        raise ValueError("student and teacher have different tokenizers or autoencoders; load both with the same")
