"""Quantized tensors as checkpoint tensors: sizes, the compressed-tensors layout, damage."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitlaw.formats import FORMATS, FloatFormat, Format, IntegerFormat, Params, format_name
from bitlaw.packing import pack, unpack, unpack_network
from bitlaw.precision import BitPlan, GroupSize, Precision
from bitlaw.quantized import QuantizedTensor, WeightSpec

SPEC = WeightSpec(FORMATS["int4"], 8)


def weights(rows: int = 6, inputs: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def stored_bits(tensors: dict[str, Tensor]) -> int:
    return sum(8 * tensor.nbytes for name, tensor in tensors.items() if not name.endswith(".weight_shape"))


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert a.shape == b.shape and a.codes.dtype == b.codes.dtype and torch.equal(a.codes, b.codes)
    assert a.params.keys() == b.params.keys()
    for name, value in a.params.items():
        assert value.dtype == b.params[name].dtype and torch.equal(value, b.params[name])
    assert torch.equal(a.decode().view(torch.int32), b.decode().view(torch.int32))


@settings(deadline=None, max_examples=200)
@given(
    name=st.sampled_from(list(FORMATS)),
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    size=st.integers(1, 21),
    by=st.sampled_from(["group", "channel", "tensor"]),
    exponent=st.integers(-30, 18),
    kernel=st.sampled_from([None, (1, 1), (1, 3), (3, 3)]),
)
def test_any_shape_survives_and_takes_the_bits_it_says(
    name: str, rows: int, groups: int, size: int, by: str, exponent: int, kernel: tuple[int, int] | None
) -> None:
    """Every width and layout, rows that do not fill words, scales in and out of float16's range."""
    spec = WeightSpec(FORMATS[name], {"group": size, "channel": None, "tensor": "tensor"}[by])
    area = prod(kernel or (1,))
    weight = weights(rows, groups * size * area) * 2.0**exponent
    if kernel is not None:
        weight = weight.view(rows, groups * size, *kernel)
    assume(spec.problem(weight.shape) is None)
    quantized = spec.quantize(weight)
    assert quantized.shape == weight.shape
    tensors = pack("a.b", quantized)
    assert stored_bits(tensors) == quantized.bits().total
    assert_same(unpack("a.b", tensors, spec), quantized)


def test_numbers_survive_a_file(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    quantized = {name: WeightSpec(format).quantize(weights()) for name, format in FORMATS.items()}
    for name, weight in quantized.items():
        tensors |= pack(name, weight)
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    for name, weight in quantized.items():
        assert_same(unpack(name, loaded, weight.spec), weight)


INTEGERS = [f for f in FORMATS.values() if isinstance(f, IntegerFormat) and f.bits <= 8]


@pytest.mark.parametrize("format", INTEGERS, ids=format_name)
@pytest.mark.parametrize(("group_size", "strategy"), [(8, "group"), (None, "channel"), ("tensor", "tensor")])
def test_integers_are_read_by_compressed_tensors(format: IntegerFormat, group_size: GroupSize, strategy: str) -> None:
    """That library's own decompressor gives our weights."""
    quantized = WeightSpec(format, group_size).quantize(weights())
    tensors = {name.removeprefix("a."): tensor for name, tensor in pack("a", quantized).items()}
    args = QuantizationArgs(
        num_bits=format.bits,
        type="int",
        symmetric=format.symmetric,
        strategy=strategy,
        group_size=group_size if strategy == "group" else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    # They multiply in the scale's type, float16: half a unit in its last place.
    assert torch.allclose(theirs.float(), quantized.decode(), rtol=2**-11, atol=2**-24)


def test_names_and_types_of_the_layout() -> None:
    def layout(name: str, group_size: GroupSize = None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        quantized = WeightSpec(FORMATS[name], group_size).quantize(weights())
        return {key: (t.dtype, tuple(t.shape)) for key, t in pack("a", quantized).items() if "shape" not in key}

    assert layout("int4", 8) == {
        "a.weight_packed": (torch.int32, (6, 3)),
        "a.weight_scale": (torch.float16, (6, 3)),
        "a.weight_zero_point": (torch.int32, (1, 3)),
    }
    assert layout("int3s") == {"a.weight_packed": (torch.int32, (6, 3)), "a.weight_scale": (torch.float16, (6, 1))}
    assert layout("int8", "tensor") == {
        "a.weight_packed": (torch.int32, (6, 6)),
        "a.weight_scale": (torch.float16, (1,)),
        "a.weight_zero_point": (torch.int8, (1,)),
    }
    assert layout("int12") == {
        "a.bitlaw_codes": (torch.int32, (6, 6 + 3)),
        "a.weight_scale": (torch.float16, (6, 1)),
        "a.bitlaw_zero_point": (torch.int32, (2 + 1, 1)),
    }
    assert layout("e2m1") == {"a.bitlaw_codes": (torch.int32, (6, 3)), "a.weight_scale": (torch.float16, (6, 1))}
    assert layout("int0") == {}


@pytest.mark.parametrize("group_size", [None, 9, "tensor"])
def test_a_convolution_is_stored_as_the_linear_of_its_windows(group_size: GroupSize) -> None:
    weight, spec = weights(6, 36).view(6, 4, 3, 3), WeightSpec(FORMATS["int4"], group_size)
    stored, flat = pack("a", spec.quantize(weight)), pack("a", spec.quantize(weight.flatten(1)))
    assert stored.pop("a.weight_shape").tolist() == [6, 4, 3, 3]
    assert flat.pop("a.weight_shape").tolist() == [6, 36]
    assert stored.keys() == flat.keys()
    assert all(torch.equal(stored[key], flat[key]) for key in flat)


def test_float_bit_patterns_are_stored_as_they_are() -> None:
    quantized = WeightSpec(FORMATS["e4m3"]).quantize(weights())
    packed = pack("a", quantized)["a.bitlaw_codes"]
    scaled = weights() / quantized.params["scale_G1"].float()
    assert torch.equal(packed.view(torch.float8_e4m3fn).float(), scaled.to(torch.float8_e4m3fn).float())


def test_scales_outside_float16_are_stored_and_counted_in_float32() -> None:
    quantized = WeightSpec(FORMATS["int4"]).quantize(weights() * 1e-9)
    tensors = pack("a", quantized)
    assert tensors["a.weight_scale"].dtype == torch.float32
    assert quantized.bits().scales == 6 * 32
    assert_same(unpack("a", tensors, quantized.spec), quantized)


Damage = Callable[[dict[str, Tensor]], object]


def damage_element(key: str, value: float) -> Damage:
    return lambda tensors: tensors[key].view(-1).__setitem__(0, value)


@pytest.mark.parametrize(
    ("damage", "named", "what"),
    [
        (lambda t: t.pop("a.weight_packed"), "a.weight_packed", "missing"),
        (lambda t: t.pop("a.weight_scale"), "a.weight_scale", "missing"),
        (lambda t: t.pop("a.weight_zero_point"), "a.weight_zero_point", "missing"),
        (lambda t: t.pop("a.weight_shape"), "a.weight_shape", "missing"),
        (damage_element("a.weight_scale", torch.nan), "a.weight_scale", "NaN or Inf"),
        (damage_element("a.weight_scale", torch.inf), "a.weight_scale", "NaN or Inf"),
        (damage_element("a.weight_scale", 0), "a.weight_scale", "not above 0"),
        (damage_element("a.weight_scale", -0.5), "a.weight_scale", "not above 0"),
        (lambda t: t.update({"a.weight_packed": t["a.weight_packed"][:, :-1]}), "a.weight_packed", r"shape \(6, 2\)"),
        (lambda t: t.update({"a.weight_packed": t["a.weight_packed"].long()}), "a.weight_packed", "expected int32"),
        (lambda t: t.update({"a.weight_scale": t["a.weight_scale"][:5]}), "a.weight_scale", r"expected \(6, 3\)"),
        (lambda t: t.update({"a.weight_scale": t["a.weight_scale"].bool()}), "a.weight_scale", "float16 or float32"),
        (lambda t: t.update({"a.weight_zero_point": t["a.weight_zero_point"].T}), "a.weight_zero_point", "shape"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([6])}), "a.weight_shape", "not the shape of a weight"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([6, -4])}), "a.weight_shape", "not the shape of a weight"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([6, 20])}), "a.weight_shape", "not a multiple"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([6, 32])}), "a.weight_scale", "shape"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([6.0, 24.0])}), "a.weight_shape", "expected int64"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([6, 8, 3])}), "a.weight_shape", "not the shape of a"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([6, 4, 3, 3])}), "a.weight_shape", "4 channels x 3 x 3"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([6, 8, 2, 2])}), "a.weight_scale", r"expected \(6, 4\)"),
    ],
)
def test_damage_is_an_error_that_names_the_tensor(damage: Damage, named: str, what: str) -> None:
    tensors = pack("a", SPEC.quantize(weights()))
    damage(tensors)
    with pytest.raises(ValueError, match=rf"^{named}: .*{what}"):
        unpack("a", tensors, SPEC)


def test_another_plan_is_an_error() -> None:
    tensors = pack("a", SPEC.quantize(weights()))
    with pytest.raises(ValueError, match=r"a\.weight_zero_point: shape \(1, 3\), expected \(2, 3\)"):
        unpack("a", tensors, WeightSpec(FORMATS["int6"], 8))
    with pytest.raises(ValueError, match=r"a\.bitlaw_codes: missing"):
        unpack("a", tensors, WeightSpec(FORMATS["e2m1"], 8))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_codes_that_stand_for_no_number_are_damage(name: str) -> None:
    spec = WeightSpec(FORMATS[name])
    tensors = pack("a", spec.quantize(weights()))
    tensors["a.bitlaw_codes"][1, 2] = 0x7F
    assert isinstance(spec.format, FloatFormat)
    with pytest.raises(ValueError, match=r"a\.bitlaw_codes: holds codes that stand for no number"):
        unpack("a", tensors, spec)


def test_every_damaged_site_of_a_network_is_named() -> None:
    plan = BitPlan({name: (Precision.parse("W4g8A16"),) for name in ("a", "b", "c")} | {"head": (Precision(),)})
    tensors = {"head.weight": torch.ones(2, 2), "a.bias": torch.ones(6)}
    for name in ("a", "b", "c"):
        tensors |= pack(name, SPEC.quantize(weights()))
    parts, rest = unpack_network(tensors, plan)
    assert set(parts) == {"a", "b", "c"}
    assert set(rest) == {"head.weight", "a.bias", "a.weight", "b.weight", "c.weight"}
    assert parts["b"].weight is not None and torch.equal(rest["b.weight"], parts["b"].weight.decode())

    tensors["a.weight_scale"][0] = torch.nan
    del tensors["c.weight_packed"]
    with pytest.raises(ValueError) as caught:
        unpack_network(tensors, plan)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["a.weight_scale", "c.weight_packed"]


@dataclass(frozen=True)
class Pairs(Format):
    """A toy codebook: two weights share one of four directions, with a length for each group."""

    @property
    def code_bits(self) -> float:
        return 1.0

    @property
    def values_per_code(self) -> int:
        return 2

    @property
    def param_names(self) -> tuple[str, ...]:
        return ("scale_G1", "directions_KD")

    def fit(self, x_GN: Tensor, importance_GN: Tensor | None = None) -> Params:
        directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        return {"scale_G1": x_GN.abs().amax(-1, keepdim=True), "directions_KD": directions}

    def encode(self, x_GN: Tensor, params: Params) -> Tensor:
        pairs = x_GN.unflatten(-1, (-1, 2)) / params["scale_G1"].float()[..., None]
        return (torch.cdist(pairs, params["directions_KD"]).argmin(-1) - 2).to(self.code_dtype)

    def decode(self, codes_GN: Tensor, params: Params) -> Tensor:
        pairs = params["directions_KD"][codes_GN.int() + 2] * params["scale_G1"].float()[..., None]
        return pairs.flatten(-2)


@pytest.mark.parametrize("group_size", [None, 8, "tensor"])
def test_a_format_of_vectors_needs_nothing_here(group_size: GroupSize) -> None:
    """Codes that stand for several numbers and parameters of its own: packed, counted and read like any other."""
    spec = WeightSpec(Pairs(), group_size)
    quantized = spec.quantize(weights())
    tensors = pack("a", quantized)
    assert quantized.codes.shape == (6, 12)
    assert tensors["a.bitlaw_codes"].shape == (6, 1)
    assert quantized.bits().other == 32 * 8
    assert stored_bits(tensors) == quantized.bits().total
    assert_same(unpack("a", tensors, spec), quantized)
