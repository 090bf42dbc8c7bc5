"""What turns images into the latents that a family's network works on, and back.

Legend: B images, Z latent channels, h x w latent positions, H x W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from bitlaw.models.official import WeightsFile


class Autoencoder(nn.Module, ABC):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, Z, h, w). It stays in float32 and is never quantized.

    Latents are as the autoencoder has them; scaling them to unit variance is the family's business (`latent_scale`).
    """

    kind: ClassVar[str]
    """Its name in AUTOENCODERS and in a checkpoint's configuration."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Z."""

    @property
    @abstractmethod
    def downsampling(self) -> int:
        """Pixels a side that one latent position stands for."""

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents (B, Z, h, w); of a distribution over latents, its mean."""

    @abstractmethod
    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W), about in [-1, 1]."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Its sizes in plain values, without "kind"."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """An autoencoder of these sizes; its weights are still to be loaded."""

    @classmethod
    @abstractmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """Whether the weights are of this kind, by their names."""

    @classmethod
    @abstractmethod
    def from_official(cls, file: WeightsFile, **sizes: Any) -> Self:
        """The autoencoder of a released file, its sizes read from the tensors' shapes.

        `sizes` says what shapes cannot. Raises ValueError naming every tensor that does not fit.
        """

    @abstractmethod
    def to_official(self) -> dict[str, Tensor]:
        """Its weights under the official names."""
