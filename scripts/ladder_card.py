"""Write the figures of the ladder's card from what is in the package: docs/ladder.md and docs/images.

python scripts/ladder_card.py
"""

import json
import statistics
from importlib import resources
from pathlib import Path

import torch

import bitlaw
from bitlaw.files import write_text
from bitlaw.ladder import data
from bitlaw.ladder.model_training import DDPM_RECIPES, DDPM_SIZES, DIT_RECIPES, SIZES, VAR_RECIPES
from bitlaw.metrics import FeatureStatistics, LadderFeatures, extract_features, frechet_distance
from bitlaw.metrics.evaluation import load_reference
from bitlaw.metrics.samples import write_grid

DOCS = Path(__file__).parent.parent / "docs"
WEIGHTS = resources.files("bitlaw") / "ladder" / "weights"
BEGIN, END = "<!-- figures: scripts/ladder_card.py -->", "<!-- end of figures -->"


def score_table() -> list[str]:
    """Sizes, training and full-precision scores with their spread over seeds."""
    lines = [
        "| model | parameters | depth, width, heads | steps x batch | CPU s | FD | FD to reconstructions | IS | loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    families = (("var", VAR_RECIPES, SIZES), ("dit", DIT_RECIPES, SIZES), ("ddpm", DDPM_RECIPES, DDPM_SIZES))
    for family, recipes, shapes in families:
        for size, shape in shapes.items():
            content = json.loads((WEIGHTS / f"{family}-{size}" / "metrics.json").read_text())

            def spread(metric: str, runs: list[dict[str, float]] = content["runs"]) -> str:
                if metric not in runs[0]:
                    return "-"
                values = [run[metric] for run in runs]
                return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

            recipe = recipes[size]
            lines.append(
                f"| {family}-{size} | {content['parameters']:,} | {', '.join(map(str, shape))} "
                f"| {recipe.steps:,} x {recipe.batch_size} | {content['training_cpu_seconds']:,} | {spread('fd')} "
                f"| {spread('fd_reconstruction')} | {spread('is')} | {content['loss']:.4f} |"
            )
    first = json.loads((WEIGHTS / "var-xs" / "metrics.json").read_text())
    lines += [
        "",
        f"Mean and standard deviation over {len(first['seeds'])} seeds of {first['num_images']:,} images. The shape of "
        "a ddpm is its widths at 24, 12 and 6 px.",
    ]
    return lines


def floor_table() -> list[str]:
    """What the metric gives for real images, and for reconstructions."""
    network, reference = LadderFeatures(), load_reference("ladder")
    images = torch.cat([batch.images_BCHW for batch in data.batches("test", 20_000)])
    features = torch.cat([f.pooled_BD for f in extract_features(network, images)])
    lines = ["| images | FD to the reference |", "| --- | --- |"]
    for count in (2_500, 5_000, 10_000):
        parts = [FeatureStatistics.of(part) for part in features.split(count)]
        values = [frechet_distance(part, reference.pooled) for part in parts]
        lines.append(f"| {count:,} real ones, mean of {len(values)} draws | {statistics.mean(values):.3f} |")
    for family, part in reference.reconstructions.items():
        kind = "quantized" if family == "var" else "continuous"
        distance = frechet_distance(part, reference.pooled)
        lines.append(f"| the reference after the tokenizer, {kind} ({family}) | {distance:.3f} |")
    return lines


def guidance_lines() -> list[str]:
    """How the guidance was chosen."""
    lines = ["| guidance | " + " | ".join(("var", "dit")) + " |", "| --- | --- | --- |"]
    chosen = {family: json.loads((WEIGHTS / f"guidance-{family}.json").read_text()) for family in ("var", "dit")}
    for value in chosen["var"]["fd"]:
        cells = []
        for family in ("var", "dit"):
            text = f"{chosen[family]['fd'][value]:.2f}"
            cells.append(f"**{text}**" if float(value) == chosen[family]["chosen"] else text)
        lines.append(f"| {value} | {' | '.join(cells)} |")
    return lines


def pictures() -> None:
    """Samples of every size for the same seeds, and real images with their reconstructions."""
    labels = torch.arange(24) % data.NUM_CLASSES
    for family in ("var", "dit"):
        rows = [bitlaw.load(f"ladder/{family}-{size}").generate(labels, seed=7) for size in SIZES]
        write_grid(DOCS / "images" / f"ladder-{family}.png", torch.cat(rows), 24, zoom=2)
    drawn = [bitlaw.load(f"ladder/ddpm-{size}").generate(torch.zeros_like(labels), seed=7) for size in DDPM_SIZES]
    write_grid(DOCS / "images" / "ladder-ddpm.png", torch.cat(drawn), 24, zoom=2)
    write_grid(DOCS / "images" / "ladder-real.png", data.draw("test", 0, 24, labels).images_BCHW, 24, zoom=2)


def main() -> None:
    """Everything between the two marks of docs/ladder.md."""
    torch.set_num_threads(2)
    pictures()
    page = DOCS / "ladder.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    parts = [score_table(), floor_table(), guidance_lines()]
    titles = [
        "### Full-precision scores",
        "### The metric's floor",
        "### Choice of guidance (FD, geometric mean of s and l)",
    ]
    body = "\n\n".join(f"{title}\n\n" + "\n".join(part) for title, part in zip(titles, parts, strict=True))
    write_text(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


if __name__ == "__main__":
    main()
