"""Methods against one of them at each precision, from a study: geometric means over sizes, as a Markdown table.

    python scripts/compare_methods.py study --against rtn
    python scripts/compare_methods.py study --against gptq --metric loss

The interval is from each cell's own: errors of cells are taken for independent, which overstates it, as all cells have
the same labels and noise.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

from bitlaw.scaling.records import Record, StudyDirectory

NORMAL_95 = 1.959964


def log_sd(score: dict[str, float]) -> float:
    """Standard deviation of the log score, from its interval."""
    return (math.log(score["high"]) - math.log(score["low"])) / (2 * NORMAL_95)


def ratio(cells: list[Record], others: list[Record], metric: str) -> tuple[float, float, float]:
    """Geometric mean of scores over others', of the same models, and its 95 % interval."""
    pairs = [(a.metrics[metric], b.metrics[metric]) for a in cells for b in others if a.cell.model == b.cell.model]
    mean = sum(math.log(a["value"] / b["value"]) for a, b in pairs) / len(pairs)
    sd = math.sqrt(sum(log_sd(a) ** 2 + log_sd(b) ** 2 for a, b in pairs)) / len(pairs)
    return math.exp(mean), math.exp(mean - NORMAL_95 * sd), math.exp(mean + NORMAL_95 * sd)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--against", default="rtn", help="the method that others are compared with")
    parser.add_argument("--metric", default="fd")
    options = parser.parse_args()
    cells: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in StudyDirectory(options.study).records():
        if record.error is None and options.metric in record.metrics:
            cells[record.family, record.cell.precision, record.cell.method].append(record)
    sizes = list(dict.fromkeys(record.size for records in cells.values() for record in records))
    digits = 2 if options.metric == "fd" else 4
    for family in dict.fromkeys(key[0] for key in cells):
        print(f"\n| {family} | {' | '.join(sizes)} | over {options.against} |\n|{' --- |' * (len(sizes) + 2)}")
        for (of, precision, method), records in cells.items():
            if of != family:
                continue
            values = {record.size: f"{record.metrics[options.metric]['value']:.{digits}f}" for record in records}
            over = ""
            baseline = cells.get((family, precision, options.against))
            if baseline and method != options.against:
                mean, low, high = ratio(records, baseline, options.metric)
                over = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
            shown = precision if method == "none" else f"{precision} {method}"
            print(f"| {shown} | {' | '.join(values.get(size, '') for size in sizes)} | {over} |")


if __name__ == "__main__":
    main()
