"""What a teacher of tokens says of each example, kept in a file.

Legend: B images of a batch, L tokens of an image, V vocabulary.
"""

import os
import shutil
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bitlaw.calibration.cache import fingerprint_of
from bitlaw.calibration.collect import Progress
from bitlaw.distill.examples import Batch, Examples
from bitlaw.models.generator import ImageGenerator, Noise


class TeacherLogits:
    """The teacher's logits of every example, in a file that is mapped: computed when they are first asked for.

    They depend on the example and its label alone, so that `examples` must decide by example which labels are dropped:
    with a cache, an example is always seen with its label or always without. A teacher of continuous latents is asked
    about other noise at each use, and nothing can be kept.

    work: folder of the file, on a disk of this machine; its processes may share it
    dtype: "float16" halves the file and rounds logits to 11 bits
    batch_size: examples that go through the teacher at once in `fill`

    Nothing is written before the first use. ValueError if the teacher or the examples do not allow it, or the disk has
    less free than the file will take.
    """

    def __init__(
        self,
        teacher: ImageGenerator[Any],
        examples: Examples,
        work: Path,
        *,
        dtype: Literal["float32", "float16"] = "float32",
        batch_size: int = 32,
        progress: Progress | None = None,
    ):
        vocab_size = check_cacheable(teacher)
        if dtype not in ("float32", "float16"):
            raise ValueError(f"teacher logits in '{dtype}': must be float32 or float16")
        if examples.null_label is not None and examples.label_dropout and not examples.dropped_by_example:
            raise ValueError(
                "teacher logits are kept for each example with or without its label, and these examples decide at each "
                "use; set dropped_by_example=True or label_dropout=0"
            )
        self.teacher, self.examples, self.batch_size, self.progress = teacher, examples, batch_size, progress
        self.dtype = np.dtype(dtype)
        count = examples.num_train + examples.num_held_out
        self.shape = (count, examples.example_numel, vocab_size)
        self.path = work / f"logits-{self._fingerprint()}.bin"
        self._check_disk()
        if progress is not None:
            progress(f"teacher logits take {self.num_bytes:,} bytes of {self.path.parent}", 0, 0)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._offset + int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def _offset(self) -> int:
        """Where logits begin, after a byte for each example, which is 1 when its logits are there."""
        return -(-self.shape[0] // 4096) * 4096

    def fill(self) -> None:
        """Compute all logits that are not there yet."""
        done = 0
        for batch in chain(self.examples.in_order(self.batch_size), self.examples.held_out(self.batch_size)):
            self._complete(batch)
            done += len(batch.rows_B)
            if self.progress is not None:
                self.progress("teacher logits", done, self.shape[0])

    def of(self, batch: Batch) -> Tensor:
        """Logits (B, L, V) of a batch of the examples, float32, on the CPU.

        In float32 they are the teacher's own, bit for bit, of the batch in which they were computed: in another batch
        it would give the same to rounding.
        """
        self._complete(batch)
        _, logits = self._maps
        return torch.from_numpy(logits[batch.rows_B.numpy()]).float()

    def _complete(self, batch: Batch) -> None:
        there, logits = self._maps
        missing = np.flatnonzero(there[batch.rows_B.numpy()] == 0)
        if not len(missing):
            return
        rows = batch.rows_B.numpy()[missing]
        chosen = torch.from_numpy(missing)
        ids = [batch.image_ids[i] for i in missing]
        given = batch._replace(encoded=batch.encoded[chosen], labels_B=batch.labels_B[chosen])
        computed = teacher_logits(self.teacher, given, Noise(self.examples.seed, ids, self.teacher.device)).cpu()
        values = computed.to(getattr(torch, self.dtype.name))
        if not values.isfinite().all():
            largest = float(computed.abs().max())
            raise ValueError(
                f"teacher logits up to {largest:g} cannot be kept in {self.dtype}"
                + ("; use float32" if self.dtype == np.float16 and np.isfinite(largest) else ": the teacher is broken")
            )
        logits[rows] = values.numpy()
        logits.flush()  # before it is said that they are there
        there[rows] = 1

    @cached_property
    def _maps(self) -> tuple[np.memmap, np.memmap]:
        """Which logits are there, and the logits.

        A file of zeros has none of them, so that one which was just made, by whichever process, is a valid one.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is found now, and not as a fault on a mapped page
                os.posix_fallocate(file.fileno(), 0, self.num_bytes)
            else:
                file.truncate(self.num_bytes)
        there = np.memmap(self.path, np.uint8, "r+", 0, (self.shape[0],))
        return there, np.memmap(self.path, self.dtype, "r+", self._offset, self.shape)

    def _check_disk(self) -> None:
        folder = next(folder for folder in self.path.absolute().parents if folder.exists())
        has = self.path.stat().st_blocks * 512 if self.path.exists() else 0
        free = shutil.disk_usage(folder).free
        if self.num_bytes - has > free:
            raise ValueError(
                f"teacher logits take {self.num_bytes:,} bytes in {self.path.parent}, which has {free:,} free; use "
                "fewer examples, float16, another folder, or compute them as they are needed"
            )

    def _fingerprint(self) -> str:
        teacher, examples = self.teacher, self.examples
        described = {
            "family": teacher.family,
            "config": {key: value for key, value in teacher.to_config().items() if key != "sampling"},
            "data": examples.data.key,
            "shape": self.shape,
            "dtype": str(self.dtype),
            "dropping": [examples.seed, examples.label_dropout, examples.null_label],
        }
        return fingerprint_of(described, teacher.net, teacher.autoencoder)


def check_cacheable(teacher: ImageGenerator[Any]) -> int:
    """V of a teacher of tokens. ValueError for one of continuous latents, of which nothing can be kept."""
    if teacher.vocab_size is None:
        raise ValueError(
            f"teacher logits of {teacher.family}: it is asked about new noise in every step, and nothing can be kept; "
            "leave them to be computed when they are needed"
        )
    return teacher.vocab_size


def teacher_logits(teacher: ImageGenerator[Any], batch: Batch, noise: Noise) -> Tensor:
    """What a teacher of tokens says of a batch now, (B, L, V), float32."""
    with torch.no_grad():
        given = teacher.teacher_forced(batch.encoded.to(teacher.device), batch.labels_B.to(teacher.device), noise)
        return teacher.predict(given)["logits"].float()
