"""Where the examples of a distillation come from, how they are encoded once, and what each training step sees of them.

A `Source` gives images as the model's network works on them: tokens, or scaled latents. `encode` asks it for all of
them and keeps them; `Examples` makes batches; `TeacherLogits` keeps what the teacher says of each of them.

Legend: M examples of a part, B images of a batch, L tokens of an image, V vocabulary, C = 3 channels, H = W pixels.
"""

import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from bitlaw.calibration.cache import fingerprint_of
from bitlaw.calibration.collect import Progress
from bitlaw.distill.settings import Distillation
from bitlaw.files import write_json, write_with
from bitlaw.ladder import data as ladder
from bitlaw.metrics.evaluation import cyclic_labels
from bitlaw.metrics.samples import IMAGE_SUFFIXES, check_picture, read_square
from bitlaw.models.autoencoders import autoencoder_config
from bitlaw.models.generator import ImageGenerator, Noise, rollout
from bitlaw.training import batch_indices

GENERATED_SEED = 2**22
"""Of the images that a teacher draws to be learned from; calibration has 2**20, evaluations small numbers."""
DROPPING_SEED = 2**23
"""Added to the seed of a training run for the choice of labels that are dropped."""
PART = 2048
"""Examples that are encoded between two writes to disk."""
NAMED = 3
"""Files of many that a message names."""

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """Some examples, on the CPU.

    encoded: (M, ...), what `ImageGenerator.encode_images` gives: tokens, or scaled latents
    labels_M: int64
    left_out: what was wrong with each example that is missing, beginning with its file
    """

    encoded: Tensor
    labels_M: Tensor
    left_out: tuple[str, ...] = ()


# ---- sources -------------------------------------------------------------------------------------


class Source(ABC):
    """Where examples come from. Example i is always the same one; the last `num_held_out` are not trained on."""

    name: str
    """It in a word, or the folder."""

    def __init__(self, model: ImageGenerator[Any], num_train: int, num_held_out: int):
        if not model.num_classes:
            raise ValueError(f"this {model.family} draws from texts; examples to learn from have classes, or no label")
        if num_train < 1 or num_held_out < 1:
            raise ValueError(f"{num_train} examples to train on, {num_held_out} held out: at least one of each")
        self.model, self.num_train, self.num_held_out = model, num_train, num_held_out

    @abstractmethod
    def examples(self, first: int, count: int) -> Part:
        """Examples first .. first + count - 1, those left out that cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A name for all that the examples depend on."""

    def check(self, progress: Progress | None = None) -> None:
        """ValueError for what can be found wrong without encoding anything."""
        self.check_left_out(())

    def check_left_out(self, left_out: Sequence[str]) -> None:
        """ValueError if these are more than may be left out."""
        assert not left_out

    def _encode(self, images_BCHW: Tensor) -> Tensor:
        return self.model.encode_images(images_BCHW.to(self.model.device)).cpu()

    def _fingerprint_of_encoded(self, **described: Any) -> str:
        """A name for images, described in plain values, after this model's autoencoder.

        Models of a family that share it share the examples, whatever the size of their networks.
        """
        model, autoencoder = self.model, self.model.autoencoder
        black_BCHW = torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8)
        described |= {
            "family": model.family,
            "config": {key: value for key, value in model.to_config().items() if key not in ("net", "sampling")},
            "shape": list(self._encode(black_BCHW).shape),
            "num_train": self.num_train,
            "num_held_out": self.num_held_out,
            "autoencoder": None if autoencoder is None else autoencoder_config(autoencoder),
        }
        return fingerprint_of(described, *([] if autoencoder is None else [autoencoder]))


class LadderImages(Source):
    """The first training images of the ladder; held out are the first of its validation images.

    ValueError for a model that draws another size, or other classes.
    """

    name = "ladder"

    def __init__(self, model: ImageGenerator[Any], num_train: int = 16384, num_held_out: int = 512):
        super().__init__(model, num_train, num_held_out)
        if model.image_size != ladder.IMAGE_SIZE:
            raise ValueError(
                f"the ladder's images have {ladder.IMAGE_SIZE} pixels a side, this {model.family} draws "
                f"{model.image_size}; give a folder of images, or let the teacher draw them"
            )
        if not _is_unconditional(model) and model.num_classes != ladder.NUM_CLASSES:
            raise ValueError(
                f"the ladder has {ladder.NUM_CLASSES} classes, this {model.family} has {model.num_classes}; give a "
                "folder of images, or let the teacher draw them"
            )

    def examples(self, first: int, count: int) -> Part:
        """Drawn now; those after `num_train` are the validation images."""
        held_out = first >= self.num_train
        assert held_out or first + count <= self.num_train
        images = ladder.draw("validation", first - self.num_train, count) if held_out else None
        images = images or ladder.draw("train", first, count)
        labels_B = torch.zeros_like(images.labels_B) if _is_unconditional(self.model) else images.labels_B
        return Part(self._encode(images.images_BCHW), labels_B)

    def fingerprint(self) -> str:
        """A name for the images and the autoencoder."""
        return self._fingerprint_of_encoded(kind="ladder")


class ImageFolder(Source):
    """A folder of images, their middle squares scaled to the model's size, in an order that is shuffled once.

    Folders inside of it are the classes, as ImageNet has them: in the order of their names, or, where all names are
    whole numbers, with these numbers. A folder of images alone is for a model without classes; a model with classes
    learns from it as the unconditional one, by its null label.

    num_train: the first of the shuffled images; None for all that are not held out
    num_held_out: the last of them
    max_unreadable: share of the images that may be damaged or transparent, and are then left out

    ValueError for a folder without images, for classes that are not the model's, for too few images.
    """

    def __init__(
        self,
        model: ImageGenerator[Any],
        path: Path | str,
        num_train: int | None = None,
        num_held_out: int = 512,
        *,
        max_unreadable: float = 0.01,
    ):
        self.path, self.name, self.max_unreadable = Path(path), str(path), max_unreadable
        if not 0 <= max_unreadable < 1:
            raise ValueError(f"max_unreadable {max_unreadable:g}: a share, from 0 to less than 1")
        files = _labelled_files(self.path, model)
        if num_train is None:
            num_train = len(files) - num_held_out
        if num_train < 1 or num_train + num_held_out > len(files):
            raise ValueError(
                f"{self.path}: {len(files)} images, of which {num_held_out} are to be held out and "
                f"{max(num_train, 1)} trained on; give more images, or ask for fewer"
            )
        super().__init__(model, num_train, num_held_out)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        self.files = [files[i] for i in (*order[:num_train], *order[len(files) - num_held_out :])]

    def examples(self, first: int, count: int) -> Part:
        """Read and encoded now."""
        images, labels, left_out = [], [], []
        for path, label in self.files[first : first + count]:
            try:
                images.append(read_square(path, self.model.image_size))
                labels.append(label)
            except ValueError as error:
                left_out.append(str(error))
        if not images:  # the shape is that of an image
            images.append(torch.zeros(3, self.model.image_size, self.model.image_size, dtype=torch.uint8))
        encoded = self._encode(torch.stack(images))[: len(labels)]
        return Part(encoded, torch.tensor(labels, dtype=torch.int64), tuple(left_out))

    def check(self, progress: Progress | None = None) -> None:
        """Look at every image's header: ValueError if more are unreadable than may be."""
        left_out = []
        for done, (path, _) in enumerate(self.files, start=1):
            try:
                check_picture(path)
            except ValueError as error:
                left_out.append(str(error))
            if progress is not None:
                progress("looking at images", done, len(self.files))
        self.check_left_out(left_out)

    def check_left_out(self, left_out: Sequence[str]) -> None:
        """ValueError if these are more than `max_unreadable` of the images."""
        if len(left_out) > self.max_unreadable * len(self.files):
            raise ValueError(
                f"{self.path}: {len(left_out)} of {len(self.files)} images cannot be used, and at most "
                f"{self.max_unreadable:.2%} may be left out (max_unreadable); repair or remove them:\n"
                + _first_of(left_out, "\n")
            )

    def fingerprint(self) -> str:
        """A name for the autoencoder, and for names, labels, sizes and dates of the files."""
        files = [(str(path.relative_to(self.path)), label, *_stamp(path)) for path, label in self.files]
        return self._fingerprint_of_encoded(kind="folder", files=files)


class TeacherImages(Source):
    """Images that the teacher draws with the settings of its sampler, of each class in turn: no data are needed.

    They are those of `teacher.generate(labels, seed)`, before they are decoded.
    """

    name = "generated"

    def __init__(
        self,
        teacher: ImageGenerator[Any],
        num_train: int = 16384,
        num_held_out: int = 512,
        *,
        seed: int = GENERATED_SEED,
    ):
        super().__init__(teacher, num_train, num_held_out)
        self.seed = seed

    def examples(self, first: int, count: int) -> Part:
        """Drawn now; example i is image i of the run."""
        labels_B = cyclic_labels(first + count, self.model.num_classes)[first:]
        noise = Noise(self.seed, range(first, first + count), self.model.device)
        state = None
        for step in rollout(self.model, self.model.check_labels(labels_B), noise):
            state = step.after
        assert state is not None
        return Part(self.model.encoded_of(state).cpu(), labels_B)

    def fingerprint(self) -> str:
        """A name for the teacher, its sampler, and the seed."""
        model, autoencoder = self.model, self.model.autoencoder
        described = {
            "kind": "generated",
            "family": model.family,
            "config": model.to_config(),
            "sampling": repr(model.sampling),
            "seed": self.seed,
            "num_train": self.num_train,
            "num_held_out": self.num_held_out,
        }
        return fingerprint_of(described, model.net, *([] if autoencoder is None else [autoencoder]))


def open_source(
    data: str | Path | None,
    teacher: ImageGenerator[Any],
    num_train: int,
    num_held_out: int,
    *,
    max_unreadable: float = 0.01,
) -> Source:
    """The source that `data` names: "ladder", "generated" (by the teacher), or a folder of images.

    None is the ladder for a model of its size and classes, and the teacher's own images for others.
    """
    if data is None:
        data = "ladder" if _draws_ladder(teacher) else "generated"
    if data == "ladder":
        return LadderImages(teacher, num_train, num_held_out)
    if data == "generated":
        return TeacherImages(teacher, num_train, num_held_out)
    return ImageFolder(teacher, data, num_train, num_held_out, max_unreadable=max_unreadable)


def _draws_ladder(model: ImageGenerator[Any]) -> bool:
    return (model.image_size, model.num_classes) == (ladder.IMAGE_SIZE, ladder.NUM_CLASSES)


def _is_unconditional(model: ImageGenerator[Any]) -> bool:
    """Whether a model has no classes at all; its only label is 0."""
    return model.num_classes == 1 and model.null_label is None


def _labelled_files(root: Path, model: ImageGenerator[Any]) -> list[tuple[Path, int]]:
    """The images of a folder and their labels, in order of names."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; give a folder of images, 'ladder' or 'generated'")
    loose = _images_in(root)
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    inside = {folder: _images_in(folder) for folder in folders}
    if not any(inside.values()):
        if not loose:
            raise ValueError(f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}) in it or in the folders inside of it")
        if model.null_label is None and not _is_unconditional(model):
            raise ValueError(
                f"{root}: {len(loose)} images without classes, but this {model.family} draws {model.num_classes} "
                "classes and has no label for none; put them into a folder for each class"
            )
        return [(path, model.null_label or 0) for path in loose]
    if loose:
        raise ValueError(
            f"{root}: {len(loose)} images beside folders of images, {loose[0].name} the first; put them into the "
            "folder of their class"
        )
    if empty := [folder.name for folder, images in inside.items() if not images]:
        raise ValueError(f"{root}: folders without images, which classes have: {_first_of(empty)}; remove or fill them")
    labels = _class_numbers(root, [folder.name for folder in folders], model.num_classes)
    return [(path, label) for label, images in zip(labels, inside.values(), strict=True) for path in images]


def _class_numbers(root: Path, names: Sequence[str], num_classes: int) -> list[int]:
    """The class of each folder."""
    if all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        if wrong := [name for name, number in zip(names, numbers, strict=True) if number >= num_classes]:
            raise ValueError(f"{root}: class {_first_of(wrong)}: this model has classes 0 to {num_classes - 1}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{root}: two folders of one class; name each by its number alone: {_first_of(names)}")
        return numbers
    if len(names) != num_classes:
        raise ValueError(
            f"{root}: {len(names)} folders, but this model has {num_classes} classes; make one for each, or name those "
            "there are by the numbers of their classes"
        )
    return list(range(num_classes))


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())


def _stamp(path: Path) -> tuple[int, int]:
    """Size and date of a file; zeros for a link to nothing."""
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return 0, 0


def _first_of(found: Sequence[str], between: str = ", ") -> str:
    return between.join([*found[:NAMED], *([f"and {len(found) - NAMED} more"] if len(found) > NAMED else [])])


# ---- encoding once -------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedData:
    """A source's examples, encoded: those that are trained on, and those that are held out.

    name, key: of the source; the key is its fingerprint
    """

    train: Part
    held_out: Part
    name: str
    key: str


def encode(
    source: Source, work: Path | None = None, *, batch_size: int = 64, progress: Progress | None = None
) -> EncodedData:
    """All examples of a source, in memory, or in files of the folder `work` that are read as they are needed.

    What is in the folder is used again. It is written part by part, so that an interrupted run goes on where it was.
    Of several processes that share the folder, let one go first. ValueError if the source has less than it should.
    """
    key = source.fingerprint()
    folder = None if work is None else work / key
    ends = {"train": (0, source.num_train), "held_out": (source.num_train, source.num_train + source.num_held_out)}
    parts = {name: None if folder is None else _read(folder / name) for name in ends}
    if None in parts.values():
        source.check(progress)
    done, total = 0, source.num_train + source.num_held_out

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("encoding images", done, total)

    whole = {}
    for name, (begin, end) in ends.items():
        part = parts[name]
        if part is None:
            part = _encode_span(source, range(begin, end), None if folder is None else folder / name, batch_size, tick)
        else:
            tick(end - begin)
        whole[name] = part
    data = EncodedData(whole["train"], whole["held_out"], source.name, key)
    left_out = data.train.left_out + data.held_out.left_out
    source.check_left_out(left_out)
    if not len(data.train.labels_M) or not len(data.held_out.labels_M):
        raise ValueError(f"none of the images to train on or to hold out can be read: {_first_of(left_out)}")
    if left_out:
        log.warning("%d of %d images are left out, the first: %s", len(left_out), total, left_out[0])
    return data


def _encode_span(source: Source, span: range, path: Path | None, batch_size: int, tick: Callable[[int], None]) -> Part:
    """Examples of a span, encoded part by part; with a path in files, which are put together at the end."""
    parts: list[Part] = []
    stems: list[Path | None] = []
    for begin in range(span.start, span.stop, PART):
        end = min(begin + PART, span.stop)
        stem = None if path is None else path.with_name(f"{path.name}-{begin}")
        part = None if stem is None else _read(stem)
        if part is None:
            pieces = []
            for first in range(begin, end, batch_size):
                count = min(batch_size, end - first)
                pieces.append(_compact(source.examples(first, count), source.model.vocab_size))
                tick(count)
            part = _join(pieces, stem)
            source.check_left_out([problem for each in [*parts, part] for problem in each.left_out])
        else:
            tick(end - begin)
        parts.append(part)
        stems.append(stem)
    whole = _join(parts, path)
    for stem in stems:
        if stem is not None:
            stem.with_suffix(".json").unlink()
            stem.with_suffix(".npy").unlink()
    return whole


def _compact(part: Part, vocab_size: int | None) -> Part:
    """Tokens in two bytes where they fit, else in four.

    Latents stay in float32: in float16 they would be others than the encoder gave, and than a run without files has.
    """
    if vocab_size is None:
        return part._replace(encoded=part.encoded.float())
    return part._replace(encoded=part.encoded.to(torch.int16 if vocab_size <= 2**15 else torch.int32))


def _join(parts: Sequence[Part], path: Path | None) -> Part:
    """One part of several, in memory or in files: `path`.npy, and then `path`.json, which says that it is whole."""
    labels_M = torch.cat([part.labels_M for part in parts])
    left_out = tuple(problem for part in parts for problem in part.left_out)
    if path is None:
        return Part(torch.cat([part.encoded for part in parts]), labels_M, left_out)

    def write(temporary: Path) -> None:
        first = parts[0].encoded.numpy()
        shape = (len(labels_M), *first.shape[1:])
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, header)
            for part in parts:
                part.encoded.numpy().tofile(file)

    write_with(path.with_suffix(".npy"), write)
    write_json(path.with_suffix(".json"), {"labels": labels_M.tolist(), "left_out": left_out})
    stored = _read(path)
    assert stored is not None
    return stored


def _read(path: Path) -> Part | None:
    """What `_join` wrote, mapped; None if it is not there or damaged, and so to be made again."""
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        # Copy on write: nothing writes to it, but a tensor cannot be of numbers that must not be written.
        encoded = np.load(path.with_suffix(".npy"), mmap_mode="c" if about["labels"] else None)
    except (OSError, ValueError, EOFError):
        return None
    labels_M = torch.tensor(about["labels"], dtype=torch.int64)
    if len(labels_M) != len(encoded):
        return None
    return Part(torch.from_numpy(encoded), labels_M, tuple(about["left_out"]))


# ---- batches -------------------------------------------------------------------------------------


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
    logits: "TeacherLogits | None" = None

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


# ---- what the teacher says -----------------------------------------------------------------------


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
        autoencoder = teacher.autoencoder
        return fingerprint_of(described, teacher.net, *([] if autoencoder is None else [autoencoder]))


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


# ---- all together --------------------------------------------------------------------------------


def source_of(teacher: ImageGenerator[Any], settings: Distillation) -> Source:
    """The source that the settings of a distillation name. ValueError for what does not go with the teacher."""
    if settings.cache_teacher:
        check_cacheable(teacher)
    return open_source(
        settings.data,
        teacher,
        settings.num_examples,
        settings.num_held_out,
        max_unreadable=settings.max_unreadable,
    )


def open_examples(
    teacher: ImageGenerator[Any],
    settings: Distillation,
    work: Path,
    shared: Path | None = None,
    progress: Progress | None = None,
) -> Examples:
    """The examples that the settings of a distillation name, encoded by the teacher and kept in a folder.

    work: for the teacher's logits, which come with the examples if `cache_teacher` says so, and for the examples
    shared: a folder for the examples that other runs use as well, if there is one

    Raises every ValueError of what this is made of.
    """
    source, folder = source_of(teacher, settings), shared or work / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # what one process has encoded the next one finds
        encoded = encode(source, folder, progress=progress)
    examples = Examples(
        encoded,
        teacher.null_label,
        settings.seed,
        settings.label_dropout,
        dropped_by_example=settings.cache_teacher,
    )
    if settings.cache_teacher:
        examples = replace(examples, logits=TeacherLogits(teacher, examples, work / "logits", progress=progress))
    return examples
