"""GPTQ: columns are rounded one after the other, and those to come make up for the error (Frantar et al. 2023).

The original inverts the Hessian and factorizes the inverse, three factorizations in all. Here there is one. With
H = U D U^T, U upper triangular with ones on its diagonal, the procedure is (Chee et al. 2023, QuIP, theorem 6)

    t_j = w_j + sum_{i<j} (w_i - q_i) U_ij,    q_j = the number of the format nearest to t_j

and the error of the output follows from it without another product:

    E |x (w - q)^T|^2 = (w - q) H (w - q)^T = sum_j D_jj (t_j - q_j)^2.

Weights and errors lie transposed, so that a column is contiguous. What many earlier columns do to a block of columns is
one matrix product; single columns see only their neighbours.

Legend: O output channels, I inputs of an output channel, N inputs of a group, J inputs of a block, K inputs before it.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.formats import Params
from bitlaw.linear import product
from bitlaw.methods.method import LayerMethod
from bitlaw.quantized import QuantizedTensor, WeightSpec, all_finite

_log = logging.getLogger(__name__)

_NEIGHBOURS = 32
"""Columns that reach one another one at a time, not by a matrix product."""

_TOGETHER = 512
"""Columns that wait together for the errors before them: products of matrices so wide are the fastest."""

_FACTOR_BLOCK = 128
"""Columns factorized at a time."""

_COMPARED_ROWS = 256
"""Rows of a weight that are compared with rounding to nearest at a time; they are to stay in the cache."""

_PROBES = 32
"""Directions by which the output error of rounding to nearest is estimated."""

_CLEARLY = 6.0
"""Standard errors of that estimate by which it is to be above an error in order to be the larger one."""

_LARGEST_DAMPING = 1e6
"""Of a diagonal: with it any matrix whose entries are not much above its diagonal can be factorized."""


@dataclass(frozen=True)
class Solution:
    """What GPTQ found for a weight.

    damping: what was added to the Hessian's diagonal, as a share of its mean; more than was asked for if that failed
    is_rtn: rounding to nearest had the smaller output error, and is what `quantized` is
    """

    quantized: QuantizedTensor
    damping: float
    is_rtn: bool = False


@dataclass(frozen=True)
class GPTQ(LayerMethod):
    """Least output error, column by column, given the errors of the columns before (P0 eq. 12-13).

    damping: added to the Hessian's diagonal, as a share of its mean. Where the Hessian cannot be factorized it grows by
             10 until it can, and a warning is logged
    act_order: take inputs in the order of falling E[x_I^2]. Groups keep their inputs, and parameters fitted to the
               original weights; otherwise those of a group are fitted to what its weights have become when it begins
    column_block: columns that wait together for the errors before them. It changes the result by rounding only, unless
    fit_by_block: fit the groups of a column block to its weights as the block begins, and not each group as it begins.
                  It loses more, and is what the original code does, whose weights lag behind within a block
    sequential: whether the Hessians of a block are to be those behind the quantized blocks before it

    Inputs that are always 0 are rounded to nearest. If the output error over the calibration rows comes out larger than
    that of rounding everything to nearest, which needs near-singular Hessians or very few bits, that is the result.
    """

    damping: float = 0.01
    act_order: bool = False
    column_block: int = 128
    fit_by_block: bool = False
    sequential: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"hessian_II"})

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if self.column_block < 1:
            raise ValueError(f"column_block {self.column_block} is not 1 or more; 128 is usual")

    def problem(self, layer: nn.Module, spec: WeightSpec) -> str | None:
        """Vectors and codebooks need another method."""
        if spec.format.values_per_code > 1 or spec.format.codebook_shape:
            return "gptq rounds single numbers to integers or floats, not to a codebook; use gptvq"
        return None

    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        """`weight_OI` in the format and groups of `spec`. ValueError as for `solve`, and without a Hessian."""
        if stats.hessian_II is None:
            raise ValueError("GPTQ needs hessian_II of the layer's inputs; calibrate first")
        return self.solve(weight_OI, stats.hessian_II, spec).quantized

    @torch.no_grad()
    def solve(self, weight_OI: Tensor, hessian_II: Tensor, spec: WeightSpec) -> Solution:
        """The codes for E[x x^T] = `hessian_II`, which may have any factor before it, and what it took to find them.

        Raises ValueError for a Hessian that is none (shape, NaN, Inf, a negative diagonal), and what
        `WeightSpec.quantize` raises.
        """
        check_hessian(hessian_II, weight_OI.shape[1])
        spec.check(weight_OI)
        if spec.format.code_bits == 0:
            return Solution(spec.quantize(weight_OI), self.damping)
        hessian_II = hessian_II.to(weight_OI.device, torch.float32)
        order_I = None
        if self.act_order:
            order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
            hessian_II = hessian_II[order_I][:, order_I]
        factor_II, damping = factorize(hessian_II, self.damping)
        columns = _Columns(spec, weight_OI.float(), factor_II, order_I)
        columns.round(self.column_block, self.fit_by_block)
        if _nearest_loses_less(columns, damping):
            return Solution(spec.quantize(weight_OI), damping, is_rtn=True)
        return Solution(columns.result(), damping)


def factorize(hessian_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """(U, damping): U U^T = hessian / mean + damping * identity, U upper triangular, float32; zeros below.

    The mean is that of the diagonal over inputs that are not always 0 (1 if all are). The damping is the one asked for
    or, as often as the factorization fails, 10 times more (at least 1e-6). ValueError if nothing helps.
    """
    diagonal_I = hessian_II.diagonal().double()
    mean = float(diagonal_I.sum() / diagonal_I.count_nonzero().clamp_min(1)) or 1.0
    used = damping
    while True:
        factor_II = _factor(hessian_II, mean, used)
        if factor_II is not None:
            return factor_II, used
        raised = max(10 * used, 1e-6)
        if raised > _LARGEST_DAMPING:
            raise ValueError(
                f"the Hessian cannot be factorized, even with damping {used:g}: it is no mean of x x^T; calibrate again"
            )
        _log.warning("GPTQ: a Hessian cannot be factorized with damping %g; going on with %g", used, raised)
        used = raised


def _factor(hessian_II: Tensor, divisor: float, added: float) -> Tensor | None:
    """U upper triangular with U U^T = hessian / divisor + added * identity; None if there is none.

    From the last block of columns to the first: all but small blocks are products of matrices (`product`).
    """
    num_inputs = len(hessian_II)
    factor_II = torch.zeros_like(hessian_II)
    for start in reversed(range(0, num_inputs, _FACTOR_BLOCK)):
        end = min(start + _FACTOR_BLOCK, num_inputs)
        panel_IJ = hessian_II[:end, start:end] / divisor
        if end < num_inputs:
            panel_IJ -= product(factor_II[:end, end:], factor_II[start:end, end:].contiguous())
        diagonal_JJ = panel_IJ[start:]
        diagonal_JJ.diagonal().add_(added)
        lower_JJ, failed = torch.linalg.cholesky_ex(diagonal_JJ.flip(0, 1))
        if failed or not all_finite(lower_JJ):
            return None
        own_JJ = lower_JJ.flip(0, 1)
        factor_II[start:end, start:end] = own_JJ
        if start > 0:  # U_above = panel_above own^-T
            inverse_JJ = torch.linalg.solve_triangular(own_JJ, torch.eye(len(own_JJ)).to(own_JJ), upper=True)
            factor_II[:start, start:end] = product(panel_IJ[:start], inverse_JJ.contiguous())
    return factor_II if all_finite(factor_II) else None


class _Columns:
    """The columns of a weight in the order in which they are rounded.

    params: fitted to the weight as it came
    target_BO: t of the largest block at hand, as far as it is known; of rounded columns all of it
    error_IO: w - q of rounded columns, w of the others
    codes_IO: of rounded columns
    rest_I, error_I: |t - q| and |w - q| of rounded columns
    """

    def __init__(self, spec: WeightSpec, weight_OI: Tensor, factor_II: Tensor, order_I: Tensor | None):
        self.spec, self.weight_OI, self.factor_II, self.order_I = spec, weight_OI, factor_II, order_I
        self.params = spec.fit(weight_OI)
        self.diagonal_I = factor_II.diagonal().clone()
        self.error_IO = self.in_order(weight_OI).T.clone(memory_format=torch.contiguous_format)
        self.target_BO, self.first = self.error_IO[:0], 0
        self.codes_IO = torch.empty_like(self.error_IO, dtype=spec.format.code_dtype)
        self.rest_I, self.error_I = torch.zeros_like(self.diagonal_I), torch.zeros_like(self.diagonal_I)
        num_inputs, size = weight_OI.shape[1], spec.group_size
        self.source_of = list(range(num_inputs)) if order_I is None else order_I.tolist()
        self.group_size = size if isinstance(size, int) else num_inputs
        # For each group of a row, those of all rows: (O, 1), or (1, 1) if the whole tensor shares them.
        count = num_inputs // self.group_size
        self.groups = [_float({k: v[index::count] for k, v in self.params.items()}) for index in range(count)]
        self.refits, self.fit_size = order_I is None and count > 1, self.group_size
        self.refitted: list[Params] = []

    def in_order(self, x_OI: Tensor) -> Tensor:
        """Columns in the order in which they are rounded."""
        return x_OI if self.order_I is None else x_OI[:, self.order_I]

    def round(self, column_block: int, fit_by_block: bool = False) -> None:
        """Round all columns."""
        sizes = [column_block, _NEIGHBOURS] if column_block > _NEIGHBOURS else [column_block]
        if self.refits:  # a group begins where a block does, so that its weights are known then
            above = [size // self.group_size * self.group_size for size in sizes if size > self.group_size]
            below = [size for size in sizes if size < self.group_size]
            sizes = list(dict.fromkeys([*above, self.group_size, *below]))
            self.fit_size = sizes[0] if fit_by_block else self.group_size
        if 2 * sizes[0] <= _TOGETHER:
            sizes = [_TOGETHER // sizes[0] * sizes[0], *sizes]
        room_BO = torch.empty_like(self.error_IO[: sizes[0]])
        for begin in range(0, len(self.error_IO), sizes[0]):
            end = min(begin + sizes[0], len(self.error_IO))
            self.first, self.target_BO = begin, room_BO[: end - begin].copy_(self.error_IO[begin:end])
            self._follow(slice(0, begin), slice(begin, end))
            self._round_block(begin, end, sizes)

    def result(self) -> QuantizedTensor:
        """The rounded weight, its columns as they came."""
        params = self.params
        if self.refits:
            names = self.params.keys()
            params = {name: torch.stack([p[name] for p in self.refitted], 1).flatten(0, 1) for name in names}
        codes_IO = self.codes_IO if self.order_I is None else self.codes_IO[self.order_I.argsort()]
        return QuantizedTensor(codes_IO.T.contiguous(), params, self.spec, tuple(self.weight_OI.shape))

    def errors_of_nearest(self) -> Iterator[Tensor]:
        """w - q of rounding to nearest, in the order of `factor_II`, some rows (o, I) after the others."""
        num_outputs, num_inputs = self.weight_OI.shape
        per_row = num_inputs // self.group_size
        for first in range(0, num_outputs, _COMPARED_ROWS):
            rows, params = slice(first, first + _COMPARED_ROWS), self.params
            if self.spec.group_size != "tensor":
                params = {name: value[first * per_row : rows.stop * per_row] for name, value in params.items()}
            part_oI = self.weight_OI[rows]
            nearest_oI = self.spec.format.nearest(part_oI.reshape(-1, self.group_size), params).view_as(part_oI)
            yield self.in_order(part_oI - nearest_oI)

    def _round_block(self, start: int, end: int, sizes: Sequence[int]) -> None:
        """Round a block of sizes[0] columns, whose targets know of everything before it, in blocks of sizes[1] ..."""
        if self.refits and sizes[0] == self.fit_size:
            self._refit(start, end)
        if len(sizes) == 1:
            self._round_one_by_one(start, end)
            return
        for begin in range(start, end, sizes[1]):
            stop = min(begin + sizes[1], end)
            self._follow(slice(start, begin), slice(begin, stop))
            self._round_block(begin, stop, sizes[1:])

    def _target(self, columns: slice) -> Tensor:
        """t of columns of the largest block at hand."""
        return self.target_BO[columns.start - self.first : columns.stop - self.first]

    def _follow(self, earlier: slice, columns: slice) -> None:
        """Tell the targets of columns of the errors of earlier ones."""
        if earlier.stop > earlier.start:
            target_JO = self._target(columns)
            target_JO += product(self._feedback(earlier, columns), self.error_IO[earlier].T)

    def _round_one_by_one(self, start: int, end: int) -> None:
        feedback_JJ, chosen = self._feedback(slice(start, end), slice(start, end)), []
        target_JO, error_JO = self._target(slice(start, end)), self.error_IO[start:end]
        # Taken apart at once: here Python's calls are what takes the time.
        columns = zip(target_JO.unbind(), target_JO.unsqueeze(2).unbind(), error_JO.unsqueeze(2).unbind(), strict=True)
        for index, (target_O, target_O1, error_O1) in enumerate(columns):
            if index > 0:
                torch.addmv(target_O, error_JO[:index].T, feedback_JJ[index, :index], out=target_O)
            params = self.groups[self.source_of[start + index] // self.group_size]
            chosen.append(self.spec.format.nearest(target_O1, params))
            error_O1 -= chosen[-1]
        # All at once, unless neighbours are of different groups.
        step = end - start if self.order_I is None or len(self.groups) == 1 else 1
        for column in range(start, end, step):
            params = self.groups[self.source_of[column] // self.group_size]
            codes_OJ = self.spec.format.encode(target_JO[column - start : column - start + step].T, params)
            self.codes_IO[column : column + step] = codes_OJ.T
        self.rest_I[start:end] = torch.linalg.vector_norm(target_JO - torch.stack(chosen).squeeze(2), dim=1)
        self.error_I[start:end] = torch.linalg.vector_norm(error_JO, dim=1)

    def _feedback(self, earlier: slice, columns: slice) -> Tensor:
        """Columns of U, transposed: what the errors of `earlier` columns are multiplied with for each of `columns`."""
        return (self.factor_II[earlier, columns] / self.diagonal_I[columns]).T.contiguous()

    def _refit(self, begin: int, stop: int) -> None:
        """Fit groups to what their weights have become: those of least error, given the columns before and no rounding.

        With z these weights, e = w - z and t the targets, which know of the columns before `begin`:
        z_j = t_j + sum over i < j from `begin` on of e_i U_ij, so that (I + U_strict^T) e = w - t.
        """
        change_JO = self.error_IO[begin:stop] - self._target(slice(begin, stop))
        if begin > 0:
            unit_JJ = self._feedback(slice(begin, stop), slice(begin, stop))
            identity_JJ = torch.eye(len(unit_JJ)).to(unit_JJ)
            inverse_JJ = torch.linalg.solve_triangular(unit_JJ, identity_JJ, upper=False, unitriangular=True)
            change_JO = product(inverse_JJ, change_JO.T)
        weight_JO = self.error_IO[begin:stop] - change_JO
        for index, weight_NO in enumerate(torch.split(weight_JO, self.group_size), begin // self.group_size):
            fitted = self.spec.format.fit(weight_NO.T)
            # As RTN stores them: float32 scales are for all groups of a tensor or for none.
            if self.params["scale_G1"].dtype == torch.float16:
                fitted = self.spec.format.storable(fitted)
            self.refitted.append(fitted)
            self.groups[index] = _float(fitted)


def _float(params: Params) -> Params:
    """Parameters as `Format.nearest` takes them fastest."""
    return {name: value.float().contiguous() for name, value in params.items()}


def check_damping(damping: float) -> None:
    """Raise ValueError for what cannot be added to a diagonal."""
    if not (isfinite(damping) and damping >= 0):
        raise ValueError(f"damping {damping} is not a share of the Hessian's diagonal, 0 or more; 0.01 is usual")


def check_hessian(hessian_II: Tensor, num_inputs: int) -> None:
    """Raise ValueError for what is no mean of x x^T of this many inputs."""
    if hessian_II.shape != (num_inputs, num_inputs):
        raise ValueError(
            f"Hessian of shape {tuple(hessian_II.shape)} for {num_inputs} inputs; calibrate this very layer"
        )
    if not all_finite(hessian_II):
        raise ValueError("NaN or Inf in the Hessian; look for them in the layer's inputs")
    if hessian_II.diagonal().min() < 0:
        raise ValueError("the Hessian's diagonal holds negative numbers: it is no mean of x x^T; calibrate again")


def _nearest_loses_less(columns: _Columns, damping: float) -> bool:
    """Whether rounding to nearest has a smaller output error than the columns have.

    Both errors are those of the damped Hessian less what the damping adds, damping * |w - q|^2 (`factorize` gives a
    Hessian a diagonal of 1). That of rounding to nearest is estimated first, which is mostly enough to know.
    """
    weighted_I = columns.rest_I.double() * columns.diagonal_I.double()
    bound = float((weighted_I.square() - damping * columns.error_I.double().square()).sum())
    if _clearly_loses_more(columns, damping, bound):
        return False
    loss, factor_II, num_inputs = 0.0, columns.factor_II, len(columns.factor_II)
    blocks = [slice(begin, min(begin + _FACTOR_BLOCK, num_inputs)) for begin in range(0, num_inputs, _FACTOR_BLOCK)]
    panels = [factor_II[: block.stop, block].contiguous() for block in blocks]  # without the zeros below
    for error_oI in columns.errors_of_nearest():
        loss += sum(_squared_norm(product(error_oI[:, : len(panel_IJ)], panel_IJ.T)) for panel_IJ in panels)
        loss -= damping * _squared_norm(error_oI)
        if loss >= bound:
            return False
    return True


def _clearly_loses_more(columns: _Columns, damping: float, bound: float) -> bool:
    """Whether the output error of rounding to nearest is larger than a bound by far more than its estimate is unsure.

    For e = w - q and standard normal v, E (e U v)^2 = |e U|^2, so that each v gives an estimate for all rows; their
    spread says how unsure the mean is. Rows only add to the error: mostly some of them are enough.
    """
    v_PI = torch.randn(_PROBES, len(columns.factor_II), generator=torch.Generator().manual_seed(0))
    directions_PI = product(v_PI.to(columns.factor_II), columns.factor_II)
    loss_P = torch.zeros(_PROBES, dtype=torch.float64, device=directions_PI.device)
    for error_oI in columns.errors_of_nearest():
        loss_P += product(error_oI, directions_PI).double().square().sum(0) - damping * _squared_norm(error_oI)
        if float(loss_P.mean() - _CLEARLY * loss_P.std() / _PROBES**0.5) >= bound:
            return True
    return False


def _squared_norm(x_RI: Tensor) -> float:
    return float(torch.linalg.vector_norm(x_RI, dim=1).double().square().sum())
