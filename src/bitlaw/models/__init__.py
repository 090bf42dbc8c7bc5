"""Model families. Each is an `ImageGenerator`; a checkpoint's configuration names its family."""

from bitlaw.models.dit import DiT
from bitlaw.models.var import VAR

Family = VAR | DiT

FAMILIES: dict[str, type[VAR] | type[DiT]] = {"var": VAR, "dit": DiT}

__all__ = ["FAMILIES", "DiT", "Family", "VAR"]
