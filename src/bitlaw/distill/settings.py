"""How a quantized model is trained to give what the full-precision model gives, and how that is written in a line."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from bitlaw.distill.qat import Scales, Trainable
from bitlaw.methods.chain import settings_of
from bitlaw.training import Optimizer

PREFIX = "distill:"
"""What a method that is a distillation begins with in a study: `distill:topkld,steps=300,start=gptq`."""

CONTINUOUS_LOSSES = ("mse", "task")
"""Losses of models that predict no categories."""


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation.

    loss: of LOSSES for models that predict categories, by default topkld; for others mse, the default, of what
        teacher and student predict, or task, the family's own training loss. ce and task have no teacher
    top_k: K of topkld; None for the sampler's own, or a quarter of the vocabulary where the sampler keeps all
    temperature: of both distributions
    start: a post-training method, whose result is trained
    data: "ladder", a folder of images, or "generated", what the teacher draws of itself; None for "ladder" where the
        model has its image size and classes, else "generated"
    num_examples, num_held_out: images to train on, and others to decide what is kept
    max_unreadable: share of a folder's images that may be damaged
    label_dropout: share of labels that become the null class
    cache_teacher: keep the teacher's logits instead of computing them anew in each step
    trainable: all numbers, or only scales and what has one dimension
    scales: learned (LSQ) or recomputed from the weights in each step
    batch_size: images of a step, over all processes; they go through the network in `accumulate` parts
    lr, scale_lr_ratio: learning rate, and by what it is multiplied for the logarithms of scales
    ema_half_life: of the average of the weights, as a share of the run; 0 is off
    evaluations, patience: how often the held-out loss is measured; stop after so many without a new least one (0 never)
    checkpointing: compute blocks anew in the backward pass instead of keeping what is in them
    autocast: arithmetic of both networks in training, "float32" or "bfloat16"
    optimizer: adamw, or adafactor, whose state is as good as nothing
    """

    loss: str | None = None
    top_k: int | None = None
    temperature: float = 1.0
    start: str = "rtn"
    data: str | None = None
    num_examples: int = 16384
    num_held_out: int = 256
    max_unreadable: float = 0.01
    label_dropout: float = 0.1
    cache_teacher: bool = False
    trainable: Trainable = "all"
    scales: Scales = "learned"
    steps: int = 400
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    scale_lr_ratio: float = 3.0
    warmup_steps: int = 20
    weight_decay: float = 0.0
    ema_half_life: float = 0.02
    evaluations: int = 8
    patience: int = 0
    checkpointing: bool = False
    autocast: Literal["float32", "bfloat16"] = "float32"
    optimizer: Optimizer = "adamw"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least = {
            "steps": 0,
            "num_examples": 1,
            "num_held_out": 1,
            "batch_size": 1,
            "accumulate": 1,
            "evaluations": 1,
            "patience": 0,
            "warmup_steps": 0,
            "label_dropout": 0,
            "max_unreadable": 0,
            "weight_decay": 0,
            "ema_half_life": 0,
        }
        problems = [
            f"{name} {getattr(self, name)}: must be {least} or more"
            for name, least in at_least.items()
            if getattr(self, name) < least
        ]
        problems += [
            f"{name} {getattr(self, name):g}: must be at most 1"
            for name in ("label_dropout", "max_unreadable")
            if getattr(self, name) > 1
        ]
        problems += [
            f"{name} {getattr(self, name):g}: must be above 0"
            for name in ("lr", "temperature", "scale_lr_ratio")
            if getattr(self, name) <= 0
        ]
        choices = {
            "trainable": ("all", "scales"),
            "scales": ("learned", "recomputed"),
            "autocast": ("float32", "bfloat16"),
            "optimizer": ("adamw", "adafactor"),
        }
        problems += [
            f"{name} '{getattr(self, name)}': must be {' or '.join(known)}"
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]
        if self.num_examples < self.batch_size:
            problems.append(f"num_examples {self.num_examples}: fewer than the batch_size {self.batch_size}")
        if self.batch_size % self.accumulate:
            problems.append(f"batch_size {self.batch_size}: no multiple of accumulate {self.accumulate}")
        if problems:
            raise ValueError("distillation: " + "; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """The settings in plain values."""
        return asdict(self)


def is_distillation(method: str) -> bool:
    """Whether the text of a method means a distillation."""
    return method == PREFIX.rstrip(":") or method.startswith(PREFIX)


def parse_distillation(text: str) -> Distillation:
    """`distill:topkld,steps=300,start=smoothquant+gptq`: a loss, then settings; `start` is the last one.

    ValueError for a setting that does not exist or a value that it cannot have.
    """
    assert is_distillation(text)
    rest, _, start = text.removeprefix(PREFIX.rstrip(":")).removeprefix(":").partition("start=")
    given: dict[str, Any] = {"start": start} if start else {}
    known = {field.name: field.default for field in fields(Distillation)}
    parts = [part for part in map(str.strip, rest.split(",")) if part]
    if parts and "=" not in parts[0]:
        given["loss"] = parts.pop(0)
    return Distillation(**(given | settings_of(parts, known, "distill", text)))
