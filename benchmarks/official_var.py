"""Sampling with VAR-d16 at 256 pixels against the official loop, both without the image decoder.

Both have the same random weights of the released widths; the depth is reduced to 4 of 16 blocks, so that a round takes
seconds. What is outside the blocks (filters, draws, codes) weighs four times as much as in the released model.
Guidance, top-k and top-p are those of the official evaluation. With the greedy choice both must draw the same tokens.

"bitlaw, products by MKL" is bitlaw without `bitlaw.linear`, that is, with the matrix products that the official loop
has: what is left of its advantage comes from the loop itself.

    python benchmarks/official_var.py --official VAR        (a checkout of FoundationVision/VAR)
"""

import contextlib
import io
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import bitlaw.linear
from bitlaw.models.autoencoders import VQTokenizer
from bitlaw.models.generator import Noise, rollout
from bitlaw.models.official import WeightsFile
from bitlaw.models.var import VAR, VARState
from harness import compare, finish, official_arguments, one_thread

DEPTH, WIDTH, HEADS = 4, 1024, 16
FILTERS = {"top_k": 900, "top_p": 0.96}
GREEDY = {"top_k": 1, "top_p": 0.0}


def official_models() -> tuple[Any, Any]:
    """The official tokenizer (its convolutions narrowed, for they do not run here) and transformer."""
    from models import VAR as OfficialVAR
    from models import VQVAE

    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = VQVAE(ch=32)
        transformer = OfficialVAR(tokenizer, depth=DEPTH, embed_dim=WIDTH, num_heads=HEADS, attn_l2_norm=True)
    generator = torch.Generator().manual_seed(0)
    for net in (tokenizer.quantize, transformer):
        randomize(net, generator)
    tokenizer.fhat_to_img = Tensor.clone  # no image decoder
    return tokenizer.eval(), transformer.eval()


@torch.no_grad()
def randomize(net: nn.Module, generator: torch.Generator) -> None:
    """Weights with which tokens differ: products of matrices keep the size of what they are given."""
    for name, parameter in net.named_parameters():
        if not name.endswith("scale_mul_1H11"):
            size = 0.05 if parameter.ndim != 2 or "emb" in name else 1 / math.sqrt(parameter.shape[1])
            parameter.normal_(0, size, generator=generator)


def run_official(transformer: Any, labels: Tensor, filters: dict[str, Any]) -> Tensor:
    """The final latent, as an image from 0 to 1 is made of it."""
    return transformer.autoregressive_infer_cfg(len(labels), labels, g_seed=0, cfg=1.5, **filters)


def run_bitlaw(model: VAR, labels: Tensor) -> VARState:
    """The state after the last stage."""
    *_, last = rollout(model, labels, Noise(0, range(len(labels))))
    return last.after


def run_through_mkl(model: VAR, labels: Tensor) -> VARState:
    """The same without oneDNN."""
    with patch.object(bitlaw.linear, "_HAS_ONEDNN", False):
        return run_bitlaw(model, labels)


def official_tokens(tokenizer: Any, transformer: Any, labels: Tensor) -> Tensor:
    """What the greedy choice draws, (B, L), read off where it is looked up."""
    tokens: list[Tensor] = []
    hook = tokenizer.quantize.embedding.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    run_official(transformer, labels, GREEDY)
    hook.remove()
    return torch.cat(tokens, 1)


def main() -> int:
    """Batches of 1 and 4."""
    one_thread()
    options = official_arguments(__doc__, "official_var", rounds=5)
    tokenizer, transformer = official_models()
    model = VAR.from_official(
        WeightsFile(Path("transformer"), transformer.state_dict()),
        VQTokenizer.from_official(WeightsFile(Path("tokenizer"), tokenizer.state_dict())),
    )
    comparisons, requirements = [], {}
    for batch in (1, 4):
        labels = torch.arange(batch) * 200 + 3
        comparison = compare(
            f"VAR-d16 widths, depth {DEPTH}, 256 px, batch {batch}, guidance, float32",
            {
                "official": lambda labels=labels: run_official(transformer, labels, FILTERS),
                "bitlaw": lambda labels=labels: run_bitlaw(model.with_sampling(**FILTERS), labels),
                "bitlaw, products by MKL": lambda labels=labels: run_through_mkl(
                    model.with_sampling(**FILTERS), labels
                ),
            },
            baseline="official",
            rounds=options.rounds,
        )
        comparisons.append(comparison)
        requirements[f"batch {batch}: at least 1.05 times as fast"] = comparison.speedup("bitlaw") >= 1.05
        with torch.inference_mode():
            theirs = official_tokens(tokenizer, transformer, labels)
            ours = torch.cat(run_bitlaw(model.with_sampling(**GREEDY), labels).tokens, 1)
        same, distinct = torch.equal(ours, theirs), len(ours.unique())
        requirements[f"batch {batch}: the same greedy tokens ({distinct} distinct ones)"] = same and distinct > 20
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
