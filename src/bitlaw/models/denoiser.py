"""What diffusion models have in common in training: one timestep an image, and a network that sees the noise.

Legend: B images, C channels, H = W side of what is denoised.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from bitlaw.models.generator import ImageGenerator, Noise, StateT
from bitlaw.models.parts.diffusion import Diffusion, NoisyBatch


class Denoiser(ImageGenerator[StateT]):
    """A network of (x_BCHW, t_B, labels_B) with the process that it was trained on. Its states have `x_BCHW`."""

    process: Diffusion

    @property
    @abstractmethod
    def spaced(self) -> Diffusion:
        """The respaced process that a rollout follows."""

    def encoded_of(self, state: StateT) -> Tensor:
        """What was drawn, (B, C, H, W)."""
        drawn: Any = state
        x_BCHW: Tensor = drawn.x_BCHW
        return x_BCHW.clone()

    @torch.no_grad()
    def teacher_forced(self, encoded: Tensor, labels_B: Tensor, noise: Noise) -> NoisyBatch:
        """Each image or latent at one timestep, by the golden-ratio sequence over the images' ids."""
        return self.process.noisy(encoded, labels_B, noise.image_ids_B, noise.normal(0, encoded.shape[1:]))

    def predict(self, batch: NoisyBatch) -> dict[str, Tensor]:
        """As "noise" the noise or v, and "variance" if it is learned, (B, C, H, W) each.

        Images are in the step group of that step of a rollout whose timestep is nearest to theirs.
        """

        def run(rows: Tensor) -> Tensor:
            output: Tensor = self.net(batch.x_BCHW[rows], batch.t_B[rows], batch.labels_B[rows])
            return output

        output = self.run_by_step(self.spaced.nearest_steps(batch.t_B), run)
        return self.process.named(output, batch.x_BCHW.shape[1])

    def training_loss(self, batch: NoisyBatch, prediction: dict[str, Tensor]) -> Tensor:
        """Squared error, and the variational bound where the variance is learned, (B,)."""
        return self.process.losses_of(batch, prediction).total_B
