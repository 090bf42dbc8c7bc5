"""The weights and inputs on which errors of the original GPTQ are known."""

import torch
from torch import Tensor


def recipe(outputs: int = 48, inputs: int = 96, rows: int = 512) -> tuple[Tensor, Tensor]:
    """W (outputs, inputs) and X (rows, inputs) with correlated columns, drawn in this order."""
    g = torch.Generator().manual_seed(1234)
    weight = torch.randn(outputs, inputs, generator=g)
    mixing = torch.randn(inputs, inputs, generator=g) / inputs**0.5
    return weight, torch.randn(rows, inputs, generator=g) @ mixing
