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

_SETTLING = 5
"""Iterations of k-means before cells are halved again."""


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

    def vectors(self, params: Params) -> Tensor:
        """The vectors of the codebooks (G, K, D), float32."""
        return params["codebook_GKD"].to(torch.float32) * params["scale_G1"].to(torch.float32)[..., None]

    def decode(self, codes_GN: Tensor, params: Params) -> Tensor:
        return look_up(self.vectors(params), self.indices(codes_GN)).flatten(1)


def look_up(vectors_GKD: Tensor, index_GM: Tensor) -> Tensor:
    """The vectors (G, M, D) of indices."""
    num_groups, num_vectors, dim = vectors_GKD.shape
    first_G1 = torch.arange(num_groups, device=index_GM.device)[:, None] * num_vectors
    return vectors_GKD.reshape(-1, dim)[index_GM + first_G1]


def k_means(x_GMD: Tensor, width: int, importance_GMD: Tensor | None = None, iterations: int = 20) -> Tensor:
    """Centroids (G, 2^width, D) of each group's vectors, float32: least sums of importance * (x - centroid)^2.

    Deterministic, and no group sees another. Cells are halved `width` times, each at its mean in the dimension of
    largest scatter, and settle in between (Linde, Buzo and Gray 1980): Lloyd's iteration, `iterations` times at most in
    the end and a few times before.
    """
    size_G11 = nonzero(x_GMD.abs().amax((1, 2), keepdim=True))
    y_GMD = x_GMD / size_G11
    weight_GMD = torch.ones_like(y_GMD) if importance_GMD is None else importance_GMD
    # In proportion, so that no square overflows; what has no importance still goes somewhere.
    weight_GMD = (weight_GMD / nonzero(weight_GMD.mean((1, 2), keepdim=True))).clamp_min(1e-6)
    points = _Points(y_GMD, weight_GMD)
    index_GM = torch.zeros(y_GMD.shape[:2], dtype=torch.int64, device=y_GMD.device)
    for level in range(width):
        index_GM = points.halved(index_GM, 2**level)
        most = iterations if level == width - 1 else min(iterations, _SETTLING)
        centroids_GKD, index_GM = points.settled(index_GM, 2 ** (level + 1), most)
    return centroids_GKD * size_G11


class _Points:
    """Vectors y of groups and their weights, in the forms that k-means reads again and again."""

    def __init__(self, y_GMD: Tensor, weight_GMD: Tensor):
        self.y_GMD, self.products_GMF = y_GMD, _y_of_products(y_GMD, weight_GMD)
        y_GDM, weight_GDM = y_GMD.mT, weight_GMD.mT
        self.weights_GFM = torch.cat([weight_GDM, weight_GDM * y_GDM], 1)
        self.squares_GDM = weight_GDM * y_GDM.square()

    def halved(self, index_GM: Tensor, count: int) -> Tensor:
        """The cells after each of `count` is cut at its mean, across the dimension in which it scatters most."""
        weight_GKD, weighted_GKD = _sums(self.weights_GFM, index_GM, count).chunk(2, 2)
        mean_GKD = weighted_GKD / nonzero(weight_GKD.clone())
        scatter_GKD = _sums(self.squares_GDM, index_GM, count) - mean_GKD * weighted_GKD
        across_GK1 = scatter_GKD.argmax(2, keepdim=True)
        across_GM1, mean_GM1 = (look_up(x_GK1, index_GM) for x_GK1 in (across_GK1, mean_GKD.gather(2, across_GK1)))
        return 2 * index_GM + (self.y_GMD.gather(2, across_GM1) > mean_GM1)[..., 0]

    def settled(self, index_GM: Tensor, count: int, iterations: int) -> tuple[Tensor, Tensor]:
        """Lloyd's iteration from `count` cells: centroids (G, K, D), and the cells of which they are the means.

        A centroid that serves no vector moves to one that is served badly, and has no cell yet if it is the last time.
        """
        centroids_GKD, _ = self._means(index_GM, count)
        for _ in range(iterations):
            before_GM = index_GM
            index_GM, distance_GM = nearest_by_products(self.products_GMF, _vectors_of_products(centroids_GKD))
            centroids_GKD, is_empty_GK = self._means(index_GM, count)
            if is_empty_GK.any():
                worst_GE = distance_GM.topk(min(int(is_empty_GK.sum(1).max()), distance_GM.shape[1]), 1).indices
                rank_GK = (is_empty_GK.cumsum(1) - 1).clamp_(0, worst_GE.shape[1] - 1)
                worst_GKD = look_up(self.y_GMD, worst_GE.gather(1, rank_GK))
                centroids_GKD = torch.where(is_empty_GK[..., None], worst_GKD, centroids_GKD)
            elif torch.equal(index_GM, before_GM):
                break
        return centroids_GKD, index_GM

    def _means(self, index_GM: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The mean of each cell (G, K, D), and which are empty (G, K)."""
        weight_GKD, weighted_GKD = _sums(self.weights_GFM, index_GM, count).chunk(2, 2)
        return weighted_GKD / nonzero(weight_GKD.clone()), weight_GKD[..., 0] == 0


def _sums(x_GFM: Tensor, index_GM: Tensor, count: int) -> Tensor:
    """Sums of each feature over each cell (G, K, F)."""
    num_groups, num_features, _ = x_GFM.shape
    sums_GFK = x_GFM.new_zeros(num_groups, num_features, count)
    return sums_GFK.scatter_add_(2, index_GM[:, None].expand(-1, num_features, -1), x_GFM).mT


def nearest(y_GMD: Tensor, vectors_GKD: Tensor, weight_GMD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The index of the vector nearest to each y, int64, and half of weight * (y - vector)^2 summed over D; (G, M) each.

    The least distance is found among numbers that carry their index in the low bits of their float32, which is several
    times as fast as torch's argmin on a CPU; of vectors as near as each other, to 2^-(23 - log2 K), the first is taken.
    """
    if weight_GMD is None:
        weight_GMD = torch.ones_like(y_GMD)
    return nearest_by_products(_y_of_products(y_GMD, weight_GMD), _vectors_of_products(vectors_GKD))


def _y_of_products(y_GMD: Tensor, weight_GMD: Tensor) -> Tensor:
    """One side of weight / 2 . (y - vector)^2 as a product: -weight y . vector + weight / 2 . (y^2 + vector^2)."""
    weighted_GMD = weight_GMD * y_GMD
    return torch.cat([-weighted_GMD, (weighted_GMD * y_GMD).sum(2, keepdim=True) / 2, weight_GMD / 2], 2)


def _vectors_of_products(vectors_GKD: Tensor) -> Tensor:
    """The other side."""
    return torch.cat([vectors_GKD, torch.ones_like(vectors_GKD[..., :1]), vectors_GKD.square()], 2)


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
