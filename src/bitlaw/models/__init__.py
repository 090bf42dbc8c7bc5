"""Model families. Each is an `ImageGenerator`; a checkpoint's configuration names its family."""

from typing import Any

from bitlaw.models.dit import DiT
from bitlaw.models.generator import ImageGenerator
from bitlaw.models.var import VAR

FAMILIES: dict[str, type[ImageGenerator[Any]]] = {"var": VAR, "dit": DiT}

__all__ = ["FAMILIES", "VAR", "DiT", "ImageGenerator"]
