"""Quantized tensors as the tensors of a checkpoint, and back, bit for bit.

Integers of 1 to 8 bits take the compressed-tensors pack-quantized layout, written with that library's packer:

    <site>.weight_packed      int32 (O, words)       codes, dense within a row
    <site>.weight_scale       float16 (O, groups)    float32 if a scale is out of float16's range
    <site>.weight_zero_point  int32 (words, groups)  packed along the output channels
    <site>.weight_shape       int64 (2,)             or (4,), a convolution's (O, I, kh, kw)

With one scale for the tensor, scale and zero point are (1,) and not packed. What the layout cannot hold has names of
its own: `bitlaw_codes` and `bitlaw_zero_point` for other formats and widths, `bitlaw_codebook`, int8 (groups, K, D),
for codebooks (whose scales are (rows of groups, groups in a row)), `bitlaw_<name>` for further parameters of a format.
Codes wider than 8 bits are two planes side by side, the low 8 bits and the rest. Bit patterns of floats are
stored as they are (e2m1: eight to a word, the first in the lowest bits). A dropped tensor has only a shape. All but the
shape of a convolution is that of the linear (O, I kh kw).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from bitlaw.formats import Format, IntegerFormat
from bitlaw.install import SiteParts, is_changed
from bitlaw.precision import BitPlan
from bitlaw.prepared import STORED, InputScaling, LowRankBranch
from bitlaw.quantized import QuantizedTensor, QuantLayer, WeightSpec, packed_bits

# ---- one weight ---------------------------------------------------------------------------------------


def pack(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that store the weight of the site `name`."""
    spec, rows, width = quantized.spec, quantized.shape[0], quantized.spec.format.code_width
    codes_key, zeros_key = _keys(spec.format)
    tensors = {"weight_shape": torch.tensor(quantized.shape)}
    if width > 0:
        tensors[codes_key] = _pack_rows(quantized.codes, width)
    for param, value in quantized.params.items():
        if param == "scale_G1":
            tensors["weight_scale"] = value.reshape(_table(spec, quantized.shape)).clone()
        elif param == "zero_G1" and spec.group_size == "tensor":
            tensors[zeros_key] = value.reshape(1).clone()
        elif param == "zero_G1":
            tensors[zeros_key] = _pack_rows(value.reshape(rows, -1).T, width).T.contiguous()
        else:
            tensors["bitlaw_codebook" if param == "codebook_GKD" else f"bitlaw_{param}"] = value.contiguous()
    assert 8 * sum(tensor.nbytes for key, tensor in tensors.items() if key != "weight_shape") == quantized.bits().total
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def layout(
    name: str, spec: WeightSpec, shape: Sequence[int], scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor that `pack` gives for a weight of this shape, whose codes need not be known."""
    format, rows, num_groups = spec.format, shape[0], spec.num_groups(shape)
    codes_key, zeros_key = _keys(format)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight_shape": (torch.int64, (len(shape),))}
    if format.code_width > 0:
        words = packed_bits(prod(shape[1:]) // format.values_per_code, format.code_width) // 32
        tensors[codes_key] = (torch.int32, (rows, words))
    for param in format.param_names:
        if param == "scale_G1":
            tensors["weight_scale"] = (scale_dtype, _table(spec, tuple(shape)))
        elif param == "zero_G1" and spec.group_size == "tensor":
            tensors[zeros_key] = (format.code_dtype, (1,))
        elif param == "zero_G1":
            tensors[zeros_key] = (torch.int32, (packed_bits(rows, format.code_width) // 32, num_groups // rows))
        else:
            assert param == "codebook_GKD"
            tensors["bitlaw_codebook"] = (torch.int8, (num_groups, *format.codebook_shape))
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def unpack(name: str, tensors: Mapping[str, Tensor], spec: WeightSpec) -> QuantizedTensor:
    """The weight that `pack` stored under `name`.

    Raises ValueError naming the tensor that is missing, has the wrong type or shape, or holds NaN, Inf, a scale that is
    not positive or a code that stands for no number.
    """
    stored, format = _Stored(name, tensors), spec.format
    codes_key, zeros_key = _keys(format)

    size = stored.take("weight_shape", torch.int64)
    if size.ndim != 1 or len(size) not in (2, 4) or size.min() < 1:
        raise stored.damaged("weight_shape", f"{size.tolist()} is not the shape of a weight")
    shape = tuple(int(n) for n in size)
    if problem := spec.problem(shape):
        raise stored.damaged("weight_shape", problem)
    rows, num_inputs, num_groups = shape[0], int(size[1:].prod()), spec.num_groups(shape)

    params = {}
    for param in format.param_names:
        if param == "scale_G1":
            scale = stored.take("weight_scale", torch.float16, torch.float32, shape=_table(spec, shape))
            if not (scale > 0).all():
                raise stored.damaged("weight_scale", "holds scales that are not above 0")
            params[param] = scale.reshape(num_groups, 1)
        elif param == "zero_G1" and spec.group_size == "tensor":
            params[param] = stored.take(zeros_key, format.code_dtype, shape=(1,)).reshape(1, 1)
        elif param == "zero_G1":
            words = packed_bits(rows, format.code_width) // 32
            packed = stored.take(zeros_key, torch.int32, shape=(words, num_groups // rows))
            params[param] = _unpack_rows(packed.T, format, rows).T.reshape(num_groups, 1)
        elif param == "codebook_GKD":
            params[param] = stored.take("bitlaw_codebook", torch.int8, shape=(num_groups, *format.codebook_shape))
        else:
            params[param] = stored.take(f"bitlaw_{param}")

    codes_in_row = num_inputs // format.values_per_code
    if format.code_width > 0:
        words = packed_bits(codes_in_row, format.code_width) // 32
        codes = _unpack_rows(stored.take(codes_key, torch.int32, shape=(rows, words)), format, codes_in_row)
    else:
        codes = torch.zeros(rows, codes_in_row, dtype=format.code_dtype)
    quantized = QuantizedTensor(codes, params, spec, shape)
    if not quantized.decode().isfinite().all():
        raise stored.damaged(codes_key, "holds codes that stand for no number")
    return quantized


@dataclass(frozen=True)
class _Stored:
    """The tensors under a site's name, checked as they are taken."""

    name: str
    tensors: Mapping[str, Tensor]

    def take(self, key: str, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
        tensor = self.tensors.get(f"{self.name}.{key}")
        if tensor is None:
            raise self.damaged(key, "missing")
        if dtypes and tensor.dtype not in dtypes:
            raise self.damaged(key, f"{_short(tensor.dtype)}, expected {' or '.join(map(_short, dtypes))}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise self.damaged(key, f"shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise self.damaged(key, "holds NaN or Inf")
        return tensor

    def damaged(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.name}.{key}: {what}; the checkpoint is damaged or the plan beside it is not its own")


def _keys(format: Format) -> tuple[str, str]:
    """Names for codes and zero points."""
    if isinstance(format, IntegerFormat) and format.bits <= 8:
        return "weight_packed", "weight_zero_point"
    return "bitlaw_codes", "bitlaw_zero_point"


def _table(spec: WeightSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of stored scales."""
    rows, columns = spec.rectangle(shape)
    return (1,) if spec.group_size == "tensor" else (shape[0] // rows, prod(shape[1:]) // columns)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pack_rows(codes: Tensor, width: int) -> Tensor:
    """Codes (rows, count) as int32 (rows, words)."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # slow to import

    if codes.dtype == torch.int8:
        return pack_to_int32(codes, width)
    patterns = codes.to(torch.int32) + (0 if codes.dtype == torch.uint8 else 1 << (width - 1))
    planes = [(patterns, width)] if width <= 8 else [(patterns & 0xFF, 8), (patterns >> 8, width - 8)]
    # The packer takes signed codes and adds half of their range itself.
    return torch.cat([pack_to_int32((plane - (1 << (w - 1))).to(torch.int8), w) for plane, w in planes], 1)


def _unpack_rows(packed: Tensor, format: Format, count: int) -> Tensor:
    """Codes (rows, count) in the format's type."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # slow to import

    width, shape = format.code_width, torch.Size((len(packed), count))

    def plane(words: Tensor, w: int) -> Tensor:
        words = words.clone(memory_format=torch.contiguous_format)
        return unpack_from_int32(words, w, shape).to(torch.int32) + (1 << (w - 1))

    if width <= 8:
        patterns = plane(packed, width)
    else:
        low, high = packed.split([packed_bits(count, 8) // 32, packed_bits(count, width - 8) // 32], 1)
        patterns = plane(low, 8) | plane(high, width - 8) << 8
    if format.code_dtype != torch.uint8:
        patterns -= 1 << (width - 1)
    return patterns.to(format.code_dtype)


# ---- a network ----------------------------------------------------------------------------------------

_SCALING, _SHIFT, _DOWN, _UP = (f"bitlaw_{part}" for part in ("input_scale", "input_shift", "down", "up"))
_ACTIVATION = {"scale_G1": "bitlaw_act_scale", "zero_G1": "bitlaw_act_zero_point"}


def pack_site(name: str, parts: SiteParts) -> dict[str, Tensor]:
    """The tensors that store all that a quantized layer has.

    Beside those of `pack`, where there are such things:
    <site>.bitlaw_input_scale, .bitlaw_input_shift     float16 (C,)          (x - shift) / scale comes before the layer
    <site>.bitlaw_down, .bitlaw_up                     float16 (R, I), (O, R)   up down x comes to its output
    <site>.bitlaw_act_scale, .bitlaw_act_zero_point    (S,)                   static ranges of each step group
    """
    tensors = {}
    if parts.scaling is not None:
        tensors[_SCALING] = parts.scaling.scale_C.to(STORED)
        if parts.scaling.shift_C is not None:
            tensors[_SHIFT] = parts.scaling.shift_C.to(STORED)
    if parts.branch is not None:
        tensors |= {_DOWN: parts.branch.down_RI.to(STORED), _UP: parts.branch.up_OR.to(STORED)}
    for param, value in parts.ranges.items():
        tensors[_ACTIVATION[param]] = value.flatten().clone()
    weight = {} if parts.weight is None else pack(name, parts.weight)
    return weight | {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def companion_bits(parts: SiteParts) -> int:
    """Bits of what a quantized layer has beside its weight, as `pack_site` stores it."""
    return 8 * sum(tensor.nbytes for tensor in pack_site("", replace(parts, weight=None)).values())


def unpack_site(name: str, tensors: Mapping[str, Tensor], plan: BitPlan) -> SiteParts:
    """What `pack_site` stored under `name`. Raises the ValueError of `unpack`."""
    stored, precision = _Stored(name, tensors), plan.weight(name)
    scaling = branch = None
    if f"{name}.{_SCALING}" in tensors:
        scale_C = stored.take(_SCALING, STORED).float()
        if scale_C.ndim != 1 or not (scale_C > 0).all():
            raise stored.damaged(_SCALING, "is not a scale above 0 for each channel")
        shift_C = None
        if f"{name}.{_SHIFT}" in tensors:
            shift_C = stored.take(_SHIFT, STORED, shape=tuple(scale_C.shape)).float()
        scaling = InputScaling(scale_C, shift_C)
    if f"{name}.{_DOWN}" in tensors:
        down_RI, up_OR = stored.take(_DOWN, STORED).float(), stored.take(_UP, STORED).float()
        if down_RI.ndim != 2 or up_OR.ndim != 2 or len(down_RI) != up_OR.shape[1]:
            raise stored.damaged(_DOWN, f"shape {tuple(down_RI.shape)} does not go with {tuple(up_OR.shape)} of {_UP}")
        branch = LowRankBranch(down_RI, up_OR)
    ranges = {}
    if format := static_format(plan, name):
        groups = (len(plan.step_groups),)
        for param in format.param_names:
            dtypes = (torch.float32,) if param == "scale_G1" else (format.code_dtype,)
            value = stored.take(_ACTIVATION[param], *dtypes, shape=groups)
            if param == "scale_G1" and not (value > 0).all():
                raise stored.damaged(_ACTIVATION[param], "holds scales that are not above 0")
            ranges[param] = value.reshape(-1, 1)
    weight = None if precision is None else unpack(name, tensors, WeightSpec.of(precision))
    return SiteParts(weight, ranges, scaling, branch)


def static_format(plan: BitPlan, name: str) -> Format | None:
    """The format of a site's static activation ranges, the widest if step groups differ; None if they are dynamic."""
    formats = [p.activation.format for p in plan[name] if p.is_static and p.activation is not None]
    return max(formats, key=lambda format: format.code_bits, default=None)


def parts_of(layer: QuantLayer) -> SiteParts:
    """What a quantized layer has."""
    return SiteParts(layer.quantized, layer.input_quant.ranges, layer.scaling, layer.branch)


def pack_network(net: nn.Module) -> dict[str, Tensor]:
    """The packed tensors of every quantized layer of a network, to be stored beside its state dict."""
    tensors: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, QuantLayer):
            tensors |= pack_site(name, parts_of(module))
    return tensors


def unpack_network(tensors: Mapping[str, Tensor], plan: BitPlan) -> tuple[dict[str, SiteParts], dict[str, Tensor]]:
    """The parts of the quantized layers of a checkpoint by site, and all its other tensors with those weights decoded.

    The second part loads into a full-precision network; `install.install` then puts the first in its place.
    Raises ValueError naming every damaged tensor.
    """
    parts, problems, taken = {}, [], set()
    for name in plan:
        if not is_changed(plan, name):
            continue
        taken |= {key for key in tensors if key.startswith((f"{name}.weight_", f"{name}.bitlaw_"))}
        try:
            parts[name] = unpack_site(name, tensors, plan)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    rest = {key: tensor for key, tensor in tensors.items() if key not in taken}
    decoded = {f"{name}.weight": p.weight.decode() for name, p in parts.items() if p.weight is not None}
    return parts, rest | decoded
