"""GPTVQ: vectors of weights chosen one after the other, each error passed on to the weights that are still free.

Legend: O output channels, I inputs of an output channel, G groups (rectangles that share a codebook), B bands of rows,
A groups side by side in a band, M vectors in a group, K vectors in a codebook, D numbers in a vector.
"""

from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS, Codebook, Dropped, IntegerFormat
from bitlaw.formats.codebook import k_means, look_up, nearest
from bitlaw.linear import linear
from bitlaw.methods.cholesky import inverse_factor
from bitlaw.methods.method import LayerMethod
from bitlaw.precision import TensorPrecision
from bitlaw.quantized import QuantizedTensor, WeightSpec

_COLUMNS = 128  # inputs whose errors are passed on together to the weights behind them


@dataclass(frozen=True)
class GPTVQ(LayerMethod):
    """Second-order vector quantization (P0 eq. 14; van Baalen et al. 2024), for codebook formats.

    `dim` inputs at a time are taken from the codebook, nearest by the Hessian, and what is lost is made up for by the
    weights behind them, as in GPTQ. The codebook of a group comes from k-means weighted by the Hessian, on the weights
    as they are when the group begins. When all are chosen, the codebooks are moved to the least error for these choices
    (a least-squares problem, by conjugate gradients) and rounded to 8 bits again; that is kept if it helps.

    A precision in asymmetric integers is taken for a codebook of as many index bits: W3 means v2b3 with `dim` 2. The
    result is never worse than the nearest entries of a plain codebook, on the Hessian: else it is that.

    damping: times the mean of the Hessian's diagonal, added to it; it grows where that is not enough (and is logged)
    """

    dim: int = 2
    damping: float = 0.01
    kmeans_iterations: int = 20
    codebook_steps: int = 10
    sequential: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"hessian_II"})

    def problem(self, layer: nn.Module, spec: WeightSpec) -> str | None:
        """Integers without groups stand for codebooks; floats and symmetric integers for nothing."""
        format = spec.format
        if isinstance(format, Codebook | Dropped):
            return None
        if not isinstance(format, IntegerFormat) or format.symmetric:
            return "gptvq chooses vectors of a codebook; give the weights a v format (v2b3) or plain bits (W3)"
        name = f"v{self.dim}b{format.bits}"
        if name not in FORMATS:
            return f"gptvq has no codebook of {self.dim} dimensions with {format.bits} bits; use fewer bits, or dim=1"
        if spec.group_size is not None:
            return f"gptvq counts the weights that share a codebook, not those that share a scale; use W{name}, or no g"
        return None

    def precision(self, asked: TensorPrecision) -> TensorPrecision:
        """Integers as the codebook of as many index bits."""
        if not isinstance(asked.format, IntegerFormat):
            return asked
        return TensorPrecision(FORMATS[f"v{self.dim}b{asked.format.bits}"], asked.group_size)

    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        """`weight_OI` in a codebook format. ValueError for NaN or Inf in weights or Hessian."""
        plain = spec.quantize(weight_OI)
        if isinstance(spec.format, Dropped):
            return plain
        assert stats.hessian_II is not None
        hessian_II, weight_OI = stats.hessian_II.float(), weight_OI.float()
        found = self._choose(weight_OI, hessian_II, spec)
        candidates = [found, self._with_better_codebooks(found, weight_OI, hessian_II), plain]
        errors = [output_error(weight_OI, q, hessian_II) for q in candidates]
        return min(zip(errors, range(3), candidates, strict=True), key=lambda e: e[:2] if isfinite(e[0]) else (inf, 0))[
            2
        ]

    def _choose(self, weight_OI: Tensor, hessian_II: Tensor, spec: WeightSpec) -> QuantizedTensor:
        format, shape = spec.format, tuple(weight_OI.shape)
        assert isinstance(format, Codebook)
        rows, columns = spec.rectangle(shape)
        num_bands, dim = shape[0] // rows, format.dim
        factor_II = inverse_factor(hessian_II, self.damping)
        importance_I = factor_II.diagonal().square().reciprocal()
        blocks = factor_II.unflatten(0, (-1, dim)).unflatten(2, (-1, dim)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        inverse_JDD = torch.linalg.solve_triangular(blocks, torch.eye(dim).expand_as(blocks), upper=True)
        free_IO = weight_OI.T.contiguous()
        index, parameters = [], []
        for first in range(0, shape[1], columns):
            group_IO = free_IO[first : first + columns]
            x_BMD = group_IO.T.reshape(num_bands, -1, dim)
            importance_BMD = importance_I[first : first + columns].expand(rows, -1).reshape(-1, dim).expand_as(x_BMD)
            centroids_BKD = k_means(x_BMD, format.code_width, importance_BMD, self.kmeans_iterations)
            params = format.rounded(centroids_BKD)
            vectors_BKD = params["codebook_GKD"].float() * params["scale_G1"][..., None]
            parameters.append(params)
            picks = []
            for b in range(first, first + columns, _COLUMNS):
                end = min(b + _COLUMNS, first + columns)
                error_JO = torch.empty(end - b, shape[0])
                for j in range(b, end, dim):
                    inv = inverse_JDD[j // dim]
                    w_DO = free_IO[j : j + dim]
                    z = (inv.T @ w_DO).T.reshape(num_bands, rows, dim)
                    pick_BR, _ = nearest(z, vectors_BKD @ inv)
                    q_OD = look_up(vectors_BKD, pick_BR).reshape(-1, dim)
                    picks.append(pick_BR)
                    e = inv.T @ (w_DO - q_OD.T)
                    error_JO[j - b : j - b + dim] = e
                    free_IO[j + dim : end].addmm_(factor_II[j : j + dim, j + dim : end].T, e, alpha=-1)
                free_IO[end:].addmm_(factor_II[b:end, end:].T, error_JO, alpha=-1)
            index.append(torch.stack(picks, 2).flatten(1))
        index_GM = torch.stack(index, 1).flatten(0, 1)
        params = {name: torch.stack([p[name] for p in parameters], 1).flatten(0, 1) for name in format.param_names}
        return QuantizedTensor(spec.join(format.codes(index_GM), shape), format.storable(params), spec, shape)

    def _with_better_codebooks(self, q: QuantizedTensor, weight_OI: Tensor, hessian_II: Tensor) -> QuantizedTensor:
        """The same choices with the codebooks of least tr(E H E^T), by conjugate gradients scaled by the diagonal."""
        format, spec, shape = q.spec.format, q.spec, q.shape
        assert isinstance(format, Codebook)
        index_GM = format.indices(spec.split(q.codes, shape))
        num_vectors, dim = format.codebook_shape
        index_GDM = index_GM[:, None].expand(-1, dim, -1)

        def spread(vectors_GKD: Tensor) -> Tensor:
            return spec.join(look_up(vectors_GKD, index_GM).flatten(1), shape)

        def gather(x_OI: Tensor) -> Tensor:
            x_GDM = spec.split(x_OI, shape).unflatten(1, (-1, dim)).transpose(1, 2)
            sums_GDK = x_GDM.new_zeros(len(index_GM), dim, num_vectors)
            return sums_GDK.scatter_add_(2, index_GDM, x_GDM).transpose(1, 2)

        c = q.params["codebook_GKD"].float() * q.params["scale_G1"].float()[..., None]
        diag = gather(hessian_II.diagonal().expand(shape))
        inv = torch.where(diag > 0, 1 / diag, 0)
        r = gather(linear(weight_OI - spread(c), hessian_II))
        z = inv * r
        p = z
        rz = (r * z).sum()
        for _ in range(self.codebook_steps):
            if rz <= 0:  # nothing left to gain
                break
            Hp = gather(linear(spread(p), hessian_II))
            alpha = rz / (p * Hp).sum().clamp_min(1e-30)
            c = c + alpha * p
            r = r - alpha * Hp
            z = inv * r
            rz2 = (r * z).sum()
            p = z + rz2 / rz * p
            rz = rz2
        return QuantizedTensor(q.codes, format.storable(format.rounded(c)), spec, shape)


def output_error(weight_OI: Tensor, quantized: QuantizedTensor, hessian_II: Tensor) -> float:
    """tr(E H E^T) of the error E of a weight."""
    e_OI = weight_OI - quantized.decode()
    return float((linear(e_OI, hessian_II) * e_OI).sum(dtype=torch.float64))
