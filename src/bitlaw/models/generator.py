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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from bitlaw.models.storage import TOKENIZER_PREFIX, split_prefix, write_model

Phase = Literal["embed", "blocks", "head"]


@dataclass(frozen=True)
class Site:
    """A linear layer that may be quantized.

    name: dotted path of the nn.Module inside the network, e.g. "blocks.3.attn.mat_qkv"
    kind: qkv, proj, fc1, fc2, adaln, embed, head ...
    block: index of the transformer block, None outside the blocks
    phase: "embed" (before the blocks), "blocks", "head" (after them)
    uses: rows of activation that pass through it per generated image: tokens x steps, per guidance branch
    """

    name: str
    kind: str
    block: int | None
    phase: Phase
    uses: int


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
    """Tells quantized layers which step is running; every QuantLinear of a model shares its model's clock."""

    step: int = 0


class ImageGenerator(ABC, Generic[StateT]):
    """A model family with its weights and its sampler's settings.

    `net` is the network that is quantized; `decoder_net` (tokenizer or VAE) stays in full precision.
    `sampling` is the family's frozen dataclass of sampler settings; it has at least `guidance`.
    """

    family: ClassVar[str]
    net: nn.Module
    sampling: Any
    num_classes: int
    image_size: int
    clock: StepClock
    storage_dtype: torch.dtype = torch.float32
    """Type in which numbers that are not quantized are stored; arithmetic is in that of the parameters."""
    provenance: Mapping[str, Any] = MappingProxyType({})
    """Where the model comes from, and what was done to it."""

    # ---- what a family defines -------------------------------------------------------------------

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Steps of a rollout."""

    @abstractmethod
    def sites(self) -> list[Site]:
        """The linear layers that may be quantized, in order of execution."""

    @abstractmethod
    def start(self, labels_B: Tensor, noise: Noise) -> StateT:
        """The state before step 0."""

    @abstractmethod
    def extract(self, state: StateT, step: int) -> Extracted:
        """Feature extraction: run the network. Leaves `state` as it found it."""

    @abstractmethod
    def reconstruct(self, state: StateT, extracted: Extracted, step: int) -> StateT:
        """Representation reconstruction: look codes up and accumulate them, or update the latent."""

    @abstractmethod
    def decode(self, state: StateT) -> Tensor:
        """uint8 images (B, 3, H, W)."""

    @abstractmethod
    def loss(self, images_BCHW: Tensor, labels_B: Tensor, noise: Noise) -> Tensor:
        """Validation loss of each image (B,), teacher forced, no label dropped."""

    @property
    @abstractmethod
    def sampler_name(self) -> str:
        """The sampler with its settings other than guidance and number of steps, for the protocol of a score."""

    @abstractmethod
    def to_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration, and tensors under official keys, "tokenizer." before the tokenizer's; no quantized weights."""

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The full-precision model that `to_checkpoint` gave. ValueError names each tensor that does not fit."""

    # ---- what every family has -------------------------------------------------------------------

    def with_sampling(self, **changes: Any) -> Self:
        """The same weights under other sampler settings; None leaves a setting as it is."""
        twin = copy.copy(self)
        twin.sampling = replace(self.sampling, **{k: v for k, v in changes.items() if v is not None})
        return twin

    def generate(
        self,
        labels: Sequence[int] | Tensor,
        seed: int = 0,
        *,
        batch_size: int = 64,
        first_image: int = 0,
        progress: Callable[[int], Any] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """uint8 images (B, 3, H, W), one per label. `first_image` is the index of the first label in the run.

        Further keywords (guidance, ...) replace the sampler's settings for this call. `progress` is called
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

    def net_tensors(self) -> dict[str, Tensor]:
        """The network's tensors under official keys, without quantized weights and without the tokenizer."""
        return split_prefix(TOKENIZER_PREFIX, self.to_checkpoint()[1])[1]

    def check_labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        """`labels` as an int64 tensor on the model's device; ValueError names the valid range."""
        labels_B = torch.as_tensor(labels, dtype=torch.int64).reshape(-1).to(self.device)
        if len(labels_B) == 0:
            raise ValueError("no labels given")
        wrong = sorted({int(x) for x in labels_B if not 0 <= x < self.num_classes})
        if wrong:
            given = ", ".join(map(str, wrong))
            raise ValueError(f"label {given} out of range: this model has classes 0 to {self.num_classes - 1}")
        return labels_B

    @property
    def device(self) -> torch.device:
        """The device the network is on."""
        return next(self.net.parameters()).device


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
