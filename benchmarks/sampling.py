"""Sampling with the largest ladder models against the straightforward loop.

The baseline for VAR runs the whole prefix through the network at every stage (no KV cache); for DiT it runs the
conditional and the unconditional half one after the other, with modulations for every row. Both use the same weights,
noise and arithmetic, so they must draw the same images up to rounding.
"""

import sys

import torch
from torch import Tensor

import bitlaw
from bitlaw.models.dit import DiT
from bitlaw.models.generator import Noise
from bitlaw.models.parts.guidance import guide, ramp
from bitlaw.models.parts.sampling import draw, filter_logits
from bitlaw.models.var import VAR
from harness import arguments, compare, finish, one_thread

NUM_IMAGES, BATCH_SIZE = 256, 64


@torch.inference_mode()
def var_without_cache(model: VAR, labels: Tensor) -> Tensor:
    """Every stage recomputes all stages before it, for each half in turn."""
    images = []
    net, tokenizer, sampling = model.net, model.tokenizer, model.sampling
    side, length = net.config.patch_nums[-1], net.config.num_tokens
    for begin in range(0, len(labels), BATCH_SIZE):
        batch = labels[begin : begin + BATCH_SIZE]
        noise = Noise(0, range(begin, begin + len(batch)))
        null = torch.full_like(batch, model.num_classes)
        latent = torch.zeros(len(batch), net.config.latent_channels, side, side)
        inputs = torch.zeros(len(batch), length - 1, net.config.latent_channels)
        for stage in range(model.num_steps):
            span = net.config.span(stage)
            if stage:
                inputs[:, span.start - 1 : span.stop - 1] = tokenizer.next_input(latent, stage)
            halves = [forward_prefix(net, half, inputs, span.stop)[:, span] for half in (batch, null)]
            logits = guide(*halves, ramp(sampling.guidance, stage, model.num_steps))
            logits = filter_logits(logits, sampling.top_k, sampling.top_p)
            tokens = draw(logits, noise.gumbel(stage + 1, logits.shape[1:]))
            latent = latent + tokenizer.refine(tokenizer.embed(tokens), stage)
        images.append(to_images(tokenizer.decode(latent)))
    return torch.cat(images)


def forward_prefix(net: torch.nn.Module, labels: Tensor, inputs: Tensor, length: int) -> Tensor:
    """Teacher-forced logits of the first `length` tokens."""
    conditions = net.conditions(labels)
    first = conditions.class_RC.unsqueeze(1) + net.pos_start
    x = torch.cat([first, net.word_embed(inputs[:, : length - 1])], 1) + net._positions()[:length]
    for block, modulation in zip(net.blocks, conditions.blocks, strict=True):
        x = block(x, modulation, bias_NM=net.mask_LL[:length, :length])
    return net.logits(x, conditions.head)


@torch.inference_mode()
def dit_in_halves(model: DiT, labels: Tensor) -> Tensor:
    """Conditional and unconditional half one after the other, a modulation for every row."""
    images = []
    process = model.spaced
    for begin in range(0, len(labels), BATCH_SIZE):
        batch = labels[begin : begin + BATCH_SIZE]
        null = torch.full_like(batch, model.num_classes)
        state = model.start(batch, Noise(0, range(begin, begin + len(batch))))
        x = state.x_BCHW
        for index in range(model.num_steps - 1, -1, -1):
            t = torch.full_like(batch, process.timesteps[index])
            output = guide(model.net(x, t, batch), model.net(x, t, null), model.sampling.guidance)
            x = process.ddim_step(x, output, index, model.sampling.eta, None)
        images.append(to_images(model.autoencoder.decode(x / model.latent_scale)))
    return torch.cat(images)


def to_images(x: Tensor) -> Tensor:
    """uint8 images, rounded half up."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def main() -> int:
    """Run both comparisons."""
    one_thread()
    options = arguments(__doc__, "sampling", rounds=5)
    labels = torch.arange(NUM_IMAGES) % 12
    comparisons, requirements = [], {}
    for name, straightforward in (("ladder/var-l", var_without_cache), ("ladder/dit-l", dit_in_halves)):
        model = bitlaw.load(name)
        contenders = {
            "straightforward": lambda model=model, loop=straightforward: loop(model, labels),
            "bitlaw": lambda model=model: model.generate(labels, batch_size=BATCH_SIZE),
        }
        comparison = compare(
            f"{name}, {NUM_IMAGES} images", contenders, baseline="straightforward", rounds=options.rounds
        )
        comparisons.append(comparison)
        images = [comparison.results[key].float() for key in contenders]
        # An image differs by more than rounding only where a token was a near tie.
        changed = ((images[0] - images[1]).abs().amax((1, 2, 3)) > 2).float().mean().item()
        requirements[f"{name}: no slower than the straightforward loop"] = comparison.speedup("bitlaw") >= 1
        requirements[f"{name}: the same images, but for {changed:.1%} (at most 2 %)"] = changed <= 0.02
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
