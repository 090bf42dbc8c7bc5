"""Quantization methods, by name."""

from bitlaw.methods.clip import ClipSearch
from bitlaw.methods.gptq import GPTQ
from bitlaw.methods.gptvq import GPTVQ
from bitlaw.methods.learned_rounding import LearnedRounding
from bitlaw.methods.method import BlockMethod, LayerMethod, Method, Transform
from bitlaw.methods.omniquant import OmniQuant
from bitlaw.methods.rtn import RTN
from bitlaw.methods.smoothquant import SmoothQuant
from bitlaw.methods.svdquant import SVDQuant

METHODS: dict[str, Method] = {
    "rtn": RTN(),
    "clip": ClipSearch(),
    "gptq": GPTQ(),
    "gptvq": GPTVQ(),
    "omniquant": OmniQuant(),
    "adaround": LearnedRounding(),
    "smoothquant": SmoothQuant(),
    "svdquant": SVDQuant(),
}

__all__ = ["METHODS", "RTN", "BlockMethod", "LayerMethod", "Method", "Transform"]
