"""Sketched rate-distortion curves against measured ones, on the largest ladder models: time, and how far they agree.

All tensors at 0 to 10 bits, weights and inputs, the same images. The baseline measures every point, reusing what lies
upstream of the tensor. Ranks are compared over all points at 2 to 8 bits.

    python benchmarks/sketch.py
"""

import os
import sys

import bitlaw
from bitlaw.allocation.curves import CurveSettings
from bitlaw.allocation.exact import measure_curves
from bitlaw.allocation.sketch import compare as compare_curves
from bitlaw.allocation.sketch import sketch_curves
from harness import arguments, compare, finish, one_thread

SETTINGS = CurveSettings(num_images=8)
FASTER, SPEARMAN = 20, 0.93


def main() -> int:
    """Run the comparison for both families."""
    one_thread()
    os.environ["BITLAW_CACHE"] = ""  # curves that are known are not measured again
    options = arguments(__doc__, "sketch", rounds=3)
    comparisons, requirements = [], {}
    for name in ("ladder/var-l", "ladder/dit-l"):
        model = bitlaw.load(name)
        sketch_curves(model, SETTINGS)  # what is loaded or compiled at the first call
        contenders = {
            "exact": lambda model=model: measure_curves(model, SETTINGS),
            "sketch": lambda model=model: sketch_curves(model, SETTINGS),
        }
        comparison = compare(
            f"{name}, {SETTINGS.num_images} images", contenders, baseline="exact", rounds=options.rounds, warmup=0
        )
        comparisons.append(comparison)
        curves = compare_curves(comparison.results["sketch"], comparison.results["exact"])
        speedup, spearman = comparison.speedup("sketch"), curves.spearman
        for bits in range(2, 9):
            at = curves.at(bits)
            print(f"  {bits} bits: Spearman {at.spearman:.3f}, median relative error {at.median_relative_error:.2f}")
        requirements[f"{name}: {speedup:.1f} times faster (at least {FASTER})"] = speedup >= FASTER
        requirements[
            f"{name}: Spearman correlation {spearman:.4f} of {len(curves.points)} points (at least {SPEARMAN}), "
            f"median relative error {curves.median_relative_error:.2f}"
        ] = spearman >= SPEARMAN
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
