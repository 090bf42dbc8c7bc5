"""The notation, its errors, and plans."""

import json
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlaw.formats import FORMATS, FloatFormat, IntegerFormat
from bitlaw.precision import PROTECTION, BitPlan, Precision, TensorPrecision, step_group


@dataclass(frozen=True)
class Site:
    name: str
    kind: str
    phase: str


SITES = [
    Site("embed", "embed", "embed"),
    Site("blocks.0.attn.qkv", "qkv", "blocks"),
    Site("blocks.0.mlp.fc2", "fc2", "blocks"),
    Site("head", "head", "head"),
]
W4A8 = Precision.parse("W4A8")

NUMBERS = st.sampled_from([f for f in FORMATS.values() if f.code_bits < 16])
SCALARS = st.sampled_from([f for f in FORMATS.values() if f.code_bits < 16 and not f.codebook_shape])
GROUPS = st.none() | st.just("tensor") | st.integers(1, 4096)


def precisions() -> st.SearchStrategy[Precision]:
    def tensor(groups: st.SearchStrategy, formats: st.SearchStrategy = SCALARS) -> st.SearchStrategy:
        def build(format, group):
            return TensorPrecision(format, group if format.code_bits else None)

        return st.none() | st.builds(build, formats, groups)

    activations = tensor(st.sampled_from([None, "tensor", "static"]))
    return st.builds(Precision, tensor(GROUPS, NUMBERS), activations, tensor(st.none()))


@given(precisions())
def test_parse_inverts_str(precision: Precision) -> None:
    assert Precision.parse(str(precision)) == precision


@given(st.text(alphabet="WAKVgstem0123456789", max_size=12))
def test_any_text_is_read_or_refused_with_a_caret(text: str) -> None:
    """What is read has one canonical form; what is refused points at a place in the text."""
    try:
        precision = Precision.parse(text)
    except ValueError as error:
        shown = str(error).splitlines()
        assert shown[1] == f"  {text}"
        assert 2 <= shown[2].index("^") <= 2 + len(text)
    else:
        assert Precision.parse(str(precision)) == precision


def test_notation_means_what_the_papers_mean() -> None:
    int4, int8 = IntegerFormat(4), IntegerFormat(8)
    expected = {
        "W4g128A8KV8": Precision(TensorPrecision(int4, 128), TensorPrecision(int8), TensorPrecision(int8)),
        "We2m1Ae4m3": Precision(TensorPrecision(FloatFormat(2, 1)), TensorPrecision(FloatFormat(4, 3))),
        "W3A16": Precision(TensorPrecision(IntegerFormat(3))),
        "W4sA8st": Precision(
            TensorPrecision(IntegerFormat(4, symmetric=True)),
            TensorPrecision(IntegerFormat(8, symmetric=True), "tensor"),
        ),
        "W8tA16": Precision(TensorPrecision(int8, "tensor")),
        "W0A16": Precision(TensorPrecision(FORMATS["int0"])),
        "W16A16": Precision(),
        "We2m1g32A16": Precision(TensorPrecision(FloatFormat(2, 1), 32)),
    }
    for text, precision in expected.items():
        assert Precision.parse(text) == precision
        assert str(precision) == text


def test_what_is_left_out_is_16_bits() -> None:
    assert str(Precision.parse("W4")) == "W4A16"
    assert str(Precision.parse("W4KV8")) == "W4A16KV8"
    assert str(Precision.parse("W4A8KV16")) == "W4A8"
    assert Precision.parse("W16").is_full and not W4A8.is_full


def test_nominal_bits() -> None:
    precision = Precision.parse("We2m1A16KV8")
    assert (precision.weight_bits, precision.activation_bits, precision.attention_bits) == (4, 16, 8)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 0, "expected W and the bits of the weights"),
        ("A8", 0, "expected W"),
        ("w4A8", 0, "expected W"),
        ("W", 1, "expected 0 to 16 bits, a float layout such as e2m1 or a codebook such as v2b3"),
        ("W17", 1, "expected 0 to 16 bits"),
        ("W04", 1, "expected 0 to 16 bits"),
        ("W4x8", 2, "expected s or g or t or A or KV or the end"),
        ("W4gA8", 3, "expected a group size"),
        ("W4g0", 3, "expected a group size of 1 or more"),
        ("W4g128x", 6, "expected A or KV or the end"),
        ("W1s", 2, "expected g or t or A"),
        ("We2m1s", 5, "expected g or t or A"),
        ("W16s", 3, "expected A or KV"),
        ("W0g32", 2, "expected A or KV"),
        ("W4A8g32", 4, "expected s or t or c or KV or the end"),
        ("W4KV8A8", 5, "expected s or the end"),
        ("W4A8KV8t", 7, "expected s or the end"),
        ("W4Ae9m9", 3, "unknown number format 'e9m9'"),
    ],
)
def test_errors_point_at_the_character(text: str, column: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Precision.parse(text)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"cannot read the precision '{text}'"
    assert lines[2].index("^") == 2 + column
    assert message in "\n".join(lines[2:])


def test_unknown_layout_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean e4m3"):
        Precision.parse("W8Ae4m33")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TensorPrecision(IntegerFormat(16)), "16 bits means as the checkpoint is"),
        (lambda: TensorPrecision(FORMATS["int0"], 8), "no scale"),
        (lambda: TensorPrecision(IntegerFormat(4), 0), "group size 0"),
        (lambda: Precision(activation=TensorPrecision(IntegerFormat(4), 8)), "no groups"),
        (lambda: Precision(attention=TensorPrecision(IntegerFormat(4), "tensor")), "each token and head"),
    ],
)
def test_what_the_notation_cannot_say_cannot_be_built(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_uniform_plan_protects_first_and_last() -> None:
    plan = BitPlan.uniform(Precision.parse("W4A8KV8"), SITES)
    assert {name: str(plan[name][0]) for name in plan} == {
        "embed": "W16A16",
        "blocks.0.attn.qkv": "W4A8KV8",
        "blocks.0.mlp.fc2": "W4A8",  # attention operands come from qkv
        "head": "W16A16",
    }
    assert list(plan) == [site.name for site in SITES]


def test_protection_by_rule_and_by_name() -> None:
    def quantized(protect: str | list[str]) -> set[str]:
        plan = BitPlan.uniform(W4A8, SITES, protect)
        return {name for name in plan if not plan[name][0].is_full}

    assert quantized("none") == {site.name for site in SITES}
    assert quantized("head") == {"embed", "blocks.0.attn.qkv", "blocks.0.mlp.fc2"}
    assert quantized(["first-last", "blocks.0.mlp.fc2"]) == {"blocks.0.attn.qkv"}
    with pytest.raises(ValueError, match=r"unknown protection rule or site 'first-lst'; did you mean first-last"):
        BitPlan.uniform(W4A8, SITES, "first-lst")
    assert set(PROTECTION) >= {"first-last", "none"}


def test_step_groups_pick_activations_but_not_weights() -> None:
    plan = BitPlan({"a": (Precision.parse("W4A8"), Precision.parse("W4A6"))}, step_groups=(0, 5))
    assert [str(plan.at("a", step)) for step in (0, 4, 5, 99)] == ["W4A8", "W4A8", "W4A6", "W4A6"]
    assert plan.weight("a") == TensorPrecision(IntegerFormat(4))
    with pytest.raises(ValueError, match="a: weight precision differs between step groups"):
        BitPlan({"a": (Precision.parse("W4A8"), Precision.parse("W3A8"))}, step_groups=(0, 5))


def test_every_misshapen_site_is_named() -> None:
    with pytest.raises(ValueError) as caught:
        BitPlan({"a": (W4A8,), "b": (W4A8, W4A8), "c": (W4A8,) * 3}, step_groups=(0, 5))
    assert str(caught.value).splitlines() == ["a: 1 precisions for 2 step groups", "c: 3 precisions for 2 step groups"]


@pytest.mark.parametrize("groups", [(), (1, 5), (0, 0), (0, 5, 3)])
def test_step_groups_cover_all_steps_in_order(groups: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="begin at 0 and ascend"):
        BitPlan({}, step_groups=groups)


@given(st.lists(st.integers(1, 30), max_size=5, unique=True).map(lambda xs: (0, *sorted(xs))), st.integers(0, 40))
def test_step_group_is_the_last_that_has_begun(groups: tuple[int, ...], step: int) -> None:
    expected = [begin <= step < end for begin, end in pairwise((*groups, 10**9))].index(True)
    assert step_group(groups, step) == expected


def test_plans_survive_json() -> None:
    sites = {"a": (Precision.parse("W4g32A8KV8"), Precision.parse("W4g32Ae4m3")), "b": (Precision(), Precision())}
    plan = BitPlan(sites, step_groups=(0, 3))
    assert BitPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_damaged_plans_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="not a bit plan: step_groups missing"):
        BitPlan.from_json({"sites": {}})
    with pytest.raises(ValueError, match=r"blocks\.1: cannot read the precision 'W4B8'"):
        BitPlan.from_json({"step_groups": [0], "sites": {"blocks.1": ["W4B8"]}})
