"""What a model family is: a loop of extract and reconstruct over steps, and the one place that runs it.

Every family, language-style or diffusion-style, draws an image as

    state = start(labels, noise)
    for step in range(num_steps):
        extracted = extract(state, step)                  # the network: logits, predicted noise
        state = reconstruct(state, extracted, step)       # code look-up and accumulation, sampler update
    images = decode(state)

`rollout` is the only sampling loop; calibration, evaluation and the analyses consume it.
Random numbers are a function of (seed, step, image): two models meet the same noise, and an image does
not depend on the batch it is drawn in.

Legend: B images, L tokens of a step, V vocabulary, C channels, H height, W width.
"""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from bitlaw.models.autoencoders import Autoencoder, autoencoder_config, restore_autoencoder
from bitlaw.models.class_names import known_names, label_of
from bitlaw.models.official import WeightsFile
from bitlaw.models.storage import TOKENIZER_PREFIX, split_prefix, with_prefix, write_model
from bitlaw.names import lookup, unknown_name
from bitlaw.precision import step_group
from bitlaw.quantized import QuantLayer

Phase = Literal["embed", "blocks", "head"]

_NUMBERED = re.compile(r".*?\.\d+(?=\.)")
Labels = Sequence[int | str] | Tensor


@dataclass(frozen=True)
class AbsorberPart:
    """Parameters that every channel of a site's input is made with, in the order of the channels.

    module: dotted path inside the network
    role: how they enter: "rows" are outputs r of a linear, as a factor or a summand; "gain" are outputs of one that
          enter as the factor 1 + r; "norm" are weight and, where there is one, bias of a normalisation
    rows: first and last + 1 output of the linear; None for all
    """

    module: str
    role: Literal["rows", "gain", "norm"]
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Absorber:
    """What lies before a site and can make (x - shift) / scale of its input x, each channel on its own.

    All parts together do it, and nothing else depends on them than the sites that have this absorber, which therefore
    share the scale. A shift goes to the parts that are no gain.

    shifts: whether a shift can be absorbed too
    """

    parts: tuple[AbsorberPart, ...]
    shifts: bool

    @classmethod
    def norm(cls, module: str, shifts: bool = True) -> Self:
        """A normalisation, which must have a weight; a bias as well if it `shifts`."""
        return cls((AbsorberPart(module, "norm"),), shifts)

    @classmethod
    def rows(cls, module: str, first: int, end: int, shifts: bool) -> Self:
        """Some outputs of a linear: those that become the values of an attention, or a factor of a gated unit.

        Weights of an attention add up to 1, so that a shift of values is one of its output.
        """
        return cls((AbsorberPart(module, "rows", (first, end)),), shifts)

    @classmethod
    def modulation(cls, module: str, width: int, gain: int, shift: int) -> Self:
        """A linear of the condition whose outputs are parts of `width`: x = norm * (1 + part `gain`) + part `shift`."""
        return cls(
            (
                AbsorberPart(module, "gain", (gain * width, (gain + 1) * width)),
                AbsorberPart(module, "rows", (shift * width, (shift + 1) * width)),
            ),
            shifts=True,
        )


@dataclass(frozen=True)
class Site:
    """A layer that may be quantized: a linear, or a convolution in two dimensions.

    name: dotted path of the nn.Module inside the network, e.g. "blocks.3.attn.mat_qkv"
    kind: qkv, proj, fc1, fc2, adaln, embed, head ...
    block: index of the transformer block, None outside the blocks
    phase: "embed" (before the blocks), "blocks", "head" (after them)
    uses: rows of activation that pass through it per generated image: tokens x steps, per guidance branch; of a
          convolution, positions of its output x steps
    absorber: what can rescale its input, exactly, in full precision; None if nothing before it can
    """

    name: str
    kind: str
    block: int | None
    phase: Phase
    uses: int
    absorber: Absorber | None = None


class Noise:
    """Random numbers that depend on (seed, step, image) only; step 0 is the start of a rollout.

    `image_ids_B` are the images' indices in the whole run, so that image 17 is the same in any batch.
    Numbers are drawn on the CPU, so that every device meets the same ones.
    """

    def __init__(self, seed: int, image_ids_B: Sequence[int], device: torch.device | str = "cpu"):
        self.seed, self.image_ids_B, self.device = seed, list(image_ids_B), torch.device(device)
        self._generator = torch.Generator()

    def __len__(self) -> int:
        return len(self.image_ids_B)

    def normal(self, step: int, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers (B, *shape), float32."""
        return self._draw(step, shape, lambda row, generator: row.normal_(generator=generator))

    def uniform(self, step: int, shape: Sequence[int]) -> Tensor:
        """Numbers from [0, 1), (B, *shape), float32."""
        return self._draw(step, shape, lambda row, generator: row.uniform_(generator=generator))

    def permutation(self, step: int, length: int) -> Tensor:
        """Random orders of 0 .. length - 1, (B, length), int64."""
        orders = self._draw(
            step, (length,), lambda row, generator: row.copy_(torch.randperm(length, generator=generator))
        )
        return orders.long()

    def gumbel(self, step: int, shape: Sequence[int]) -> Tensor:
        """Standard Gumbel numbers (B, *shape), float32: argmax(logits + gumbel) draws from softmax(logits)."""
        uniform = self._draw(step, shape, lambda row, generator: row.uniform_(generator=generator))
        return uniform.log_().neg_().log_().neg_()  # uniform 0 gives -inf, which is never drawn

    def _draw(self, step: int, shape: Sequence[int], fill: Callable[[Tensor, torch.Generator], Any]) -> Tensor:
        out = torch.empty((len(self), *shape), dtype=torch.float32)
        for row, image in zip(out, self.image_ids_B, strict=True):
            self._generator.manual_seed(_mix(self.seed, step, image))
            fill(row, self._generator)
        return out.to(self.device)


def _mix(seed: int, step: int, image: int) -> int:
    """One 63-bit seed from three integers: splitmix64's finalizer over each in turn."""
    mask, x = 2**64 - 1, 0
    for value in (seed, step, image):
        x = (x + (value & mask) + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x >> 1


class Extracted(NamedTuple):
    """What the network gives in one step: guided features, and the cache it has grown (None where there is none)."""

    features: Tensor
    cache: Any = None


StateT = TypeVar("StateT")


class Step(NamedTuple, Generic[StateT]):
    """One step of a rollout: the state before, what was extracted, the state after."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    before: StateT
    extracted: Extracted
    after: StateT


@dataclass
class StepClock:
    """Tells quantized layers which step is running; every QuantLayer of a model shares its model's clock."""

    step: int = 0


class ImageGenerator(ABC, Generic[StateT]):
    """A model family with its weights and its sampler's settings.

    `net` is the network that is quantized; `autoencoder` stays in full precision, and is None for a model of pixels or
    one that was loaded without it. `sampling` is the family's frozen dataclass of sampler settings; it has at least
    `guidance`.

    What a family is, in the order in which one is written:
      sizes      `config_of` reads them off a released file, `to_config` writes them, `from_config` builds the model
      sampling   `start`, `extract`, `reconstruct`, `decode`
      training   `encode_images` and `encoded_of`, `teacher_forced`, `predict`, `training_loss`; of which `loss` is made
      quantizing `sites`
    """

    family: ClassVar[str]
    autoencoder_names: ClassVar[tuple[str, ...]] = ()
    """Usual names of the autoencoder's file, which is looked for beside the network's; () for a model of pixels."""
    official_wrapper: ClassVar[str] = ""
    """Key under which the official code looks for the weights in a file; "" for the top level."""

    net: nn.Module
    autoencoder: Autoencoder | None
    sampling: Any
    num_classes: int
    image_size: int
    clock: StepClock
    storage_dtype: torch.dtype = torch.float32
    """Type in which numbers that are not quantized are stored; arithmetic is in that of the parameters."""
    provenance: Mapping[str, Any] = MappingProxyType({})
    """Where the model comes from, and what was done to it."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, by number; () where they are those of ImageNet or not known."""
    recipe: str = ""
    """Name of the recipe that `sampling` is, for the protocol of a score; "" for settings of one's own."""

    # ---- what a family defines: sizes and weights ------------------------------------------------

    @classmethod
    @abstractmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """Whether a released file is of this family, by the names and shapes of its tensors."""

    @classmethod
    @abstractmethod
    def config_of(cls, file: WeightsFile, autoencoder: Autoencoder | None, **options: Any) -> dict[str, Any]:
        """What `to_config` would give for the model in a released file, read from its tensors' shapes.

        `options` are what shapes cannot tell (`heads=4`), and go before what is assumed. ValueError names an option
        that does not exist, what does not go together (with the tokenizer, say), or what has to be given.
        """

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Sizes and sampler settings in plain values: "net", "sampling" and what else the family has."""

    @classmethod
    @abstractmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        autoencoder: Autoencoder | None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The model of a configuration, with `tensors` under the names of a checkpoint; see `to_tensors`.

        ValueError names each tensor that does not fit.
        """

    def to_tensors(self) -> dict[str, Tensor]:
        """The network's tensors as a checkpoint names them, quantized weights left out."""
        return self.net.state_dict()

    @classmethod
    def autoencoder_names_for(cls, file: WeightsFile) -> tuple[str, ...]:
        """Usual names of the autoencoder's file of a released file's model, where not all models have the same."""
        return cls.autoencoder_names

    @classmethod
    def rearranged(cls, file: WeightsFile, options: Mapping[str, Any]) -> WeightsFile:
        """A released file in the one layout that `config_of` and `from_official_names` know, of several."""
        return file

    @classmethod
    def from_official_names(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A released file's tensors as a checkpoint names them; what holds nothing is left out."""
        return dict(tensors)

    def to_official_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse, for `to_official`."""
        return dict(tensors)

    # ---- what a family defines: sampling ---------------------------------------------------------

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Steps of a rollout."""

    @abstractmethod
    def sites(self) -> list[Site]:
        """The layers that may be quantized, in order of execution."""

    @abstractmethod
    def start(self, labels_B: Tensor, noise: Noise) -> StateT:
        """The state before step 0."""

    @abstractmethod
    def extract(self, state: StateT, step: int) -> Extracted:
        """Feature extraction: run the network. Leaves `state` as it found it. Features are float32."""

    @abstractmethod
    def reconstruct(self, state: StateT, extracted: Extracted, step: int) -> StateT:
        """Representation reconstruction: look codes up and accumulate them, or update the latent."""

    @abstractmethod
    def decode(self, state: StateT) -> Tensor:
        """uint8 images (B, 3, H, W)."""

    blocks_are_chained: ClassVar[bool] = True
    """Whether a block's first input is the output of the block before it, and the output has that input's shape."""

    @property
    def blocks(self) -> list[str]:
        """Names of the modules that are quantized one after the other, in order of execution.

        Those that a site's name first has a number in; what a block needs beside its first input depends on no other.
        """
        found = (_NUMBERED.match(site.name) for site in self.sites() if site.block is not None)
        return list(dict.fromkeys(match.group() for match in found if match))

    def with_cache(self, state: StateT, cache: Any) -> StateT:
        """`state` with another cache of what earlier steps left, None for none; families without one ignore it."""
        return state

    @property
    @abstractmethod
    def sampler_name(self) -> str:
        """The sampler with its settings other than guidance and number of steps, for the protocol of a score."""

    @property
    def recipes(self) -> Mapping[str, Any]:
        """Sampler settings by name; "paper" are those of the published evaluation of a model of this size."""
        return {}

    @property
    def null_label(self) -> int | None:
        """The label of the unconditional model, which callers write as -1; None if there is none."""
        return None

    # ---- what a family defines: training ---------------------------------------------------------

    @property
    def vocab_size(self) -> int | None:
        """V, how many tokens the network's logits choose between; None where it predicts numbers."""
        return None

    @abstractmethod
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """What training starts from, (B, ...), of uint8 images: tokens, int64, or scaled latents, float32.

        No gradient, and no tensor of inference mode unless it is called in that.
        """

    @abstractmethod
    def encoded_of(self, state: StateT) -> Tensor:
        """The same of a finished rollout's images: what `decode` decodes."""

    @abstractmethod
    def teacher_forced(self, encoded: Tensor, labels_B: Tensor, noise: Noise) -> Any:
        """What the network is asked in one pass over all steps, and what is true; a NamedTuple of the family.

        encoded: (B, ...) from `encode_images` or `encoded_of`
        labels_B: may hold the null label
        noise: timesteps, masks and noise follow from it alone, so that every model meets the same ones. Any run of
            image ids covers the schedule evenly; in training, each use of an image needs an id of its own.
        """

    @abstractmethod
    def predict(self, batch: Any) -> dict[str, Tensor]:
        """What the network gives for a batch of `teacher_forced`: float32, differentiable, first dimension B.

        "logits" (B, L, V) of tokens in the order of `encoded`; or "noise" (or v, where the process predicts that), with
        "variance" beside it where that is learned, and before them the "conditions" that a head starts from.
        Predictions of two models for one batch are comparable entry by entry: the mean of a squared difference over all
        dimensions but the first is that image's error. No label is dropped here, nor anything else at random.

        Quantized layers are told the steps as far as a pass over all of them can: images at one timestep each run with
        the others of their step group, see `run_by_step`; a pass over all tokens of an image runs as the last step.
        """

    @abstractmethod
    def training_loss(self, batch: Any, prediction: dict[str, Tensor]) -> Tensor:
        """The loss of each image (B,) that the family is trained with, of a prediction against what is true."""

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, noise: Noise) -> Tensor:
        """Validation loss of each uint8 image (B,), teacher forced, no label dropped."""
        batch = self.teacher_forced(self.encode_images(images_BCHW), labels_B, noise)
        return self.training_loss(batch, self.predict(batch))

    def require_gradients(self) -> None:
        """Let those parameters ask for a gradient that the family's own training trains; by default all."""
        self.net.requires_grad_(True)

    def run_by_step(self, steps_B: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """`run(rows)` for all rows (B,) of a batch at once, the clock at their steps as far as layers tell steps apart.

        Rows of one step group go through the network together, rows of another after them. Without quantized
        activations, or with one range for all steps, everything goes at once.
        """
        starts = sorted({first for module in self.net.modules() for first in getattr(module, "step_groups", ())})
        steps = steps_B.tolist()
        groups = [step_group(starts, step) if starts else 0 for step in steps]
        parts: list[Tensor] = []
        order: list[int] = []
        for group in dict.fromkeys(groups):
            rows = [row for row, other in enumerate(groups) if other == group]
            self.clock.step = steps[rows[0]]
            parts.append(run(torch.tensor(rows, device=steps_B.device)))
            order += rows
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.tensor(order, device=steps_B.device).argsort()]

    # ---- what every family has -------------------------------------------------------------------

    def to_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration, and tensors, "tokenizer." before the autoencoder's; no quantized weights."""
        config, tensors = {"family": self.family, **self.to_config()}, self.to_tensors()
        if self.autoencoder is not None:
            config["tokenizer"] = autoencoder_config(self.autoencoder)
            tensors |= with_prefix(TOKENIZER_PREFIX, self.autoencoder.state_dict())
        if self.class_names:
            config["class_names"] = list(self.class_names)
        return config, tensors

    @classmethod
    def from_checkpoint(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Self:
        """The full-precision model that `to_checkpoint` gave. ValueError names each tensor that does not fit."""
        inside, own = split_prefix(TOKENIZER_PREFIX, tensors)
        autoencoder = restore_autoencoder(config["tokenizer"], inside) if "tokenizer" in config else None
        model = cls.from_config(config, own, autoencoder, dtype)
        model.class_names = tuple(config.get("class_names", ()))
        return model

    @classmethod
    def from_official(
        cls,
        file: WeightsFile,
        autoencoder: Autoencoder | None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Self:
        """The model in a released file. ValueError, naming the file, for what does not fit; see `config_of`."""
        try:
            file = cls.rearranged(file, options)
            config = cls.config_of(file, autoencoder, **options)
            return cls.from_config(config, cls.from_official_names(file.tensors), autoencoder, dtype)
        except ValueError as error:
            raise ValueError(f"{file.path.name}: {str(error).removeprefix(f'{file.path.name}: ')}") from error

    def to_official(self) -> dict[str, Tensor]:
        """The network's weights under official names, quantized ones decoded."""
        layers = ((n, m) for n, m in self.net.named_modules() if isinstance(m, QuantLayer) and m.quantized is not None)
        return self.to_official_names(self.to_tensors() | {f"{name}.weight": layer.weight for name, layer in layers})

    def with_sampling(self, recipe: str | None = None, **changes: Any) -> Self:
        """The same weights under other sampler settings; None leaves a setting as it is.

        `recipe` is a name of `recipes`, whose settings `changes` may still replace. ValueError for an unknown name.
        """
        twin = copy.copy(self)
        changes = {key: value for key, value in changes.items() if value is not None}
        if recipe is not None:
            twin.sampling, twin.recipe = lookup(self.recipes, recipe, f"recipe of {self.family}"), recipe
        if unknown := [key for key in changes if not hasattr(twin.sampling, key)]:
            raise unknown_name(unknown[0], vars(twin.sampling), f"sampler setting of {self.family}")
        twin.sampling = replace(twin.sampling, **changes)
        if changes:
            twin.recipe = ""
        return twin

    def generate(
        self,
        labels: Labels,
        seed: int = 0,
        *,
        batch_size: int = 64,
        first_image: int = 0,
        progress: Callable[[int], Any] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """uint8 images (B, 3, H, W), one per label. `first_image` is the index of the first label in the run.

        Further keywords (guidance, recipe, ...) replace the sampler's settings for this call. `progress` is called
        with the number of images finished. Raises ValueError for a label out of range.
        """
        labels_B = self.check_labels(labels)
        model = self.with_sampling(**sampling)
        images: list[Tensor] = []
        for begin in range(0, len(labels_B), batch_size):
            batch = labels_B[begin : begin + batch_size]
            ids = range(first_image + begin, first_image + begin + len(batch))
            state = None
            for step in rollout(model, batch, Noise(seed, ids, self.device)):
                state = step.after
            assert state is not None
            with torch.inference_mode():
                images.append(self.decode(state).cpu())
            if progress is not None:
                progress(len(batch))
        return torch.cat(images)

    def save(self, directory: Path | str) -> None:
        """Write a checkpoint directory, atomically; `bitlaw.load` of it gives the same numbers, bit for bit.

        Numbers that are not quantized are stored in `storage_dtype`. Raises ValueError for one that does not fit it.
        """
        write_model(directory, *self.to_checkpoint(), self.net, self.storage_dtype, self.provenance)

    @property
    def latent_codec(self) -> Autoencoder:
        """Its autoencoder. ValueError if the model was loaded without."""
        if self.autoencoder is None:
            wanted = self.autoencoder_names[0]
            raise ValueError(f"this {self.family} was loaded without its autoencoder ({wanted}), which this needs")
        return self.autoencoder

    def check_labels(self, labels: Labels) -> Tensor:
        """`labels` as an int64 tensor on the model's device.

        Names of classes may stand for their numbers, and -1 for the unconditional model. ValueError names the valid
        range.
        """
        if not isinstance(labels, Tensor):
            names = [(name,) for name in self.class_names] or known_names(self.num_classes)
            labels = [label_of(label, names) if isinstance(label, str) else label for label in labels]
        labels_B = torch.as_tensor(labels, dtype=torch.int64).reshape(-1).to(self.device)
        if len(labels_B) == 0:
            raise ValueError("no labels given")
        lowest = 0 if self.null_label is None else -1
        wrong = sorted({int(x) for x in labels_B if not lowest <= x < self.num_classes})
        if wrong:
            given = ", ".join(map(str, wrong))
            raise ValueError(f"label {given} out of range: this model has classes 0 to {self.num_classes - 1}")
        return labels_B if self.null_label is None else labels_B.masked_fill(labels_B == -1, self.null_label)

    def to(self, device: torch.device | str) -> Self:
        """The model with its network and autoencoder moved to a device."""
        self.net.to(device)
        if self.autoencoder is not None:
            self.autoencoder.to(device)
        return self

    def compile(self) -> Self:
        """The model with its network's blocks compiled by torch, in place: the same numbers, to rounding.

        The first images wait up to a minute for it, and need a C++ compiler. On a CPU little is gained; on CUDA, where
        the blocks are also recorded as CUDA graphs, neither numbers nor gain have been verified.
        """
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        for part in self.compiled_parts:
            part.compile(mode=mode)
        return self

    @property
    def compiled_parts(self) -> Sequence[nn.Module]:
        """What `compile` compiles, each on its own: the network's blocks."""
        blocks = next((getattr(self.net, name) for name in ("blocks", "layers") if hasattr(self.net, name)), None)
        return list(blocks) if isinstance(blocks, nn.ModuleList) else [self.net]

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called: layers inside compiled blocks cannot be watched or replaced any more."""
        return any(part._compiled_call_impl is not None for part in self.compiled_parts)

    @property
    def device(self) -> torch.device:
        """The device the network is on."""
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type the network computes in."""
        return next(p.dtype for p in self.net.parameters() if p.is_floating_point())


def rollout(model: ImageGenerator[StateT], labels_B: Tensor, noise: Noise) -> Iterator[Step[StateT]]:
    """Run the sampler, yielding every step; quantized layers are told the step through the model's clock.

    Two rollouts may be consumed side by side (`zip(rollout(a, ...), rollout(b, ...))`) if a and b do not share a clock.
    """
    with torch.inference_mode():
        state = model.start(labels_B, noise)
    for index in range(model.num_steps):
        step = replay(model, state, index)
        yield step
        state = step.after


def replay(model: ImageGenerator[StateT], state: StateT, step: int) -> Step[StateT]:
    """One step from a given state."""
    with torch.inference_mode():
        model.clock.step = step
        extracted = model.extract(state, step)
        return Step(step, state, extracted, model.reconstruct(state, extracted, step))
