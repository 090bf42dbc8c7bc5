"""How far a student's distribution over codes is from its teacher's, token by token.

P_T and P_S are the softmax of teacher's and student's logits over a temperature; gradients are the student's only.
Numbers are natural logarithms in float32 (float64 for float64 logits), whatever the logits' dtype.

The logits of a vocabulary are the largest tensors of a training step. So a loss walks over them in chunks of tokens and
keeps nothing of their size: the backward pass walks again and writes the gradient, which is the one tensor of that size
that is made. All gradients are in closed form. With h = dL/d log P_S, that by the logits is h - P_S sum(h).

Legend: N tokens, V codes of the vocabulary, C tokens of a chunk.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bitlaw.names import lookup

# Of one tensor of a chunk. On a CPU the few that are alive at once are to stay in its cache; on a GPU they are to be
# large beside the start of a kernel and small beside the logits.
_CHUNK_BYTES_CPU, _CHUNK_BYTES_GPU = 2**19, 2**24

PRINTED_WARNING = (
    "TopKLD as printed (Ding et al. eq. 7) is not a divergence: each half runs over a part of the simplex, so the sum "
    "goes below zero, its gradient does not vanish where student and teacher agree, and training drives probability "
    "out of the top K (on the ladder that was worse than no training); 'topkld' adds the mass terms that mend it"
)


@dataclass(frozen=True)
class Chunk:
    """Some of the tokens. What a loss does not use is empty.

    student_CV, teacher_CV: logits over the temperature, in the dtype of the computation; not to be written to
    cutoff_C1: what `Divergence.cutoff` gave for them
    excluding: whether there may be logits of -inf, so that products of 0 and infinity need care
    """

    student_CV: Tensor
    teacher_CV: Tensor
    tokens_C: Tensor
    cutoff_C1: Tensor
    excluding: bool

    def log_ratio(self, weight_CV: Tensor) -> Tensor:
        """log(P_S / P_T) of every code (C, V), to be multiplied by this weight: 0 where the weight is 0 (0 log 0 = 0).

        Finite logits have finite logarithms, also of probabilities that underflow, and need no such care.
        """
        ratio_CV = self.student_CV.log_softmax(-1).sub_(self.teacher_CV.log_softmax(-1))
        return ratio_CV.masked_fill_(weight_CV == 0, 0) if self.excluding else ratio_CV


class Divergence(ABC):
    """A loss of a token: called with logits, it gives the loss of each token, with gradients for the student.

    A subclass is a frozen dataclass of settings, and one line in LOSSES.
    """

    needs_teacher: ClassVar[bool] = True
    temperature: float = 1.0

    def __call__(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor | None = None,
        tokens_N: Tensor | None = None,
        *,
        chunk_bytes: int | None = None,
    ) -> Tensor:
        """The loss of each token (N,), times temperature^2 (Hinton et al. 2015), so that gradients keep their size.

        tokens_N: the true tokens, for the cross entropy
        chunk_bytes: about how large a tensor of a chunk may be; by default by the device

        Where a divergence is infinite (the student excludes by a logit of -inf what the teacher does not, or the other
        way round, in that order for forward and reverse KL) so is the value, and a gradient need not exist. A logit of
        NaN makes the token's loss NaN. ValueError for logits of different shapes and for what is missing.
        """
        if student_NV.ndim != 2 or not student_NV.is_floating_point():
            raise ValueError(
                f"the student's logits are {student_NV.dtype} of shape {tuple(student_NV.shape)}; give floating-point "
                "numbers of shape (tokens, vocabulary)"
            )
        if self.needs_teacher:
            if teacher_NV is None:
                raise ValueError(f"{type(self).__name__} compares with a teacher; give its logits")
            if teacher_NV.shape != student_NV.shape:
                raise ValueError(
                    f"the teacher's logits have shape {tuple(teacher_NV.shape)}, the student's "
                    f"{tuple(student_NV.shape)}; give both for the same tokens and vocabulary"
                )
            teacher_NV, tokens_N = teacher_NV.detach(), _empty(student_NV)
        else:
            teacher_NV, tokens_N = _empty(student_NV), _checked(tokens_N, student_NV)
        self.check(student_NV.shape[1])
        out = _OverChunks.apply(student_NV, teacher_NV, tokens_N, self, chunk_bytes)
        assert isinstance(out, Tensor)
        return out

    def check(self, vocab_size: int) -> None:  # noqa: B027  (most have nothing to check)
        """ValueError if the settings are not for a vocabulary of this size."""

    def cutoff(self, teacher_CV: Tensor) -> Tensor:
        """What is to be found once for a token and kept for the backward pass (C, 1); by most losses not used."""
        return teacher_CV.new_zeros(len(teacher_CV), 1)

    @abstractmethod
    def value(self, chunk: Chunk) -> Tensor:
        """The loss of each token (C,), not yet times temperature^2."""

    @abstractmethod
    def gradient(self, chunk: Chunk) -> Tensor:
        """The derivative of `value` by `chunk.student_CV`, a new tensor (C, V)."""


@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """-log P_S of the true tokens: training without a teacher."""

    needs_teacher: ClassVar[bool] = False

    def value(self, chunk: Chunk) -> Tensor:
        return F.cross_entropy(chunk.student_CV, chunk.tokens_C, reduction="none")

    def gradient(self, chunk: Chunk) -> Tensor:
        grad_CV = chunk.student_CV.softmax(-1)
        index_C1 = chunk.tokens_C[:, None]
        return grad_CV.scatter_add_(1, index_C1, grad_CV.new_full((1, 1), -1.0).expand(index_C1.shape))


@dataclass(frozen=True)
class MSE(Divergence):
    """The squared difference of logits, mean over the vocabulary. Codes that both exclude (-inf) count as equal.

    There is no temperature: its square would cancel it.
    """

    def value(self, chunk: Chunk) -> Tensor:
        return self._difference(chunk).square_().mean(-1)

    def gradient(self, chunk: Chunk) -> Tensor:
        return self._difference(chunk).mul_(2 / chunk.student_CV.shape[1])

    def _difference(self, chunk: Chunk) -> Tensor:
        difference_CV = chunk.student_CV - chunk.teacher_CV
        if chunk.excluding:
            difference_CV.masked_fill_(chunk.student_CV == chunk.teacher_CV, 0)
        return difference_CV


@dataclass(frozen=True)
class Tempered(Divergence):
    """What the losses on probabilities have in common. temperature: tau, above 0; 1 compares the distributions."""

    temperature: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0 (1 is none)")


@dataclass(frozen=True)
class JS(Tempered):
    """Jensen-Shannon: half of KL(P_S | M) + KL(P_T | M), with M the mean of both. At most log 2, and symmetric."""

    def value(self, chunk: Chunk) -> Tensor:
        p_CV, q_CV, log_mean_CV = self._probabilities(chunk)
        terms_CV = self._log_ratio(chunk.student_CV, log_mean_CV).mul_(p_CV)
        terms_CV.add_(self._log_ratio(chunk.teacher_CV, log_mean_CV).mul_(q_CV))
        return terms_CV.sum(-1).mul_(0.5)

    def gradient(self, chunk: Chunk) -> Tensor:
        p_CV, _, log_mean_CV = self._probabilities(chunk)
        return _by_logits(self._log_ratio(chunk.student_CV, log_mean_CV).mul_(p_CV).mul_(0.5), p_CV)

    def _probabilities(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """P_S, P_T and log M, which is finite also where both underflow."""
        p_CV, q_CV = chunk.student_CV.softmax(-1), chunk.teacher_CV.softmax(-1)
        mean_CV = (p_CV + q_CV).mul_(0.5)
        return p_CV, q_CV, mean_CV.clamp_(min=torch.finfo(mean_CV.dtype).tiny).log_()

    def _log_ratio(self, logits_CV: Tensor, log_mean_CV: Tensor) -> Tensor:
        """Finite, as it meets a probability of 0 wherever the clamp counts."""
        log_CV = logits_CV.log_softmax(-1)
        return log_CV.clamp_(min=torch.finfo(log_CV.dtype).min / 2).sub_(log_mean_CV)


@dataclass(frozen=True)
class ForwardKL(Tempered):
    """sum P_T log(P_T / P_S). Infinite where the student excludes what the teacher does not."""

    def value(self, chunk: Chunk) -> Tensor:
        q_CV = chunk.teacher_CV.softmax(-1)
        return chunk.log_ratio(q_CV).mul_(q_CV).sum(-1).neg_()

    def gradient(self, chunk: Chunk) -> Tensor:
        return chunk.student_CV.softmax(-1).sub_(chunk.teacher_CV.softmax(-1))


@dataclass(frozen=True)
class ReverseKL(Tempered):
    """sum P_S log(P_S / P_T). Infinite where the teacher excludes what the student does not."""

    def value(self, chunk: Chunk) -> Tensor:
        p_CV = chunk.student_CV.softmax(-1)
        return chunk.log_ratio(p_CV).mul_(p_CV).sum(-1)

    def gradient(self, chunk: Chunk) -> Tensor:
        p_CV = chunk.student_CV.softmax(-1)
        return _by_logits(chunk.log_ratio(p_CV).mul_(p_CV), p_CV)


@dataclass(frozen=True)
class TopKLD(Tempered):
    """Reverse KL on the teacher's most probable codes and forward KL on the others (Ding et al. eq. 7, corrected).

    Over the K most probable codes sum P_S log(P_S/P_T) + P_T - P_S, over the rest P_T log(P_T/P_S) + P_S - P_T. The
    mass terms are not in the paper; they make every term non-negative and zero only where both agree. K = 0 is forward
    KL, K = V reverse KL. Codes as probable as the K-th are in the set with it, so that no order among ties matters.
    Infinite where the teacher excludes a code of the set that the student does not (a teacher that leaves fewer than
    K codes has all others in the set), and where the student excludes one of the rest that the teacher does not.

    top_k: K, from 0 to the vocabulary's size; the sampler's own is best (Table 4)
    as_printed: without the mass terms, which is not a divergence (see PRINTED_WARNING)
    """

    top_k: int | None = None
    as_printed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give a number of codes, from 0 (forward KL) to the vocabulary's")

    def check(self, vocab_size: int) -> None:
        if self.top_k is None:
            raise ValueError(
                f"TopKLD needs top_k, how many of the {vocab_size} codes are compared by reverse KL; give the top-k "
                "that the sampler draws with"
            )
        if self.top_k > vocab_size:
            raise ValueError(
                f"top_k is {self.top_k}, but the vocabulary has {vocab_size} codes; give a number from 0 (forward KL) "
                f"to {vocab_size} (reverse KL)"
            )

    def cutoff(self, teacher_CV: Tensor) -> Tensor:
        """The logit of the K-th most probable code."""
        assert self.top_k is not None
        if self.top_k == 0:
            return torch.full_like(teacher_CV[:, :1], torch.inf)
        if self.top_k == teacher_CV.shape[1]:
            return teacher_CV.amin(-1, keepdim=True)
        if teacher_CV.device.type == "cpu":  # NumPy partitions some ten times faster than torch finds the K largest
            index = teacher_CV.shape[1] - self.top_k
            return torch.from_numpy(np.partition(teacher_CV.numpy(), index, axis=-1)[:, index : index + 1].copy())
        return teacher_CV.topk(self.top_k, sorted=False).values.amin(-1, keepdim=True)

    def value(self, chunk: Chunk) -> Tensor:
        p_CV, q_CV = chunk.student_CV.softmax(-1), chunk.teacher_CV.softmax(-1)
        in_set_CV = self._in_set(chunk)
        weight_CV = torch.lerp(q_CV, p_CV, in_set_CV)
        terms_CV = chunk.log_ratio(weight_CV).mul_(weight_CV)
        if self.as_printed:
            return terms_CV.mul_(in_set_CV.mul_(2).sub_(1)).sum(-1)
        # A term of the rest is the negative of its divergence here; the others are positive as they are.
        return terms_CV.sub_(p_CV.sub_(q_CV)).abs_().sum(-1)

    def gradient(self, chunk: Chunk) -> Tensor:
        p_CV, q_CV = chunk.student_CV.softmax(-1), chunk.teacher_CV.softmax(-1)
        in_set_CV = self._in_set(chunk)
        # In the set h = P_S log(P_S/P_T), in the rest P_S - P_T; the ratio counts in the set only.
        by_set_CV = chunk.log_ratio(p_CV * in_set_CV)
        if self.as_printed:
            by_set_CV.add_(1)
            by_rest_CV = q_CV.neg_()
        else:
            by_rest_CV = torch.sub(p_CV, q_CV, out=q_CV)
        return _by_logits(by_rest_CV.lerp_(by_set_CV.mul_(p_CV), in_set_CV), p_CV)

    def _in_set(self, chunk: Chunk) -> Tensor:
        """1 for the teacher's most probable codes, 0 for the rest: numbers, as masks of bool are slow on a CPU."""
        return chunk.teacher_CV.clone().ge_(chunk.cutoff_C1)


LOSSES: dict[str, Divergence] = {
    "ce": CrossEntropy(),
    "mse": MSE(),
    "js": JS(),
    "forward-kl": ForwardKL(),
    "reverse-kl": ReverseKL(),
    "topkld": TopKLD(),
    "topkld-printed": TopKLD(as_printed=True),
}


def make_loss(name: str, *, vocab_size: int, top_k: int | None = None, temperature: float = 1.0) -> Divergence:
    """The loss of that name with its settings.

    top_k: for TopKLD, which must have one; temperature: for losses on probabilities. ValueError for an unknown name, a
    setting that the loss has not, a top_k that is missing or above the vocabulary. Warns if the loss is no divergence.
    """
    loss: Any = lookup(LOSSES, name, "loss")
    settings: dict[str, Any] = {}
    for setting, given, default in (("top_k", top_k, None), ("temperature", temperature, 1.0)):
        having = [key for key, other in LOSSES.items() if setting in _settings(other)]
        if name in having:
            settings[setting] = given
        elif given != default:
            raise ValueError(
                f"loss '{name}' has no {setting}, but {given} was given; leave it out, or use {', '.join(having)}"
            )
    made: Divergence = replace(loss, **settings)
    made.check(vocab_size)
    if isinstance(made, TopKLD) and made.as_printed:
        warnings.warn(PRINTED_WARNING, stacklevel=2)
    return made


def _settings(loss: Any) -> set[str]:
    return {entry.name for entry in fields(loss)}


def _empty(student_NV: Tensor) -> Tensor:
    """Stands for logits or tokens that a loss does not use (N, 0)."""
    return student_NV.detach()[:, :0]


def _checked(tokens_N: Tensor | None, student_NV: Tensor) -> Tensor:
    """The tokens; ValueError unless there is a code of the vocabulary for every row."""
    num_tokens, vocab_size = student_NV.shape
    if tokens_N is None:
        raise ValueError("the cross entropy is that of the true tokens; give them")
    if tokens_N.shape != (num_tokens,) or tokens_N.dtype != torch.int64:
        raise ValueError(f"tokens are {tokens_N.dtype} of shape {tuple(tokens_N.shape)}; give int64, ({num_tokens},)")
    if num_tokens and not 0 <= int(tokens_N.min()) <= int(tokens_N.max()) < vocab_size:
        raise ValueError(
            f"tokens go from {int(tokens_N.min())} to {int(tokens_N.max())}, but the vocabulary has {vocab_size} "
            "codes; give those of the tokenizer that the model was made for"
        )
    return tokens_N


def _by_logits(by_log_CV: Tensor, p_CV: Tensor) -> Tensor:
    """The derivative by logits from that by log P_S, in place."""
    return by_log_CV.addcmul_(p_CV, by_log_CV.sum(-1, keepdim=True), value=-1)


def _all_finite(x_NV: Tensor, temperature: float) -> bool:
    """Whether no logit over the temperature is -inf, or NaN."""
    return x_NV.numel() == 0 or math.isfinite(float(x_NV.amin()) / temperature)


def _chunks(
    loss: Divergence,
    student_NV: Tensor,
    teacher_NV: Tensor,
    tokens_N: Tensor,
    excluding: bool,
    chunk_bytes: int | None,
    cutoff_N1: Tensor | None = None,
) -> Iterator[tuple[slice, Chunk]]:
    """The tokens in chunks, with the rows that they are; cutoffs are found where they are not given."""
    num_tokens, vocab_size = student_NV.shape
    dtype = _computed_in(student_NV, teacher_NV)
    default = _CHUNK_BYTES_CPU if student_NV.device.type == "cpu" else _CHUNK_BYTES_GPU
    num_rows = max(1, (chunk_bytes or default) // max(1, vocab_size * dtype.itemsize))
    for begin in range(0, num_tokens, num_rows):
        rows = slice(begin, begin + num_rows)
        student_CV, teacher_CV = (_tempered(x_NV[rows], loss.temperature, dtype) for x_NV in (student_NV, teacher_NV))
        cutoff_C1 = loss.cutoff(teacher_CV) if cutoff_N1 is None else cutoff_N1[rows]
        yield rows, Chunk(student_CV, teacher_CV, tokens_N[rows], cutoff_C1, excluding)


def _computed_in(student_NV: Tensor, teacher_NV: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(torch.promote_types(student_NV.dtype, teacher_NV.dtype), torch.float32)


def _tempered(x_CV: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    x_CV = x_CV.to(dtype)
    return x_CV if temperature == 1 else x_CV / temperature


class _OverChunks(torch.autograd.Function):
    """The loss of each token, chunk by chunk in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        teacher_NV: Tensor,
        tokens_N: Tensor,
        loss: Divergence,
        chunk_bytes: int | None,
    ) -> Tensor:
        logits = student_NV.detach(), teacher_NV
        excluding = not all(_all_finite(x_NV, loss.temperature) for x_NV in logits)
        values_N = student_NV.new_empty(len(student_NV), dtype=_computed_in(*logits))
        cutoff_N1 = torch.empty_like(values_N[:, None])
        for rows, chunk in _chunks(loss, *logits, tokens_N, excluding, chunk_bytes):
            torch.mul(loss.value(chunk), loss.temperature**2, out=values_N[rows])
            cutoff_N1[rows] = chunk.cutoff_C1
        ctx.save_for_backward(student_NV, teacher_NV, tokens_N, cutoff_N1)
        ctx.settings = loss, excluding, chunk_bytes
        return values_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        student_NV, teacher_NV, tokens_N, cutoff_N1 = ctx.saved_tensors
        loss, excluding, chunk_bytes = ctx.settings
        factor_N1 = grads[0][:, None] * loss.temperature  # its square, over the one that the logits were divided by
        grad_NV = torch.empty_like(student_NV)
        for rows, chunk in _chunks(loss, student_NV, teacher_NV, tokens_N, excluding, chunk_bytes, cutoff_N1):
            torch.mul(loss.gradient(chunk), factor_N1[rows], out=grad_NV[rows])
        return grad_NV, None, None, None, None
