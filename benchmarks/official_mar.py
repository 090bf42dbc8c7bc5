"""MAR-B against the official sampler: the transformer's steps and the head's diffusion, without the autoencoder.

Run it with a checkout of LTH14/mar and a folder that has timm (0.9), which the official code imports:

    python benchmarks/official_mar.py --official ~/mar ~/timm

Both have the same random weights, orders and noise, so they must draw the same tokens up to rounding. Whole images are
drawn with half of the blocks and in fewer steps than in the published evaluation (256, and 100 of the head), so that a
step reveals many tokens; what the evaluation has most of, the head on the one to seven tokens of a step, is timed apart
at its full size.

"bitlaw, products by MKL" is bitlaw without `bitlaw.linear`, that is, with the matrix products that the official code
has: what is left of its advantage comes from the loop itself. The official code calls `.cuda()` by name and imports
torchvision for nothing that is used here; the one is made to do nothing, the other is stubbed.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import bitlaw.linear
from bitlaw.models.generator import Noise, rollout
from bitlaw.models.mar import MAR, MARSampling
from bitlaw.models.networks.mar import MARConfig, MARTransformer
from harness import compare, finish, official_arguments, one_thread, stub_torchvision

MKL = "bitlaw, products by MKL"
DEPTH, NUM_STEPS = 6, 8
HEAD_STEPS = "ddim10"  # not "10", whose first step multiplies random weights' outputs by 20,000
TRANSFORMER = {"embed_dim": 768, "depth": DEPTH, "num_heads": 12}
IMAGES = ((1, 2.9), (2, 1.0))  # batch, guidance
TOKENS = ((1, 2.9), (8, 2.9), (1, 1.0))  # tokens, guidance


def random_model() -> MAR:
    """MAR-B of half the depth with random weights, none of them zero."""
    torch.manual_seed(0)
    net = MARTransformer(MARConfig(768, DEPTH, DEPTH, 12, 6, 1024))
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return MAR(net.eval().requires_grad_(False), None, MARSampling(num_steps=NUM_STEPS, head_steps=HEAD_STEPS))


def official_model(model: MAR) -> nn.Module:
    """The official class around the same tensors."""
    from models.mar import MAR as OfficialMAR

    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in TRANSFORMER.items()}
    head = {"diffloss_d": 6, "diffloss_w": 1024, "num_sampling_steps": HEAD_STEPS}
    with torch.device("meta"):
        official = OfficialMAR(**sizes, **head, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    official.load_state_dict(model.net.state_dict(), assign=True)
    return official.eval()


@contextmanager
def given_noise(noise_SMC: Iterator[Tensor]):
    """`torch.randn` gives the first of the next numbers, `randn_like` the others; a second half of rows gets zeros."""
    pending: list[Tensor] = []

    def randn(*_: int) -> Tensor:
        pending[:] = next(noise_SMC)
        pending.append(torch.zeros_like(pending[0]))  # the last step draws numbers that it multiplies by zero
        return pending.pop(0)

    def randn_like(x: Tensor) -> Tensor:
        numbers = pending.pop(0)
        return torch.cat([numbers, torch.zeros(len(x) - len(numbers), x.shape[1])])

    originals = torch.randn, torch.randn_like
    torch.randn, torch.randn_like = randn, randn_like
    try:
        yield
    finally:
        torch.randn, torch.randn_like = originals


def official_images(official: nn.Module, model: MAR, labels: Tensor, guidance: float) -> Tensor:
    """Tokens (B, L, C) by the official loop."""
    noise = Noise(0, range(len(labels)))
    counts = [before - after for before, after in pairwise(model.hidden_counts)]
    shapes = [(model.spaced.num_steps, count, model.net.config.token_channels) for count in counts]
    numbers = (noise.normal(step, shape).transpose(0, 1).flatten(1, 2) for step, shape in enumerate(shapes, start=1))
    official.sample_orders = lambda _: noise.permutation(0, model.net.config.num_tokens)
    with torch.no_grad(), given_noise(numbers):
        latents = official.sample_tokens(len(labels), NUM_STEPS, guidance, "linear", labels)
    return official.patchify(latents)


def our_images(model: MAR, labels: Tensor) -> Tensor:
    """Tokens (B, L, C) by the rollout."""
    for step in rollout(model, labels, Noise(0, range(len(labels)))):
        state = step.after
    return state.tokens_BLC


def official_tokens(official: nn.Module, z_RD: Tensor, noise_SMC: Tensor, guidance: float) -> Tensor:
    """Tokens (M, C) by the official head."""
    with torch.no_grad(), given_noise(iter([noise_SMC])):
        return official.diffloss.sample(z_RD, 1.0, guidance)[: noise_SMC.shape[1]]


def our_tokens(model: MAR, z_RD: Tensor, noise_SMC: Tensor, guidance: float) -> Tensor:
    """Tokens (M, C) by ours."""
    with torch.inference_mode():
        return model.draw_tokens(z_RD, noise_SMC, guidance)


def by_mkl(sampler: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """A sampler of ours with torch's own matrix products."""
    with patch.object(bitlaw.linear, "_HAS_ONEDNN", False):
        return sampler(*arguments)


def main() -> int:
    """Compare images with and without guidance, then the head alone at full size."""
    one_thread()
    options = official_arguments(__doc__, "official_mar", rounds=5)
    stub_torchvision()
    Tensor.cuda = lambda self, *_, **__: self
    model = random_model()
    official = official_model(model)
    cases = {}
    for batch, guidance in IMAGES:
        labels = torch.arange(batch) * 100
        cases[f"half of MAR-B, batch {batch}, guidance {guidance:g}, {NUM_STEPS} steps, head {HEAD_STEPS}"] = {
            "official": partial(official_images, official, model, labels, guidance),
            "bitlaw": partial(our_images, model.with_sampling(guidance=guidance), labels),
            MKL: partial(by_mkl, our_images, model.with_sampling(guidance=guidance), labels),
        }
    for count, guidance in TOKENS:
        noise_SMC = Noise(0, range(count)).normal(0, (model.spaced.num_steps, 16)).transpose(0, 1)
        z_RD = Noise(1, range(count if guidance == 1 else 2 * count)).normal(0, (768,))
        cases[f"head of MAR-B, {count} tokens, guidance {guidance:g}, {HEAD_STEPS}"] = {
            "official": partial(official_tokens, official, z_RD, noise_SMC, guidance),
            "bitlaw": partial(our_tokens, model, z_RD, noise_SMC, guidance),
            MKL: partial(by_mkl, our_tokens, model, z_RD, noise_SMC, guidance),
        }
    comparisons, requirements = [], {}
    for title, contenders in cases.items():
        comparison = compare(title, contenders, baseline="official", rounds=options.rounds)
        comparisons.append(comparison)
        theirs, ours = (comparison.results[name] for name in ("official", "bitlaw"))
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        for name in ("bitlaw", MKL):
            faster = comparison.speedup(name)
            requirements[f"{title}: {name} never slower ({faster:.2f} times as fast)"] = faster >= 1
        requirements[f"{title}: the same tokens (relative difference {difference:.1e})"] = difference < 1e-4
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
