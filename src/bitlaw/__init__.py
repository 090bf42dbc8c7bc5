"""bitlaw: quantize vision generative models, and find which size at which bit width gives the best images.

model = bitlaw.load("ladder/var-s")
small = bitlaw.quantize(model, "W4A8")
images = small.generate(labels=[3, 3, 7], seed=0)
small.save("var-s-w4a8")
"""

from bitlaw.methods.quantize import quantize
from bitlaw.metrics.evaluation import evaluate
from bitlaw.models.loading import load
from bitlaw.precision import BitPlan, Precision
from bitlaw.scaling import fit, read_points
from bitlaw.scaling.sweep import Study

__all__ = ["BitPlan", "Precision", "Study", "evaluate", "fit", "load", "quantize", "read_points"]
