"""Plans as readable JSON files: what `BitPlan.to_json` gives, and where it comes from.

{"step_groups": [0], "sites": {"blocks.0.attn.qkv": ["W4A8"]}} is a plan that may be written by hand: a precision for
each step group (or one text for all of them), and sites that are left out stay as they are. What `allocate` writes has
more beside it: the model's family and its sites, budgets, costs, settings of the curves.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitlaw.allocation.allocate import Allocated, Problem
from bitlaw.allocation.sensitivity import plan_sparing
from bitlaw.files import write_json
from bitlaw.install import check_plan
from bitlaw.methods.quantize import Protect
from bitlaw.models.generator import ImageGenerator
from bitlaw.names import lookup, unknown_name
from bitlaw.precision import BitPlan, Precision, check_step_groups

PLAN_VERSION = 1

PRESETS: dict[str, tuple[str, ...]] = {"litevar": ("fc2",)}
"""Kinds of sites that stay in 16 bits, by name of the rule. litevar: paper 002, for VAR."""


@dataclass(frozen=True)
class PlanFile:
    """A plan with its provenance.

    provenance: of a plan written by hand {}; else at least "bitlaw", "family" and "sites" (kind, block and shape)
    """

    plan: BitPlan
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_plan(path: Path | str, plan: BitPlan, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a plan, atomically."""
    content = {"bitlaw_plan": PLAN_VERSION, **plan.to_json()}
    write_json(Path(path), content | ({"provenance": dict(provenance)} if provenance else {}))


def read_plan(path: Path | str) -> PlanFile:
    """The plan in a file. Raises ValueError naming the file, and the site that cannot be read."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    try:
        if not isinstance(value, dict):
            raise ValueError("not a bit plan: an object with step_groups and sites was expected")
        if (given := value.get("bitlaw_plan", PLAN_VERSION)) != PLAN_VERSION:
            raise ValueError(f"a plan of version {given}, this bitlaw reads version {PLAN_VERSION}")
        groups, sites = value.get("step_groups", [0]), value.get("sites")
        if not isinstance(groups, list) or not all(type(step) is int for step in groups):
            raise ValueError(f"step_groups {groups}: the first step of each group was expected, such as [0] or [0, 5]")
        if not isinstance(sites, dict):
            raise ValueError("not a bit plan: sites missing, a precision for each site")
        plain: dict[str, list[str]] = {}
        for name, texts in sites.items():
            texts = [texts] * len(groups) if isinstance(texts, str) else texts
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f'{name}: {texts} is not a precision for each step group, such as ["W4A8"]')
            plain[name] = texts
        provenance = value.get("provenance", {})
        if not isinstance(provenance, dict):
            raise ValueError("provenance: an object was expected")
        return PlanFile(BitPlan.from_json({"step_groups": groups, "sites": plain}), provenance)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_plan_for(model: ImageGenerator[Any], file: PlanFile | BitPlan) -> BitPlan:
    """The plan, if it can be carried out on a model.

    Raises one ValueError that names every site that the model has not, has in another size or cannot have in these
    numbers; or another family, and step groups that begin behind the model's last step.
    """
    file = file if isinstance(file, PlanFile) else PlanFile(file)
    plan, provenance = file.plan, file.provenance
    source = f"this plan is for {provenance.get('model') or 'a model'}"
    if (family := provenance.get("family", model.family)) != model.family:
        raise ValueError(f"{source} of family {family}, and the model is a {model.family}")
    known = {site.name for site in model.sites()}
    problems = [str(unknown_name(name, known, "site")) for name in plan if name not in known]
    shapes = {name: of_site["shape"] for name, of_site in _described(model).items()}
    for name, of_site in provenance.get("sites", {}).items():
        if shapes.get(name, of_site["shape"]) != of_site["shape"]:
            problems.append(f"{name}: a weight of shape {shapes[name]}, and {of_site['shape']} in the plan's model")
    if problems and provenance:
        problems.insert(0, f"{source} of other sites")
    if not problems:
        steps = partial(check_step_groups, plan.step_groups, model.num_steps)
        for check in (steps, partial(check_plan, model.net, plan)):
            try:
                check()
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return plan


def model_provenance(model: ImageGenerator[Any], name: str = "") -> dict[str, Any]:
    """What a plan remembers of its model."""
    return {"bitlaw": version("bitlaw"), "model": name, "family": model.family, "sites": _described(model)}


def _described(model: ImageGenerator[Any]) -> dict[str, dict[str, Any]]:
    """Kind, block and shape of the weight of every site."""
    described = {}
    for site in model.sites():
        layer: Any = model.net.get_submodule(site.name)
        described[site.name] = {"kind": site.kind, "block": site.block, "shape": list(layer.weight.shape)}
    return described


def plan_provenance(problem: Problem, found: Allocated, name: str = "") -> dict[str, Any]:
    """What a plan from curves remembers: its model, the curves, budgets and what came of them."""
    curves = problem.curves
    return {
        **model_provenance(problem.model, name or curves.model),
        "fingerprint": curves.fingerprint,
        "curves": {"mode": curves.mode, "settings": curves.settings.to_json()},
        "constraints": problem.constraints.to_json(),
        "method": found.method,
        "budgets": dict(found.budgets),
        "costs": dict(found.costs),
        "least_possible": dict(found.least),
        "numbers": dict(found.numbers),
        "predicted_distortion": found.distortion,
        "lower_bound": found.lower_bound,
        "exact_distortion": found.exact_distortion,
        "lagrangian_distortion": found.lagrangian_distortion,
    }


def preset_plan(
    model: ImageGenerator[Any], preset: str, precision: Precision | str, protect: Protect = "first-last"
) -> BitPlan:
    """A plan of PRESETS. ValueError for a name that is not there, or a model without such layers."""
    return plan_sparing(model, precision, lookup(PRESETS, preset, "preset"), protect)
