"""Train the ladder's autoencoder: a multi-scale residual VQ whose decoder also takes continuous latents.

Reconstruction is L1 + MSE + gradient loss; the codebook follows the residuals it is given by exponential moving
averages, and codes that nothing chooses are moved onto residuals of the batch. A part of each batch goes to the decoder
unquantized and slightly noisy, so that one decoder serves VAR's tokens and DiT's continuous latents.

Legend: B images, C latent channels, h = w latent side, N vectors, V codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer
from bitlaw.training import step_generator

COMMITMENT = 0.25  # VAR's beta
CODEBOOK_DECAY = 0.99
CONTINUOUS_SHARE = 0.25
LATENT_NOISE = 0.15  # of the latents' standard deviation, at most


class TokenizerTraining(nn.Module):
    """The tokenizer with the moving averages of its codebook."""

    def __init__(self, tokenizer: VQTokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        codes_VC = tokenizer.quantize.embedding.weight
        codes_VC.requires_grad_(False)
        self.register_buffer("count_V", torch.ones(len(codes_VC)))
        self.register_buffer("sum_VC", codes_VC.detach().clone())
        self.count_V: Tensor
        self.sum_VC: Tensor

    def loss(self, x_BCHW: Tensor, step: int) -> Tensor:
        """Reconstruction plus commitment of images in [-1, 1]; moves the codebook."""
        generator = step_generator(step)
        f = self.tokenizer.encode(x_BCHW)
        quantized, commitment = self._quantize(f, generator, warm=step < 50)
        straight_through = f + (quantized - f).detach()
        spread = f.detach().std() * LATENT_NOISE
        noisy = f + spread * torch.rand(len(f), 1, 1, 1, generator=generator) * torch.randn(
            f.shape, generator=generator
        )
        num_continuous = int(CONTINUOUS_SHARE * len(f))
        latents = torch.cat([noisy[:num_continuous], straight_through[num_continuous:]])
        return reconstruction_loss(self.tokenizer.decode(latents, clamp=False), x_BCHW) + commitment

    def _quantize(self, f: Tensor, generator: torch.Generator, warm: bool) -> tuple[Tensor, Tensor]:
        """The sum of all stages' codes (B, C, h, w) and VAR's commitment loss, mean over stages."""
        tokenizer, side = self.tokenizer, f.shape[-1]
        total, terms, vectors, choices = torch.zeros_like(f), [], [], []
        for stage, patch in enumerate(tokenizer.config.patch_nums):
            with torch.no_grad():
                rest = f - total
                q = F.interpolate(rest, size=(patch, patch), mode="area") if patch != side else rest
                vectors_NC = q.permute(0, 2, 3, 1).reshape(-1, q.shape[1])
                codes_VC = tokenizer.quantize.embedding.weight
                chosen_N = torch.addmm(codes_VC.square().sum(1), vectors_NC, codes_VC.T, alpha=-2).argmin(1)
                h = codes_VC[chosen_N].reshape(len(f), patch, patch, -1).permute(0, 3, 1, 2)
                if patch != side:
                    h = F.interpolate(h, size=(side, side), mode="bicubic")
                vectors.append(vectors_NC)
                choices.append(chosen_N)
            total = total + tokenizer.phi_for_stage(stage)(h)
            terms.append(COMMITMENT * F.mse_loss(total.detach(), f) + F.mse_loss(total, f.detach()))
        if self.training:
            self._move_codes(torch.cat(vectors), torch.cat(choices), generator, warm)
        return total, torch.stack(terms).mean()

    @torch.no_grad()
    def _move_codes(self, vectors_NC: Tensor, chosen_N: Tensor, generator: torch.Generator, warm: bool) -> None:
        count_V = torch.bincount(chosen_N, minlength=len(self.count_V)).float()
        sum_VC = torch.zeros_like(self.sum_VC).index_add_(0, chosen_N, vectors_NC)
        decay = 0.8 if warm else CODEBOOK_DECAY
        self.count_V.lerp_(count_V, 1 - decay)
        self.sum_VC.lerp_(sum_VC, 1 - decay)
        dead_V = self.count_V < 0.02 * len(vectors_NC) / len(self.count_V)
        if dead_V.any():
            fresh_N = torch.randint(len(vectors_NC), (int(dead_V.sum()),), generator=generator)
            self.sum_VC[dead_V] = vectors_NC[fresh_N]
            self.count_V[dead_V] = 1.0
        self.tokenizer.quantize.embedding.weight.copy_(self.sum_VC / self.count_V[:, None])


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + MSE + L1 of horizontal and vertical differences."""
    error = y - x
    gradient = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + error.square().mean() + gradient
