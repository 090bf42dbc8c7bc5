"""Quantization methods, by name."""

from bitlaw.methods.method import LayerMethod
from bitlaw.methods.rtn import RTN

METHODS: dict[str, LayerMethod] = {
    "rtn": RTN(),
}

__all__ = ["METHODS", "RTN", "LayerMethod"]
