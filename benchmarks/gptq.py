"""GPTQ of single layers against the original implementation: the Hessian, and the solve for the same Hessian.

A weight of 1024 x 4096 and one of 4096 x 1024 at 4 bits (asymmetric) in groups of 128; inputs correlated as a random
mixing makes them, 8 calls of 1024 rows. A solve starts from the weight and the Hessian, and ends with the decoded
weight (the original) or with codes (bitlaw). bitlaw's time includes a comparison with rounding to nearest, which it
returns where that has the smaller error. There being no GPU, the original's `torch.cuda.synchronize` does nothing.

    python benchmarks/gptq.py --official gptq     (a checkout of IST-DASLab/gptq, which imports transformers)
"""

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bitlaw.calibration.moments import Moments
from bitlaw.formats import FORMATS
from bitlaw.methods.gptq import GPTQ
from bitlaw.quantized import QuantizedTensor, WeightSpec
from harness import compare, finish, official_arguments, one_thread

SHAPES = ((1024, 4096), (4096, 1024))
SPEC = WeightSpec(FORMATS["int4"], 128)
CALLS, ROWS = 8, 1024


def layer_and_inputs(num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """A weight, and inputs (calls, rows, inputs)."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs, generator=g)
    mixing = torch.randn(num_inputs, num_inputs, generator=g) / num_inputs**0.5
    return weight, torch.randn(CALLS, ROWS, num_inputs, generator=g) @ mixing


def original(weight: Tensor) -> Any:
    """The original's object for a layer."""
    from quant import Quantizer

    from gptq import GPTQ as OriginalGPTQ

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    method = OriginalGPTQ(linear)
    method.quantizer = Quantizer()
    method.quantizer.configure(4, perchannel=True, sym=False)
    return method


def original_hessian(weight: Tensor, x: Tensor) -> Tensor:
    """2 E[x x^T] times the rows of a call, as it is accumulated there."""
    method = original(weight)
    for call in x:
        method.add_batch(call[None], None)
    return method.H


def bitlaw_hessian(x: Tensor) -> Tensor:
    """E[x x^T], from sums in float64."""
    moments = Moments(x.shape[2], hessian=True)
    for call in x:
        moments.add(call)
    return moments.hessian_II


def original_solve(prepared: list[Any]) -> Tensor:
    """The decoded weight; takes one of the prepared objects, as a solve uses its Hessian up."""
    method = prepared.pop()
    with contextlib.redirect_stdout(io.StringIO()), patch("torch.cuda.synchronize"):
        method.fasterquant(groupsize=128)
    return method.layer.weight.data


def bitlaw_solve(weight: Tensor, hessian: Tensor) -> QuantizedTensor:
    """Codes and parameters as they are stored."""
    return GPTQ().solve(weight, hessian, SPEC).quantized


def prepare(weight: Tensor, hessian: Tensor, count: int) -> list[Any]:
    """Objects that have their Hessian."""
    methods = [original(weight) for _ in range(count)]
    for method in methods:
        method.H = 2 * hessian
    return methods


def error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """|X (W - Wq)^T|^2, of each row of X."""
    difference = (decoded - weight).double()
    return float(((difference @ hessian.double()) * difference).sum())


@torch.no_grad()
def main() -> int:
    """Both shapes: the Hessian, then the solve."""
    one_thread()
    options = official_arguments(__doc__, "gptq", rounds=9)
    comparisons, requirements = [], {}
    for num_outputs, num_inputs in SHAPES:
        weight, x = layer_and_inputs(num_outputs, num_inputs)
        contenders: dict[str, Callable[[], Any]] = {
            "original": lambda weight=weight, x=x: original_hessian(weight, x),
            "bitlaw": lambda x=x: bitlaw_hessian(x),
        }
        name = f"Hessian of {num_inputs} inputs, {CALLS * ROWS} rows"
        comparison = compare(name, contenders, baseline="original", rounds=options.rounds)
        comparisons.append(comparison)
        exact = sum(call.double().T @ call.double() for call in x) / (CALLS * ROWS)
        theirs, ours = (
            float((hessian.double() - exact).norm() / exact.norm())
            for hessian in (comparison.results["original"] / (2 * ROWS), comparison.results["bitlaw"])
        )
        requirements[f"{name}: 2 times as fast"] = comparison.speedup("bitlaw") >= 2
        requirements[f"{name}: relative error {ours:.1e} (at most 5e-7), theirs {theirs:.1e}"] = ours <= 5e-7

        hessian = comparison.results["bitlaw"]
        prepared = prepare(weight, hessian, options.rounds + 1)
        contenders = {
            "original": lambda prepared=prepared: original_solve(prepared),
            "bitlaw": lambda weight=weight, hessian=hessian: bitlaw_solve(weight, hessian),
        }
        name = f"solve of {num_outputs} x {num_inputs}, W4g128"
        comparison = compare(name, contenders, baseline="original", rounds=options.rounds)
        comparisons.append(comparison)
        ratio = error(weight, comparison.results["bitlaw"].decode(), hessian) / error(
            weight, comparison.results["original"], hessian
        )
        requirements[f"{name}: 3 times as fast"] = comparison.speedup("bitlaw") >= 3
        requirements[f"{name}: output error {ratio:.4f} times theirs (at most 1.005)"] = ratio <= 1.005
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
