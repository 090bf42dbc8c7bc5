"""Sampling with DiT-XL/2 at 256 pixels against the official loop and diffusers' pipeline, without the image decoder.

All have the same random weights of the released widths; the depth is reduced to 2 of 28 blocks, so that a round takes
seconds. What is outside the blocks (embeddings, the last layer, the sampler) weighs 14 times as much as in the released
model. 20 steps with guidance 1.5: ancestral with a learned variance against the official loop, DDIM against
`DiTPipeline`, which has no other that its scheduler can follow. Its class is corrected so that it computes what the
official network does, and its autoencoder is one of a few channels. Latents must be the same, to rounding.

"bitlaw, products by MKL" is bitlaw without `bitlaw.linear`, that is, with the matrix products that the official loop
has: what is left of its advantage comes from the loop itself.

    python benchmarks/official_dit.py --official DiT timm     (a checkout of facebookresearch/DiT, and timm 0.9.12)
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

import bitlaw.linear
from bitlaw.models.dit import DiT
from bitlaw.models.generator import Noise, rollout
from bitlaw.models.official import WeightsFile
from harness import compare, finish, official_arguments, one_thread, stub_torchvision

DEPTH, WIDTH, HEADS = 2, 1152, 16
NUM_STEPS, GUIDANCE = 20, 1.5
DDIM = {"sampler": "ddim", "spacing": "stride", "guided_channels": "all"}


class GivenNoise(Noise):
    """Numbers that both sides are given: the start, then those of each step."""

    def __init__(self, numbers: Sequence[Tensor]):
        super().__init__(0, range(len(numbers[0])))
        self.numbers = numbers

    def normal(self, step: int, shape: Sequence[int]) -> Tensor:
        return self.numbers[step]


def official_network() -> Any:
    """The official network, with weights at which every branch is awake."""
    stub_torchvision()  # after diffusers was imported, which asks whether there is one
    from models import DiT as OfficialDiT

    net = OfficialDiT(depth=DEPTH, hidden_size=WIDTH, num_heads=HEADS)
    randomize(net)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def randomize(net: nn.Module) -> None:
    """Products of matrices keep the size of what they are given, and so does the last layer."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        if name != "pos_embed":
            size = 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1
            parameter.normal_(0, size, generator=generator)


def diffusers_pipeline(net: nn.Module) -> Any:
    """`DiTPipeline` with the weights of an official network, corrected so that it computes the same."""
    theirs = DiTTransformer2DModel(HEADS, WIDTH // HEADS, out_channels=8, num_layers=DEPTH, norm_eps=1e-6)
    theirs.load_state_dict(diffusers_names(net.state_dict()))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="leading")
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, mid_block_add_attention=False)
    pipeline = DiTPipeline(theirs.eval().requires_grad_(False), vae.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_names(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of diffusers, which has the embedders once in every block."""
    tensors: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        tensors[f"pos_embed.proj.{kind}"] = official[f"x_embedder.proj.{kind}"]
        tensors[f"proj_out_1.{kind}"] = official[f"final_layer.adaLN_modulation.1.{kind}"]
        tensors[f"proj_out_2.{kind}"] = official[f"final_layer.linear.{kind}"]
        for i in range(DEPTH):
            ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            embedder = f"{theirs}.norm1.emb.timestep_embedder"
            tensors[f"{embedder}.linear_1.{kind}"] = official[f"t_embedder.mlp.0.{kind}"]
            tensors[f"{embedder}.linear_2.{kind}"] = official[f"t_embedder.mlp.2.{kind}"]
            tensors[f"{theirs}.norm1.linear.{kind}"] = official[f"{ours}.adaLN_modulation.1.{kind}"]
            for letter, part in zip("qkv", official[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                tensors[f"{theirs}.attn1.to_{letter}.{kind}"] = part
            tensors[f"{theirs}.attn1.to_out.0.{kind}"] = official[f"{ours}.attn.proj.{kind}"]
            tensors[f"{theirs}.ff.net.0.proj.{kind}"] = official[f"{ours}.mlp.fc1.{kind}"]
            tensors[f"{theirs}.ff.net.2.{kind}"] = official[f"{ours}.mlp.fc2.{kind}"]
            table = "class_embedder.embedding_table.weight"
            tensors[f"{theirs}.norm1.emb.{table}"] = official["y_embedder.embedding_table.weight"]
    return tensors


def run_official(net: Any, labels: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """Latents of the official loop, which carries both halves; the noise it draws is replaced by the given one."""
    from diffusion import create_diffusion

    given = iter(numbers[1:])
    both = torch.cat([numbers[0], numbers[0]])
    conditions = {"y": torch.cat([labels, torch.full_like(labels, 1000)]), "cfg_scale": GUIDANCE}
    with patch("torch.randn_like", lambda x: (noise := next(given)).repeat(len(x) // len(noise), 1, 1, 1)):
        latents = create_diffusion(str(NUM_STEPS)).p_sample_loop(
            net.forward_with_cfg, both.shape, both, clip_denoised=False, model_kwargs=conditions, device="cpu"
        )
    return latents.chunk(2)[0]


def run_pipeline(pipeline: Any, labels: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """Latents of diffusers' pipeline, read off where the autoencoder gets them."""
    found: list[Tensor] = []
    hook = pipeline.vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    with patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: numbers[0]):
        pipeline(labels.tolist(), guidance_scale=GUIDANCE, num_inference_steps=NUM_STEPS, output_type="np")
    hook.remove()
    return found[0] * pipeline.vae.config.scaling_factor


def run_bitlaw(model: DiT, labels: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """Latents of bitlaw."""
    *_, last = rollout(model, labels, GivenNoise(numbers))
    return last.after.x_BCHW


def run_through_mkl(model: DiT, labels: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """The same without oneDNN."""
    with patch.object(bitlaw.linear, "_HAS_ONEDNN", False):
        return run_bitlaw(model, labels, numbers)


def main() -> int:
    """Batches of 1 and 4."""
    one_thread()
    options = official_arguments(__doc__, "official_dit", rounds=3)
    net = official_network()
    pipeline = diffusers_pipeline(net)
    released = DiT.from_official(WeightsFile(Path("DiT-XL-2-256x256.pt"), net.state_dict()), None)
    model = released.with_sampling(guidance=GUIDANCE, num_steps=NUM_STEPS)
    comparisons, requirements = [], {}
    for batch in (1, 4):
        labels = torch.arange(batch) * 200 + 3
        generator = torch.Generator().manual_seed(batch)
        numbers = [torch.randn(batch, 4, 32, 32, generator=generator) for _ in range(NUM_STEPS + 1)]
        for baseline, run, ours in (
            ("official", lambda *given: run_official(net, *given), model),
            ("DiTPipeline", lambda *given: run_pipeline(pipeline, *given), model.with_sampling(**DDIM)),
        ):
            comparison = compare(
                f"DiT-XL/2 widths, depth {DEPTH}, 256 px, batch {batch}, {NUM_STEPS} {ours.sampling.sampler} steps",
                {
                    baseline: lambda run=run, labels=labels, numbers=numbers: run(labels, numbers),
                    "bitlaw": lambda ours=ours, labels=labels, numbers=numbers: run_bitlaw(ours, labels, numbers),
                    "bitlaw, products by MKL": lambda ours=ours, labels=labels, numbers=numbers: run_through_mkl(
                        ours, labels, numbers
                    ),
                },
                baseline=baseline,
                rounds=options.rounds,
            )
            comparisons.append(comparison)
            theirs = comparison.results[baseline]
            error = ((comparison.results["bitlaw"] - theirs).abs().max() / theirs.abs().max()).item()
            requirements[f"batch {batch}: not slower than {baseline}"] = comparison.speedup("bitlaw") >= 1
            requirements[f"batch {batch}: latents of {baseline}, to {error:.1e} of the largest"] = error < 2e-5
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
