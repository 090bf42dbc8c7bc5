"""The command that decides how many bits each tensor gets, and what plans and their options mean."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlaw.cli.app import app, out_console, stages, write_pictures
from bitlaw.cli.options import (
    Device,
    Dtype,
    Guidance,
    Model,
    Option,
    Out,
    Sampling,
    Tokenizer,
    load_model,
    settings,
)

if TYPE_CHECKING:
    from bitlaw.allocation.allocate import Allocated, Problem
    from bitlaw.allocation.curves import CurveSettings, RateDistortion
    from bitlaw.allocation.plan_file import PlanFile
    from bitlaw.allocation.swaps import Refined
    from bitlaw.calibration.collect import Progress
    from bitlaw.models.generator import ImageGenerator
    from bitlaw.precision import BitPlan

Several = list[str] | None


@app.command(
    epilog="Examples: `bitlaw allocate ladder/var-s --average-bits 4 --curves var-s.curves.json --out plan.json` · "
    "`bitlaw allocate ladder/dit-s --average-bits 4 --activation-bits 6 --step-groups dp:4 --out plan.json` · "
    "`bitlaw allocate ladder/var-s --size 300kB --widths 2,3,4,8,16 --tie kind-in-block --swaps 64 --out plan.json` · "
    "`bitlaw allocate ladder/var-s --preset litevar --precision W4A8 --out plan.json`; then "
    "`bitlaw quantize ladder/var-s --plan plan.json --method gptq --out var-s-mixed`"
)
def allocate(
    model: Model,
    out: Out,
    average_bits: Annotated[
        float | None,
        typer.Option(help="Mean bits of the weights that get curves, and of their inputs if those get curves too."),
    ] = None,
    activation_bits: Annotated[
        float | None, typer.Option(help="Mean bits of inputs, the numbers of each layer's input counted once.")
    ] = None,
    activation_bits_used: Annotated[
        float | None,
        typer.Option(help="Mean bits of inputs over all numbers that enter layers while an image is drawn."),
    ] = None,
    compute_bits: Annotated[
        float | None, typer.Option(help="Sum of weights x bits of a weight x bits of an input, over all layers.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of model.safetensors with everything in it: 300MB, 1.5GB.")
    ] = None,
    widths: Annotated[str | None, typer.Option(help="Allowed bits: 2,3,4,8. 16 leaves a tensor as it is.")] = None,
    method: Annotated[str, typer.Option(help="exact, or lagrangian, the paper's.")] = "exact",
    swaps: Annotated[int, typer.Option(help="Swaps to measure afterwards, keeping what is better.")] = 0,
    protect: Annotated[
        str, typer.Option(help="Layers left in 16 bits: first-last, none, names, kinds or patterns with commas.")
    ] = "first-last",
    min_bits: Annotated[
        Several, typer.Option("--min-bits", help="Least bits: 3 for all, or fc2=4, for a name, kind or pattern.")
    ] = None,
    tie: Annotated[
        Several,
        typer.Option(
            "--tie", help="Layers of equal bits: kind, block, kind-in-block, or names, kinds, patterns with +."
        ),
    ] = None,
    step_groups: Annotated[
        str | None,
        typer.Option(help="Groups of steps whose inputs have bits of their own: how many, first steps, or dp:4."),
    ] = None,
    curves: Annotated[
        Path | None, typer.Option(help="File of curves: read if it is there, else written when they are measured.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="How curves are measured: exact (default), or sketch.")] = None,
    what: Annotated[
        str | None, typer.Option(help="weights, inputs or both. Default: what the budgets are about, else weights.")
    ] = None,
    numbers: Annotated[str | None, typer.Option(help="Of weights: int (default), symmetric, float, codebook.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights of a row that share a scale. Default: the row.")
    ] = None,
    static_inputs: Annotated[
        bool | None, typer.Option("--static-inputs", help="Inputs have calibrated ranges instead of one a token.")
    ] = None,
    weight_method: Annotated[
        str | None, typer.Option(help="How codes are chosen for curves: rtn (default), gptq.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="Of distortion: mse, mse+ssim, kl ... Default: the family's.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Images that curves are measured on. Default: 16.")] = None,
    additivity: Annotated[
        Path | None,
        typer.Option(help="additivity.json of `analyze additivity`: says if this plan is where its curves fail."),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="A folder for pictures of the plan and of the curves: bits, curves, steps.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A plan without curves: litevar (fc2 stays in 16 bits).")] = None,
    precision: Annotated[str | None, typer.Option(help="Of a preset's other layers: W4A8.")] = None,
    guidance: Guidance = None,
    sampling: Sampling = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    option: Option = None,
) -> None:
    """Decide how many bits every weight, and every input in a group of steps, gets within budgets.

    Writes a plan, which `quantize --plan` and `distill --plan` carry out and `info` describes.
    """
    from bitlaw.allocation.additivity import Additivity
    from bitlaw.allocation.allocate import Problem
    from bitlaw.allocation.constraints import Constraints
    from bitlaw.allocation.plan_file import model_provenance, plan_provenance, preset_plan, write_plan
    from bitlaw.scaling.budget import parse_bits

    refuse_other(out)
    budgets = {
        "average_bits": average_bits,
        "bits_per_activation": activation_bits,
        "bits_per_activation_used": activation_bits_used,
        "compute_bits": compute_bits,
        "bytes": None if size is None else math.floor(parse_bits(size) / 8),
    }
    limits = {name: value for name, value in budgets.items() if value is not None}
    protected = tuple(filter(None, (part.strip() for part in protect.split(","))))
    if preset is not None:
        if limits or precision is None:
            raise ValueError(
                "--preset: a rule needs --precision, and takes no budget; leave --average-bits and others out"
            )
        loaded = load_model(model, tokenizer, dtype, device, option)
        provenance = {**model_provenance(loaded, model), "preset": preset}
        write_plan(out, preset_plan(loaded, preset, precision, protected), provenance)
        tell_of_plan(out)
        return
    if precision is not None:
        raise ValueError("--precision is for --preset; what allocate chooses is limited by --average-bits or --size")
    if not limits:
        raise ValueError("give a budget: --average-bits 4, --size 300MB, --activation-bits 6 or --compute-bits 1e12")
    if swaps < 0:
        raise ValueError(f"--swaps {swaps}: must be 0 or more")
    allowed = () if widths is None else _whole_numbers("--widths", widths)
    constraints = Constraints(allowed, protected, _least_bits(min_bits), tuple(tie or ()))
    checked = None if additivity is None else Additivity.read(additivity)
    given: dict[str, Any] = {
        "what": what,
        "numbers": numbers,
        "group_size": group_size,
        "static_inputs": static_inputs,
        "method": weight_method,
        "measure": measure,
        "num_images": images,
        "guidance": guidance,
        "sampling": settings(sampling, "sampling") or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    is_measured = curves is not None and curves.exists()
    with stages() as report:
        if is_measured:
            assert curves is not None
            known = _read_curves(curves, given, mode, step_groups)
            loaded = load_model(model, tokenizer, dtype, device, option)
        else:
            if what is None:
                about_inputs = limits.keys() & {"bits_per_activation", "bits_per_activation_used", "compute_bits"}
                given["what"] = "both" if about_inputs else "weights"
            chosen = _curve_settings(given, allowed)
            loaded = load_model(model, tokenizer, dtype, device, option)
            known = _measured(loaded, model, chosen, mode or "exact", protected, step_groups, report)
            if curves is not None:
                known.save(curves)
        if checked is not None and checked.fingerprint != known.fingerprint:
            raise ValueError(f"{additivity}: additivity of another model ({checked.model})")
        problem = Problem(loaded, known, constraints)
        if is_measured and protected != ("first-last",) and (missing := problem.sites_without_curves):
            raise ValueError(f"{curves}: no curves of {', '.join(missing)}; protect them, or give another --curves")
        found = problem.allocate(_budgets(problem, limits), method)  # type: ignore[arg-type]
        refined = _refined(problem, found, loaded, swaps, report) if swaps else None
    plan = (refined.allocated if refined else found).plan
    provenance = plan_provenance(problem, refined.allocated if refined else found, model)
    if refined is not None:
        provenance["swaps"] = refined.to_json()
    if checked is not None:
        provenance["warning"] = checked.warning_for(plan)
    write_plan(out, plan, provenance)
    tell_of_plan(out)
    if pictures is not None:
        _draw(plan, known, loaded, pictures)


def _whole_numbers(name: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise ValueError(f"{name} {text}: expected numbers with commas, such as 2,3,4,8")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _least_bits(given: Several) -> dict[str, int]:
    """`["3", "fc2=4"]` as bits by sites."""
    least = {}
    for text in given or ():
        sites, equals, bits = text.rpartition("=")
        if not bits.strip().isdecimal() or (equals and not sites):
            raise ValueError(f"--min-bits {text}: expected bits (3), or a name, kind or pattern with them (fc2=4)")
        least[sites.strip() if equals else "*"] = int(bits)
    return least


def _budgets(problem: "Problem", limits: Mapping[str, float]) -> dict[str, float]:
    """Budgets as the library names them: average bits are of weights, and of inputs where they have curves."""
    budgets = {name: value for name, value in limits.items() if name != "average_bits"}
    if (average := limits.get("average_bits")) is not None:
        if problem.numbers["weight_bits"]:
            budgets["bits_per_weight"] = average
        if problem.numbers["activation_bits"] and "bits_per_activation_used" not in budgets:
            budgets.setdefault("bits_per_activation", average)
    return budgets


def _curve_settings(given: Mapping[str, Any], allowed: tuple[int, ...]) -> "CurveSettings":
    """How curves are to be measured: at the allowed widths, or at all that the numbers have."""
    from bitlaw.allocation.curves import CurveSettings
    from bitlaw.precision import FULL_BITS

    if allowed:
        return CurveSettings(**given, widths=tuple(width for width in allowed if width != FULL_BITS))
    return CurveSettings.at_all_widths(**given)


def _measured(
    model: "ImageGenerator[Any]",
    name: str,
    chosen: "CurveSettings",
    mode: str,
    protected: tuple[str, ...],
    step_groups: str | None,
    report: "Progress",
) -> "RateDistortion":
    from dataclasses import replace

    from bitlaw.allocation.constraints import sites_of
    from bitlaw.allocation.exact import measure_curves
    from bitlaw.allocation.sketch import sketch_curves
    from bitlaw.precision import PROTECTION

    if mode not in ("exact", "sketch"):
        raise ValueError(f"--mode {mode}: must be exact or sketch")
    names = {text: [text] if text in PROTECTION else sites_of(model.sites(), text) for text in protected}
    chosen = replace(chosen, protect=tuple(name for found in names.values() for name in found))
    if step_groups is not None:
        chosen = replace(chosen, step_groups=_step_groups(model, chosen, step_groups, report))
    if mode == "exact":
        return measure_curves(model, chosen, progress=report, name=name)
    return sketch_curves(model, chosen, progress=report, name=name)


def _step_groups(
    model: "ImageGenerator[Any]", chosen: "CurveSettings", text: str, report: "Progress"
) -> tuple[int, ...]:
    """`4`, `0,4,8` or `dp:4` as the first step of each group."""
    from bitlaw.allocation.step_groups import choose_step_groups
    from bitlaw.methods.quantize import equal_groups

    if found := re.fullmatch(r"dp:(\d+)", text):
        images: dict[str, Any] = {name: getattr(chosen, name) for name in ("labels", "guidance", "sampling")}
        return choose_step_groups(model, int(found[1]), protect=chosen.protect, progress=report, **images)
    numbers = _whole_numbers("--step-groups", text)
    if "," in text:
        return numbers
    return equal_groups(numbers[0], model.with_sampling(guidance=chosen.guidance, **chosen.sampling).num_steps)


def _read_curves(path: Path, given: Mapping[str, Any], mode: str | None, step_groups: str | None) -> "RateDistortion":
    """Curves that were measured before. ValueError for options that say something else than they do."""
    from bitlaw.allocation.curves import RateDistortion

    known = RateDistortion.read(path)
    problems = [
        f"{name} is {getattr(known.settings, name)!r}, not {value!r}"
        for name, value in given.items()
        if getattr(known.settings, name) != value
    ]
    if mode is not None and mode != known.mode:
        problems.append(f"mode is {known.mode}, not {mode}")
    if step_groups is not None:
        starts = known.settings.step_groups
        if step_groups not in (",".join(map(str, starts)), str(len(starts)), f"dp:{len(starts)}"):
            problems.append(f"step groups begin at {starts}, not {step_groups}")
    if problems:
        raise ValueError(f"{path}: these curves were measured otherwise: {'; '.join(problems)}. Give another --curves")
    return known


def _draw(plan: "BitPlan", curves: "RateDistortion", model: "ImageGenerator[Any]", folder: Path) -> None:
    from bitlaw.allocation import pictures

    chosen = curves.settings
    middle = chosen.widths[len(chosen.widths) // 2]  # where tensors can be told apart
    drawn = {
        "bits": pictures.bits_by_layer(plan, model.sites()),
        "curves": pictures.rate_distortion(curves, model.sites()),
        "steps": pictures.distortion_by_step(curves, middle, "weight" if chosen.what == "weights" else "input"),
    }
    write_pictures(folder, drawn)


def _refined(
    problem: "Problem", found: "Allocated", model: "ImageGenerator[Any]", num_swaps: int, report: "Progress"
) -> "Refined":
    from bitlaw.allocation.paths import Paths, calibration_of
    from bitlaw.allocation.swaps import held_out_settings, measure_on, refine

    chosen = problem.settings
    calibration = calibration_of(chosen)
    judged, unseen = Paths(model, chosen, report), Paths(model, held_out_settings(chosen), report)
    return refine(
        problem,
        found,
        measure_on(judged, model, chosen.method, calibration),
        measure_on(unseen, model, chosen.method, calibration),
        num_swaps=num_swaps,
        progress=report,
    )


# ---- plans in words ------------------------------------------------------------------------------------


def tell_of_plan(path: Path) -> None:
    """Print what a plan file holds."""
    from bitlaw.allocation.plan_file import read_plan

    out_console.print(describe_plan(read_plan(path), str(path)), markup=False, highlight=False)


def describe_plan(file: "PlanFile", name: str) -> str:
    """A plan in lines: bits by block and kind, budgets and what is taken of them, predicted and measured distortion."""
    from bitlaw.scaling.summary import text_table

    plan, provenance = file.plan, file.provenance
    described = provenance.get("sites", {})
    groups = f", step groups from {', '.join(map(str, plan.step_groups))}" if len(plan.step_groups) > 1 else ""
    of = f" for {provenance.get('model') or 'a model'} ({provenance['family']})" if "family" in provenance else ""
    lines = [f"{name}: a plan of {len(plan.sites)} layers{of}{groups}"]
    if described:
        lines += ["", "bits of weights / inputs, mean over layers and step groups", _bits_table(plan, described)]
    else:
        lines += ["", text_table(["layer", "precision"], [[site, " ".join(map(str, plan[site]))] for site in plan])]
    if "preset" in provenance:
        lines += ["", f"by the rule {provenance['preset']}"]
    if costs := provenance.get("costs"):
        lines += ["", _budget_table(provenance, costs)]
        lines += ["", *_distortion_lines(provenance)]
    return "\n".join(lines)


def _bits_table(plan: "BitPlan", described: Mapping[str, Mapping[str, Any]]) -> str:
    from bitlaw.precision import Precision
    from bitlaw.scaling.summary import text_table

    full = (Precision(),) * len(plan.step_groups)
    cells: dict[tuple[Any, str], list[tuple[float, float]]] = {}
    for site, of_site in described.items():
        precisions = plan.sites.get(site, full)
        inputs = sum(precision.activation_bits for precision in precisions) / len(precisions)
        cells.setdefault((of_site["block"], of_site["kind"]), []).append((precisions[0].weight_bits, inputs))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    blocks = sorted({block for block, _ in cells}, key=lambda block: (block is None, block))

    def cell(block: Any, kind: str) -> str:
        found = cells.get((block, kind))
        if not found:
            return ""
        means = [sum(values) / len(values) for values in zip(*found, strict=True)]
        return "/".join(f"{mean:.3g}" for mean in means)

    rows = [["-" if block is None else str(block), *(cell(block, kind) for kind in kinds)] for block in blocks]
    return text_table(["block", *kinds], rows)


def _budget_table(provenance: Mapping[str, Any], costs: Mapping[str, float]) -> str:
    from bitlaw.scaling.summary import text_table

    budgets, numbers = provenance["budgets"], provenance["numbers"]

    def said(name: str, cost: float | None) -> str:
        if cost is None:
            return "-"
        mean = f" ({cost / numbers[name]:.3f} a number)" if numbers.get(name) else ""
        return f"{cost:,.0f}{mean}"

    rows = [
        [name, said(name, cost), said(name, budgets.get(name)), said(name, provenance["least_possible"].get(name))]
        for name, cost in costs.items()
    ]
    return text_table(["", "taken", "budget", "least possible"], rows)


def _distortion_lines(provenance: Mapping[str, Any]) -> list[str]:
    exact, by_slope = provenance["exact_distortion"], provenance["lagrangian_distortion"]
    found, curves = exact if provenance["method"] == "exact" else by_slope, provenance["curves"]
    lines = [
        f"predicted distortion  {found:.5g} by {provenance['method']}, at most "
        f"{_above(found, provenance['lower_bound'])} above the optimum; curves: {curves['mode']}, "
        f"{curves['settings']['num_images']} images"
    ]
    if by_slope is None:
        lines.append("lagrangian            not for budgets that share tensors")
    else:
        lines.append(f"lagrangian            {by_slope:.5g}, {_above(by_slope, exact)} above exact")
    if swaps := provenance.get("swaps"):
        is_kept = swaps["held_out_end"] < swaps["held_out_start"]
        lines.append(
            f"measured distortion   {swaps['start']:.5g} -> {swaps['end']:.5g} by {swaps['num_better']} of "
            f"{swaps['num_measured']} swaps; on images they have not seen {swaps['held_out_start']:.5g} -> "
            f"{swaps['held_out_end']:.5g}{'' if is_kept else ', so that the plan is the one without swaps'}"
        )
    if warning := provenance.get("warning"):
        lines.append(f"warning: {warning}")
    return lines


def _above(value: float, reference: float) -> str:
    if value <= reference:
        return "0 %"
    return f"{100 * (value - reference) / reference:.2g} %" if reference else "infinitely"


# ---- plans as options ----------------------------------------------------------------------------------


def refuse_other(out: Path) -> None:
    """ValueError if something that is no plan is in the way."""
    from bitlaw.allocation.plan_file import read_plan

    if not out.exists():
        return
    try:
        read_plan(out)
    except (ValueError, OSError) as error:
        raise ValueError(f"{out} exists and is not a plan; give another --out") from error


def precision_or_plan(precision: str | None, plan: Path | None, options: Mapping[str, bool]) -> "str | PlanFile":
    """What a command quantizes to. ValueError for a precision and a plan, and options that a plan leaves no room for.

    options: whether options are given that say what a plan says
    """
    from bitlaw.allocation.plan_file import read_plan
    from bitlaw.precision import Precision

    if plan is None:
        precision = precision or "W4A16"
        Precision.parse(precision)
        return precision
    given = [name for name, is_given in {"--precision": precision is not None, **options}.items() if is_given]
    if given:
        raise ValueError(f"--plan says the bits of every layer; leave {' and '.join(given)} out, or --plan")
    return read_plan(plan)


def noted(model: "ImageGenerator[Any]", file: "PlanFile", path: Path) -> None:
    """Write into a quantized model's provenance which plan it follows."""
    kept = ("preset", "budgets", "costs", "predicted_distortion", "method", "swaps")
    about = {name: file.provenance[name] for name in kept if name in file.provenance}
    model.provenance = {**model.provenance, "plan": {"file": path.name, **about}}


def check_size(file: "PlanFile", directory: Path) -> str:
    """A line on a saved checkpoint that is above the budget of bytes of its plan; "" if it is not, or there is none."""
    limit = file.provenance.get("budgets", {}).get("bytes")
    saved = (directory / "model.safetensors").stat().st_size
    if limit is None or saved <= limit:
        return ""
    return (
        f"{directory / 'model.safetensors'} has {saved:,} bytes, {saved - limit:,.0f} above the plan's budget: the "
        "method, or another --dtype, stores more beside the codes than the plan counts"
    )
