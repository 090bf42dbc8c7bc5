"""Distillation: a quantized student that learns from its full-precision teacher.

small = distill(bitlaw.load("ladder/var-s"), "W3A16", Distillation(loss="topkld", steps=400))
"""

from bitlaw.distill.settings import Distillation
from bitlaw.distill.trainer import distill, distill_from

__all__ = ["Distillation", "distill", "distill_from"]
