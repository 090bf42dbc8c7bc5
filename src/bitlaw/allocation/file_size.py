"""The size of the file that a model under a plan is saved in, to the byte, before anything is quantized.

`model.safetensors` is a number of 8 bytes, a JSON header padded to a multiple of 8, and the tensors. The header says of
each tensor its type, its shape and the bytes where it begins and ends, and so has more digits where more lies before
it. That makes a file's size all but a sum over the sites, and `Sizes` brackets it between two sums.

The tokenizer, in a file of its own, is not counted: it is the same for every plan.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitlaw.allocation.curves import CurveSettings
from bitlaw.formats.format import SMALLEST_FLOAT16_SCALE
from bitlaw.install import SiteParts, is_changed
from bitlaw.models.generator import ImageGenerator
from bitlaw.packing import layout, pack_site, static_format
from bitlaw.precision import FULL_BITS, BitPlan, TensorPrecision
from bitlaw.quantized import WeightSpec

SCALE_MARGIN = 4
"""A scale is counted in float16 if it would stay in its range when a method moves it by this factor."""

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Types as a header names them, in the order of safetensors, which writes the last first."""
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


class Stored(NamedTuple):
    """A tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        """As a tensor would be stored."""
        return cls(tensor.dtype, tuple(tensor.shape))


Layout = dict[str, Stored]


def file_bytes(tensors: Mapping[str, Stored]) -> int:
    """The size of a safetensors file of these tensors."""
    header, begin = {}, 0
    for name in sorted(tensors, key=lambda name: _place(name, tensors[name].dtype)):
        stored = tensors[name]
        end = begin + stored.nbytes
        header[name] = {"dtype": _NAMES[stored.dtype], "shape": stored.shape, "data_offsets": [begin, end]}
        begin = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + begin


def _place(name: str, dtype: torch.dtype) -> tuple[int, str]:
    """What tensors are sorted by in a file."""
    return -_RANKS[dtype], name


def _entry_bytes(name: str, stored: Stored) -> int:
    """Bytes of a tensor's entry in a header with the comma behind it, but for the digits of its two offsets."""
    entry = {name: {"dtype": _NAMES[stored.dtype], "shape": stored.shape, "data_offsets": [0, 0]}}
    return len(json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode()) - 2 + 1 - 2


def layout_of(
    model: ImageGenerator[Any], plan: BitPlan, known: dict[tuple[str, TensorPrecision], Layout] | None = None
) -> Layout:
    """The tensors of the file that `model.save` writes once the model is quantized by `plan`.

    By a method that stores no more than codes and their parameters; transforms put scales or branches beside them.

    known: layouts of weights of this model that were looked at before; new ones are added
    """
    known = {} if known is None else known
    tensors = _unquantized(model)
    for name in plan:
        if (precision := plan.weight(name)) is not None:
            key = f"{name}.weight"
            if (name, precision) not in known:
                known[name, precision] = weight_layout(name, model.net.get_parameter(key), precision)
            del tensors[key]
            tensors |= known[name, precision]
        if is_changed(plan, name):
            tensors |= _ranges_layout(plan, name)
    return tensors


def weight_layout(name: str, weight: Tensor, precision: TensorPrecision) -> Layout:
    """The tensors that store a site's weight in few bits."""
    spec = WeightSpec.of(precision)
    scale_dtype = _scale_dtype(spec, weight.detach())
    return {key: Stored(*value) for key, value in layout(name, spec, tuple(weight.shape), scale_dtype).items()}


def _scale_dtype(spec: WeightSpec, weight: Tensor) -> torch.dtype:
    """Type of stored scales (`formats.format.round_scale`), the wider one near the ends of float16's range."""
    if "scale_G1" not in spec.format.param_names:
        return torch.float16
    x_GN = spec.groups(weight.float())
    if spec.format.codebook_shape:
        # k-means need not be done for it: entries of a codebook reach about as far as the weights.
        reach_G = x_GN.abs().amax(1)
        scale = torch.where(reach_G > 0, reach_G / 127, 1.0)
    else:
        scale = spec.format.fit(x_GN)["scale_G1"]
    lowest, highest = SMALLEST_FLOAT16_SCALE * SCALE_MARGIN, torch.finfo(torch.float16).max / SCALE_MARGIN
    return torch.float16 if lowest <= float(scale.min()) and float(scale.max()) <= highest else torch.float32


def _unquantized(model: ImageGenerator[Any]) -> Layout:
    tensors = model.to_tensors()
    dtype = model.storage_dtype
    return {
        name: Stored(dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def _ranges_layout(plan: BitPlan, name: str) -> Layout:
    """Static ranges of a site's input."""
    if (format := static_format(plan, name)) is None:
        return {}
    params = format.fit(torch.tensor([[-1.0, 1.0]]))
    ranges = {key: value.expand(len(plan.step_groups), 1) for key, value in params.items()}
    return {key: Stored.of(tensor) for key, tensor in pack_site(name, SiteParts(ranges=ranges)).items()}


@dataclass(frozen=True)
class Bracket:
    """Bytes of a part of a file: at least `low`, at most `high`."""

    low: int
    high: int


class Sizes:
    """The file's size as a sum: of each weight at each width, and of the rest.

    For any choice of a width for every weight, the file has at least the sum of `low` and at most that of `high`.
    Inputs cost nothing but their static ranges, which are part of the rest.

    widths: of each site's weight
    input_widths: of each site's inputs in all step groups, where they may have static ranges
    """

    weights: dict[str, dict[int, Bracket]]
    rest: Bracket

    def __init__(
        self,
        model: ImageGenerator[Any],
        settings: CurveSettings,
        widths: Mapping[str, Sequence[int]],
        input_widths: Mapping[str, Sequence[int]],
        num_groups: int,
    ):
        always = _unquantized(model)
        options: list[Layout] = []
        weights: dict[str, dict[int, Layout]] = {}
        for site, of_site in widths.items():
            key, weight = f"{site}.weight", model.net.get_parameter(f"{site}.weight")
            full = {key: always.pop(key)}
            weights[site] = {
                bits: full if precision is None else weight_layout(site, weight, precision)
                for bits in of_site
                for precision in [settings.weight_precision(bits)]
            }
            options += weights[site].values()
        maybe: Layout = {}
        for site, of_site in input_widths.items():
            quantized = [bits for bits in of_site if 0 < bits < FULL_BITS]
            if not quantized:
                continue
            precision = settings.precision("input", max(quantized))
            plan = BitPlan({site: (precision,) * num_groups}, tuple(range(num_groups)))
            # Zero points of more than 8 bits are of another type.
            is_certain = len(quantized) == len(of_site) and len({bits > 8 for bits in quantized}) == 1
            (always if is_certain else maybe).update(_ranges_layout(plan, site))
        digits = _Digits(always, [maybe, *options])
        self.weights = {
            site: {bits: digits.bracket(tensors) for bits, tensors in of_site.items()}
            for site, of_site in weights.items()
        }
        certain, possible = digits.bracket(always), digits.bracket(maybe)
        # There are two braces, but no comma behind the last entry; then up to 7 spaces.
        fixed = 8 + 2 - 1
        self.rest = Bracket(fixed + certain.low, fixed + 7 + certain.high + possible.high)


class _Digits:
    """How many digits the offsets of each tensor have, at least and at most, whatever is chosen."""

    def __init__(self, always: Layout, options: Iterable[Layout]):
        least = {_place(name, stored.dtype): stored.nbytes for name, stored in always.items()}
        most = dict(least)
        for tensors in options:
            for name, stored in tensors.items():
                place = _place(name, stored.dtype)
                most[place] = max(most.get(place, 0), stored.nbytes)
        self.before: dict[tuple[int, str], tuple[int, int]] = {}
        low = high = 0
        for place in sorted(most):
            self.before[place] = low, high
            low, high = low + least.get(place, 0), high + most[place]

    def bracket(self, tensors: Layout) -> Bracket:
        low = high = 0
        for name, stored in tensors.items():
            fixed = _entry_bytes(name, stored) + stored.nbytes
            begin_low, begin_high = self.before[_place(name, stored.dtype)]
            low += fixed + len(str(begin_low)) + len(str(begin_low + stored.nbytes))
            high += fixed + len(str(begin_high)) + len(str(begin_high + stored.nbytes))
        return Bracket(low, high)
