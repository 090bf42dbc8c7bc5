"""Rate-distortion curves that were not measured but made up, for tests of what is done with curves."""

import random
from typing import Any

from bitlaw.allocation.curves import CurveSettings, RateDistortion, tensor_keys
from bitlaw.allocation.paths import curve_sites, model_fingerprint
from bitlaw.models.generator import ImageGenerator


def made_curves(model: ImageGenerator[Any], seed: int = 0, **settings: Any) -> RateDistortion:
    """Curves like 4^-bits with noise, of tensors that differ a thousandfold; not all of them fall everywhere."""
    chosen = CurveSettings(**{"widths": (0, 2, 3, 4, 8), **settings})
    draw = random.Random(seed)
    by_step = {}
    for key in tensor_keys(chosen, [site.name for site in curve_sites(model, chosen)]):
        height = 10 ** draw.uniform(-3, 0)
        by_width = [height * 4.0**-bits * draw.uniform(0.5, 1.5) for bits in chosen.widths]
        shares = [draw.uniform(0.5, 1.5) for _ in range(model.num_steps)]
        by_step[key] = tuple(tuple(value * share for share in shares) for value in by_width)
    return RateDistortion(by_step, chosen, "exact", "made", model_fingerprint(model))
