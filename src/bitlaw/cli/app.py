"""The application that commands register with, and its way of printing."""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

app = typer.Typer(
    name="bitlaw",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Quantize vision generative models and find which size at which bit width gives the best images.",
)

out_console, error_console = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)


def main() -> None:
    """Run the command line; a user's mistake is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        error_console.print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(2)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with the time left on a terminal; elsewhere a plain line whenever there is something to say."""
    if not out_console.is_terminal:
        done = 0

        def plain(count: int, text: str = "") -> None:
            nonlocal done
            done += count
            if text:
                print(f"[{done}/{total}] {text}", flush=True)

        yield plain
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=out_console) as bar:
        task = bar.add_task("", total=total)
        yield lambda count, text="": bar.update(task, advance=count, description=text)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Progress of work in stages, told what is being done, how much of it, and of how much: a bar for each stage.

    What is told with nothing to do (of 0) is a line to be read.
    """
    if not out_console.is_terminal:
        said: dict[str, int] = {}

        def plain(what: str, done: int, total: int) -> None:
            if not total:
                print(what, flush=True)
                return
            tenth = 10 * done // total
            if said.get(what) != tenth:
                said[what] = tenth
                print(f"{what} [{done}/{total}]", flush=True)

        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out_console) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if not total:
                bar.console.print(what, highlight=False)
                return
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def escape(text: str) -> str:
    """`text` without rich markup in it."""
    return text.replace("[", r"\[")


def minutes(seconds: float) -> str:
    """Seconds as people say them."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def write_pictures(folder: Path, drawn: "Mapping[str, Figure]", others: "Sequence[Path]" = ()) -> None:
    """Write figures by their names, and print what was written, `others` before: pages where there is no Chromium."""
    from bitlaw.figures import write_figure

    suffix = ".png" if shutil.which("chromium") else ".html"
    written = [*others, *(folder / f"{name}{suffix}" for name in drawn)]
    for name, figure in drawn.items():
        write_figure(folder / f"{name}{suffix}", figure)
    out_console.print("written: " + ", ".join(map(str, written)), highlight=False)
