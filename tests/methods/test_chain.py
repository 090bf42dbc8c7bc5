"""Methods by name, with settings, in chains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.methods.chain import chain, parse_method
from bitlaw.methods.method import LayerMethod, Method, Note, Transform
from bitlaw.methods.rtn import RTN
from bitlaw.models.generator import Site
from bitlaw.precision import BitPlan
from bitlaw.quantized import QuantizedTensor, WeightSpec


@dataclass(frozen=True)
class Smooth(Transform):
    alpha: float | None = 0.5
    explicit: bool = True

    def apply(
        self, net: nn.Module, sites: Sequence[Site], plan: BitPlan, stats: Mapping[str, InputStats]
    ) -> dict[str, Note]:
        return {}


@dataclass(frozen=True)
class Careful(LayerMethod):
    rounds: int = 3
    order: str = "given"

    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        return spec.quantize(weight_OI)


TABLE: dict[str, Method] = {"rtn": RTN(), "smooth": Smooth(), "careful": Careful()}


def test_names_settings_and_order() -> None:
    found = parse_method("smooth:alpha=0.75,explicit=false+careful:rounds=5,order=act", TABLE)
    assert found.transforms == (Smooth(0.75, False),)
    assert found.final == Careful(5, "act")
    assert found.name == "smooth:alpha=0.75,explicit=false+careful:rounds=5,order=act"
    assert parse_method("smooth:alpha=none", TABLE).transforms == (Smooth(None),)
    assert parse_method("careful", TABLE).final == Careful()


def test_transforms_alone_end_in_rounding_to_nearest() -> None:
    assert parse_method("smooth", TABLE).final == RTN()
    assert parse_method("smooth+smooth:alpha=0.3", TABLE).transforms == (Smooth(), Smooth(0.3))
    assert chain(Smooth(), Careful()) == chain(Smooth(), Careful(), name="Smooth+Careful")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smoth", "unknown method 'smoth'; did you mean smooth"),
        ("careful:round=3", "unknown setting of careful 'round'; did you mean rounds"),
        ("careful:rounds", "settings are name=value"),
        ("careful:rounds=many", "careful:rounds: many is not a number"),
        ("careful:rounds=2.5", "not a whole number"),
        ("smooth:explicit=3", "not true or false"),
        ("careful+smooth", "Smooth prepares the network, so it comes before Careful"),
        ("careful+rtn", "Careful and RTN each choose the codes"),
    ],
)
def test_what_cannot_be_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_method(text, TABLE)
