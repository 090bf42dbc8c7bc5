"""A made-up study with known laws, and a Chromium to look at its report with."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, sync_playwright

from bitlaw.report import write_report
from bitlaw.scaling.records import Cell

CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

SIZES = {"xs": (2, 48), "s": (3, 64), "m": (4, 96), "l": (6, 128)}
PRECISIONS = ("W16A16", "W8A16", "W4A16", "W2A16", "W4A4", "We2m1A16")
WEIGHT_BITS = {"W16": 16, "W8": 8, "W4": 4, "W3": 3, "W2": 2, "We2m1": 4}
DAMAGE = {"W16": 1.0, "W8": 1.005, "W4": 1.07, "W3": 1.3, "W2": 2.4, "We2m1": 1.05}
TILE = 24


def strip_png(rng: np.random.Generator, noise: float) -> bytes:
    """12 x 2 tiles with the same shapes in every cell; `noise` is what quantization did to them."""
    picture = Image.new("RGB", (12 * TILE, 2 * TILE))
    draw = ImageDraw.Draw(picture)
    for i in range(24):
        x, y = (i % 12) * TILE, (i // 12) * TILE
        hue = (i * 47) % 255
        tile = Image.new("HSV", (TILE, TILE), (hue, 90, 190)).convert("RGB")
        picture.paste(tile, (x, y))
        draw.regular_polygon((x + 12, y + 12, 8), 3 + i % 12 % 6, fill=f"hsv({(hue + 140) % 255}, 80%, 90%)")
    pixels = np.asarray(picture, np.float64) + rng.normal(0, noise, (2 * TILE, 12 * TILE, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_study(
    path: Path,
    *,
    precisions: tuple[str, ...] = PRECISIONS,
    sizes: tuple[str, ...] = tuple(SIZES),
    seeds: tuple[int, ...] = (0,),
    failed: tuple[str, ...] = (),
    not_run: tuple[str, ...] = (),
) -> Path:
    """A study directory of two families whose FD follows a power law in parameters and damage.

    failed, not_run: stems of cells that end in an error, and of cells without a record
    """
    rng = np.random.default_rng(0)
    cells_dir, samples_dir = path / "cells", path / "samples"
    cells_dir.mkdir(parents=True)
    samples_dir.mkdir()
    configs = []
    for family in ("var", "dit"):
        for size in sizes:
            depth, width = SIZES[size]
            for precision in precisions:
                for seed in seeds:
                    record = made_up_record(rng, family, size, depth, width, precision, seed)
                    config = record["config"]
                    configs.append({k: v for k, v in config.items() if k not in ("family", "size")})
                    stem = Cell.from_json(config).stem
                    if stem in not_run:
                        continue
                    if stem in failed:
                        config.update(family="", size="")
                        record.update(
                            metrics={}, bits={}, error="ValueError: blocks.0.attn.qkv: NaN in <weights> & more"
                        )
                    else:
                        noise = 60 * (DAMAGE[precision.split("A")[0]] - 1)
                        (samples_dir / f"{stem}.png").write_bytes(strip_png(rng, noise))
                    (cells_dir / f"{stem}.json").write_text(json.dumps(record))
    study = {
        "name": "made up",
        "description": "Two families at four sizes, quantized by rounding to nearest.",
        "cells": configs,
        "versions": {"bitlaw": "0.1.0", "torch": "2.13.0"},
    }
    (path / "study.json").write_text(json.dumps(study))
    return path


def made_up_record(
    rng: np.random.Generator, family: str, size: str, depth: int, width: int, precision: str, seed: int
) -> dict[str, Any]:
    """One cell's record as the study engine writes it."""
    weight, activation = precision.split("A")
    bits_w, bits_a = WEIGHT_BITS[weight], int(activation)
    block_weights, other_weights = 18 * depth * width**2, 600 * width
    parameters = block_weights + other_weights
    code_bits = block_weights * bits_w + other_weights * 16
    overhead = 0 if bits_w == 16 else depth * 15 * width * 24
    damage = DAMAGE[weight] * (1 + 0.12 * (bits_a == 4)) * (1 + 0.004 * (bits_a == 8))
    scale = {"var": (0.9, 0.22), "dit": (0.5, 0.34)}[family]
    fd = (2.0 + scale[0] * (parameters / 1e7) ** -scale[1] * 3) * damage * float(np.exp(rng.normal(0, 0.006)))

    def score(value: float, relative: float = 0.02) -> dict[str, float]:
        return {"value": value, "low": value * (1 - relative), "high": value * (1 + relative)}

    uses = {"var": 66, "dit": 180}[family]
    compute = block_weights * bits_w * bits_a + other_weights * 256
    return {
        "config": {
            "model": f"ladder/{family}-{size}",
            "precision": precision,
            "method": "none" if precision == "W16A16" else "rtn",
            "seed": seed,
            "num_images": 2500,
            "num_validation": 512,
            "protect": "first-last",
            "reference": "ladder",
            "features": "ladder",
            "sampling": {},
            "family": family,
            "size": size,
        },
        "parameters": parameters,
        "metrics": {
            "fd": score(fd),
            "fd_reconstruction": score(fd * 0.8),
            "sfd": {"value": fd * 2.1},
            "is": score(11.5 - fd * 0.3, 0.005),
            "kid": score(fd * 0.004, 0.1),
            "precision": score(0.95 - 0.03 * fd, 0.01),
            "recall": score(0.9 - 0.03 * fd, 0.01),
            "loss": score(4 * parameters**-0.04 * damage**0.1, 0.003),
        },
        "bits": {
            "model_bits": code_bits + overhead,
            "model_code_bits": code_bits,
            "quantized_bits": block_weights * bits_w,
            "compute_bits": compute,
            "compute_bits_used": compute * uses,
        },
        "protocol": {
            "num_images": 2500,
            "seed": seed,
            "labels": "cyclic",
            "guidance": 2.0,
            "num_steps": {"var": 5, "dit": 20}[family],
            "sampler": {"var": "gumbel", "dit": "ddim"}[family],
            "rounding": "half up",
            "features": "ladder",
            "features_fingerprint": "9f3c2a71",
            "reference": "ladder",
            "num_reference": 50000,
        },
        "versions": {"bitlaw": "0.1.0"},
        "seconds": 3.2 + 1e-6 * parameters,
        "error": None,
    }


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that is complete but for one cell that failed and one that was not run."""
    path = tmp_path_factory.mktemp("study") / "study"
    return write_study(path, failed=("var-l--W2A16--rtn--s0",), not_run=("dit-l--W2A16--rtn--s0",))


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Path]:
    """`write_study` into an own directory."""
    return lambda **grid: write_study(tmp_path / "study", **grid)


@pytest.fixture(scope="session")
def report(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `study`; few resamples, for nothing here depends on the width of an interval."""
    return write_report(study, tmp_path_factory.mktemp("report") / "report.html", num_resamples=40)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.fail("the report is tested in Chromium, which is not installed: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()
