"""Names of classes, so that `golden retriever` may be said for 207.

The 1000 classes of ImageNet (ILSVRC 2012) in the order that every model trained on it uses.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

from bitlaw.names import unknown_name

NUM_IMAGENET_CLASSES = 1000


@lru_cache(maxsize=1)
def imagenet_names() -> tuple[tuple[str, ...], ...]:
    """The names of every class, the usual one first: ("great white shark", "white shark", ...)."""
    text = (resources.files("bitlaw") / "models" / "imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(tuple(name.strip() for name in line.split(",")) for line in text.splitlines())


def known_names(num_classes: int) -> Sequence[Sequence[str]] | None:
    """Names of the classes of a model with so many of them, all of each; None if they are not known."""
    return imagenet_names() if num_classes == NUM_IMAGENET_CLASSES else None


def label_of(name: str, names: Sequence[Sequence[str]] | None) -> int:
    """The number of a class by any of its names, capitals and underscores aside. ValueError gives the nearest names."""
    if names is None:
        raise ValueError(f"label '{name}': the names of this model's classes are not known; give numbers")
    wanted = _plain(name)
    found = [label for label, those in enumerate(names) if wanted in map(_plain, those)]
    if not found:
        raise unknown_name(name, {those[0] for those in names}, "class")
    if len(found) > 1:  # crane and maillot are two classes each
        raise ValueError(f"class '{name}' is ambiguous: {' or '.join(map(str, found))}; give the number")
    return found[0]


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().casefold()
