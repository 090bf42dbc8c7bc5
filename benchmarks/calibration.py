"""What calibration costs: the sampling that it observes, with and without.

Sampling with no observer against the same with all of: ranges, channel extremes, sampled rows; with second moments;
with Hessians. The images are not decoded in either, which would only hide the cost.

The ladder's models draw the 64 images of the default, with 8 rows an input for the moments. Blocks as wide as a
released model's would take hours for that; they draw fewer images and take fewer rows:

- VAR-d16: 16 images and 2 rows an input, so that the same share of all rows is taken (38 % of those that enter fc2);
- DiT-XL/2: 8 images in 25 steps and 1 row an input, 4.5 % of those that enter fc2. Of 64 images in 50 steps 8 rows an
  input are 2.3 %: Hessians cost less there than here.
"""

import sys

import torch

import bitlaw
from bitlaw.calibration.collect import batches, collect
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.dit import DiT, DiTSampling
from bitlaw.models.generator import ImageGenerator, rollout
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.var import VAR
from harness import arguments, compare, finish, one_thread

CHEAP = frozenset({"low_C", "high_C", "rows_RI", "histograms_S"})


def sample(model: ImageGenerator, settings: bitlaw.Calibration) -> int:
    """Draw without looking."""
    steps = 0
    for labels_B, noise in batches(model, settings):
        for _ in rollout(model, labels_B, noise):
            steps += 1
    return steps


def observed(model: ImageGenerator, settings: bitlaw.Calibration, needs: frozenset[str]) -> int:
    """The same, observed."""
    names = [site.name for site in model.sites() if site.phase == "blocks"]
    return len(collect(model, settings, names, needs))


def wide_var() -> VAR:
    """Two blocks of VAR-d16's width."""
    torch.manual_seed(0)
    net = VARTransformer(VARConfig(depth=2, width=1024, heads=16)).eval().requires_grad_(False)
    return VAR(net, VQTokenizer(VQTokenizerConfig()).eval().requires_grad_(False))


def wide_dit() -> DiT:
    """One block of DiT-XL/2's width."""
    torch.manual_seed(0)
    net = DiTTransformer(DiTConfig(1, 1152, 16, 1000, 32, 4, 2)).eval().requires_grad_(False)
    return DiT(net, None, Diffusion(), DiTSampling(num_steps=25))


def main() -> int:
    """Compare on ladder models and on blocks as wide as a released model's."""
    one_thread()
    options = arguments(__doc__, "calibration", rounds=5)
    comparisons = []
    for name, model, settings in (
        ("ladder/var-l", bitlaw.load("ladder/var-l"), bitlaw.Calibration(num_images=64)),
        ("ladder/dit-l", bitlaw.load("ladder/dit-l"), bitlaw.Calibration(num_images=64)),
        ("2 blocks of VAR-d16", wide_var(), bitlaw.Calibration(num_images=16, rows_per_input=2)),
        ("a block of DiT-XL/2", wide_dit(), bitlaw.Calibration(num_images=8, rows_per_input=1)),
    ):
        contenders = {
            "sampling": lambda m=model, s=settings: sample(m, s),
            "ranges, extremes and rows": lambda m=model, s=settings: observed(m, s, CHEAP),
            "and second moments": lambda m=model, s=settings: observed(m, s, CHEAP | {"second_moment_I"}),
            "Hessians and rows": lambda m=model, s=settings: observed(m, s, frozenset({"hessian_II", "rows_RI"})),
        }
        comparisons.append(compare(name, contenders, baseline="sampling", rounds=options.rounds))
    bars = {
        f"{c.title}, {name}: at most 1.25 times the sampling ({1 / c.speedup(name):.2f})": 1 / c.speedup(name) <= 1.25
        for c in comparisons
        for name in c.seconds
        if name != c.baseline
    }
    return finish(options.out, comparisons, bars)


if __name__ == "__main__":
    sys.exit(main())
