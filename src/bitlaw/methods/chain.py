"""Methods by name and in chains: `smoothquant:alpha=0.6+gptq`."""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from bitlaw.methods.method import BlockMethod, LayerMethod, Method, Transform
from bitlaw.methods.rtn import RTN
from bitlaw.names import lookup, unknown_name
from bitlaw.precision import BitPlan
from bitlaw.quantized import WeightSpec


@dataclass(frozen=True)
class Chain:
    """Any number of transforms, and the method that then chooses the codes."""

    transforms: tuple[Transform, ...]
    final: LayerMethod | BlockMethod
    name: str = ""

    @property
    def needs_calibration(self) -> bool:
        """Whether anything of it looks at activations."""
        return bool(self.transforms) or bool(self.final.needs) or isinstance(self.final, BlockMethod)

    def plan(self, plan: BitPlan) -> BitPlan:
        """The plan that this chain means by a plan: GPTVQ takes 3 bits for a codebook of as many."""
        sites = {}
        for site in plan:
            weight = plan.weight(site)
            meant = self.final.precision(weight) if weight is not None else None
            sites[site] = tuple(replace(precision, weight=meant) for precision in plan[site])
        return BitPlan(sites, plan.step_groups)

    def problems(self, net: nn.Module, plan: BitPlan) -> list[str]:
        """What of a plan this chain cannot do, for every site, with the change to make."""
        problems = []
        for name in plan:
            precision = plan.weight(name)
            if precision is None:
                continue
            layer, spec = net.get_submodule(name), WeightSpec.of(precision)
            for method in (*self.transforms, self.final):
                if problem := method.problem(layer, spec) or _grouped(layer, method):
                    problems.append(f"{name}: {problem}")
        return problems


def _grouped(layer: nn.Module, method: Method) -> str | None:
    if isinstance(layer, nn.Conv2d) and layer.groups > 1 and method.needs & {"hessian_II", "second_moment_I"}:
        name = type(method).__name__
        return f"a convolution of {layer.groups} groups, which {name} is not defined for; use rtn or protect this site"
    return None


def chain(*methods: Method, name: str = "") -> Chain:
    """The methods one after the other: transforms, then one that chooses codes (RTN if there is none).

    ValueError for another order.
    """
    transforms = tuple(method for method in methods if isinstance(method, Transform))
    others = tuple(method for method in methods if not isinstance(method, Transform))
    shown = name or "+".join(type(method).__name__ for method in methods)
    if len(others) > 1:
        both = " and ".join(type(method).__name__ for method in others)
        raise ValueError(f"method '{shown}': {both} each choose the codes of weights; a chain ends in one of them")
    if others and methods[-1] is not others[0]:
        first, last = type(others[0]).__name__, type(methods[-1]).__name__
        raise ValueError(f"method '{shown}': {last} prepares the network, so it comes before {first}, not after it")
    final = others[0] if others else RTN()
    assert isinstance(final, LayerMethod | BlockMethod)
    return Chain(transforms, final, name or shown)


def parse_method(text: str, table: Mapping[str, Method]) -> Chain:
    """The chain that a text names: methods of the table joined by +, each with settings after a colon.

    ValueError for a name or setting that does not exist (with those that do), a value that cannot be, or an order.
    """
    return chain(*(_method(part.strip(), table) for part in text.split("+")), name=text)


def _method(text: str, table: Mapping[str, Method]) -> Method:
    name, _, settings = text.partition(":")
    method: Any = lookup(table, name, "method")
    known = {f.name: getattr(method, f.name) for f in fields(method)}
    made: Method = replace(method, **settings_of(settings.split(","), known, name, text))
    return made


def settings_of(parts: Iterable[str], known: Mapping[str, Any], name: str, text: str) -> dict[str, Any]:
    """Settings that parts of a text, `key=value` each, give; empty parts give none.

    known: every setting with its value now; name, text: of the method, for messages
    ValueError for a part that is none, a setting that does not exist, or a value of another type.
    """
    given = {}
    for part in filter(None, (part.strip() for part in parts)):
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"method '{text}': settings are name=value with commas, not '{part}'")
        if key not in known:
            raise unknown_name(key, list(known), f"setting of {name}")
        given[key] = setting_value(value.strip(), known[key], f"{name}:{key}")
    return given


def setting_value(text: str, like: Any, what: str) -> Any:
    """The value that a text means for a setting whose value now is `like`. ValueError for one of another type."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(like, bool | str) and type(value) is not type(like):
        raise ValueError(f"{what}: {text} is not {'true or false' if isinstance(like, bool) else 'a name'}")
    if isinstance(like, int | float) and not isinstance(value, int | float):
        raise ValueError(f"{what}: {text} is not a number")
    if isinstance(like, int) and isinstance(value, float):
        raise ValueError(f"{what}: {text} is not a whole number")
    return value
