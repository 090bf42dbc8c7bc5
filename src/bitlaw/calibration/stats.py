"""What methods are told about the inputs of a site.

Legend: I inputs of an output channel (`methods.method`): input channels of a linear, numbers in a window of a
convolution. C input channels (of a linear the same as I). R rows of a sample. S step groups.
"""

from dataclasses import dataclass

from torch import Tensor

from bitlaw.calibration.histogram import Histogram


@dataclass(frozen=True)
class InputStats:
    """What calibration has seen enter one site. A field is None unless somebody needs it.

    Means are over all rows that entered, those of both guidance branches included, and float32 after sums in float64.

    second_moment_I: E[x_I^2]
    hessian_II: E[x x^T], which GPTQ's H = 2 X X^T is proportional to
    low_C, high_C: least and greatest number of each input channel
    ends_S2: least and greatest number of all channels, for each step group; inf and -inf where nothing entered
    rows_RI: a sample of the rows themselves
    histograms_S: distribution of all numbers, for each step group
    num_rows: how many rows the moments are means of; 0 where they were not collected
    """

    second_moment_I: Tensor | None = None
    hessian_II: Tensor | None = None
    low_C: Tensor | None = None
    high_C: Tensor | None = None
    ends_S2: Tensor | None = None
    rows_RI: Tensor | None = None
    histograms_S: tuple[Histogram, ...] | None = None
    num_rows: int = 0

    @property
    def absmax_C(self) -> Tensor | None:
        """max |x_C|."""
        if self.low_C is None or self.high_C is None:
            return None
        return self.high_C.maximum(-self.low_C)
