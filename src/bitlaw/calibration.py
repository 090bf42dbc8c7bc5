"""What methods are told about the inputs of a site.

Legend: I inputs of an output channel (`methods.method`).
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InputStats:
    """What calibration has seen enter one site. A field is None unless a method names it in `needs`.

    second_moment_I: E[x_I^2] over all rows that entered
    """

    second_moment_I: Tensor | None = None
