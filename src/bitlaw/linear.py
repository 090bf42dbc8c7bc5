"""x W^T + b, by the faster of two implementations that are equal to rounding.

CPU builds of torch send float32 products to MKL, which leaves the AVX-512 units of other makers' processors unused;
oneDNN, which comes with torch as well, uses them. Training, other types and other devices are torch's business.

Legend: R rows, I input channels, O output channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# One thread of an AMD EPYC with AVX-512, float32, 1024 -> 4096, weights that come from memory, as in a network:
# oneDNN is 1.2 times as fast at 1 row, 1.6 at 2 and at 8, 2.2 from 50 rows on. (On one weight over and over, which is
# then in the cache, MKL is the faster one at 2 rows; no network is like that.) Small weights stay with MKL: the scores
# that are shipped with the ladder were computed with it, bit for bit, and a handful of rows gains nothing there.
_MIN_NUMBERS = 1 << 18
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not a public name: another torch may be without it
)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(..., I) -> (..., O): `F.linear`, to rounding."""
    if _goes_to_onednn(x, weight_OI):
        through = _opaque if torch.compiler.is_compiling() else _through_onednn
        return through(x, weight_OI, bias_O)
    return F.linear(x, weight_OI, bias_O)


def product(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """(R, I) -> (R, O): x W^T by the faster implementation, for operands that are in the cache."""
    # Below this the first call with a shape, for which oneDNN makes code, costs more than is gained.
    if _goes_to_onednn(x_RI, weight_OI, min_numbers=1 << 15):
        return _through_onednn(x_RI, weight_OI, None)
    return F.linear(x_RI, weight_OI)


def transposed(x_RI: Tensor) -> Tensor:
    """(R, I) -> (I, R) as `product` takes it fastest: MKL reads columns where they lie, oneDNN would copy them."""
    return x_RI.T.contiguous() if _HAS_ONEDNN and x_RI.device.type == "cpu" else x_RI.T


def _through_onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return out


# torch.compile takes that operator for one of its own making, with constant weights, and fails; so it is not shown it.
_opaque = torch.library.custom_op("bitlaw::linear", _through_onednn, mutates_args=())


@_opaque.register_fake
def _shape(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight_OI))


def _goes_to_onednn(x: Tensor, weight_OI: Tensor, min_numbers: int = _MIN_NUMBERS) -> bool:
    return (
        _HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and not torch.is_grad_enabled()
        and weight_OI.numel() >= min_numbers
        and (weight_OI.is_contiguous() or weight_OI.mT.is_contiguous())  # oneDNN is 1000 times slower on others
    )


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(input, self.weight, self.bias)
