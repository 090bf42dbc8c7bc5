"""Calibration that has been done before: statistics by a fingerprint of all that they depend on.

They lie in the folder that the environment variable BITLAW_CACHE names, by default in the user's cache folder; the
oldest go when it is full. An empty BITLAW_CACHE turns it off.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitlaw.calibration.collect import Progress, collect
from bitlaw.calibration.histogram import Histogram
from bitlaw.calibration.settings import Calibration
from bitlaw.calibration.stats import InputStats
from bitlaw.files import write_with
from bitlaw.models.generator import ImageGenerator

LARGEST_ENTRY = 2**31
LARGEST_CACHE = 2**33

log = logging.getLogger(__name__)


def calibrate(
    model: ImageGenerator[Any],
    settings: Calibration,
    names: Sequence[str],
    needs: frozenset[str],
    step_groups: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> dict[str, InputStats]:
    """`collect`, or what it gave before for the same model, settings, layers and needs."""
    folder = cache_folder()
    if folder is None:
        return collect(model, settings, names, needs, step_groups, progress)
    key = fingerprint(model, settings, sorted(names), sorted(needs), list(step_groups))
    path = folder / f"{key}.safetensors"
    if (stored := _read(path)) is not None:
        log.info("calibration: found in %s", folder)
        return stored
    stats = collect(model, settings, names, needs, step_groups, progress)
    _write(path, stats)
    return stats


def fingerprint(model: ImageGenerator[Any], settings: Calibration, *more: Any) -> str:
    """A name for a model's numbers, its sampler, calibration settings, and further plain values."""
    described = {
        "config": model.to_config(),
        "sampling": repr(model.sampling),
        "settings": settings.to_json(),
        "more": more,
    }
    return fingerprint_of(described, model.net)


def fingerprint_of(described: Mapping[str, Any], *modules: nn.Module | None) -> str:
    """A name for plain values and the numbers of modules (None has none), under these versions of bitlaw and torch."""
    digest = hashlib.blake2b(digest_size=16)
    described = {"versions": [version("bitlaw"), version("torch")], **described}
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    for module in modules:
        if module is None:
            continue
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            digest.update(name.encode())
            numbers: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(numbers)
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """Where statistics are kept; None if they are not."""
    named = os.environ.get("BITLAW_CACHE")
    if named is not None:
        return Path(named) / "calibration" if named else None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "bitlaw" / "calibration"


_TENSORS = [f.name for f in fields(InputStats) if f.name not in ("histograms_S", "num_rows")]


def _write(path: Path, stats: Mapping[str, InputStats]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, entry in stats.items():
        tensors |= {f"{name}/{f}": value for f in _TENSORS if (value := getattr(entry, f)) is not None}
        tensors[f"{name}/num_rows"] = torch.tensor(entry.num_rows)
        for group, histogram in enumerate(entry.histograms_S or ()):
            ends = torch.tensor([histogram.bound, histogram.low, histogram.high], dtype=torch.float64)
            tensors |= {f"{name}/histogram.{group}": histogram.counts_K, f"{name}/histogram_ends.{group}": ends}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > LARGEST_ENTRY:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_room(path.parent, size)
        write_with(path, lambda temporary: save_file({k: v.contiguous() for k, v in tensors.items()}, temporary))
    except OSError as error:  # a full or read-only disk costs the next calibration, not this one
        log.warning("calibration is not kept: %s", error)


def _make_room(folder: Path, size: int) -> None:
    entries = sorted(folder.glob("*.safetensors"), key=lambda entry: entry.stat().st_mtime)
    held = sum(entry.stat().st_size for entry in entries)
    while entries and held + size > LARGEST_CACHE:
        held -= entries[0].stat().st_size
        entries.pop(0).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, InputStats] | None:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # not there, or damaged: it is made again
        return None
    names = dict.fromkeys(name.rpartition("/")[0] for name in tensors)
    return {name: _entry(name, tensors) for name in names}


def _entry(name: str, tensors: Mapping[str, Tensor]) -> InputStats:
    histograms: list[Histogram] = []
    while (counts_K := tensors.get(f"{name}/histogram.{len(histograms)}")) is not None:
        bound, low, high = tensors[f"{name}/histogram_ends.{len(histograms)}"].tolist()
        histograms.append(Histogram(counts_K, bound, low, high))
    given: dict[str, Any] = {f: tensors.get(f"{name}/{f}") for f in _TENSORS}
    return InputStats(**given, histograms_S=tuple(histograms) or None, num_rows=int(tensors[f"{name}/num_rows"]))
