"""How the numbers of a network are chosen: the interfaces of methods.

A method is one of three things, and a chain is any number of the first followed by one of the others:

  Transform     finds an equivalent network that is easier to quantize (SmoothQuant, the low-rank part of SVDQuant)
  LayerMethod   chooses the codes of one layer at a time (RTN, GPTQ, GPTVQ)
  BlockMethod   chooses those of a block together, by what the block gives (OmniQuant, learned rounding)

All are frozen dataclasses of their settings, and name in `needs` what calibration has to collect for them.

Legend: O output channels, I inputs of an output channel: the input channels of a linear; of a convolution the numbers
in a window that one output channel weighs, channel by channel and row by row, as F.unfold lists them. C input channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.calibration.replay import BlockCall
from bitlaw.formats import Params
from bitlaw.models.generator import Site
from bitlaw.precision import BitPlan, TensorPrecision
from bitlaw.quantized import QuantizedTensor, WeightSpec

Note = dict[str, Any]
"""What a method did to a site, in plain values: {"alpha": 0.5}. It is kept in the checkpoint."""


class Method(ABC):  # noqa: B024  (its kinds below have abstract methods)
    """What all methods have."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of InputStats that calibration must collect for it."""

    def problem(self, layer: nn.Module, spec: WeightSpec) -> str | None:
        """Why the weight of this layer cannot be quantized so by this method, and what to do; None if it can."""
        return None

    def precision(self, asked: TensorPrecision) -> TensorPrecision:
        """The weight precision that this method means by the one asked for; for most the same."""
        return asked


class LayerMethod(Method):
    """Quantizes the weight of one layer.

    A convolution is a linear to it: its weight (O, channels, kh, kw) arrives as (O, I), `stats` are those of windows
    of its input, and the caller gives the result the weight's shape.
    """

    sequential: bool = False
    """Whether the statistics of a block are to be those behind the quantized blocks before it."""

    @abstractmethod
    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        """`weight_OI` in the format and groups of `spec`."""

    def quantize_layer(self, weight: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        """`quantize` for the weight of a linear or convolution, in whose shape the result is."""
        return replace(self.quantize(weight.flatten(1), stats, spec), shape=tuple(weight.shape))


class Transform(Method):
    """Changes a network into one that computes the same, to rounding, and loses less when it is quantized."""

    @abstractmethod
    def apply(
        self, net: nn.Module, sites: Sequence[Site], plan: BitPlan, stats: Mapping[str, InputStats]
    ) -> dict[str, Note]:
        """Change `net` in place; what was done to each site. Sites that `plan` leaves in 16 bits stay as they are."""


@dataclass(frozen=True)
class BlockTask:
    """A block, and what a method needs to quantize it.

    name: of the block's module in the network
    module: the block in full precision, which the method leaves as it is
    sites: its sites whose weight or input is quantized, by the names they have in the network; those that are not
           inside the module (modulations that are computed before the blocks, say) are not among them
    ranges: parameters of static activation ranges, (S, 1) each, of the sites that have them
    calls, held_out: calls to learn from, and others to decide when to stop: with inputs behind the quantized blocks
                     before it, and as target what full precision gives behind full precision
    """

    name: str
    module: nn.Module
    sites: tuple[Site, ...]
    plan: BitPlan
    stats: Mapping[str, InputStats]
    calls: Sequence[BlockCall]
    held_out: Sequence[BlockCall]
    ranges: Mapping[str, Params] = field(default_factory=dict)
    seed: int = 0

    def inside(self, site: Site | str) -> str:
        """The name of a site's layer inside the block's module."""
        name = site if isinstance(site, str) else site.name
        return name.removeprefix(f"{self.name}.")


@dataclass(frozen=True)
class Rescaling:
    """x -> (x - shift) / scale at the input of a site, with the weight and bias that undo it; shift None is 0."""

    scale_C: Tensor
    shift_C: Tensor | None = None


@dataclass(frozen=True)
class BlockResult:
    """What was chosen for the sites of a block, or for some others.

    weights: of each site whose weight is quantized, for inputs as `rescalings` makes them
    rescalings: of the sites that have one; those that share an absorber have the same
    """

    weights: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    rescalings: Mapping[str, Rescaling] = field(default_factory=dict)
    notes: Mapping[str, Note] = field(default_factory=dict)


class BlockMethod(Method):
    """Quantizes all sites of a block, by the error of what the block gives."""

    @abstractmethod
    def quantize_block(self, task: BlockTask) -> BlockResult:
        """The block's weights. Sites outside of any block are quantized by `outside`."""

    @property
    @abstractmethod
    def outside(self) -> LayerMethod:
        """Quantizes the sites that are in no block."""
