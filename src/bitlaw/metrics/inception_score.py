"""Inception score: how sure a classifier is of each image, and how evenly its answers spread over the classes.

Legend: N images, C classes, K resamples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bitlaw.metrics.fid import resampling_weights
from bitlaw.metrics.protocol import Interval


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits, as the field reports it (the deviation is not that of the mean)."""

    mean: float
    deviation: float


def inception_score(logprobs_NC: Tensor, num_splits: int = 10, seed: int = 0) -> InceptionScore:
    """exp(E_x KL(p(y|x) || p(y))) in each split; between 1 and C (Salimans et al. 2016 section 4).

    Images are shuffled by `seed` before they are split. The original takes them in order, which is the same for
    images in random order but leaves classes out of a split when labels are sorted or cyclic.
    ValueError with fewer images than splits.
    """
    _check(logprobs_NC)
    num_images = len(logprobs_NC)
    if not 1 <= num_splits <= num_images:
        raise ValueError(f"{num_splits} splits of {num_images} images; give at least one image to each")
    order_N = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    splits = logprobs_NC.double()[order_N].tensor_split(num_splits)
    scores_S = torch.cat([_scores(torch.full((1, len(split)), 1 / len(split)).double(), split) for split in splits])
    return InceptionScore(float(scores_S.mean()), float(scores_S.std(correction=0)))


def inception_score_interval(
    logprobs_NC: Tensor, *, num_resamples: int = 200, level: float = 0.95, seed: int = 0
) -> Interval:
    """The bootstrap interval of the score of all images as one split (`num_splits=1`)."""
    _check(logprobs_NC)
    logprobs_NC = logprobs_NC.double()
    weights_KN = resampling_weights(len(logprobs_NC), num_resamples, seed)
    value = inception_score(logprobs_NC, num_splits=1).mean
    return Interval.around(value, _scores(weights_KN, logprobs_NC), level)


def _scores(weights_KN: Tensor, logprobs_NC: Tensor) -> Tensor:
    """The score under each row of image weights: log IS = H(mean p) - mean H(p)."""
    probs_NC = logprobs_NC.exp()
    entropy_N = torch.special.entr(probs_NC).sum(-1)
    marginal_entropy_K = torch.special.entr(weights_KN @ probs_NC).sum(-1)
    return (marginal_entropy_K - weights_KN @ entropy_N).exp()


def _check(logprobs_NC: Tensor) -> None:
    if logprobs_NC.ndim != 2 or not (logprobs_NC.double().logsumexp(-1).abs() < 1e-3).all():
        raise ValueError("inception score: expected log-probabilities (N, C), each row with probabilities summing to 1")
