"""The examples that the settings of a distillation name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from bitlaw.calibration.collect import Progress
from bitlaw.distill.encoding import encode
from bitlaw.distill.examples import Examples
from bitlaw.distill.settings import Distillation
from bitlaw.distill.sources import Source, open_source
from bitlaw.distill.teacher_logits import TeacherLogits, check_cacheable
from bitlaw.models.generator import ImageGenerator


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
