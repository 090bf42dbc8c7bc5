"""Examples are encoded once, in memory or in files that a next run finds.

Legend: M examples of a part.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bitlaw.calibration.collect import Progress
from bitlaw.distill.sources import Part, Source, first_of
from bitlaw.files import write_json, write_with

PART = 2048
"""Examples that are encoded between two writes to disk."""

log = logging.getLogger(__name__)


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
        raise ValueError(f"none of the images to train on or to hold out can be read: {first_of(left_out)}")
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
