"""Model families. Each is an `ImageGenerator`; a checkpoint's configuration names its family."""

from typing import Any

from bitlaw.models.ddpm import DDPM
from bitlaw.models.dit import DiT
from bitlaw.models.generator import ImageGenerator
from bitlaw.models.large_dit import LargeDiT
from bitlaw.models.ldm import LDM
from bitlaw.models.llamagen import LlamaGen
from bitlaw.models.mar import MAR
from bitlaw.models.var import VAR

FAMILIES: dict[str, type[ImageGenerator[Any]]] = {
    "var": VAR,
    "dit": DiT,
    "large-dit": LargeDiT,
    "llamagen": LlamaGen,
    "mar": MAR,
    "ddpm": DDPM,
    "ldm": LDM,
}

__all__ = ["DDPM", "FAMILIES", "LDM", "MAR", "VAR", "DiT", "ImageGenerator", "LargeDiT", "LlamaGen"]
