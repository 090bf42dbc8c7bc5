"""How far a step's output is from the full-precision one.

The output of a step is what the network gives: guided logits, predicted noise; in a family part of whose network runs
while tokens are drawn (MAR), the tokens (`paths`).

Paper 004, equation 3, has |O - O^|^2 / (|O|^2 |O^|^2) + SSIM(O, O^). Read so, with three departures:
  SSIM is a similarity, 1 for equal outputs; what is added is 1 - SSIM.
  Norms are means of squares, so that nothing depends on how many numbers or images there are.
  Only |O|^2 divides. |O^|^2 is 0 where an output has vanished (0 bits), which would be infinitely bad, and large where
    it has exploded, which would pass for good; near the full-precision output both say the same, but for a constant.
    So a distortion has no unit, 1 is that of an output of zeros, and those of independent errors add up (equation 5).

Legend: B images, C channels, H height, W width, N tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlaw.models.denoiser import Denoiser
from bitlaw.models.generator import ImageGenerator
from bitlaw.names import lookup

SSIM_WINDOW = 7
"""Positions a side of the windows of SSIM; fewer where an output has not as many."""
K1, K2 = 0.01, 0.03
"""Of the constants that stabilise SSIM, in ranges of the full-precision output."""


Comparison = Callable[[Tensor], Tensor]
"""From an output, (B, ...) float64, to its distortion, (B,)."""


@dataclass(frozen=True)
class Measure:
    """A distortion of outputs: called with the full-precision output and another, (B, ...) each, gives (B,), float64.

    of: what it is defined for: "numbers" (anything), "images" (B, C, H, W) or "logits" (B, N, V)
    with_exact: the comparison with a full-precision output, float64; what depends on that alone is computed once
    """

    of: Literal["numbers", "images", "logits"]
    with_exact: Callable[[Tensor], Comparison]

    def __call__(self, exact: Tensor, other: Tensor) -> Tensor:
        """(B,), float64; 0 for equal outputs, and never less but for rounding."""
        return self.to(exact)(other)

    def to(self, exact: Tensor) -> Comparison:
        """Its comparison of outputs with a full-precision one."""
        compare = self.with_exact(exact.double())

        def distortion(other: Tensor) -> Tensor:
            if other.shape != exact.shape:
                raise ValueError(f"outputs of shapes {tuple(exact.shape)} and {tuple(other.shape)} cannot be compared")
            return compare(other.double())

        return distortion

    def suits(self, model: ImageGenerator[Any]) -> bool:
        """Whether a model's outputs are what it is defined for."""
        return self.of in kinds_of_output(model)


def kinds_of_output(model: ImageGenerator[Any]) -> tuple[str, ...]:
    """What the outputs of a model's steps are, in the words of `Measure.of`."""
    if model.vocab_size is not None:
        return ("numbers", "logits")
    return ("numbers", "images") if isinstance(model, Denoiser) else ("numbers",)


def relative_mse(exact: Tensor) -> Comparison:
    """|O - O^|^2 / |O|^2 of each image, (B,). ValueError for an O of zeros."""
    square_B = exact.square().flatten(1).mean(1)
    if not square_B.all():
        raise ValueError("a full-precision output is all zeros, so that errors have nothing to be compared with")
    return lambda other: (exact - other).square().flatten(1).mean(1) / square_B


def ssim(exact_BCHW: Tensor) -> Comparison:
    """Structural similarity of each image, (B,): mean over channels and over all windows inside of the image.

    Windows are uniform; their variances are those of the window itself (by N, not N - 1). The dynamic range is
    max - min of each full-precision image; one that is constant, and has none, counts as of range 1.
    """
    c1, c2, side = ssim_constants(exact_BCHW)

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1)

    mean_a = mean(exact_BCHW)
    square_a = mean_a.square()
    variance_a = mean(exact_BCHW.square()) - square_a

    def compare(other_BCHW: Tensor) -> Tensor:
        mean_b = mean(other_BCHW)
        square_b, product = mean_b.square(), mean_a * mean_b
        variance_b = mean(other_BCHW.square()) - square_b
        covariance = mean(exact_BCHW * other_BCHW) - product
        luminance = (2 * product + c1) / (square_a + square_b + c1)
        structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
        return (luminance * structure).flatten(1).mean(1)

    return compare


def ssim_constants(exact_BCHW: Tensor) -> tuple[Tensor, Tensor, int]:
    """c1 and c2, (B, 1, 1, 1) each, and the side of windows."""
    low_B, high_B = exact_BCHW.flatten(1).aminmax(dim=1)
    range_B111 = torch.where(high_B > low_B, high_B - low_B, 1.0)[:, None, None, None]
    return (K1 * range_B111) ** 2, (K2 * range_B111) ** 2, min(SSIM_WINDOW, *exact_BCHW.shape[2:])


def mse_and_ssim(exact: Tensor) -> Comparison:
    """Relative MSE + (1 - SSIM) of each image, (B,)."""
    mse, similarity = relative_mse(exact), ssim(exact)
    return lambda other: mse(other) + (1 - similarity(other))


def forward_kl(exact_BNV: Tensor) -> Comparison:
    """KL(P || P^) of what tokens are drawn from, before temperature and filters, in nats; mean over tokens, (B,)."""
    log_p = exact_BNV.log_softmax(-1)
    p = log_p.exp()
    return lambda other_BNV: (p * (log_p - other_BNV.log_softmax(-1))).sum(-1).flatten(1).mean(1)


def mse_of_probabilities(exact_BNV: Tensor) -> Comparison:
    """Relative MSE of softmax probabilities, (B,)."""
    compare = relative_mse(exact_BNV.softmax(-1))
    return lambda other_BNV: compare(other_BNV.softmax(-1))


MEASURES: dict[str, Measure] = {
    "mse": Measure("numbers", relative_mse),
    "mse+ssim": Measure("images", mse_and_ssim),
    "kl": Measure("logits", forward_kl),
    "mse-logits": Measure("logits", relative_mse),
    "mse-probabilities": Measure("logits", mse_of_probabilities),
}


def default_measure(model: ImageGenerator[Any]) -> str:
    """The measure that suits a model: kl for tokens, mse+ssim for what is denoised, mse for the rest."""
    kinds = kinds_of_output(model)
    if "logits" in kinds:
        return "kl"
    return "mse+ssim" if "images" in kinds else "mse"


def measure_for(model: ImageGenerator[Any], name: str = "") -> tuple[str, Measure]:
    """Name and measure, "" for the default. ValueError for one that does not exist or does not suit the model."""
    name = name or default_measure(model)
    measure = lookup(MEASURES, name, "measure of distortion")
    if not measure.suits(model):
        fitting = [other for other, candidate in MEASURES.items() if candidate.suits(model)]
        raise ValueError(
            f"measure '{name}' is for {measure.of}, which {model.family} does not give in a step; "
            f"use {' or '.join(fitting)}"
        )
    return name, measure
