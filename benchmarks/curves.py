"""Exact rate-distortion curves of the largest ladder models, against Algorithm 1 of paper 004 as printed.

The baseline runs the whole network for every tensor and width, on the same full-precision paths; it is spared the
copies that `quantize` makes: only the layer at hand is replaced. Results must be the same bits. Both draw the paths
once, and neither uses the cache. The settings are the default ones (11 widths, 16 images), the tensors those of two of
six blocks: what a run costs is linear in the depth at which it begins, and their mean depth is that of all. Once all
steps are one group, and once each step is a group of its own, in which inputs have curves of their own.
"""

import copy
import os
import sys
from dataclasses import replace
from typing import Any

import torch

import bitlaw
from bitlaw.allocation.curves import CurveSettings, TensorKey, plan_of_widths, tensor_keys
from bitlaw.allocation.exact import measure_curves
from bitlaw.allocation.paths import Paths, curve_sites
from bitlaw.calibration import InputStats
from bitlaw.install import SiteParts, install_site
from bitlaw.methods.rtn import RTN
from bitlaw.models.generator import ImageGenerator
from bitlaw.quantized import WeightSpec
from harness import arguments, compare, finish, one_thread

SETTINGS = (
    ("ladder/var-l", CurveSettings()),
    ("ladder/var-l", CurveSettings(step_groups=(0, 1, 2, 3, 4))),
    ("ladder/dit-l", CurveSettings(sampling={"num_steps": 2})),
    ("ladder/dit-l", CurveSettings(sampling={"num_steps": 2}, step_groups=(0, 1))),
)
BLOCKS = (1, 4)
TIMES_FASTER = 1.8


def as_printed(model: ImageGenerator[Any], settings: CurveSettings) -> dict[TensorKey, tuple[tuple[float, ...], ...]]:
    """The curves, by a run of the whole network for every point."""
    paths = Paths(model, settings)
    twin = copy.copy(paths.model)
    twin.clock, twin.net = copy.copy(model.clock), copy.deepcopy(model.net)
    curves = {}
    for tensor in tensor_keys(settings, [site.name for site in curve_sites(model, settings)]):
        layer = twin.net.get_submodule(tensor.site)
        rows = []
        for bits in settings.widths:
            plan, parts = plan_of_widths(settings, {tensor: bits}), SiteParts()
            if (precision := plan.weight(tensor.site)) is not None:
                weight = layer.get_parameter("weight").detach()
                parts = SiteParts(RTN().quantize_layer(weight, InputStats(), WeightSpec.of(precision)))
            install_site(twin.net, plan, tensor.site, parts, twin.clock)
            rows.append(tuple(paths.distortion(twin).tolist()))
            twin.net.set_submodule(tensor.site, layer)
        curves[tensor] = tuple(rows)
    return curves


def main() -> int:
    """Run the comparison for both models, without and with step groups."""
    one_thread()
    os.environ["BITLAW_CACHE"] = ""
    options = arguments(__doc__, "curves", rounds=7)
    comparisons, requirements = [], {}
    for name, usual in SETTINGS:
        model = bitlaw.load(name)
        assert sum(BLOCKS) / len(BLOCKS) == (len(model.blocks) - 1) / 2
        left_out = [site.name for site in model.sites() if site.block not in BLOCKS]
        settings = replace(usual, protect=tuple(left_out))
        contenders = {
            "Algorithm 1": lambda model=model, settings=settings: as_printed(model, settings),
            "bitlaw": lambda model=model, settings=settings: measure_curves(model, settings).by_step,
        }
        num_tensors = len(tensor_keys(settings, [site.name for site in curve_sites(model, settings)]))
        title = f"{name}, step groups from {', '.join(map(str, usual.step_groups))}"
        shape = f"{num_tensors} tensors x {len(settings.widths)} widths, {settings.num_images} images"
        comparison = compare(f"{title}: {shape}", contenders, baseline="Algorithm 1", rounds=options.rounds, warmup=0)
        comparisons.append(comparison)
        faster, same = comparison.speedup("bitlaw"), comparison.results["Algorithm 1"] == comparison.results["bitlaw"]
        assert same, f"{title}: curves differ from those of full runs"
        requirements[f"{title}: {faster:.2f} times faster (at least {TIMES_FASTER})"] = faster >= TIMES_FASTER
        requirements[f"{title}: the same bits"] = same
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
