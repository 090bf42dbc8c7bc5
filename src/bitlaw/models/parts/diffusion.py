"""Gaussian diffusion in discrete time: schedules, respacing, DDIM and DDPM steps, training losses.

Equations as in Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (learned variance, cosine
schedule, respacing) and Salimans & Ho 2022 (v prediction). Tables are float64.

`index` counts the steps of the (respaced) process, 0 is the least noisy; `timesteps[index]` is what the network gets.
abar is the cumulative product of 1 - beta.

Legend: B images, C channels, H height, W width; the output of a network that learns its variance has 2 C channels.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Schedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PredictionType = Literal["epsilon", "v"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]


class Posterior(NamedTuple):
    """p(x_{k-1} | x_k): mean and log variance, and the x_0 they follow from."""

    mean_BCHW: Tensor
    log_variance_BCHW: Tensor
    x0_BCHW: Tensor


class Losses(NamedTuple):
    """Training losses of each image (B,): mean squared error, and the variational bound in bits.

    The bound is None where the variance is fixed.
    """

    mse_B: Tensor
    vb_B: Tensor | None

    @property
    def total_B(self) -> Tensor:
        """Their sum."""
        return self.mse_B if self.vb_B is None else self.mse_B + self.vb_B


class NoisyBatch(NamedTuple):
    """Images or latents at one timestep each, what a network is asked in training: x from x_0 and noise."""

    labels_B: Tensor
    t_B: Tensor
    x_BCHW: Tensor
    x0_BCHW: Tensor
    noise_BCHW: Tensor


@dataclass(frozen=True)
class Diffusion:
    """A diffusion process; the defaults are DiT's.

    schedule: betas, "linear", "scaled_linear" (their square roots are; LDM calls that "linear") or "squaredcos_cap_v2"
    (cosine)
    prediction: what the network gives, the noise ("epsilon") or v = sqrt(abar) noise - sqrt(1 - abar) x_0 ("v")
    variance: of the DDPM posterior: learned between two bounds, or fixed at the lower (small) or upper (large) one
    respacing: which steps are kept, see `kept_timesteps`
    beta_ends: first and last beta of a linear schedule, None for those of `betas_of`
    """

    num_timesteps: int = 1000
    schedule: Schedule = "linear"
    prediction: PredictionType = "epsilon"
    variance: Variance = "learned_range"
    respacing: str = ""
    beta_ends: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.beta_ends is not None:
            object.__setattr__(self, "beta_ends", tuple(self.beta_ends))
            if self.schedule == "squaredcos_cap_v2":
                raise ValueError("beta_ends are of a linear or scaled_linear schedule; a cosine schedule has none")
        for field, value, known in (
            ("schedule", self.schedule, ("linear", "scaled_linear", "squaredcos_cap_v2")),
            ("prediction", self.prediction, ("epsilon", "v")),
            ("variance", self.variance, ("learned_range", "fixed_small", "fixed_large")),
        ):
            if value not in known:
                raise ValueError(f"diffusion {field} '{value}': must be one of {', '.join(known)}")

    # ---- tables, one float64 number for each step -----------------------------------------------

    def respaced(self, respacing: str) -> "Diffusion":
        """The same process on fewer steps, with its tables at hand."""
        return _respaced(self, respacing)

    @property
    def num_steps(self) -> int:
        """Steps of the respaced process."""
        return len(self.timesteps)

    @cached_property
    def timesteps(self) -> list[int]:
        """Original timestep of every index, ascending."""
        return kept_timesteps(self.num_timesteps, self.respacing)

    @cached_property
    def _all_betas(self) -> Tensor:
        """Betas before respacing."""
        return betas_of(self.schedule, self.num_timesteps, self.beta_ends)

    @cached_property
    def betas(self) -> Tensor:
        """1 - abar[k] / abar[k - 1]."""
        full = self._all_betas
        if not self.respacing:
            return full
        abar = (1 - full).cumprod(0)[self.timesteps]
        return 1 - abar / _shifted(abar)

    @cached_property
    def log_betas(self) -> Tensor:
        """The upper bound of the posterior's log variance."""
        return self.betas.log()

    @cached_property
    def abar(self) -> Tensor:
        """Share of the signal's variance that is left."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def abar_previous(self) -> Tensor:
        """abar one step less noisy; 1 at index 0."""
        return _shifted(self.abar)

    @cached_property
    def signal(self) -> Tensor:
        """sqrt(abar), the weight of x_0 in x_k."""
        return self.abar.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """sqrt(1 - abar), the weight of the noise in x_k."""
        return (1 - self.abar).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{k-1} | x_k, x_0)."""
        return self.betas * (1 - self.abar_previous) / (1 - self.abar)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Its logarithm; that at index 0, which would be -inf, is that of index 1."""
        variance = self.posterior_variance
        if len(variance) < 2:
            raise ValueError("a process of one step has no posterior variance: sample it with DDIM, or keep more steps")
        return torch.cat([variance[1:2], variance[1:]]).log()

    @cached_property
    def posterior_x0_weight(self) -> Tensor:
        """Weight of x_0 in the mean of q(x_{k-1} | x_k, x_0)."""
        return self.betas * self.abar_previous.sqrt() / (1 - self.abar)

    @cached_property
    def posterior_x_weight(self) -> Tensor:
        """Weight of x_k in that mean."""
        return (1 - self.abar_previous) * (1 - self.betas).sqrt() / (1 - self.abar)

    @property
    def abar_of_timestep_0(self) -> float:
        """abar of the least noisy original timestep, which a respaced process may not have kept."""
        return float(1 - self._all_betas[0])

    # ---- forward process and training -------------------------------------------------------------

    def add_noise(self, x0_BCHW: Tensor, index: Tensor | int, noise_BCHW: Tensor) -> Tensor:
        """x_k = sqrt(abar) x_0 + sqrt(1 - abar) noise."""
        signal, sigma = self._at(self.signal, index, x0_BCHW), self._at(self.sigma, index, x0_BCHW)
        return signal * x0_BCHW + sigma * noise_BCHW

    def loss_timesteps(self, image_ids: Sequence[int]) -> Tensor:
        """A timestep (B,) for the validation loss of each image, by the golden-ratio sequence over images' indices.

        Any run of images covers the schedule evenly, and every model meets the same timesteps.
        """
        fractions = [(image * (math.sqrt(5) - 1) / 2 + 0.5) % 1 for image in image_ids]
        return torch.tensor([int(fraction * self.num_timesteps) for fraction in fractions])

    def noisy(self, x0_BCHW: Tensor, labels_B: Tensor, image_ids: Sequence[int], noise_BCHW: Tensor) -> NoisyBatch:
        """Images or latents at the timesteps of `loss_timesteps`."""
        t_B = self.loss_timesteps(image_ids).to(x0_BCHW.device)
        return NoisyBatch(labels_B, t_B, self.add_noise(x0_BCHW, t_B, noise_BCHW), x0_BCHW, noise_BCHW)

    def named(self, output_BCHW: Tensor, channels: int) -> dict[str, Tensor]:
        """The parts of an output: "noise" (or v, if the process predicts that), and "variance" if it is learned."""
        if self.variance != "learned_range":
            return {"noise": output_BCHW}
        return {"noise": output_BCHW[:, :channels], "variance": output_BCHW[:, channels:]}

    def target(self, x0_BCHW: Tensor, index: Tensor | int, noise_BCHW: Tensor) -> Tensor:
        """What the network should give."""
        if self.prediction == "epsilon":
            return noise_BCHW
        signal, sigma = self._at(self.signal, index, x0_BCHW), self._at(self.sigma, index, x0_BCHW)
        return signal * noise_BCHW - sigma * x0_BCHW

    def losses(self, output_BCHW: Tensor, x0_BCHW: Tensor, index_B: Tensor, noise_BCHW: Tensor) -> Losses:
        """Losses of each image; the bound's gradient reaches the variance channels only (Nichol & Dhariwal eq. 16)."""
        channels = x0_BCHW.shape[1]
        target = self.target(x0_BCHW, index_B, noise_BCHW)
        mse_B = (output_BCHW[:, :channels] - target).square().flatten(1).mean(1)
        if self.variance != "learned_range":
            return Losses(mse_B, None)
        frozen = torch.cat([output_BCHW[:, :channels].detach(), output_BCHW[:, channels:]], 1)
        return Losses(mse_B, self._variational_bound(frozen, x0_BCHW, index_B, noise_BCHW))

    def _variational_bound(self, output_BCHW: Tensor, x0_BCHW: Tensor, index_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        x_BCHW = self.add_noise(x0_BCHW, index_B, noise_BCHW)
        model = self.posterior(x_BCHW, output_BCHW, index_B)
        true_mean = self._posterior_mean(x0_BCHW, x_BCHW, index_B)
        true_log_variance = self._at(self.posterior_log_variance, index_B, x0_BCHW)
        kl = 0.5 * (
            model.log_variance_BCHW
            - true_log_variance
            - 1
            + torch.exp(true_log_variance - model.log_variance_BCHW)
            + (true_mean - model.mean_BCHW).square() * torch.exp(-model.log_variance_BCHW)
        )
        nll = -_discretized_log_likelihood(x0_BCHW, model.mean_BCHW, 0.5 * model.log_variance_BCHW)
        return torch.where(index_B == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    def losses_of(self, batch: NoisyBatch, prediction: Mapping[str, Tensor]) -> Losses:
        """Losses of each image of a batch, of the parts of an output as `named` gives them."""
        parts = [prediction[name] for name in ("noise", "variance") if name in prediction]
        return self.losses(torch.cat(parts, 1), batch.x0_BCHW, batch.t_B, batch.noise_BCHW)

    def nearest_steps(self, t_B: Tensor) -> Tensor:
        """Steps of a rollout (B,), 0 the noisiest, whose timesteps are nearest to original ones; of two the later."""
        kept_K = torch.tensor(self.timesteps, dtype=torch.float32, device=t_B.device)
        return self.num_steps - 1 - torch.bucketize(t_B.float(), (kept_K[1:] + kept_K[:-1]) / 2)

    # ---- reverse process ----------------------------------------------------------------------------

    def predict_x0(self, x_BCHW: Tensor, output_BCHW: Tensor, index: Tensor | int) -> Tensor:
        """x_0 as the network's output (its first C channels) implies."""
        signal, sigma = self._at(self.signal, index, x_BCHW), self._at(self.sigma, index, x_BCHW)
        prediction = output_BCHW[:, : x_BCHW.shape[1]]
        if self.prediction == "v":
            return signal * x_BCHW - sigma * prediction
        return x_BCHW / signal - prediction * (sigma / signal)

    def predict_noise(self, x_BCHW: Tensor, output_BCHW: Tensor, index: Tensor | int) -> Tensor:
        """The noise as the network's output (its first C channels) implies."""
        prediction = output_BCHW[:, : x_BCHW.shape[1]]
        if self.prediction == "epsilon":
            return prediction
        signal, sigma = self._at(self.signal, index, x_BCHW), self._at(self.sigma, index, x_BCHW)
        return signal * prediction + sigma * x_BCHW

    def posterior(self, x_BCHW: Tensor, output_BCHW: Tensor, index: Tensor | int, *, clip: bool = False) -> Posterior:
        """p(x_{k-1} | x_k). `clip` limits x_0 to [-1, 1], for models of pixels."""
        x0 = self.predict_x0(x_BCHW, output_BCHW, index)
        if clip:
            x0 = x0.clamp(-1, 1)
        low, high = self._at(self.posterior_log_variance, index, x_BCHW), self._at(self.log_betas, index, x_BCHW)
        if self.variance == "learned_range":
            fraction = (output_BCHW[:, x_BCHW.shape[1] :] + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
        else:
            log_variance = torch.zeros_like(x0) + (low if self.variance == "fixed_small" else high)
        return Posterior(self._posterior_mean(x0, x_BCHW, index), log_variance, x0)

    def ddpm_step(
        self,
        x_BCHW: Tensor,
        output_BCHW: Tensor,
        index: int,
        noise_BCHW: Tensor | None,
        *,
        clip: bool = False,
        temperature: float = 1.0,
    ) -> Tensor:
        """x_{k-1} drawn from p(x_{k-1} | x_k), its deviation times `temperature`; the mean at index 0."""
        posterior = self.posterior(x_BCHW, output_BCHW, index, clip=clip)
        if index == 0:
            return posterior.mean_BCHW
        if noise_BCHW is None:
            raise ValueError("a DDPM step needs noise")
        deviation = temperature * torch.exp(0.5 * posterior.log_variance_BCHW)
        return posterior.mean_BCHW + deviation * noise_BCHW

    def ddim_step(
        self,
        x_BCHW: Tensor,
        output_BCHW: Tensor,
        index: int,
        eta: float = 0.0,
        noise_BCHW: Tensor | None = None,
        *,
        clip: bool = False,
        to_x0: bool = True,
    ) -> Tensor:
        """x_{k-1} by DDIM (Song et al. eq. 12): deterministic at eta = 0; at eta = 1 it needs noise, as DDPM does.

        clip: limit x_0 to [-1, 1] and leave the noise as predicted; the DDIM paper's samplers do not
        to_x0: index 0 gives x_0 and draws nothing; otherwise it stops at the noise of original timestep 0, as LDM's
        sampler does, and draws as the others
        """
        abar, previous = float(self.abar[index]), float(self.abar_previous[index])
        if index == 0 and not to_x0:
            previous = self.abar_of_timestep_0
        x0, noise = self.predict_x0(x_BCHW, output_BCHW, index), self.predict_noise(x_BCHW, output_BCHW, index)
        if clip:
            x0 = x0.clamp(-1, 1)
        spread = eta * math.sqrt((1 - previous) / (1 - abar) * (1 - abar / previous))
        x = math.sqrt(previous) * x0 + math.sqrt(max(1 - previous - spread * spread, 0.0)) * noise
        if spread == 0:
            return x
        if noise_BCHW is None:
            raise ValueError(f"DDIM with eta {eta} needs noise")
        return x + spread * noise_BCHW

    def _posterior_mean(self, x0_BCHW: Tensor, x_BCHW: Tensor, index: Tensor | int) -> Tensor:
        x0_weight = self._at(self.posterior_x0_weight, index, x_BCHW)
        return x0_weight * x0_BCHW + self._at(self.posterior_x_weight, index, x_BCHW) * x_BCHW

    @staticmethod
    def _at(table: Tensor, index: Tensor | int, like_BCHW: Tensor) -> "Tensor | float":
        """Entry of a table: a number for one index, float64 numbers that broadcast for an index of each image."""
        if isinstance(index, int):
            return float(table[index])
        return table.to(index.device)[index].view(-1, *[1] * (like_BCHW.dim() - 1)).to(like_BCHW.dtype)


@lru_cache(maxsize=64)
def _respaced(process: Diffusion, respacing: str) -> Diffusion:
    return replace(process, respacing=respacing)


def betas_of(schedule: Schedule, num_timesteps: int, ends: tuple[float, float] | None = None) -> Tensor:
    """Betas of a whole schedule, float64.

    Linear between `ends`; without them from 1e-4 to 0.02 at 1000 steps, both ends in proportion at another number.
    Scaled linear: the same with square roots of betas.
    Cosine: 1 - g((i + 1) / T) / g(i / T), at most 0.999, with g(u) = cos^2((u + 0.008) / 1.008 * pi / 2).
    """
    if schedule != "squaredcos_cap_v2":
        factor = 1000 / num_timesteps
        first, last = ends or (factor * 1e-4, factor * 0.02)
        if schedule == "linear":
            return torch.linspace(first, last, num_timesteps, dtype=torch.float64)
        return torch.linspace(first**0.5, last**0.5, num_timesteps, dtype=torch.float64) ** 2
    g = [math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_timesteps + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(g)], dtype=torch.float64)


def kept_timesteps(num_timesteps: int, respacing: str) -> list[int]:
    """Timesteps that a respacing string keeps, ascending.

    "" keeps all; "strideS" every S-th from 0, and "strideS+F" from F; "ddimK" every s-th from 0 for the smallest stride
    s that keeps K; "a,b,c" cuts the range into equal sections and keeps a, b, c evenly spaced steps of them, both ends
    included. Raises ValueError if that is impossible.
    """
    if respacing == "":
        return list(range(num_timesteps))
    if found := re.fullmatch(r"stride([1-9]\d*)(?:\+(\d+))?", respacing):
        kept_from = int(found[2] or 0)
        if kept_from >= num_timesteps:
            raise ValueError(f"respacing '{respacing}': starts after the last of {num_timesteps} timesteps")
        return list(range(kept_from, num_timesteps, int(found[1])))
    if not re.fullmatch(r"ddim\d+|\d+(,\d+)*", respacing):
        raise ValueError(
            f"respacing '{respacing}': must be a number of steps, ddim or stride and a number, or numbers with commas"
        )
    if respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        for stride in range(1, num_timesteps):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"respacing '{respacing}': no stride keeps {count} of {num_timesteps} steps")
    counts = [int(part) for part in respacing.split(",")]
    size, longer = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 1 <= count <= length:
            raise ValueError(f"respacing '{respacing}': cannot keep {count} of a section of {length} steps")
        apart = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # summed and rounded half to even, as the official processes were
        for _ in range(count):
            kept.append(start + round(position))
            position += apart
        start += length
    return kept


def _shifted(abar: Tensor) -> Tensor:
    return torch.cat([abar.new_ones(1), abar[:-1]])


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of bytes (bins of half width 1/255 in [-1, 1], open at the ends) under a Gaussian.

    The normal distribution function is the tanh approximation that DDPM's code uses.
    """

    def normal_cdf(u: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    above = normal_cdf((x - mean + 1 / 255) * torch.exp(-log_std))
    below = normal_cdf((x - mean - 1 / 255) * torch.exp(-log_std))
    inside = (above - below).clamp(min=1e-12).log()
    lower_end, upper_end = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, lower_end, torch.where(x > 0.999, upper_end, inside))
