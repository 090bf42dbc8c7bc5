"""Round to nearest and pack the largest ladder models at 4 bits, against compressed-tensors' own functions.

Both make a copy of the network with decoded weights, to be evaluated, and the packed tensors, to be stored.
The baseline calculates ranges, quantizes, decodes and packs layer by layer with that library.
"""

import copy
import sys

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

import bitlaw
from bitlaw.models.dit import DiT
from bitlaw.models.var import VAR
from bitlaw.packing import pack_network, unpack
from bitlaw.quantized import WeightSpec
from harness import arguments, compare, finish, one_thread

ARGS = QuantizationArgs(num_bits=4, symmetric=False, strategy=QuantizationStrategy.CHANNEL)


def by_library(model: VAR | DiT) -> dict[str, Tensor]:
    """The packed tensors and the decoded weights, with compressed-tensors alone."""
    tensors: dict[str, Tensor] = {}
    net = copy.deepcopy(model.net)
    for site in model.sites():
        if site.phase != "blocks":
            continue
        weight = net.get_parameter(f"{site.name}.weight")
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale, zero = calculate_qparams(low, high, ARGS)
        codes = quantize(weight, scale, zero, ARGS, dtype=torch.int8)
        tensors[f"{site.name}.weight_packed"] = pack_to_int32(codes, 4)
        tensors[f"{site.name}.weight_scale"] = scale.half()
        tensors[f"{site.name}.weight_zero_point"] = pack_to_int32(zero.to(torch.int8), 4, packed_dim=0)
        net.get_submodule(site.name).weight = torch.nn.Parameter(
            dequantize(codes, scale.half().float(), zero, ARGS), requires_grad=False
        )
        tensors[f"{site.name}.decoded"] = net.get_parameter(f"{site.name}.weight")
    return tensors


def by_bitlaw(model: VAR | DiT) -> dict[str, Tensor]:
    """The packed tensors, as `save` writes them."""
    return pack_network(bitlaw.quantize(model, "W4A16").net)


def main() -> int:
    """Run the comparison for both families."""
    one_thread()
    options = arguments(__doc__, "packing", rounds=15)
    spec = WeightSpec.of(bitlaw.Precision.parse("W4A16").weight)
    comparisons, requirements = [], {}
    for name in ("ladder/var-l", "ladder/dit-l"):
        model = bitlaw.load(name)
        contenders = {
            "compressed-tensors": lambda model=model: by_library(model),
            "bitlaw": lambda model=model: by_bitlaw(model),
        }
        comparison = compare(f"{name}, W4A16", contenders, baseline="compressed-tensors", rounds=options.rounds)
        comparisons.append(comparison)
        theirs, ours = comparison.results["compressed-tensors"], comparison.results["bitlaw"]
        errors = [0.0, 0.0]
        for site in (key.removesuffix(".decoded") for key in theirs if key.endswith(".decoded")):
            weight = model.net.get_parameter(f"{site}.weight")
            for index, decoded in enumerate((theirs[f"{site}.decoded"], unpack(site, ours, spec).decode())):
                errors[index] += (decoded - weight).square().sum().item()
        ratio = errors[1] / errors[0]
        requirements[f"{name}: squared error {ratio:.4f} times theirs (at most 1.01)"] = ratio <= 1.01
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
