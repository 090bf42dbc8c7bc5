"""Write a model in the formats of others. Each gives back what its format cannot hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bitlaw.files import write_with
from bitlaw.install import plan_of
from bitlaw.models.generator import ImageGenerator


def export_official(model: ImageGenerator[Any], path: Path | str) -> list[str]:
    """The network under official names, quantized weights decoded: what the official code loads.

    A `.safetensors` has the tensors; `.pt` and `.pth` have them under the wrapper that the family's releases have.
    ValueError for another suffix. Returns what is lost, a line each.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.to_official().items()}
    if path.suffix == ".safetensors":
        write_with(path, lambda temporary: save_file(tensors, temporary))
    elif path.suffix in (".pt", ".pth", ".ckpt"):
        content = {model.official_wrapper: tensors} if model.official_wrapper else tensors
        write_with(path, lambda temporary: torch.save(content, temporary))
    else:
        raise ValueError(f"{path}: the official format is .pt, .pth, .ckpt or .safetensors")
    lost = []
    if (plan := plan_of(model.net)) is not None:
        lost.append("the packed codes: weights are the numbers that the codes stand for, in full size")
        if any(precision.activation or precision.attention for name in plan for precision in plan[name]):
            lost.append("the quantization of activations, which happens when the model runs")
    if model.autoencoder is not None:
        lost.append("the autoencoder, which has a file of its own and is not changed by bitlaw")
    return lost


EXPORTS: dict[str, Callable[[ImageGenerator[Any], Path], list[str]]] = {"official": export_official}
