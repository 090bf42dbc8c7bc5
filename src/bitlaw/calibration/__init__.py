"""What enters the layers of a model while it draws images."""

from bitlaw.calibration.histogram import Histogram
from bitlaw.calibration.stats import InputStats

__all__ = ["Histogram", "InputStats"]
