"""Quantize a model: a method chooses codes, and quantized modules go where a plan says."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bitlaw.calibration.collect import Progress, as_calibrated
from bitlaw.calibration.settings import Calibration
from bitlaw.install import check_plan
from bitlaw.methods import METHODS
from bitlaw.methods.chain import Chain, chain, parse_method
from bitlaw.methods.method import Method
from bitlaw.methods.pipeline import Pipeline
from bitlaw.models.generator import ImageGenerator
from bitlaw.precision import BitPlan, Precision, check_step_groups

ModelT = TypeVar("ModelT", bound=ImageGenerator[Any])
Protect = str | Sequence[str]
MethodLike = str | Method | Chain


def quantize(
    model: ModelT,
    precision: Precision | str | BitPlan,
    method: MethodLike = "rtn",
    protect: Protect = "first-last",
    *,
    calibration: Calibration | None = None,
    step_groups: int | Sequence[int] = 1,
    work: Path | str | None = None,
    progress: Progress | None = None,
) -> ModelT:
    """A quantized copy of a model. `precision` is one for all sites but those that `protect` names, or a plan.

    method: a name of METHODS with settings (`gptq:act_order=true`), several in a chain (`smoothquant+gptq`), or objects
    calibration: what the model draws for methods and static ranges that look at activations; by default 64 images
    step_groups: how many groups of steps have activation ranges of their own, or the first step of each
    work: a folder where finished blocks are kept, so that an interrupted run goes on; it may be removed afterwards
    progress: told what is being done

    The decoder is shared with the original, the network is not. Raises one ValueError naming every site that cannot be
    quantized so, before any is.
    """
    settings = calibration or Calibration()
    steps = as_chain(method)
    plan = check_quantizable(model, precision, protect, steps, step_groups)
    as_calibrated(model, settings)  # a sampler setting that does not exist is an error now
    twin = copy.copy(model)
    twin.clock = copy.copy(model.clock)
    twin.net = copy.deepcopy(model.net)
    notes = Pipeline(model, twin, plan, steps, settings, None if work is None else Path(work), progress).run()
    uses_activations = steps.needs_calibration or any(p.is_static for name in plan for p in plan[name])
    twin.provenance = {
        **model.provenance,
        "precision": "plan" if isinstance(precision, BitPlan) else str(Precision.parse(str(precision))),
        "method": steps.name if isinstance(method, str) else repr(method),
        "protect": protect if isinstance(protect, str) else list(protect),
        **({"calibration": settings.to_json(), "sites": notes} if uses_activations else {}),
    }
    return twin


def as_chain(method: MethodLike) -> Chain:
    """A method, its name, or a chain, as a chain."""
    if isinstance(method, Chain):
        return method
    return parse_method(method, METHODS) if isinstance(method, str) else chain(method)


def plan_for(
    model: ImageGenerator[Any],
    precision: Precision | str | BitPlan,
    protect: Protect = "first-last",
    step_groups: int | Sequence[int] = 1,
) -> BitPlan:
    """The plan that a precision means for a model; a plan is returned as it is."""
    if isinstance(precision, BitPlan):
        if step_groups != 1:
            raise ValueError("a plan has step groups of its own; leave step_groups out")
        return precision
    if isinstance(precision, str):
        precision = Precision.parse(precision)
    starts = equal_groups(step_groups, model.num_steps) if isinstance(step_groups, int) else tuple(step_groups)
    check_step_groups(starts, model.num_steps)
    plan = BitPlan.uniform(precision, model.sites(), protect)
    return BitPlan({name: plan[name] * len(starts) for name in plan}, starts)


def equal_groups(count: int, num_steps: int) -> tuple[int, ...]:
    """The first steps of `count` groups of about equal length. ValueError for more groups than steps."""
    if not 1 <= count <= num_steps:
        raise ValueError(f"step_groups {count}: must be from 1 to the model's {num_steps} steps")
    return tuple(i * num_steps // count for i in range(count))


def check_quantizable(
    model: ImageGenerator[Any],
    precision: Precision | str | BitPlan,
    protect: Protect = "first-last",
    method: MethodLike = "rtn",
    step_groups: int | Sequence[int] = 1,
) -> BitPlan:
    """The plan that will be carried out. Raises the ValueError that `quantize` would raise."""
    steps = as_chain(method)
    plan = plan_for(model, precision, protect, step_groups)
    problems = []
    try:
        check_plan(model.net, plan)
        problems = steps.problems(model.net, plan)
        if not problems:
            plan = steps.plan(plan)
            check_plan(model.net, plan)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return plan


KeyT = TypeVar("KeyT")


def check_each(
    model: ImageGenerator[Any], plans: Mapping[KeyT, BitPlan], method: MethodLike = "rtn"
) -> dict[KeyT, BitPlan]:
    """`check_quantizable` of several plans; one ValueError for all of them, what they share said once."""
    checked, problems = {}, []
    for key, plan in plans.items():
        try:
            checked[key] = check_quantizable(model, plan, method=method)
        except ValueError as error:
            problems += str(error).splitlines()
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return checked
