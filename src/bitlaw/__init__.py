"""bitlaw: quantize vision generative models, and find which size at which bit width gives the best images.

model = bitlaw.load("ladder/var-s")
small = bitlaw.quantize(model, "W4A8")
images = small.generate(labels=[3, 3, 7], seed=0)
small.save("var-s-w4a8")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitlaw.calibration.settings import Calibration
    from bitlaw.distill.settings import Distillation
    from bitlaw.methods.quantize import quantize
    from bitlaw.metrics.evaluation import evaluate
    from bitlaw.models.loading import load
    from bitlaw.precision import BitPlan, Precision
    from bitlaw.scaling import fit, read_points
    from bitlaw.scaling.sweep import Study

__all__ = [
    "BitPlan",
    "Calibration",
    "Distillation",
    "Precision",
    "Study",
    "evaluate",
    "fit",
    "load",
    "quantize",
    "read_points",
]

# Names are imported when they are first used: `bitlaw --help` need not wait for torch.
_HOMES = {
    "BitPlan": "bitlaw.precision",
    "Calibration": "bitlaw.calibration.settings",
    "Distillation": "bitlaw.distill.settings",
    "Precision": "bitlaw.precision",
    "Study": "bitlaw.scaling.sweep",
    "evaluate": "bitlaw.metrics.evaluation",
    "fit": "bitlaw.scaling",
    "load": "bitlaw.models.loading",
    "quantize": "bitlaw.methods.quantize",
    "read_points": "bitlaw.scaling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitlaw' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
