"""Vectors from a codebook: a code is the index of several numbers at once.

Legend: G groups, N numbers in a group, M vectors in a group, D numbers in a vector, K vectors in a codebook, F
features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitlaw.formats.format import SMALLEST_FLOAT16_SCALE, Format, Params, nonzero

LARGEST_WIDTH = 12
"""Most bits of an index."""

# Products of vectors and codebook computed at a time: 1 MB, which stays in the cache.
_PART = 2**18

_FAR = 2.0**13


@dataclass(frozen=True)
class Codebook(Format):
    """scale * entry: `dim` neighbours share an index of dim * bits bits into a table of 8-bit integers.

    Each group has its table of 2^(dim * bits) vectors and a scale, which are what k-means makes of its weights,
    weighted where importances are given (van Baalen et al. 2024, GPTVQ, section 3.2; no random number is used), rounded
    to multiples of max|entry| / 127. Numbers of a group that are neighbours in memory form the vectors.

    A group whose numbers are all c has scale |c| and entries +-1, so that c comes back exactly (to the rounding of a
    stored scale to float16). A group of zeros has scale 1 and entries 0. In other groups a zero is what its neighbours
    make of it: unlike integers and floats a codebook need not hold it.
    """

    dim: int
    bits: int

    def __post_init__(self) -> None:
        if self.dim not in (1, 2, 4):
            raise ValueError(f"codebooks have vectors of 1, 2 or 4 numbers, not {self.dim}")
        # More than 256 numbers of one dimension are more than 8 bits can tell apart.
        most = 8 if self.dim == 1 else LARGEST_WIDTH // self.dim
        if not 1 <= self.bits <= most:
            raise ValueError(f"codebooks of {self.dim} dimensions have 1 to {most} bits a number, not {self.bits}")

    @property
    def code_bits(self) -> float:
        return self.bits

    @property
    def values_per_code(self) -> int:
        return self.dim

    @property
    def param_names(self) -> tuple[str, ...]:
        return ("scale_G1", "codebook_GKD")

    @property
    def codebook_shape(self) -> tuple[int, ...]:
        return (2**self.code_width, self.dim)

    def fit(self, x_GN: Tensor, importance_GN: Tensor | None = None) -> Params:
        x_GMD = x_GN.unflatten(1, (-1, self.dim))
        importance_GMD = None if importance_GN is None else importance_GN.unflatten(1, (-1, self.dim))
        return self.rounded(k_means(x_GMD, self.code_width, importance_GMD))

    def rounded(self, centroids_GKD: Tensor) -> Params:
        """Codebooks as they are stored, nearest to these. Scales are numbers that float16 holds, where it can."""
        low_G1, high_G1 = centroids_GKD.flatten(1).amin(1, keepdim=True), centroids_GKD.flatten(1).amax(1, keepdim=True)
        width_G1 = torch.maximum(high_G1, -low_G1)
        scale_G1 = width_G1 / 127
        half_G1 = scale_G1.to(torch.float16).to(torch.float32)
        fits_G1 = (scale_G1 >= SMALLEST_FLOAT16_SCALE) & half_G1.isfinite()
        scale_G1 = torch.where(fits_G1, half_G1, scale_G1)
        scale_G1 = nonzero(torch.where(low_G1 == high_G1, width_G1, scale_G1))
        entries_GKD = (centroids_GKD / scale_G1[..., None]).round_().clamp_(-128, 127)
        return {"scale_G1": scale_G1, "codebook_GKD": entries_GKD.to(torch.int8)}

    def encode(self, x_GN: Tensor, params: Params) -> Tensor:
        # What lies far outside the codebook must not be squared to infinity.
        y_GN = (x_GN / params["scale_G1"].to(torch.float32)).clamp_(-_FAR, _FAR)
        index_GM, _ = nearest(y_GN.unflatten(1, (-1, self.dim)), params["codebook_GKD"].to(torch.float32))
        return self.codes(index_GM)

    def codes(self, index_GM: Tensor) -> Tensor:
        """Codes of indices: signed integers, as those of all formats of this width."""
        return (index_GM - 2 ** (self.code_width - 1)).to(self.code_dtype)

    def indices(self, codes_GM: Tensor) -> Tensor:
        """Indices of codes, int64."""
        return codes_GM.to(torch.int64) + 2 ** (self.code_width - 1)

    def decode(self, codes_GN: Tensor, params: Params) -> Tensor:
        vectors_GKD = params["codebook_GKD"].to(torch.float32) * params["scale_G1"].to(torch.float32)[..., None]
        return look_up(vectors_GKD, self.indices(codes_GN)).flatten(1)


def look_up(vectors_GKD: Tensor, index_GM: Tensor) -> Tensor:
    """The vectors (G, M, D) of indices."""
    num_groups, num_vectors, dim = vectors_GKD.shape
    first_G1 = torch.arange(num_groups, device=index_GM.device)[:, None] * num_vectors
    return vectors_GKD.reshape(-1, dim)[index_GM + first_G1]


def k_means(x_GMD: Tensor, width: int, importance_GMD: Tensor | None = None, iterations: int = 20) -> Tensor:
    """Centroids (G, 2^width, D) of each group's vectors, float32: least sums of importance * (x - centroid)^2.

    Deterministic, and no group sees another. It starts from 2^width cells that are halved `width` times, each at its
    mean in the dimension of largest scatter. A centroid that serves no vector moves to one that is served badly.
    """
    size_G11 = nonzero(x_GMD.abs().amax((1, 2), keepdim=True))
    y_GMD = x_GMD / size_G11
    weight_GMD = torch.ones_like(y_GMD) if importance_GMD is None else importance_GMD
    # In proportion, so that no square overflows; what has no importance still goes somewhere.
    weight_GMD = (weight_GMD / nonzero(weight_GMD.mean((1, 2), keepdim=True))).clamp_min(1e-6)
    moments_GMF = torch.cat([weight_GMD, weight_GMD * y_GMD, weight_GMD * y_GMD.square()], 2)

    index_GM = torch.zeros(y_GMD.shape[:2], dtype=torch.int64, device=y_GMD.device)
    for level in range(width):
        mean_GKD, scatter_GKD, _ = _cells(moments_GMF, index_GM, 2**level)
        split_GK1 = scatter_GKD.argmax(2, keepdim=True)
        at_GK1 = mean_GKD.gather(2, split_GK1)
        at_GM1, split_GM1 = look_up(at_GK1, index_GM), look_up(split_GK1, index_GM)
        index_GM = 2 * index_GM + (y_GMD.gather(2, split_GM1) > at_GM1)[..., 0]

    num_centroids = 2**width
    centroids_GKD, _, _ = _cells(moments_GMF, index_GM, num_centroids)
    for _ in range(iterations):
        before_GM = index_GM
        index_GM, distance_GM = nearest(y_GMD, centroids_GKD, weight_GMD)
        centroids_GKD, _, is_empty_GK = _cells(moments_GMF, index_GM, num_centroids)
        if is_empty_GK.any():
            centroids_GKD = _with_badly_served(centroids_GKD, is_empty_GK, y_GMD, distance_GM)
        elif torch.equal(index_GM, before_GM):
            break
    return centroids_GKD * size_G11


def nearest(y_GMD: Tensor, vectors_GKD: Tensor, weight_GMD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The index of the vector nearest to each y, int64, and half of weight * (y - vector)^2 summed over D; (G, M) each.

    The least distance is found among numbers that carry their index in the low bits of their float32, which is several
    times as fast as torch's argmin on a CPU; of vectors as near as each other, to 2^-(23 - log2 K), the first is taken.
    """
    ones = torch.ones_like
    if weight_GMD is None:
        y_GMF = torch.cat([-y_GMD, y_GMD.square().sum(2, keepdim=True) / 2, ones(y_GMD[..., :1])], 2)
        squares_GKD = vectors_GKD.square().sum(2, keepdim=True) / 2
        vectors_GKF = torch.cat([vectors_GKD, ones(vectors_GKD[..., :1]), squares_GKD], 2)
    else:
        total_GM1 = (weight_GMD * y_GMD.square()).sum(2, keepdim=True) / 2
        y_GMF = torch.cat([-weight_GMD * y_GMD, total_GM1, weight_GMD / 2], 2)
        vectors_GKF = torch.cat([vectors_GKD, ones(vectors_GKD[..., :1]), vectors_GKD.square()], 2)
    return nearest_by_products(y_GMF, vectors_GKF)


def nearest_by_products(y_GMF: Tensor, vectors_GKF: Tensor) -> tuple[Tensor, Tensor]:
    """For each y the index of the vector of least y . vector, and that product; products are distances, 0 or more."""
    (num_groups, num_y, _), num_vectors = y_GMF.shape, vectors_GKF.shape[1]
    vectors_GFK = vectors_GKF.transpose(1, 2).contiguous()
    order_K = torch.arange(num_vectors, dtype=torch.int32, device=y_GMF.device)
    least_GM = torch.empty(num_groups, num_y, dtype=torch.int32, device=y_GMF.device)
    groups, rows = max(1, _PART // (num_y * num_vectors)), max(1, _PART // num_vectors)
    for g in range(0, num_groups, groups):
        for m in range(0, num_y, rows):
            part_gmK = torch.bmm(y_GMF[g : g + groups, m : m + rows], vectors_GFK[g : g + groups])
            # Non-negative floats are ordered as their bit patterns; rounding may take a distance of 0 below it.
            bits_gmK = part_gmK.clamp_min_(0).view(torch.int32)
            bits_gmK.bitwise_and_(-num_vectors).bitwise_or_(order_K)
            least_GM[g : g + groups, m : m + rows] = bits_gmK.amin(2)
    index_GM = (least_GM & (num_vectors - 1)).to(torch.int64)
    return index_GM, least_GM.bitwise_and_(-num_vectors).view(torch.float32)


def _cells(moments_GMF: Tensor, index_GM: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and scatter (G, K, D) of each cell, from sums of weights, numbers and squares; which are empty (G, K)."""
    num_groups, num_features = len(moments_GMF), moments_GMF.shape[2]
    sums_GFK = moments_GMF.new_zeros(num_groups, num_features, count)
    sums_GFK.scatter_add_(2, index_GM[:, None].expand(-1, num_features, -1), moments_GMF.transpose(1, 2))
    weight_GKD, first_GKD, second_GKD = sums_GFK.transpose(1, 2).chunk(3, 2)
    mean_GKD = first_GKD / nonzero(weight_GKD.clone())
    return mean_GKD, second_GKD - mean_GKD * first_GKD, weight_GKD[..., 0] == 0


def _with_badly_served(centroids_GKD: Tensor, is_empty_GK: Tensor, y_GMD: Tensor, distance_GM: Tensor) -> Tensor:
    """Centroids with the vectors of largest distance in the place of those that are empty, largest first."""
    most = min(int(is_empty_GK.sum(1).max()), distance_GM.shape[1])
    worst_GK = distance_GM.topk(most, 1).indices
    rank_GK = (is_empty_GK.cumsum(1) - 1).clamp_(0, most - 1)
    return torch.where(is_empty_GK[..., None], look_up(y_GMD, worst_GK.gather(1, rank_GK)), centroids_GKD)
