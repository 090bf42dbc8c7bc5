"""0 bits: a tensor that is dropped. Rate-distortion allocation uses it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitlaw.formats.format import Format, Params


@dataclass(frozen=True)
class Dropped(Format):
    """Every number is 0, and nothing is stored."""

    @property
    def code_bits(self) -> float:
        return 0

    @property
    def param_names(self) -> tuple[str, ...]:
        return ()

    def fit(self, x_GN: Tensor, importance_GN: Tensor | None = None) -> Params:
        return {}

    def encode(self, x_GN: Tensor, params: Params) -> Tensor:
        return torch.zeros_like(x_GN, dtype=self.code_dtype)

    def decode(self, codes_GN: Tensor, params: Params) -> Tensor:
        return codes_GN.to(torch.float32)

    def fake(self, x_GN: Tensor) -> Tensor:
        return torch.zeros_like(x_GN)
