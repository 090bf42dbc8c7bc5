"""Where the examples of a distillation come from.

A `Source` gives images as the model's network works on them: tokens, or scaled latents.

Legend: M examples of a part, B images of a batch, C = 3 channels, H = W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitlaw.calibration.cache import fingerprint_of
from bitlaw.calibration.collect import Progress
from bitlaw.ladder import data as ladder
from bitlaw.metrics.evaluation import cyclic_labels
from bitlaw.metrics.samples import IMAGE_SUFFIXES, check_picture, read_square
from bitlaw.models.autoencoders import autoencoder_config
from bitlaw.models.generator import ImageGenerator, Noise, rollout

GENERATED_SEED = 2**22
"""Of the images that a teacher draws to be learned from; calibration has 2**20, evaluations small numbers."""
NAMED = 3
"""Files of many that a message names."""


class Part(NamedTuple):
    """Some examples, on the CPU.

    encoded: (M, ...), what `ImageGenerator.encode_images` gives: tokens, or scaled latents
    labels_M: int64
    left_out: what was wrong with each example that is missing, beginning with its file
    """

    encoded: Tensor
    labels_M: Tensor
    left_out: tuple[str, ...] = ()


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
        return fingerprint_of(described, autoencoder)


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
                + first_of(left_out, "\n")
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
        model = self.model
        described = {
            "kind": "generated",
            "family": model.family,
            "config": model.to_config(),
            "sampling": repr(model.sampling),
            "seed": self.seed,
            "num_train": self.num_train,
            "num_held_out": self.num_held_out,
        }
        return fingerprint_of(described, model.net, model.autoencoder)


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
        raise ValueError(f"{root}: folders without images, which classes have: {first_of(empty)}; remove or fill them")
    labels = _class_numbers(root, [folder.name for folder in folders], model.num_classes)
    return [(path, label) for label, images in zip(labels, inside.values(), strict=True) for path in images]


def _class_numbers(root: Path, names: Sequence[str], num_classes: int) -> list[int]:
    """The class of each folder."""
    if all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        if wrong := [name for name, number in zip(names, numbers, strict=True) if number >= num_classes]:
            raise ValueError(f"{root}: class {first_of(wrong)}: this model has classes 0 to {num_classes - 1}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{root}: two folders of one class; name each by its number alone: {first_of(names)}")
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


def first_of(found: Sequence[str], between: str = ", ") -> str:
    """Some of many files, in words."""
    return between.join([*found[:NAMED], *([f"and {len(found) - NAMED} more"] if len(found) > NAMED else [])])
