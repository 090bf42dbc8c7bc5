"""GPTVQ in two dimensions at 2 and 3 bits against the implementation of its paper, on the same weights and Hessian.

Both have one codebook of 8-bit entries for 2048 weights (2 bits) or 8192 (3 bits), over 256 input channels, damping
0.01, and codebooks that are updated after assignment. Theirs runs as their scripts run it: Mahalanobis initialisation,
Hessian-weighted lookups, the M-step; with 10 iterations of k-means, which is the default of their code, and, where
"100" is in the name, with the 100 of their scripts. Their file synchronizes a GPU at the end: that call is made to do
nothing. Weights are Gaussian, inputs are correlated (a Gaussian mixed by a random matrix). The error is
tr((W - Q) H (W - Q)^T).

    python benchmarks/gptvq.py --official gptvq     (a checkout of qualcomm-ai-research/gptvq)
"""

import contextlib
import io
import sys
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.methods.gptvq import GPTVQ
from bitlaw.precision import Precision
from bitlaw.quantized import WeightSpec
from harness import compare, finish, official_arguments, one_thread

SHAPES = ((1024, 1024), (1024, 4096))
GROUP = {2: 2048, 3: 8192}
OURS = GPTVQ()


def layer(num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """A weight (O, I) and the Hessian of correlated inputs (I, I)."""
    g = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(num_outputs, num_inputs, generator=g)
    mixing_II = torch.randn(num_inputs, num_inputs, generator=g) / num_inputs**0.5
    x_NI = torch.randn(2 * num_inputs, num_inputs, generator=g) @ mixing_II
    return weight_OI, x_NI.T @ x_NI / len(x_NI)


def by_official(weight_OI: Tensor, hessian_II: Tensor, bits: int, iterations: int) -> Tensor:
    """The weight that the paper's implementation gives."""
    from vq_quant import VQQuantizer

    from gptq import GPTQ as Official

    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    linear.weight.data = weight_OI.clone()
    solver = Official(linear)
    solver.H = 2 * hessian_II
    solver.quantizer = VQQuantizer(
        vq_dim=2, columns_per_group=256, kmeans_iters=iterations, codebook_bitwidth=8, quantize_per_codebook=True
    )
    solver.quantizer.configure(bits)
    with contextlib.redirect_stdout(io.StringIO()), patch("torch.cuda.synchronize", lambda: None):
        solver.fasterquant(groupsize=GROUP[bits], include_m_step=True, use_vq=True, hessian_weighted_lookups=True)
    return linear.weight.detach()


def by_bitlaw(weight_OI: Tensor, hessian_II: Tensor, bits: int) -> Tensor:
    """The weight that bitlaw gives."""
    precision = Precision.parse(f"Wv2b{bits}g{GROUP[bits]}A16").weight
    assert precision is not None
    with torch.no_grad():
        return OURS.quantize(weight_OI, InputStats(hessian_II=hessian_II), WeightSpec.of(precision)).decode()


def main() -> int:
    """Run every comparison."""
    one_thread()
    options = official_arguments(__doc__, "gptvq", rounds=3)
    comparisons, requirements = [], {}

    def run(title: str, contenders: dict[str, Any], weight_OI: Tensor, hessian_II: Tensor, rounds: int) -> None:
        baseline = next(iter(contenders))
        comparison = compare(title, contenders, baseline=baseline, rounds=rounds, warmup=0)
        comparisons.append(comparison)
        errors = {}
        for name, result in comparison.results.items():
            off_OI = (result - weight_OI).double()
            errors[name] = float(((off_OI @ hessian_II.double()) * off_OI).sum())
        ratio, faster = errors["bitlaw"] / errors[baseline], comparison.speedup("bitlaw")
        requirements[f"{title}: {faster:.1f} times as fast (at least 3)"] = faster >= 3
        requirements[f"{title}: error {ratio:.3f} times theirs (at most 1.05)"] = ratio <= 1.05

    for num_outputs, num_inputs in SHAPES:
        weight_OI, hessian_II = layer(num_outputs, num_inputs)
        for bits in (2, 3):
            for iterations in (10, 100) if num_inputs == 1024 else (10,):
                contenders = {
                    "their code": lambda b=bits, i=iterations, w=weight_OI, h=hessian_II: by_official(w, h, b, i),
                    "bitlaw": lambda b=bits, w=weight_OI, h=hessian_II: by_bitlaw(w, h, b),
                }
                title = f"{num_outputs}x{num_inputs}, {bits} bits, {iterations} iterations of theirs"
                run(title, contenders, weight_OI, hessian_II, options.rounds if iterations == 10 else 1)
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
