"""Pictures of numbers: one look for all of them, written as a page or as a PNG.

Figures are plotly's. A page stands alone and needs no network; a PNG is a photograph of it by Chromium.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

import plotly.graph_objects as go

from bitlaw.files import replacing, write_text

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#3b3b3b", "#7a4fbf")
"""After Okabe and Ito: told apart with any colour vision, and dark enough for lines on white."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "pentagon")

WIDTH, HEIGHT = 860, 420

_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-quic")
_DRAWING_TIME_MS = 10_000  # of the page's own clock, which runs as fast as the page is done


def styled(figure: go.Figure, x: str, y: str, width: int = WIDTH, height: int = HEIGHT) -> go.Figure:
    """The figure in the common look, in place.

    x, y: titles of all axes that have none yet; width, height: in pixels
    """
    figure.update_layout(
        template="plotly_white",
        width=width,
        height=height,
        margin={"l": 70, "r": 20, "t": 50 if figure.layout.title.text or figure.layout.annotations else 30, "b": 55},
        colorway=COLOURS,
        font={"size": 13},
    )
    figure.for_each_xaxis(lambda axis: axis.title.text or axis.update(title_text=x))
    figure.for_each_yaxis(lambda axis: axis.title.text or axis.update(title_text=y))
    return figure


def check_picture(path: Path | str) -> None:
    """Raise ValueError if `write_figure` could not write there: for an unknown ending, or a PNG without Chromium."""
    suffix = Path(path).suffix
    if suffix not in (".html", ".png"):
        raise ValueError(f"{path}: pictures are .png or .html, not '{suffix}'")
    if suffix == ".png" and shutil.which("chromium") is None:
        raise ValueError(f"{path}: a PNG needs chromium on PATH, and there is none; install it, or give a .html")


def write_figure(path: Path | str, figure: go.Figure) -> None:
    """Write a figure as .png, or as .html that works offline; atomically. ValueError as in `check_picture`."""
    path = Path(path)
    check_picture(path)
    page = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
    if path.suffix == ".html":
        write_text(path, page)
        return
    width, height = figure.layout.width or WIDTH, figure.layout.height or HEIGHT
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figure.html"
        # Without the margin of a page, which would push the figure out of the picture.
        file.write_text(page.replace("<body>", '<body style="margin:0">'), encoding="utf-8")
        photograph(file, path, int(width), int(height))


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """A PNG of the top of a page, `width` x `height` pixels, by headless Chromium. OSError if it does not come."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise ValueError(f"{picture}: a picture of a page needs chromium on PATH; install the system's package")
    with tempfile.TemporaryDirectory() as folder, replacing(picture) as temporary:
        drawn = Path(folder) / "picture.png"
        command = [
            chromium,
            *_FLAGS,
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
            f"--virtual-time-budget={_DRAWING_TIME_MS}",
            f"--screenshot={drawn}",
            page.resolve().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not drawn.exists():
            raise OSError(f"{picture}: chromium drew nothing: {done.stderr.strip()[-500:]}")
        shutil.copyfile(drawn, temporary)
