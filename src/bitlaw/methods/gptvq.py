"""GPTVQ: vectors of weights are chosen one after the other, and those to come make up for the error.

As GPTQ (`methods.gptq`), with a codebook in the place of a grid. With H = F F^T, F upper triangular, and E = W - Q the
output error is tr(E H E^T) = |E F|^2. The inputs of a group g see of those before it (p) only a shift:

    E_g F_gg + E_p F_pg = (free_g - Q_g) F_gg,    free_g = W_g + E_p F_pg F_gg^-1

and so do, inside the group, the inputs J of a vector: Q_J is the entry nearest to their target t_J in the norm
|(t_J - q) F_JJ|. `free_g` are the weights as they are when the group begins, to which its codebooks are fitted.

Legend: O output channels, I inputs of an output channel, C inputs of a group, B bands of rows (groups above one
another), R rows of a band, G groups, M vectors in a group, K vectors in a codebook, D numbers in a vector, J the inputs
of a vector (D of them).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS, Codebook, Dropped, IntegerFormat
from bitlaw.formats.codebook import k_means, look_up, nearest
from bitlaw.linear import linear, product
from bitlaw.methods.gptq import check_damping, check_hessian, factorize
from bitlaw.methods.method import LayerMethod
from bitlaw.precision import TensorPrecision
from bitlaw.quantized import QuantizedTensor, WeightSpec

_COLUMNS = 32
"""Inputs that reach one another a vector at a time, not by a matrix product."""

_ENOUGH = 1e-4
"""Codebooks are done when a step would take less than this share from the error."""


@dataclass(frozen=True)
class GPTVQ(LayerMethod):
    """Second-order vector quantization (P0 eq. 14; van Baalen et al. 2024), for codebook formats.

    `dim` inputs at a time are taken from the codebook, nearest by the Hessian, and what is lost is made up for by the
    weights behind them, as in GPTQ. The codebook of a group comes from k-means weighted by the Hessian, on the weights
    as they are when the group begins. When all are chosen, the codebooks are moved to the least error for these choices
    (a least-squares problem, by conjugate gradients) and rounded to 8 bits again; that is kept if it helps.

    A precision in asymmetric integers is taken for a codebook of as many index bits: W3 means v2b3 with `dim` 2. The
    result is never worse than the nearest entries of a plain codebook, on the Hessian: else it is that.

    Departures from the paper's code: the error of a vector and what it passes on are those of its whole block of the
    Hessian (theirs: of the diagonal); k-means starts from halved cells, not from vectors sorted by Mahalanobis
    distance; the codebooks are updated by conjugate gradients (theirs: 25 steps of Adam).

    dim: numbers in a vector where integers were asked for: 1, 2 or 4
    damping: added to the Hessian's diagonal, as a share of its mean; it grows where that is not enough (and is logged)
    kmeans_iterations: at most
    codebook_steps: of conjugate gradients, at most; 0 leaves the codebooks as k-means made them
    sequential: whether the Hessians of a block are to be those behind the quantized blocks before it
    """

    dim: int = 2
    damping: float = 0.01
    kmeans_iterations: int = 20
    codebook_steps: int = 10
    sequential: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"hessian_II"})

    def __post_init__(self) -> None:
        if self.dim not in (1, 2, 4):
            raise ValueError(f"dim {self.dim} is not 1, 2 or 4")
        check_damping(self.damping)
        if self.kmeans_iterations < 1:
            raise ValueError(f"kmeans_iterations {self.kmeans_iterations} is not 1 or more; 20 is usual")
        if self.codebook_steps < 0:
            raise ValueError(f"codebook_steps {self.codebook_steps} is not 0 or more; 10 is usual")

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
        """Integers as the codebook of as many index bits; what has a `problem` as it is."""
        format = asked.format
        name = f"v{self.dim}b{format.bits}" if isinstance(format, IntegerFormat) and not format.symmetric else ""
        return TensorPrecision(FORMATS[name]) if name in FORMATS and asked.group_size is None else asked

    @torch.no_grad()
    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        """`weight_OI` in the codebook format and groups of `spec`.

        Raises ValueError without a Hessian, for one that is none, and what `WeightSpec.quantize` raises.
        """
        plain = spec.quantize(weight_OI)
        if isinstance(spec.format, Dropped):
            return plain
        if stats.hessian_II is None:
            raise ValueError("GPTVQ needs hessian_II of the layer's inputs; calibrate first")
        check_hessian(stats.hessian_II, weight_OI.shape[1])
        hessian_II, weight_OI = stats.hessian_II.to(weight_OI.device, torch.float32), weight_OI.float()
        found = self._choose(weight_OI, hessian_II, spec)
        if self.codebook_steps:
            found = self._with_better_codebooks(found, weight_OI, hessian_II)
        error, error_of_plain = (output_error(weight_OI, q, hessian_II) for q in (found, plain))
        return found if error < error_of_plain else plain

    def _choose(self, weight_OI: Tensor, hessian_II: Tensor, spec: WeightSpec) -> QuantizedTensor:
        """Codebooks and codes, from the first inputs to the last."""
        format, shape = spec.format, tuple(weight_OI.shape)
        assert isinstance(format, Codebook)
        rows, columns = spec.rectangle(shape)
        factor_II, _ = factorize(hessian_II, self.damping)
        error_OI = torch.empty_like(weight_OI)
        index, params = [], []
        for start in range(0, shape[1], columns):
            group = slice(start, start + columns)
            factor_CC, free_OC = factor_II[group, group], weight_OI[:, group]
            if start > 0:
                eye_CC = torch.eye(columns).to(factor_CC)
                inverse_CC = torch.linalg.solve_triangular(factor_CC, eye_CC, upper=True)
                passed_IC = product(factor_II[:start, group].contiguous(), inverse_CC.T)
                free_OC = free_OC + product(error_OI[:, :start], passed_IC.T)

            x_BMD = free_OC.reshape(shape[0] // rows, -1, format.dim)
            # What an error costs that those behind it make up for.
            importance_C = factor_CC.diagonal().square()
            importance_BMD = importance_C.repeat(rows).view(-1, format.dim).expand_as(x_BMD)
            fitted = format.rounded(k_means(x_BMD, format.code_width, importance_BMD, self.kmeans_iterations))
            vectors_BKD = format.vectors(fitted)
            index_BM = _nearest_in_order(free_OC, factor_CC, vectors_BKD)
            error_OI[:, group] = weight_OI[:, group] - look_up(vectors_BKD, index_BM).view(shape[0], columns)
            index.append(index_BM)
            params.append(fitted)
        codes_GM = format.codes(torch.stack(index, 1).flatten(0, 1))
        joined = {name: torch.stack([part[name] for part in params], 1).flatten(0, 1) for name in format.param_names}
        return QuantizedTensor(spec.join(codes_GM, shape), format.storable(joined), spec, shape)

    def _with_better_codebooks(
        self, quantized: QuantizedTensor, weight_OI: Tensor, hessian_II: Tensor
    ) -> QuantizedTensor:
        """The same choices with the codebooks of least error for them, if rounding them to 8 bits leaves it smaller.

        tr(E H E^T) is quadratic in the codebooks; conjugate gradients, scaled by the diagonal, start where they are.
        """
        format, spec, shape = quantized.spec.format, quantized.spec, quantized.shape
        assert isinstance(format, Codebook)
        index_GM = format.indices(spec.split(quantized.codes, shape))
        num_vectors, dim = format.codebook_shape
        index_GDM = index_GM[:, None].expand(-1, dim, -1)

        def spread(vectors_GKD: Tensor) -> Tensor:
            """The weight (O, I) that these codebooks give."""
            return spec.join(look_up(vectors_GKD, index_GM).flatten(1), shape)

        def gather(x_OI: Tensor) -> Tensor:
            """Sums over the weights that share a number of a codebook (G, K, D): `spread` transposed."""
            x_GDM = spec.split(x_OI, shape).unflatten(1, (-1, dim)).transpose(1, 2)
            sums_GDK = x_GDM.new_zeros(len(index_GM), dim, num_vectors)
            return sums_GDK.scatter_add_(2, index_GDM, x_GDM).transpose(1, 2)

        vectors_GKD = format.vectors(quantized.params)
        diagonal_GKD = gather(hessian_II.diagonal().expand(shape))
        scaling_GKD = torch.where(diagonal_GKD > 0, 1 / diagonal_GKD, 0)  # 0: of numbers that no weight has
        error_OI = weight_OI - spread(vectors_GKD)
        pull_OI = linear(error_OI, hessian_II)
        error = before = _inner(error_OI, pull_OI)
        rest_GKD = gather(pull_OI)
        direction_GKD = scaling_GKD * rest_GKD
        slope = _inner(rest_GKD, direction_GKD)
        for _ in range(self.codebook_steps):
            changed_GKD = gather(linear(spread(direction_GKD), hessian_II))
            curvature = _inner(direction_GKD, changed_GKD)
            # Rounding may leave nothing to descend; what is no number ends it too.
            if not (curvature > 0 and slope * slope / curvature > _ENOUGH * error):
                break
            length = slope / curvature
            vectors_GKD = vectors_GKD + length * direction_GKD
            rest_GKD = rest_GKD - length * changed_GKD
            error -= length * slope
            scaled_GKD = scaling_GKD * rest_GKD
            last, slope = slope, _inner(rest_GKD, scaled_GKD)
            direction_GKD = scaled_GKD + slope / last * direction_GKD
        rounded = QuantizedTensor(quantized.codes, format.storable(format.rounded(vectors_GKD)), spec, shape)
        return rounded if output_error(weight_OI, rounded, hessian_II) < before else quantized


def _nearest_in_order(free_OC: Tensor, factor_CC: Tensor, vectors_BKD: Tensor) -> Tensor:
    """Indices (B, M) of the entries for groups above one another, each target knowing of the errors before it.

    Weights and errors lie transposed, so that an input is contiguous.
    """
    (num_outputs, num_inputs), (num_bands, _, dim) = free_OC.shape, vectors_BKD.shape
    free_CO = free_OC.T.clone(memory_format=torch.contiguous_format)
    error_CO = torch.empty_like(free_CO)
    chosen = []
    for begin in range(0, num_inputs, _COLUMNS):
        end = min(begin + _COLUMNS, num_inputs)
        # Of inputs before `begin` all at once, of those from there on a vector at a time.
        passed_CO = torch.zeros_like(free_CO[begin:end])
        if begin > 0:
            passed_CO = product(factor_CC[:begin, begin:end].T.contiguous(), error_CO[:begin].T)
        for j in range(begin, end, dim):
            here = slice(j, j + dim)
            # t_J F_JJ, so that the nearest entry is that of q F_JJ.
            factor_JJ = factor_CC[here, here]
            scaled_JO = passed_CO[j - begin : j - begin + dim] + factor_JJ.T @ free_CO[here]
            scaled_JO.addmm_(factor_CC[begin:j, here].T, error_CO[begin:j])
            index_BR, _ = nearest(scaled_JO.T.reshape(num_bands, -1, dim), vectors_BKD @ factor_JJ)
            error_CO[here] = free_CO[here] - look_up(vectors_BKD, index_BR).view(num_outputs, dim).T
            chosen.append(index_BR)
    return torch.stack(chosen, 2).flatten(1)


def output_error(weight_OI: Tensor, quantized: QuantizedTensor, hessian_II: Tensor) -> float:
    """tr(E H E^T) of the error E of a weight."""
    error_OI = weight_OI - quantized.decode()
    return _inner(error_OI, linear(error_OI, hessian_II))


def _inner(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
