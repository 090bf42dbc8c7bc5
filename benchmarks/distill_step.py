"""A step of quantization-aware training, with cached teacher logits, against one of full-precision training.

Both are `bitlaw.training.train` on the same batches: forward, backward, clipping, AdamW, average of the weights. The
full-precision step has the cross entropy of the tokens; the other W3A16 with learned scales, from rounding to nearest.

    python benchmarks/distill_step.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import bitlaw
from bitlaw.distill import Distillation
from bitlaw.distill.data import open_examples
from bitlaw.distill.examples import Examples
from bitlaw.distill.processes import One
from bitlaw.distill.qat import parameter_groups, student_of
from bitlaw.distill.trainer import Lesson, Trainer, loss_of
from bitlaw.models.generator import ImageGenerator, Noise
from bitlaw.training import Recipe, of_loss, train
from harness import arguments, compare, finish, one_thread

MODELS = ("var-xs", "var-s", "var-m", "var-l")
STEPS = 4
LARGEST = 2.2


@dataclass
class FullPrecision:
    """Steps of ordinary training."""

    model: ImageGenerator
    examples: Examples

    def __call__(self) -> float:
        model = self.model
        model.require_gradients()

        def loss_at(step: int):
            given = self.examples.batch(step, 64)
            batch = model.teacher_forced(given.encoded, given.labels_B, Noise(0, given.image_ids))
            return model.training_loss(batch, model.predict(batch)).mean()

        with TemporaryDirectory() as work:
            recipe = Recipe(steps=STEPS, lr=1e-6)
            return train("step", model.net, recipe, of_loss(loss_at), Path(work), lambda text: None).step


@dataclass
class Quantized:
    """Steps of distillation."""

    lesson: Lesson
    trainer: Trainer

    def __call__(self) -> float:
        with TemporaryDirectory() as work:
            recipe = Recipe(steps=STEPS, lr=1e-6)
            groups = parameter_groups(self.lesson, scale_lr_ratio=1.0, weight_decay=0.0)
            rest = (self.trainer.gradients_at, Path(work), lambda text: None)
            return train("step", self.lesson, recipe, *rest, groups=groups).step


def contenders(name: str, work: Path, cached: bool, loss: str) -> tuple[FullPrecision, Quantized]:
    settings = Distillation(loss=loss, num_examples=512, num_held_out=1, cache_teacher=cached)
    teacher = bitlaw.load(f"ladder/{name}")
    examples = open_examples(teacher, settings, work)
    student = student_of(bitlaw.quantize(teacher, "W3A16"), teacher)
    lesson = Lesson(student, loss_of(teacher, settings), settings)
    trainer = Trainer(lesson, teacher, examples, settings, One())
    return FullPrecision(bitlaw.load(f"ladder/{name}"), examples), Quantized(lesson, trainer)


def main() -> int:
    """Every VAR of the ladder."""
    one_thread()
    options = arguments(__doc__, "distill_step", rounds=9)
    comparisons, requirements = [], {}
    for name in MODELS:
        with TemporaryDirectory() as work:
            full, cached = contenders(name, Path(work), True, "topkld")
            _, at_once = contenders(name, Path(work), False, "topkld")
            given = {"full precision": full, "W3, cached teacher": cached, "W3, teacher in each step": at_once}
            comparison = compare(
                f"{name}, {STEPS} steps of 64", given, baseline="full precision", rounds=options.rounds
            )
        times = 1 / comparison.speedup("W3, cached teacher")
        requirements[f"{name}: {times:.2f} times a full-precision step (at most {LARGEST})"] = times <= LARGEST
        comparisons.append(comparison)
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
