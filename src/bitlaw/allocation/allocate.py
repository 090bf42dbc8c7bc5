"""Rate-distortion curves, a model and budgets -> a width for every tensor, as a plan.

What costs count, each with its total and its mean for a number (`BUDGETS`):

weight_bits           bits of the codes of the weights that are allocated
activation_bits       bits of inputs as paper 004 counts them: the numbers of each layer's input once; with step groups
                      once in each of them, in the step that has most (timesteps have as many as each other, VAR's
                      stages do not)
activation_bits_used  bits of all numbers that enter the layers while an image is drawn, in one branch of guidance:
                      what is moved, and so what latency depends on
compute_bits          sum over all sites of weights x bits of a weight x bits of an input, mean over steps, as
                      `bitlaw info` counts codes; compute_bits_used: each site times `Site.uses`
bytes                 the size of model.safetensors

Compute bits are a product of two choices and no sum over tensors. Where both weights and inputs have curves, the
tensors of a site become one curve whose points are all combinations of their widths: exact, and larger. Bytes are a sum
but for some digits in the file's header (`file_size`): the plan is the best for a sum that is a little too high, and
then for higher limits as long as the file, whose size is known to the byte, fits; the bound is that of a sum a little
too low.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitlaw.allocation import solve
from bitlaw.allocation.constraints import Constraints, Sets, sites_of
from bitlaw.allocation.curves import RateDistortion, TensorKey, plan_of_widths
from bitlaw.allocation.file_size import Layout, Sizes, file_bytes, layout_of
from bitlaw.allocation.paths import images_of, model_fingerprint
from bitlaw.calibration.collect import as_calibrated, batches
from bitlaw.calibration.settings import Calibration
from bitlaw.install import plan_of
from bitlaw.models.denoiser import Denoiser
from bitlaw.models.generator import ImageGenerator, rollout
from bitlaw.names import lookup, unknown_name
from bitlaw.precision import FULL_BITS, BitPlan, TensorPrecision

BUDGETS: dict[str, str] = {
    "weight_bits": "bits_per_weight",
    "activation_bits": "bits_per_activation",
    "activation_bits_used": "bits_per_activation_used",
    "compute_bits": "",
    "compute_bits_used": "",
    "bytes": "",
}
"""What can be limited, and by which name as a mean for a number."""

COMPUTE = {"compute_bits": lambda site: 1, "compute_bits_used": lambda site: site.uses}
"""How often a site's weights count."""

MAX_COMBINATIONS = 4096
"""Widths of the tensors of a site, or of sites that are tied, that may be combined for a budget of compute bits."""

TRIES = 6
"""Limits tried above the one that is certain to be met."""

Method = Literal["exact", "lagrangian"]

# ---- counting ------------------------------------------------------------------------------------------


def input_numbers(model: ImageGenerator[Any], labels: Sequence[int | str] = ()) -> dict[str, tuple[int, ...]]:
    """How many numbers enter each site in each step, for an image, in one branch of guidance.

    They are counted while an image is drawn; of a denoising model in one step, as all are alike.
    """
    counts = {site.name: [0] * model.num_steps for site in model.sites()}

    def counter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[name][model.clock.step] += args[0].numel()

        return hook

    one = model.with_sampling(guidance=1) if hasattr(model.sampling, "guidance") else model
    modules = [(name, model.net.get_submodule(name)) for name in counts]
    hooks = [module.register_forward_pre_hook(counter(name)) for name, module in modules]
    is_alike = isinstance(model, Denoiser)
    try:
        labels_B, noise = next(iter(batches(one, Calibration(num_images=1, labels=tuple(labels[:1])))))
        for _ in islice(rollout(one, labels_B, noise), 1 if is_alike else None):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    if is_alike:
        counts = {name: per_step[:1] * model.num_steps for name, per_step in counts.items()}
    return {name: tuple(per_step) for name, per_step in counts.items()}


# ---- the problem ---------------------------------------------------------------------------------------

Bits = dict[TensorKey, int]


@dataclass(frozen=True)
class Allocated:
    """A plan within budgets.

    bits: of every tensor that has a curve and is not protected
    distortion: predicted, the sum of the curves' points: of the output, mean over images and steps
    lower_bound: no choice within the budgets has less, as the curves say
    method: which of both found it
    exact_distortion, lagrangian_distortion: of the optimum and of paper 004's way; None where that has no answer
    budgets: limits in all, by name of BUDGETS
    costs: what the plan takes of everything in BUDGETS, exactly
    least: what each could be at least under the constraints, were it the only budget
    numbers: of weights and inputs that are counted; a cost divided by them is a mean
    """

    plan: BitPlan
    bits: Bits
    distortion: float
    lower_bound: float
    method: Method
    exact_distortion: float
    lagrangian_distortion: float | None
    budgets: Mapping[str, float]
    costs: Mapping[str, float]
    least: Mapping[str, float]
    numbers: Mapping[str, int]

    @property
    def gap_percent(self) -> float:
        """How far above the lower bound the predicted distortion is at most."""
        return _percent_above(self.distortion, self.lower_bound)

    @property
    def lagrangian_gap_percent(self) -> float | None:
        """How much more the Lagrangian's plan distorts than the optimum."""
        if self.lagrangian_distortion is None:
            return None
        return _percent_above(self.lagrangian_distortion, self.exact_distortion)

    def mean_bits(self, budget: str) -> float | None:
        """A cost as bits for a number, or None where it is no mean of bits."""
        count = self.numbers.get(budget)
        return self.costs[budget] / count if count else None


def _percent_above(value: float, reference: float) -> float:
    if value <= reference:
        return 0.0
    return 100 * (value - reference) / reference if reference else math.inf


def allocate(
    model: ImageGenerator[Any],
    curves: RateDistortion,
    budgets: Mapping[str, float],
    method: Method = "exact",
    constraints: Constraints | None = None,
) -> Allocated:
    """The widths of least predicted distortion within every budget.

    budgets: limits by name of BUDGETS, in all (`weight_bits`) or as a mean (`bits_per_weight=4`)
    method: "exact", or "lagrangian" (paper 004, Algorithm 2) where no tensor counts for two of the budgets

    Raises ValueError for a budget below the least possible, which is given; for constraints that leave a tensor no
    width; for names that do not exist; and for curves that are not of this model's sites.
    """
    return Problem(model, curves, constraints).allocate(budgets, method)


class Problem:
    """Curves of a model under constraints: what can be chosen, and what each choice costs and distorts.

    variables: a curve for every tensor, or for several that are tied; its names are those of `TensorKey`
    """

    variables: tuple[solve.Curve, ...]

    def __init__(self, model: ImageGenerator[Any], curves: RateDistortion, constraints: Constraints | None = None):
        if plan_of(model.net) is not None:
            raise ValueError("this model is quantized already; allocate bits for the full-precision model")
        self.constraints = constraints or Constraints()
        self.curves, self.settings = curves, curves.settings
        self.model = as_calibrated(model, images_of(curves.settings))
        self._all = self.model.sites()
        self.sites = {site.name: site for site in self._all}
        self._check_curves(model)
        if missing := set(self.constraints.widths) - {*self.settings.widths, FULL_BITS}:
            raise ValueError(
                f"widths {', '.join(map(str, sorted(missing)))}: these curves are of {self.settings.widths} bits; "
                "measure others, or allow only these and 16"
            )
        self.protected = {name for text in self.constraints.protect for name in sites_of(self._all, text)}
        self.keys = [key for key in curves.by_step if key.site not in self.protected]
        if not self.keys:
            raise ValueError("every tensor that has a curve is protected; there is nothing to allocate")
        self.has_inputs = any(key.what == "input" for key in self.keys)
        self.step_groups = curves.settings.step_groups if self.has_inputs else (0,)
        ends = [*self.step_groups[1:], self.model.num_steps]
        self.spans = list(zip(self.step_groups, ends, strict=True))
        entering = input_numbers(self.model, self.settings.labels) if self.has_inputs else {}
        self.counts = {key: self._counts(key, entering) for key in self.keys}
        self.numbers = {
            budget: sum(count.get(budget, 0) for count in self.counts.values())
            for budget, mean in BUDGETS.items()
            if mean
        }
        self._layouts: dict[tuple[str, TensorPrecision], Layout] = {}
        self.variables = tuple(self._tied({key: self._curve(key) for key in self.keys}))

    @property
    def sites_without_curves(self) -> list[str]:
        """Sites that stay as they are because they have no curve, not because a constraint protects them."""
        covered = {key.site for key in self.curves.by_step} | self.protected
        return [site for site in self.sites if site not in covered]

    def _check_curves(self, model: ImageGenerator[Any]) -> None:
        problems = [
            str(unknown_name(site, self.sites, "site"))
            for site in {key.site: None for key in self.curves.by_step}
            if site not in self.sites
        ]
        if problems:
            problems.append(f"these curves are of {self.curves.model or 'another model'}")
            raise ValueError("\n".join(problems))
        num_widths, num_steps = len(self.settings.widths), self.model.num_steps
        for key, by_width in self.curves.by_step.items():
            if len(by_width) != num_widths or any(len(steps) != num_steps for steps in by_width):
                raise ValueError(
                    f"{key}: the curve is not of {num_widths} widths and {num_steps} steps, which this model has "
                    f"under the curves' sampler"
                )
        if all(model_fingerprint(of) != self.curves.fingerprint for of in (model, self.model)):
            warnings.warn(
                f"the curves were measured on '{self.curves.model}' with other numbers, another sampler or other "
                "versions of bitlaw and torch; measure them again if it is not the same model",
                stacklevel=4,
            )

    # ---- curves with costs -----------------------------------------------------------------------

    def _counts(self, key: TensorKey, entering: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """How many numbers have the width of a tensor, by budget."""
        if key.what == "weight":
            return {"weight_bits": self._num_weights(key.site)}
        steps = entering[key.site][slice(*self.spans[key.group])]
        return {"activation_bits": max(steps), "activation_bits_used": sum(steps)}

    def _num_weights(self, site: str) -> int:
        return self.model.net.get_parameter(f"{site}.weight").numel()

    def _curve(self, key: TensorKey) -> solve.Curve:
        points = dict(zip(self.settings.widths, self.curves.distortions(key), strict=True))
        # SSIM of equal outputs is 1 but for rounding.
        points = {bits: max(d, 0.0) if d > -1e-9 else d for bits, d in points.items()}
        if FULL_BITS in self.constraints.widths:
            points[FULL_BITS] = 0.0
        costs = {budget: tuple(count * bits for bits in points) for budget, count in self.counts[key].items()}
        curve = solve.Curve((str(key),), tuple(points), costs, tuple(points.values()))
        if self.constraints.widths:
            curve = solve.restrict(curve, self.constraints.widths)
        least = self.constraints.least_bits(self._all, key.site)
        return solve.at_least(curve, least) if least else curve

    def _tied(self, curves: Mapping[TensorKey, solve.Curve]) -> list[solve.Curve]:
        """The curves, those of tied sites in one."""
        merged = self.constraints.tied(self._all)
        together: dict[tuple[str, str, int], list[solve.Curve]] = {}
        for key, curve in curves.items():
            together.setdefault((merged.of(key.site), key.what, key.group), []).append(curve)
        return [solve.tie(group) if len(group) > 1 else group[0] for group in together.values()]

    # ---- what a choice is ------------------------------------------------------------------------

    def plan(self, bits: Mapping[TensorKey, int]) -> BitPlan:
        """The plan of widths; sites without stay as they are."""
        return plan_of_widths(self.settings, bits, self.sites)

    def distortion(self, bits: Mapping[TensorKey, int]) -> float:
        """Predicted for widths: the sum of the curves' points."""
        return math.fsum(
            curve.distortions[curve.widths.index(bits[TensorKey.parse(curve.names[0])])] for curve in self.variables
        )

    def costs(self, bits: Mapping[TensorKey, int]) -> dict[str, float]:
        """What widths take of everything in BUDGETS, exactly."""
        costs: dict[str, float] = {budget: 0 for budget in self.numbers if self.numbers[budget]}
        for key, counts in self.counts.items():
            for budget, count in counts.items():
                costs[budget] += count * bits[key]
        for budget in COMPUTE:
            costs[budget] = self._compute(budget, self.sites, bits) / self.model.num_steps
        costs["bytes"] = self._file_bytes(bits)
        return costs

    def _file_bytes(self, bits: Mapping[TensorKey, int]) -> int:
        return file_bytes(layout_of(self.model, self.plan(bits), self._layouts))

    def changes(self, bits: Mapping[TensorKey, int], budgets: Iterable[str]) -> list[dict[int, dict[str, float]]]:
        """How each of some costs changes when one variable gets another width; of bytes at most, for all but digits.

        For every variable, in order, by width.
        """
        found = []
        for curve in self.variables:
            keys = [TensorKey.parse(name) for name in curve.names]
            now = curve.widths.index(bits[keys[0]])
            sized = self._sized(curve, "high") if "bytes" in budgets else curve
            sites = list(dict.fromkeys(key.site for key in keys))
            by_width: dict[int, dict[str, float]] = {}
            for index, width in enumerate(curve.widths):
                by_width[width] = {}
                for budget in budgets:
                    if budget in COMPUTE:
                        changed = {**bits, **dict.fromkeys(keys, width)}
                        more = self._compute(budget, sites, changed) - self._compute(budget, sites, bits)
                        by_width[width][budget] = more / self.model.num_steps
                    else:
                        costs = sized.costs.get(budget)
                        by_width[width][budget] = costs[index] - costs[now] if costs else 0
            found.append(by_width)
        return found

    def _compute(self, budget: str, sites: Iterable[str], bits: Mapping[TensorKey, int]) -> int:
        """Compute bits of some sites, times the number of steps."""
        # As `scaling.bits`: a layer of which nothing is quantized has the bits that its numbers are stored in.
        full = torch.finfo(self.model.storage_dtype).bits
        total = 0
        for site in sites:
            weight = bits.get(TensorKey(site, "weight"), FULL_BITS)
            inputs = [bits.get(TensorKey(site, "input", group), FULL_BITS) for group in range(len(self.spans))]
            if min(weight, *inputs) == FULL_BITS:
                inputs = [full] * len(inputs)
            of_inputs = sum((end - begin) * width for width, (begin, end) in zip(inputs, self.spans, strict=True))
            of_weight = full if weight == FULL_BITS else weight
            total += COMPUTE[budget](self.sites[site]) * self._num_weights(site) * of_weight * of_inputs
        return total

    # ---- solving ---------------------------------------------------------------------------------

    def limits(self, budgets: Mapping[str, float]) -> dict[str, float]:
        """Budgets as totals. ValueError for unknown names, for numbers that are none, and for what has no curves."""
        means = {mean: budget for budget, mean in BUDGETS.items() if mean}
        limits: dict[str, float] = {}
        for name, limit in budgets.items():
            if name not in means and name not in BUDGETS:
                raise unknown_name(name, [*BUDGETS, *means], "budget")
            budget = means.get(name, name)
            if not 0 <= limit < math.inf:
                raise ValueError(f"{name} {limit}: must be a number, 0 or more")
            if self.numbers.get(budget) == 0:
                raise ValueError(f"{name}: there are no curves of {'inputs' if 'act' in budget else 'weights'}")
            if budget in limits:
                raise ValueError(f"{name}: {budget} is limited already; give one of both")
            limits[budget] = limit * self.numbers[budget] if name in means else limit
        if not limits:
            raise ValueError(f"there is no budget; give one or more of {', '.join([*BUDGETS, *means])}")
        return limits

    def allocate(self, budgets: Mapping[str, float], method: Method = "exact") -> Allocated:
        """See `allocate`."""
        lookup({"exact": 0, "lagrangian": 0}, method, "method of allocation")
        limits = self.limits(budgets)
        least = self.least()
        for budget, limit in limits.items():
            if limit < least[budget]:
                raise ValueError(
                    f"{budget}: the budget is {self._said(budget, limit)}, but the least possible is "
                    f"{self._said(budget, least[budget])}"
                )
        best, bound = self._search(limits, solve.exact)
        by_slope: Bits | None
        try:
            by_slope = self._search(limits, _lagrangian)[0]
            # Both end a few bytes below the limit, where they happen to.
            best = min(best, by_slope, key=self.distortion)
        except _Connected:
            by_slope = None
            if method == "lagrangian":
                raise ValueError(
                    f"lagrangian: a tensor counts for several of {', '.join(limits)}; give one budget, or use exact"
                ) from None
        chosen = by_slope if method == "lagrangian" and by_slope is not None else best
        return Allocated(
            plan=self.plan(chosen),
            bits=chosen,
            distortion=self.distortion(chosen),
            lower_bound=bound,
            method=method,
            exact_distortion=self.distortion(best),
            lagrangian_distortion=None if by_slope is None else self.distortion(by_slope),
            budgets=limits,
            costs=self.costs(chosen),
            least=least,
            numbers=self.numbers,
        )

    def _said(self, budget: str, cost: float) -> str:
        mean = f" ({cost / self.numbers[budget]:.4g} a number)" if self.numbers.get(budget) else ""
        return f"{cost:,.0f}{mean}"

    def least(self) -> dict[str, float]:
        """The least that can be taken of each budget, were it the only one."""
        lowest: Bits = {}
        for curve in self.variables:
            lowest |= {TensorKey.parse(name): curve.widths[0] for name in curve.names}
        least = self.costs(lowest)
        # Where few weights share a scale, fewer bits need not be fewer bytes.
        return least | {"bytes": min(least["bytes"], self.costs(self._smallest_choice())["bytes"])}

    def _search(self, limits: Mapping[str, float], solver: Callable[..., solve.Allocation]) -> tuple[Bits, float]:
        """The best widths that a solver finds within limits, and the bound that is proven."""
        if "bytes" not in limits:
            bits, found = self._solve(limits, solver)
            return bits, found.lower_bound
        limit = limits["bytes"]

        bits, found = self._solve(limits, solver, "low")
        bound = found.lower_bound
        if self._file_bytes(bits) <= limit:
            return bits, bound
        best: Bits | None = None
        distortion, raised = math.inf, 0.0
        try:
            best, found = self._solve(limits, solver, "high")
            distortion, raised = found.distortion, found.costs["bytes"] - self._file_bytes(best)
        except ValueError:
            # Within some bytes of the least possible; so much may be the sum too high.
            raised = (
                self._sizes.rest.high
                - self._sizes.rest.low
                + sum(max(b.high - b.low for b in of_site.values()) for of_site in self._sizes.weights.values())
            )
        for _ in range(TRIES):
            try:
                bits, found = self._solve({**limits, "bytes": limit + raised}, solver, "high")
            except ValueError:
                break
            excess = self._file_bytes(bits) - limit
            if excess <= 0 and found.distortion < distortion:
                best, distortion = bits, found.distortion
                raised = found.costs["bytes"] - self._file_bytes(bits)
            else:
                raised = min(raised - max(excess, 1), raised * 3 // 4)
            if raised <= 0:
                break
        if best is None:
            best = self._smallest_choice()
            if any(cost > limits.get(budget, math.inf) for budget, cost in self.costs(best).items()):
                raise ValueError(f"no choice of widths meets {' and '.join(limits)} together")
        return best, bound

    def _solve(
        self,
        limits: Mapping[str, float],
        solver: Callable[..., solve.Allocation],
        side: Literal["low", "high"] = "high",
    ) -> tuple[Bits, solve.Allocation]:
        """Widths, and the solution that they are of; file sizes are the lower or the higher sum."""
        curves = [self._sized(curve, side) for curve in self.variables] if "bytes" in limits else list(self.variables)
        rest: dict[str, int] = {}
        if "bytes" in limits:
            rest["bytes"] = getattr(self._sizes.rest, side)
        computing = [budget for budget in COMPUTE if budget in limits]
        choices = [_Joined(curve, (curve,)) for curve in curves]
        if computing:
            choices = [self._joined(group, computing) for group in self._components(curves)]
            ours = {key.site for key in self.keys}
            others = [site for site in self.sites if site not in ours]
            rest |= {budget: self._compute(budget, others, {}) for budget in computing}
        fixed = solve.Curve(("all else",), (FULL_BITS,), {name: (cost,) for name, cost in rest.items()}, (0.0,))
        scaled = {name: limit * self.model.num_steps if name in COMPUTE else limit for name, limit in limits.items()}
        try:
            found = solver([*(choice.curve for choice in choices), *([fixed] if rest else [])], scaled)
        except ValueError as error:
            if len(limits) == 1 or not computing:
                raise
            # Its numbers are of other units.
            raise ValueError(f"no choice of widths meets {' and '.join(limits)} together") from error
        bits: Bits = {}
        for choice in choices:
            widths = choice.widths(found.widths[choice.curve.names[0]])
            for curve, width in zip(choice.parts, widths, strict=True):
                bits |= {TensorKey.parse(name): width for name in curve.names}
        return {key: bits[key] for key in self.keys}, found

    @cached_property
    def _sizes(self) -> Sizes:
        widths: dict[str, tuple[int, ...]] = {}
        of_inputs: dict[str, tuple[int, ...]] = {}
        for curve in self.variables:
            for key in map(TensorKey.parse, curve.names):
                if key.what == "weight":
                    widths[key.site] = curve.widths
                elif self.settings.static_inputs:
                    of_inputs[key.site] = (*of_inputs.get(key.site, ()), *curve.widths)
        return Sizes(self.model, self.settings, widths, of_inputs, len(self.step_groups))

    def _sized(self, curve: solve.Curve, side: Literal["low", "high"]) -> solve.Curve:
        """A curve with its part of the file's size."""
        keys = [TensorKey.parse(name) for name in curve.names]
        if keys[0].what == "input":
            return curve
        sizes = [self._sizes.weights[key.site] for key in keys]
        of_widths = tuple(sum(getattr(of_site[bits], side) for of_site in sizes) for bits in curve.widths)
        return replace(curve, costs={**curve.costs, "bytes": of_widths})

    def _smallest_choice(self) -> Bits:
        """The widths of the smallest file."""
        smallest: Bits = {}
        for curve in self.variables:
            curve = self._sized(curve, "high")
            costs = curve.costs.get("bytes", curve.widths)
            width = curve.widths[costs.index(min(costs))]
            smallest |= {TensorKey.parse(name): width for name in curve.names}
        return smallest

    # ---- products of choices ---------------------------------------------------------------------

    def _components(self, curves: Sequence[solve.Curve]) -> list[list[solve.Curve]]:
        """Curves whose sites are the same, or tied."""
        sets = Sets(self.sites)
        for curve in curves:
            sets.join([TensorKey.parse(name).site for name in curve.names])
        found: dict[str, list[solve.Curve]] = {}
        for curve in curves:
            found.setdefault(sets.of(TensorKey.parse(curve.names[0]).site), []).append(curve)
        return list(found.values())

    def _joined(self, curves: Sequence[solve.Curve], computing: Sequence[str]) -> "_Joined":
        """One curve for all combinations of the widths of several, which says what they cost to compute with."""
        keys = [[TensorKey.parse(name) for name in curve.names] for curve in curves]
        sites = list(dict.fromkeys(key.site for of_curve in keys for key in of_curve))
        count = math.prod(len(curve.widths) for curve in curves)
        if count > MAX_COMBINATIONS:
            raise ValueError(
                f"{curves[0].label}: {count} combinations of the widths of its weight and its inputs in "
                f"{len(self.step_groups)} step groups, at most {MAX_COMBINATIONS} can be told apart for a budget of "
                "compute bits; allow fewer widths, measure fewer step groups, or limit weight and activation bits"
            )
        costs: dict[str, list[int]] = {name: [] for curve in curves for name in curve.costs}
        costs |= {name: [] for name in computing}
        distortions = []
        for indices in product(*(range(len(curve.widths)) for curve in curves)):
            chosen = list(zip(curves, keys, indices, strict=True))
            bits = {key: curve.widths[index] for curve, of_curve, index in chosen for key in of_curve}
            for name, of_name in costs.items():
                if name in computing:
                    of_name.append(self._compute(name, sites, bits))
                else:
                    of_name.append(sum(curve.costs[name][i] for curve, _, i in chosen if name in curve.costs))
            distortions.append(math.fsum(curve.distortions[index] for curve, _, index in chosen))
        curve = solve.Curve(
            tuple(name for curve in curves for name in curve.names),
            tuple(range(count)),
            {name: tuple(of_name) for name, of_name in costs.items()},
            tuple(distortions),
        )
        return _Joined(curve, tuple(curves))


@dataclass(frozen=True)
class _Joined:
    """A curve that stands for several: for a single one itself, else its widths number the combinations of theirs."""

    curve: solve.Curve
    parts: tuple[solve.Curve, ...]

    def widths(self, width: int) -> tuple[int, ...]:
        """The widths of the parts."""
        if self.parts == (self.curve,):
            return (width,)
        widths: list[int] = []
        for part in reversed(self.parts):
            width, index = divmod(width, len(part.widths))
            widths.append(part.widths[index])
        return tuple(reversed(widths))


class _Connected(Exception):
    """A tensor counts for several budgets, which the Lagrangian of one lambda does not know."""


def _lagrangian(curves: Sequence[solve.Curve], limits: Mapping[str, float]) -> solve.Allocation:
    """`solve.lagrangian` for every budget on its own. Raises `_Connected` where that cannot be."""
    apart: dict[str, list[solve.Curve]] = {budget: [] for budget in limits}
    for curve in curves:
        counted = [budget for budget in limits if budget in curve.costs] or list(limits)[:1]
        if len(counted) > 1 and len(curve.widths) > 1:
            raise _Connected
        for budget in counted[:1]:
            apart[budget].append(curve)
    found = [solve.lagrangian(group, {budget: limits[budget]}) for budget, group in apart.items()]
    costs: dict[str, int] = {}
    for part in found:
        costs |= {name: costs.get(name, 0) + cost for name, cost in part.costs.items()}
    return solve.Allocation(
        {name: width for part in found for name, width in part.widths.items()},
        costs,
        math.fsum(part.distortion for part in found),
        math.fsum(part.lower_bound for part in found),
    )
