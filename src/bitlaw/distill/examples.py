"""What each training step sees of encoded examples: a function of step and seed, however a batch is split.

Legend: B images of a batch, L tokens of an image, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bitlaw.distill.encoding import EncodedData
from bitlaw.models.generator import Noise
from bitlaw.training import batch_indices

DROPPING_SEED = 2**23
"""Added to the seed of a training run for the choice of labels that are dropped."""


class Batch(NamedTuple):
    """What a step is taken on, on the CPU.

    encoded: (B, ...), tokens int64 or latents float32
    labels_B: int64, some of them the null label
    image_ids: for `Noise`: new ones in every step
    rows_B: which examples they are; those that are held out come after those that are trained on
    logits_BLV: the teacher's, float32, where they are kept
    """

    encoded: Tensor
    labels_B: Tensor
    image_ids: range
    rows_B: Tensor
    logits_BLV: Tensor | None = None


class Logits(Protocol):
    """A cache of what a teacher says (`teacher_logits.TeacherLogits`)."""

    def of(self, batch: Batch) -> Tensor:
        """(B, L, V), float32."""
        ...


@dataclass(frozen=True)
class Examples:
    """What the steps of a training run see of encoded data: a function of step and seed, however it is split.

    null_label: of the unconditional model; None if there is none, and then no label is dropped
    label_dropout: share of the labels that become the null label, as in the training of a model with guidance
    dropped_by_example: whether it is decided once for an example whether its label is dropped, and not at each use; a
        cache of what a teacher says needs this
    logits: such a cache, made of examples that are otherwise these
    """

    data: EncodedData
    null_label: int | None
    seed: int = 0
    label_dropout: float = 0.1
    dropped_by_example: bool = False
    logits: Logits | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout {self.label_dropout:g}: a share, from 0 to 1")

    @property
    def num_train(self) -> int:
        """Examples that are trained on."""
        return len(self.data.train.labels_M)

    @property
    def num_held_out(self) -> int:
        """Examples that are not."""
        return len(self.data.held_out.labels_M)

    @property
    def example_numel(self) -> int:
        """Tokens or numbers of one example."""
        return self.data.train.encoded[0].numel()

    @property
    def name(self) -> str:
        """Where they come from, in a word."""
        return self.data.name

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step, or the share of one of `world` processes; every example comes once an epoch.

        size: of the whole batch. Microbatches m of n on rank r of w are those of rank r * n + m of w * n.
        ValueError for a batch larger than the data, or that cannot be shared evenly.
        """
        if not 1 <= size <= self.num_train:
            raise ValueError(f"batch size {size}: from 1 to the {self.num_train} examples that there are")
        if not 0 <= rank < world or size % world:
            raise ValueError(f"batch size {size}: cannot be shared evenly, share {rank} of {world}")
        share = size // world
        rows_B = batch_indices(step, size, self.num_train, self.seed)[rank * share : (rank + 1) * share]
        first = step * size + rank * share
        return self._batch(rows_B, range(first, first + share))

    def in_order(self, size: int) -> Iterator[Batch]:
        """Every example that is trained on once, in batches of `size`."""
        for begin in range(0, self.num_train, size):
            ids = range(begin, min(begin + size, self.num_train))
            yield self._batch(torch.arange(ids.start, ids.stop), ids)

    def held_out(self, size: int) -> Iterator[Batch]:
        """The examples that are held out, no label dropped. Their image ids are negative, and no step's."""
        part, count = self.data.held_out, self.num_held_out
        for begin in range(0, count, size):
            end = min(begin + size, count)
            rows_B = torch.arange(self.num_train + begin, self.num_train + end)
            ids = range(begin - count, end - count)
            yield self._with_logits(Batch(_wide(part.encoded[begin:end]), part.labels_M[begin:end], ids, rows_B))

    def _batch(self, rows_B: Tensor, image_ids: range) -> Batch:
        labels_B = self.data.train.labels_M[rows_B]
        if self.null_label is not None and self.label_dropout:
            decided_by = rows_B.tolist() if self.dropped_by_example else image_ids
            dropped_B = Noise(self.seed + DROPPING_SEED, decided_by).uniform(0, ()) < self.label_dropout
            labels_B = labels_B.masked_fill(dropped_B, self.null_label)
        return self._with_logits(Batch(_wide(self.data.train.encoded[rows_B]), labels_B, image_ids, rows_B))

    def _with_logits(self, batch: Batch) -> Batch:
        return batch if self.logits is None else batch._replace(logits_BLV=self.logits.of(batch))


def _wide(encoded: Tensor) -> Tensor:
    """A copy, in the types that models take."""
    return encoded.clone() if encoded.is_floating_point() else encoded.long()
