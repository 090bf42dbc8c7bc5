"""Curves that were found before: files beside calibration in the cache, and what an interrupted run has finished."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bitlaw.allocation.curves import RateDistortion
from bitlaw.calibration.cache import cache_folder

log = logging.getLogger(__name__)


def kept_curves(
    key: str, work: Path | str | None, name: str, find: Callable[[Path | None], RateDistortion]
) -> RateDistortion:
    """Curves of this key from the cache, or those that `find` gives, which are kept there.

    work: a folder for what a run has finished, by default in the cache (`BITLAW_CACHE`); `find` gets the key's own
        folder inside of it, None if nothing is to be kept
    name: of the model, which the curves are to bear
    """
    beside = cache_folder()
    cache = None if beside is None else beside.parent / "curves"
    finished = None if cache is None else cache / f"{key}.json"
    if finished is not None and (known := _read(finished)) is not None:
        return replace(known, model=name)
    folder = cache if work is None else Path(work)
    curves = find(None if folder is None else folder / key)
    if finished is not None:
        try:
            curves.save(finished)
            if work is None:
                shutil.rmtree(finished.with_suffix(""), ignore_errors=True)
        except OSError as error:  # a full or read-only disk costs the next time, not this one
            log.warning("curves are not kept: %s", error)
    return curves


def _read(path: Path) -> RateDistortion | None:
    if not path.is_file():
        return None
    try:
        return RateDistortion.read(path)
    except ValueError as error:  # damaged: they are found again
        log.warning("%s", error)
        return None
