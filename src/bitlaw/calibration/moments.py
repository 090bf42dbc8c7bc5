"""Second moments of what enters a layer, accumulated row by row: E[x_I^2], and E[x x^T] for GPTQ.

Legend: R rows, I inputs of an output channel, J inputs (a block of them, or all from a block on).
"""

from math import isfinite, sqrt

import torch
from torch import Tensor

from bitlaw.linear import product, transposed

_BUFFER_ROWS = 1024
"""Rows multiplied at a time. The sums, in float64, are read and written once for so many."""

_SUMMED_ROWS = 256
"""Rows whose squares are summed at a time. torch sums a float64 copy of them, which is to stay in the cache."""

_BLOCK = 128
"""Inputs of a block. E[x x^T] is symmetric: of every block only the products with itself and what follows are taken."""


class Moments:
    """Sums over rows. Rows wait in a float32 buffer; products are float32, their sums over buffers float64.

    Beside its buffer of 4 KiB an input it holds 8 bytes an input or, for a Hessian, 8 bytes a pair of inputs
    (`num_bytes`), on the device of the first rows. For 4096 inputs these are 151 MB.
    """

    def __init__(self, num_inputs: int, hessian: bool):
        if num_inputs < 1:
            raise ValueError(f"{num_inputs} inputs; a layer has 1 or more")
        self.num_inputs, self.hessian = num_inputs, hessian
        self.num_rows = 0
        """Rows added, whatever they weigh."""
        self._weight = 0.0
        self._waiting = 0
        self._buffer_RI: Tensor | None = None
        self._sum: Tensor | None = None  # (I,), or (I, I) of which only blocks on and below the diagonal are filled

    @staticmethod
    def num_bytes(num_inputs: int, hessian: bool) -> int:
        """Bytes that are held while rows are added."""
        return num_inputs * (4 * _BUFFER_ROWS + 8 * (num_inputs if hessian else 1))

    @torch.no_grad()
    def add(self, x_RI: Tensor, weight: float = 1.0, chosen: Tensor | None = None) -> None:
        """Take in rows of any float type, each of which counts `weight` times: steps can be balanced by it.

        chosen: indices of those that are taken; None for all
        """
        if x_RI.ndim != 2 or x_RI.shape[1] != self.num_inputs:
            raise ValueError(f"rows of shape {tuple(x_RI.shape)}, expected (rows, {self.num_inputs})")
        if not (isfinite(weight) and weight > 0):
            raise ValueError(f"rows of weight {weight}; a weight is finite and above 0")
        if self._buffer_RI is None or self._sum is None:
            self._buffer_RI = x_RI.new_empty(_BUFFER_ROWS, self.num_inputs, dtype=torch.float32)
            shape = (self.num_inputs, self.num_inputs) if self.hessian else (self.num_inputs,)
            self._sum = x_RI.new_zeros(shape, dtype=torch.float64)
        num_rows = len(x_RI) if chosen is None else len(chosen)
        begin = 0
        while begin < num_rows:
            count = min(num_rows - begin, _BUFFER_ROWS - self._waiting)
            place_RI = self._buffer_RI[self._waiting : self._waiting + count]
            if chosen is None:
                place_RI.copy_(x_RI[begin : begin + count])
            elif x_RI.dtype == torch.float32:
                torch.index_select(x_RI, 0, chosen[begin : begin + count], out=place_RI)
            else:
                place_RI.copy_(x_RI.index_select(0, chosen[begin : begin + count]))
            if weight != 1:
                place_RI.mul_(sqrt(weight))
            begin, self._waiting = begin + count, self._waiting + count
            if self._waiting == _BUFFER_ROWS:
                self._flush()
        self.num_rows += num_rows
        self._weight += weight * num_rows

    @property
    def second_moment_I(self) -> Tensor:
        """E[x_I^2] over all rows, float32. ValueError if there are none, or for NaN, Inf and too large numbers."""
        sum_ = self._flushed()
        return (self._diagonal(sum_) / self._weight).float()

    @property
    def hessian_II(self) -> Tensor:
        """E[x x^T] over all rows, float32, symmetric to the bit. Errors as for `second_moment_I`."""
        assert self.hessian, "not collected"
        sum_II = self._flushed()
        mean_II = torch.empty_like(sum_II, dtype=torch.float32)
        for begin in range(0, self.num_inputs, _BLOCK):  # block by block, so that no other matrix is as large
            end = begin + _BLOCK
            panel_IJ = (sum_II[begin:, begin:end] / self._weight).float()
            diagonal_JJ = panel_IJ[:_BLOCK]
            diagonal_JJ.copy_(diagonal_JJ.tril() + diagonal_JJ.tril(-1).T)
            mean_II[begin:, begin:end] = panel_IJ
            mean_II[begin:end, end:] = panel_IJ[_BLOCK:].T
        return mean_II

    def _flushed(self) -> Tensor:
        """The sums of all rows."""
        self._flush()
        if self._sum is None or not self._weight:
            raise ValueError("no rows were added: nothing entered this layer while calibration ran")
        if not self._diagonal(self._sum).isfinite().all():
            raise ValueError("NaN, Inf or numbers whose squares overflow float32 entered this layer")
        return self._sum

    def _diagonal(self, sum_: Tensor) -> Tensor:
        return sum_.diagonal() if self.hessian else sum_

    @torch.no_grad()
    def _flush(self) -> None:
        """Take the buffer into the sums."""
        if self._waiting == 0:
            return
        assert self._buffer_RI is not None and self._sum is not None
        rows_RI = self._buffer_RI[: self._waiting]
        self._waiting = 0
        if not self.hessian:
            for part_RI in rows_RI.split(_SUMMED_ROWS):
                self._sum += part_RI.square().sum(0, dtype=torch.float64)
            return
        rows_IR = transposed(rows_RI)  # all at once: much faster than one call's rows after the other
        for begin in range(0, self.num_inputs, _BLOCK):
            block_JR = rows_IR[begin : begin + _BLOCK]
            # Not `+=`, by which Python would also assign the sum to its own place: a copy of it.
            self._sum[begin:, begin : begin + _BLOCK].add_(product(rows_IR[begin:], block_JR))
