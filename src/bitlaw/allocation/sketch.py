"""Rate-distortion curves of all tensors at all widths from a few backward passes.

Tensor i at b bits changes the output, to first order, by d = J_i delta_i(b): its Jacobian times the error of the
tensor. A measure of distortion is |L d|^2 to second order in d, for some matrix L. With z of random signs,
E[(z . L d)^2] = |L d|^2, which is unbiased for that; and z . L d of all tensors at all widths comes from one backward
pass of z . L output. With inputs x of a layer and gradients g of its outputs it is <g^T x, delta(b)> for the weight and
<g W, delta(b)> for the input, of each image and step.

It remains an estimate. Errors of one tensor share their signs, so that the shape of a curve is surer than its height.
The first order is what it is where d is not small: at 2 bits and below, and at 0, where delta is minus the tensor.

In denoising, no step feels another on the paths of the full-precision model, so that each image has a direction of its
own in every step. In a language-style model, a step feels the errors of those before it through keys, values and
conditions; there all steps of an image run in one teacher-forced pass, and its directions are in one step each.

Legend: B images, R rows of the network (B, or 2 B with guidance: conditional, then unconditional), H rows of an image,
N positions of an image in all its rows, I inputs and O outputs of a layer, G groups of a convolution, K numbers of a
weight, P numbers of an input, D directions, W widths, S steps; L and M positions, Z latent channels, V vocabulary.
"""

import json
import logging
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call

from bitlaw.allocation.choices import Choices
from bitlaw.allocation.curves import CurveSettings, RateDistortion, TensorKey, tensor_keys
from bitlaw.allocation.distortion import ssim_constants
from bitlaw.allocation.exact import check_curves
from bitlaw.allocation.kept import kept_curves
from bitlaw.allocation.paths import PathBatch, Paths, curve_sites, model_fingerprint
from bitlaw.calibration.cache import fingerprint_of
from bitlaw.calibration.collect import Progress
from bitlaw.files import write_json
from bitlaw.formats import Params
from bitlaw.methods.quantize import quantize
from bitlaw.models.dit import DiT
from bitlaw.models.generator import ImageGenerator, Noise
from bitlaw.models.llamagen import LlamaGen
from bitlaw.models.mar import MAR
from bitlaw.models.networks.dit import Classes
from bitlaw.models.parts.guidance import guide, ramp
from bitlaw.models.var import VAR
from bitlaw.precision import BitPlan, Precision, step_group
from bitlaw.quantized import ActivationSpec, QuantConv2d, QuantizedTensor, QuantLinear

log = logging.getLogger(__name__)

MAR_HEAD = "diffloss.net."

_NUMBERS_AT_ONCE = 2**25
"""Numbers of the products of outputs' gradients and inputs that are held at a time."""
_HELD_BYTES = 2**31
"""Of errors of weights; those beyond are decoded anew for every graph."""
_MOST_DRAWS = 8
"""Tensors of signs that a direction is made of, at most."""

# ---- the network of a batch of rollouts, differentiable -------------------------------------------------


class Graph(NamedTuple):
    """A run of the network with its graph.

    steps: those of the rollout that it is
    run: the output of each step, (B, ...): that of `Paths`, to rounding, but that rows of different images are kept
         apart where the rollout computes equal ones once
    by_image: what enters or leaves a site as (H, B, ...): what is of each image, H times; (H, 1, ...) of what is of no
              image in particular, as the embedding of a timestep
    steps_of: of the former, the step of each position, the next dimension; one step if all are of one
    """

    steps: Sequence[int]
    run: Callable[[], list[Tensor]]
    by_image: Callable[[str, Tensor], Tensor]
    steps_of: Callable[[str, Tensor], Sequence[int]]


class _Apart(Classes):
    """The class of every row on its own, equal or not."""

    def with_null(self, null: int) -> "_Apart":
        """For twice as many rows, of which the second half has the class `null`."""
        labels_R = torch.cat([self.distinct_K, torch.full_like(self.distinct_K, null)])
        return _Apart(labels_R, torch.arange(len(labels_R), device=labels_R.device))


def _step_by_step(paths: Paths, batch: PathBatch) -> Iterator[Graph]:
    """A graph for every step, where none feels another."""
    for step in batch.steps:
        state = step.state
        if isinstance(paths.model, DiT):
            rows_B = torch.arange(len(state.labels_B), device=paths.model.device)
            state = state._replace(classes=_Apart(state.labels_B, rows_B))
        apart = replace(step, state=state)
        yield Graph(
            (step.index,),
            lambda apart=apart: [paths.run(paths.model, apart).features],  # type: ignore[misc]
            partial(_rows_of_images, paths.model, len(batch.labels_B), step.index),
            lambda site, x, index=step.index: (index,),  # type: ignore[misc]
        )


def _rows_of_images(model: ImageGenerator[Any], num_images: int, step: int, site: str, x: Tensor) -> Tensor:
    """Rows are those of the images, or twice as many with guidance; one for all timesteps may be of no image.

    The head of MAR has a row for every token that is drawn, image by image in every half, and modulations of several
    steps of its own (R, ..., I) at once.
    """
    if isinstance(model, MAR) and site.startswith(MAR_HEAD):
        if site.startswith(f"{MAR_HEAD}time_embed"):
            return x[:, None]
        before, after = model.hidden_counts[step : step + 2]
        return x.unflatten(-2, (-1, num_images, before - after)).flatten(0, -4)
    return x.unflatten(0, (-1, num_images if len(x) % num_images == 0 else 1))


def _all_stages(paths: Paths, batch: PathBatch) -> Iterator[Graph]:
    """VAR: all stages in one pass. What the class makes of the network is computed in the first."""
    model: Any = paths.model
    net, guidance, num_steps = model.net, model.sampling.guidance, model.num_steps
    with torch.no_grad():
        inputs = [model.tokenizer.next_input(step.state.latent_BZhw, step.index) for step in batch.steps[1:]]
    labels_R = labels_B = batch.labels_B
    if guidance != 1:
        labels_R = torch.cat([labels_B, torch.full_like(labels_B, model.num_classes)])
    latents_RLZ = torch.cat(inputs, 1).repeat(len(labels_R) // len(labels_B), 1, 1)
    # A table with a row for every row of the batch: modulations are computed once for each class.
    table = {"class_emb.weight": net.class_emb.weight.detach()[labels_R]}
    spans, step_L = [net.config.span(stage) for stage in range(num_steps)], net.stage_L.tolist()

    def run() -> list[Tensor]:
        rows_R = torch.arange(len(labels_R), device=model.device)
        logits_RLV: Tensor = functional_call(net, table, (rows_R, latents_RLZ))
        cond, uncond = logits_RLV[: len(labels_B)], logits_RLV[len(labels_B) :]
        if guidance == 1:
            return [cond[:, span] for span in spans]
        return [guide(cond[:, s], uncond[:, s], ramp(guidance, stage, num_steps)) for stage, s in enumerate(spans)]

    yield Graph(
        range(num_steps),
        run,
        lambda site, x: x.unflatten(0, (-1, len(labels_B))),
        lambda site, x: step_L[-x.shape[2] :] if x.ndim == 4 else (0,),
    )


def _all_tokens(paths: Paths, batch: PathBatch) -> Iterator[Graph]:
    """LlamaGen: all tokens in one pass. The condition enters in the first step."""
    model: Any = paths.model
    w, interval, config = model.sampling.guidance, model.sampling.guidance_interval, model.net.config
    num_steps, num_images = config.num_tokens, len(batch.labels_B)
    condition_R, mask_RT = model.rows(batch.labels_B, w > 1)
    tokens_RL = batch.steps[-1].state.tokens_Bn.repeat(2 if w > 1 else 1, 1)
    step_M = [0] * (config.condition_tokens - 1) + list(range(num_steps))

    def run() -> list[Tensor]:
        logits_RNV = model.net(condition_R, tokens_RL, mask_RT)
        cond, uncond = (part.split(1, 1) for part in (logits_RNV[:num_images], logits_RNV[num_images:]))
        guided = [w > 1 and (step == 0 or not 0 <= interval < step - 1) for step in range(num_steps)]
        return [guide(cond[s], uncond[s], w) if guided[s] else cond[s] for s in range(num_steps)]

    def steps_of(site: str, x: Tensor) -> Sequence[int]:
        return (0,) if site.startswith("cls_embedding") else step_M[-x.shape[2] :]

    yield Graph(range(num_steps), run, lambda site, x: x.unflatten(0, (-1, num_images)), steps_of)


GraphsOf = Callable[[Paths, PathBatch], Iterator[Graph]]

ALL_STEPS: dict[type[ImageGenerator[Any]], GraphsOf] = {VAR: _all_stages, LlamaGen: _all_tokens}
"""How families whose steps feel those before them go through all of them at once."""


# ---- projections of errors on directions ----------------------------------------------------------------


@dataclass(eq=False)
class _Call:
    """A call of a site: what entered it, (H, B, ...), the step of each position of that, and gradients of passes."""

    x: Tensor
    steps: Sequence[int]
    grads_x: list[Tensor] = field(default_factory=list)
    grads_out: list[Tensor] = field(default_factory=list)


class _Watch:
    """Keeps what enters sites while the network runs, and the gradients of passes that go back through it."""

    def __init__(self, net: nn.Module, what: str, sites: Sequence[str]):
        self.net, self.what, self.sites = net, what, sites
        self.calls: dict[str, list[_Call]] = {}
        self.leaves: list[Tensor] = []

    @contextmanager
    def watching(self, graph: Graph) -> Iterator[None]:
        """While it lasts, runs of the network are watched, and no parameter asks for a gradient of its own."""
        self.forget()
        asking = [p for p in self.net.parameters() if p.requires_grad]
        hooks = []
        for site in self.sites:
            layer = self.net.get_submodule(site)
            hooks.append(layer.register_forward_pre_hook(partial(self._enter, graph, site)))
            if self.what != "inputs":
                hooks.append(layer.register_forward_hook(partial(self._leave, graph, site)))
        try:
            for parameter in asking:
                parameter.requires_grad_(False)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in asking:
                parameter.requires_grad_(True)

    def forget(self) -> None:
        """Let go of what has been kept."""
        self.calls, self.leaves = {}, []

    def go_back(self, total: Tensor, is_last: bool) -> None:
        """A pass back through the graph. No tensor accumulates a gradient, which would write into those kept."""
        torch.autograd.grad(total, self.leaves, retain_graph=not is_last, allow_unused=True)

    def _enter(self, graph: Graph, site: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        if not x.requires_grad:
            x = x.detach().clone().requires_grad_()
            self.leaves.append(x)
        x = x.view_as(x)  # whose gradient is that through this layer alone
        arranged = graph.by_image(site, x.detach())
        call = _Call(arranged, graph.steps_of(site, arranged))
        self.calls.setdefault(site, []).append(call)
        if self.what != "weights":
            x.register_hook(lambda grad: call.grads_x.append(graph.by_image(site, grad)))
        return (x, *args[1:])

    def _leave(self, graph: Graph, site: str, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        call = self.calls[site][-1]
        out.register_hook(lambda grad: call.grads_out.append(graph.by_image(site, grad)))


class _Projector:
    """v . J delta(b) for all tensors, from what a watch has kept: inputs and gradients of D directions."""

    def __init__(self, net: nn.Module, settings: CurveSettings, choices: Choices):
        self.net, self.settings, self.choices = net, settings, choices
        self._weights: dict[str, list[QuantizedTensor]] = {}
        self._decoded: dict[str, Tensor] = {}
        self._ranges: dict[tuple[TensorKey, int], Params] = {}

    def projections(self, calls: Mapping[str, Sequence[_Call]]) -> dict[TensorKey, Tensor]:
        """(D, B, W) of each image; (D, 1, W), their sum, where nothing is of one image."""
        found: dict[TensorKey, Tensor] = {}
        for site, of_site in calls.items():
            layer = self.net.get_submodule(site)
            for call in of_site:  # which are all of one direction
                if call.grads_out:
                    key = TensorKey(site, "weight")
                    found[key] = self._of_weight(site, layer, call) + found.get(key, 0)
                for group, positions in self._groups(call.steps) if call.grads_x else ():
                    key = TensorKey(site, "input", group)
                    found[key] = self._of_input(key, layer, call, positions) + found.get(key, 0)
        return found

    def _groups(self, steps: Sequence[int]) -> list[tuple[int, slice | None]]:
        """The step groups of the steps of positions, and where each is among them; None for everywhere."""
        groups = [step_group(self.settings.step_groups, step) for step in steps]
        if groups[0] == groups[-1]:  # steps ascend
            return [(groups[0], None)]
        first = {group: groups.index(group) for group in dict.fromkeys(groups)}
        return [(group, slice(start, start + groups.count(group))) for group, start in first.items()]

    def _of_input(self, key: TensorKey, layer: nn.Module, call: _Call, positions: slice | None) -> Tensor:
        """Gradients times errors. One product for all widths is several times as fast as one for each."""
        widths = self.settings.widths
        range_of = (QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear).range_of
        whole = [t if positions is None else t[:, :, positions] for t in (call.x, *call.grads_x)]
        size = max(1, _NUMBERS_AT_ONCE * whole[0].shape[1] // (len(widths) * whole[0].numel()))
        parts = []
        for x, *grads in zip(*(t.split(size, 1) for t in whole), strict=True):
            errors_BWP = x.new_empty(x.shape[1], len(widths), x[:, 0].numel(), dtype=torch.float32)
            for index, bits in enumerate(widths):
                precision = self.settings.input_precision(bits)
                assert precision is not None
                rounded = ActivationSpec.of(precision, range_of).fake(x, self._range(key, bits) or None)
                errors_BWP[:, index] = (rounded.float() - x.float()).transpose(0, 1).flatten(1)
            grads_BDP = torch.stack([grad.float().transpose(0, 1).flatten(1) for grad in grads], 1)
            parts.append(grads_BDP @ errors_BWP.mT)
        return torch.cat(parts).transpose(0, 1)

    def _of_weight(self, site: str, layer: nn.Module, call: _Call) -> Tensor:
        """All products of gradients and inputs of an image, and what they have in common with the errors."""
        errors_WK = self._errors(site)
        size = max(1, _NUMBERS_AT_ONCE // (len(call.grads_out) * errors_WK.shape[1]))
        parts = []
        for x, *grads in zip(*(t.float().split(size, 1) for t in (call.x, *call.grads_out)), strict=True):
            x_BGNI, *grads_BGNO = _operands(layer, x, grads)
            products_BGDOI = torch.stack(grads_BGNO, 2).mT @ x_BGNI[:, :, None]
            parts.append(products_BGDOI.transpose(1, 2).flatten(2) @ errors_WK.T)
        return torch.cat(parts).transpose(0, 1)

    def _errors(self, site: str) -> Tensor:
        """(W, K): what rounding adds to a weight, as the quantized layer computes with it."""
        if (known := self._decoded.get(site)) is not None:
            return known
        if site not in self._weights:
            self._weights[site] = [self.choices.weight(site, bits) for bits in self.settings.widths]
        weight = self.net.get_parameter(f"{site}.weight").detach()
        rounded = (other.decode().to(weight) for other in self._weights[site])
        errors_WK = torch.stack([(other.float() - weight.float()).flatten() for other in rounded])
        if sum(other.nbytes for other in self._decoded.values()) + errors_WK.nbytes <= _HELD_BYTES:
            self._decoded[site] = errors_WK
        return errors_WK

    def _range(self, key: TensorKey, bits: int) -> Params:
        if (key, bits) not in self._ranges:
            device = self.net.get_parameter(f"{key.site}.weight").device
            found = self.choices.ranges(key.site, key.group, bits)
            self._ranges[key, bits] = {name: value.to(device) for name, value in found.items()}
        return self._ranges[key, bits]


def _operands(layer: nn.Module, x: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    """Inputs (B, G, N, I) and gradients of outputs (B, G, N, O), of each of the G groups of a convolution.

    x, grads: (H, B, ...)
    """
    leading = x.shape[:2]
    if isinstance(layer, nn.Conv2d):
        reach: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        parts = [F.unfold(x.flatten(0, 1), *reach), *(grad.flatten(0, 1).flatten(2) for grad in grads)]
        parts = [part.unflatten(1, (layer.groups, -1)).mT.unflatten(0, leading) for part in parts]
    else:
        parts = [part.reshape(*leading, 1, -1, part.shape[-1]) for part in (x, *grads)]
    return [part.permute(1, 2, 0, 3, 4).flatten(2, 3) for part in parts]


# ---- directions -----------------------------------------------------------------------------------------

Signs = Callable[[Sequence[int]], Tensor]
"""Random signs (B, *shape) of a shape, others at each call."""


def _along_mse(output_B: Tensor, signs: Signs) -> Tensor:
    """Of |d|^2 / |O|^2."""
    norm_B = torch.linalg.vector_norm(output_B.detach().flatten(1), dim=1)
    return (signs(output_B.shape[1:]) * output_B).flatten(1).sum(1) / norm_B


def _along_ssim(output_BCHW: Tensor, signs: Signs) -> Tensor:
    """Of 1 - SSIM. In a window of mean u and variance s^2, where d has mean m and variance t^2, SSIM is, exactly,

        (1 - m^2 / (u^2 + (u + m)^2 + c1)) (1 - t^2 / (s^2 + Var(o + d) + c2)),

    so that 1 - SSIM is m^2 / (2 u^2 + c1) + t^2 / (2 s^2 + c2) to second order. t^2 is the mean square of what the mean
    leaves; the signs of that are those of places times one of the window, of which any two are independent.
    """
    exact_BCHW = output_BCHW.detach().double()  # a variance is a small difference
    c1_B111, c2_B111, side = ssim_constants(exact_BCHW)

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1)

    places_BCHW = signs(exact_BCHW.shape[1:])
    mean_BCHW = mean(exact_BCHW)
    variance_BCHW = (mean(exact_BCHW.square()) - mean_BCHW.square()).clamp_min(0)
    windows = mean_BCHW[0].numel()
    of_mean = mean(output_BCHW) * ((2 * mean_BCHW.square() + c1_B111) * windows).rsqrt().to(output_BCHW)
    rest = mean(places_BCHW * output_BCHW) - mean(places_BCHW) * mean(output_BCHW)
    of_rest = side * rest * ((2 * variance_BCHW + c2_B111) * windows).rsqrt().to(output_BCHW)
    return (signs(mean_BCHW.shape[1:]) * of_mean + signs(mean_BCHW.shape[1:]) * of_rest).flatten(1).sum(1)


def _along_kl(output_BNV: Tensor, signs: Signs) -> Tensor:
    """Of KL(P || P^), which is half the variance of d under P to second order, and so 2 |d sqrt(P)|^2."""
    root_BNV = (output_BNV.log_softmax(-1) / 2).exp()
    return math.sqrt(2 / root_BNV.shape[1]) * (signs(root_BNV.shape[1:]) * root_BNV).flatten(1).sum(1)


ALONG: dict[str, Callable[[Tensor, Signs], Tensor]] = {
    "mse": _along_mse,
    "mse+ssim": lambda output, signs: _along_mse(output, signs) + _along_ssim(output, signs),
    "kl": _along_kl,
    "mse-logits": _along_mse,
    "mse-probabilities": lambda output, signs: _along_mse(output.softmax(-1), signs),
}
"""For every measure a random function (B,) of the full-precision output, (B, ...), of whose change d to first order the
mean square is the distortion to second order."""


# ---- curves ---------------------------------------------------------------------------------------------


def sketch_curves(
    model: ImageGenerator[Any],
    settings: CurveSettings,
    *,
    num_directions: int = 3,
    seed: int = 0,
    work: Path | str | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> RateDistortion:
    """The curves of a full-precision model, estimated to first order; they are kept, as those of exact mode.

    Held at a time are, of a batch of images, one step's graph, or that of all steps where they feel each other, with
    what enters every site and two gradients of it for each direction; and the errors of weights, at most 2 GiB.

    num_directions: of each image, spread over its steps; where every step has a graph of its own, each has one at
        least, and otherwise every step has one of some image. The variance of an estimate falls as 1 / directions
    seed: of the directions, which are a function of it, the step and the image
    work: a folder for finished batches, so that an interrupted run goes on; by default in the cache (`BITLAW_CACHE`)
    progress: told of every graph
    name: of the model, to be noted
    Raises one ValueError naming every site that cannot be quantized so, and for a method or a model that only
    `exact.measure_curves` takes, before anything is run.
    """
    plans = check_sketchable(model, settings)
    if num_directions < 1:
        raise ValueError(f"num_directions {num_directions}: must be 1 or more")
    fingerprint = model_fingerprint(model)
    directions = {"number": num_directions, "seed": seed}
    described = {"curves": "sketch", "model": fingerprint, "directions": directions, "settings": settings.to_json()}
    key = fingerprint_of(described, model.autoencoder)

    def find(folder: Path | None) -> RateDistortion:
        sites = [site.name for site in curve_sites(model, settings)]
        paths = Paths(model, settings, progress)
        sketch = _Sketch(paths, Choices(model, settings, plans, sites, progress), num_directions, seed)
        finished = None if folder is None else folder / "sums.json"
        total = len(paths.batches) * paths.num_steps
        for number in range(sketch.read(finished), len(paths.batches)):
            for done in sketch.add(paths.batches[number]):
                if progress is not None:
                    progress("sketching curves", number * paths.num_steps + done, total)
            sketch.write(finished, number + 1)
        return RateDistortion(sketch.by_step(), settings, "sketch", name, fingerprint)

    return kept_curves(key, work, name, find)


def check_sketchable(model: ImageGenerator[Any], settings: CurveSettings) -> dict[int, BitPlan]:
    """What `exact.check_curves` gives. ValueError, as it, and for what can only be measured exactly."""
    plans = check_curves(model, settings)
    if not Choices(model, settings, plans, ()).by_layer:
        raise ValueError(
            f"method '{settings.method}' does more than choose the codes of one layer at a time, which a sketch cannot "
            "see; measure exactly, or sketch with rtn or gptq"
        )
    if type(model).with_cache is not ImageGenerator.with_cache and _all_steps(model) is None:
        raise ValueError(
            f"{model.family} keeps something from step to step, and has no pass over all steps that could be "
            "differentiated; measure exactly"
        )
    return plans


def _all_steps(model: ImageGenerator[Any]) -> GraphsOf | None:
    return next((graphs_of for family, graphs_of in ALL_STEPS.items() if isinstance(model, family)), None)


class _Sketch:
    """Means of squared projections, batch after batch."""

    def __init__(self, paths: Paths, choices: Choices, num_directions: int, seed: int):
        self.paths, self.choices, self.num_directions, self.seed = paths, choices, num_directions, seed
        settings, net = paths.settings, paths.model.net
        self.graphs_of = _all_steps(paths.model) or _step_by_step
        keys = tensor_keys(settings, choices.sites)
        self.watch = _Watch(net, settings.what, choices.sites)
        self.projector = _Projector(net, settings, choices)
        size = len(settings.widths), paths.num_steps
        self.sums_WS = {key: torch.zeros(size, dtype=torch.float64) for key in keys}
        self.count_S = torch.zeros(paths.num_steps, dtype=torch.float64)

    def add(self, batch: PathBatch) -> Iterator[int]:
        """Project the errors of all tensors on directions of the images of a batch; yields the number of steps done."""
        image_ids_B = batch.noise.image_ids_B
        done = 0
        for graph in self.graphs_of(self.paths, batch):
            with self.watch.watching(graph), torch.enable_grad():
                outputs = graph.run()
            places_DB = self._turns(len(outputs), image_ids_B)
            for number, place_B in enumerate(places_DB):
                self._go_back(graph, outputs, place_B, image_ids_B, number, number == len(places_DB) - 1)
            step_DB = torch.tensor(graph.steps)[places_DB]
            self.count_S += step_DB.flatten().bincount(minlength=self.paths.num_steps)
            for key, projection_DBW in self.projector.projections(self.watch.calls).items():
                squares_WX = projection_DBW.double().square().cpu().flatten(0, 1).T
                self.sums_WS[key].index_add_(1, step_DB[:, : projection_DBW.shape[1]].flatten(), squares_WX)
            self.watch.forget()
            done += len(graph.steps)
            yield done

    def write(self, path: Path | None, num_batches: int) -> None:
        """Keep the sums, if somewhere."""
        if path is None:
            return
        sums = {str(key): sum_WS.tolist() for key, sum_WS in self.sums_WS.items()}
        try:
            write_json(path, {"batches": num_batches, "counts": self.count_S.tolist(), "sums": sums})
        except OSError as error:
            log.warning("a finished batch is not kept: %s", error)

    def read(self, path: Path | None) -> int:
        """Take up what was written; of how many batches it is, 0 if there is nothing, or it is damaged."""
        if path is None:
            return 0
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            sums_WS = {key: torch.tensor(stored["sums"][str(key)], dtype=torch.float64) for key in self.sums_WS}
            count_S = torch.tensor(stored["counts"], dtype=torch.float64)
            if count_S.shape != self.count_S.shape or any(
                sums_WS[key].shape != sum_WS.shape for key, sum_WS in self.sums_WS.items()
            ):
                return 0
            num_batches = int(stored["batches"])
        except (OSError, ValueError, TypeError, KeyError):
            return 0
        self.sums_WS, self.count_S = sums_WS, count_S
        return num_batches

    def by_step(self) -> dict[TensorKey, tuple[tuple[float, ...], ...]]:
        """(W, S) of every tensor. ValueError for one that is not finite."""
        wrong = [str(key) for key, sum_WS in self.sums_WS.items() if not sum_WS.isfinite().all()]
        if wrong:
            raise ValueError(f"sketched distortions are NaN or Inf: {', '.join(wrong)}; measure exactly")
        return {key: tuple(map(tuple, (sum_WS / self.count_S).tolist())) for key, sum_WS in self.sums_WS.items()}

    def _turns(self, num_outputs: int, image_ids_B: Sequence[int]) -> Tensor:
        """(D, B): which of the outputs of a graph the directions of each image are in."""
        num_images = self.paths.settings.num_images
        share = self.num_directions * num_outputs / self.paths.num_steps
        passes = max(math.ceil(share), math.ceil(num_outputs / num_images))
        # Images take outputs in turn, and an image comes to all of them before it comes to one again.
        before_D = torch.arange(passes) * num_images
        before_D += before_D // math.lcm(num_images, num_outputs)
        return (before_D[:, None] + torch.tensor(image_ids_B)) % num_outputs

    def _go_back(
        self,
        graph: Graph,
        outputs: Sequence[Tensor],
        place_B: Tensor,
        image_ids_B: Sequence[int],
        number: int,
        is_last: bool,
    ) -> None:
        """A backward pass of one direction of every image."""
        along = ALONG[self.paths.measure_name]
        total = torch.zeros((), device=outputs[0].device)
        for place in place_B.unique().tolist():
            rows = (place_B == place).nonzero()[:, 0]
            noise = Noise(self.seed, [image_ids_B[row] for row in rows.tolist()], total.device)
            draws = count((number * self.paths.num_steps + graph.steps[place]) * _MOST_DRAWS)
            with torch.enable_grad():
                total = total + along(outputs[place][rows.to(total.device)], partial(_signs, noise, draws)).sum()
        self.watch.go_back(total, is_last)


def _signs(noise: Noise, draws: Iterator[int], shape: Sequence[int]) -> Tensor:
    return torch.where(noise.uniform(next(draws), shape) < 0.5, -1.0, 1.0)


# ---- how far it is from exact mode ----------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Points of curves, as sketched and as measured: mean over steps.

    points: tensor and width of each
    """

    points: tuple[tuple[TensorKey, int], ...]
    sketched: tuple[float, ...]
    exact: tuple[float, ...]

    @property
    def relative_errors(self) -> tuple[float, ...]:
        """|sketched - exact| / exact; inf where only the exact one is 0."""
        return tuple(
            abs(a - b) / b if b else (math.inf if a else 0.0) for a, b in zip(self.sketched, self.exact, strict=True)
        )

    @property
    def median_relative_error(self) -> float:
        """Of all points."""
        return median(self.relative_errors)

    @property
    def spearman(self) -> float:
        """Rank correlation; NaN where all are equal."""
        return float(spearmanr(self.sketched, self.exact).statistic)

    def at(self, bits: int) -> "Comparison":
        """Points at one width."""
        chosen = [index for index, (_, width) in enumerate(self.points) if width == bits]
        return Comparison(
            tuple(self.points[i] for i in chosen),
            tuple(self.sketched[i] for i in chosen),
            tuple(self.exact[i] for i in chosen),
        )


COMPARED = range(2, 9)
"""Widths at which a sketch is held to exact curves, where nothing else is said."""


def compare(sketch: RateDistortion, exact: RateDistortion, widths: Collection[int] = COMPARED) -> Comparison:
    """All points that both have, at these widths. ValueError for curves of other models or settings."""
    if (sketch.fingerprint, sketch.settings) != (exact.fingerprint, exact.settings):
        raise ValueError("the curves are of different models or settings: measure them with the same")
    every = sketch.settings.widths
    points = tuple((key, bits) for key in sketch.by_step for bits in every if bits in widths)
    sketched, measured = (
        tuple(curves.distortions(key)[every.index(bits)] for key, bits in points) for curves in (sketch, exact)
    )
    return Comparison(points, sketched, measured)


def check_sketch(
    model: ImageGenerator[Any],
    sketch: RateDistortion,
    *,
    num_points: int = 50,
    widths: Collection[int] = COMPARED,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """A sketch of a model against random points of it that are measured exactly, on the same images.

    ValueError for a sketch of another model, or for fewer than 3 points.
    """
    settings = sketch.settings
    if sketch.fingerprint != model_fingerprint(model):
        raise ValueError(f"the sketch is of another model ('{sketch.model}') or sampler than this {model.family}")
    candidates = [(key, bits) for key in sketch.by_step for bits in settings.widths if bits in widths]
    if min(num_points, len(candidates)) < 3:
        raise ValueError(
            f"{num_points} of {len(candidates)} points cannot be compared by rank: 3 or more are needed, at widths "
            f"{min(widths)} to {max(widths)}"
        )
    points = tuple(random.Random(seed).sample(candidates, min(num_points, len(candidates))))
    paths = Paths(model, settings, progress)
    plans = check_curves(model, settings)
    calibration = Choices(model, settings, plans, ()).calibration
    sketched, measured = [], []
    for number, (key, bits) in enumerate(points):
        plan = _plan_of_one(settings, key, bits)
        twin = quantize(model, plan, settings.method, calibration=calibration)
        measured.append(float(paths.distortion(twin).mean()))
        sketched.append(sketch.distortions(key)[settings.widths.index(bits)])
        if progress is not None:
            progress("measuring points", number + 1, len(points))
    return Comparison(points, tuple(sketched), tuple(measured))


def _plan_of_one(settings: CurveSettings, key: TensorKey, bits: int) -> BitPlan:
    """Only this tensor is quantized."""
    precision = settings.precision(key.what, bits)
    groups = range(len(settings.step_groups))
    precisions = (precision if key.what == "weight" or group == key.group else Precision() for group in groups)
    return BitPlan({key.site: tuple(precisions)}, settings.step_groups)
