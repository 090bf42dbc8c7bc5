"""Checkpoints as directories: config.json, model.safetensors (the network), tokenizer.safetensors (what decodes its
latents), and bitlaw.json for what quantization adds.

A directory appears under its name only when it is complete. What is read is checked before it is used, and an error
names the file and the tensor.
"""

import json
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitlaw.files import replacing_directory, write_json
from bitlaw.install import plan_of
from bitlaw.packing import pack_network
from bitlaw.quantized import all_finite

CONFIG_FILE, QUANTIZATION_FILE = "config.json", "bitlaw.json"
TENSORS_FILE, TOKENIZER_FILE = "model.safetensors", "tokenizer.safetensors"
TOKENIZER_PREFIX = "tokenizer."
FORMAT_VERSION = 1


class Checkpoint(NamedTuple):
    """What a directory holds; `quantization` is None for a model that is not quantized.

    Tensors of the tokenizer have names that start with "tokenizer.".
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    quantization: dict[str, Any] | None = None


def write_checkpoint(
    directory: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, atomically; an older one of that name is replaced."""
    with replacing_directory(directory) as temporary:
        write_json(temporary / CONFIG_FILE, dict(config))
        tokenizer, network = split_prefix(TOKENIZER_PREFIX, tensors)
        _save(network, temporary / TENSORS_FILE)
        if tokenizer:
            _save(tokenizer, temporary / TOKENIZER_FILE)
        if quantization is not None:
            write_json(temporary / QUANTIZATION_FILE, dict(quantization))


def write_model(
    directory: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    net: nn.Module,
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
) -> None:
    """Write a model: `tensors` in `dtype`, the quantized weights of `net` packed, and the plan they follow.

    A tokenizer's numbers that `dtype` would round stay as they are: it computes in float32 whatever the network does.
    Raises ValueError for a number that `dtype` cannot hold.
    """
    stored = {}
    for name, tensor in tensors.items():
        stored[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        is_inexact = tensor.is_floating_point() and not torch.equal(stored[name].to(tensor.dtype), tensor)
        if is_inexact and name.startswith(TOKENIZER_PREFIX):
            stored[name] = tensor
        if not stored[name].isfinite().all():
            raise ValueError(f"{name}: does not fit {dtype}; set storage_dtype to a wider type")
    quantization = None
    if (plan := plan_of(net)) is not None:
        stored |= pack_network(net)
        quantization = {
            "format_version": FORMAT_VERSION,
            "plan": plan.to_json(),
            "provenance": {**provenance, "bitlaw": version("bitlaw"), "torch": version("torch")},
        }
    write_checkpoint(directory, {**config, "dtype": str(dtype).removeprefix("torch.")}, stored, quantization)


def read_checkpoint(directory: Path | str) -> Checkpoint:
    """Read a checkpoint. Raises ValueError, naming the file, if one is missing, damaged or truncated."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such checkpoint directory")
    config, tensors = read_json(directory / CONFIG_FILE), read_tensors(directory / TENSORS_FILE)
    if "tokenizer" in config:
        tensors |= with_prefix(TOKENIZER_PREFIX, read_tensors(directory / TOKENIZER_FILE))
    quantization = directory / QUANTIZATION_FILE
    return Checkpoint(config, tensors, read_json(quantization) if quantization.exists() else None)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, so {path.parent} is not a checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged, a JSON object was expected")
    return value


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ValueError naming the file and any tensor with NaN or Inf."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error})") from error
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path}: NaN or Inf in {', '.join(broken)}")
    return tensors


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], what: str, ignore: Collection[str] = ()) -> None:
    """Fill a module from tensors of any float type.

    `what` tells the reader which network it is; names that end in one of `ignore` are passed over.
    Raises ValueError naming every tensor that is missing, unknown, misshapen or holds NaN or Inf.
    """
    given = _fitting(module, tensors, what, ignore)
    module.load_state_dict({name: tensor.to(torch.float32) for name, tensor in given.items()})


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def build(
    make: Callable[[], ModuleT],
    tensors: Mapping[str, Tensor],
    what: str,
    *,
    ignore: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
) -> ModuleT:
    """The module that `make` makes, in evaluation mode, with `tensors` as its parameters.

    It is made without memory of its own, and a tensor that has the right type is taken as it is: one that is mapped
    from a file stays so, and the weights are never in memory twice. Modules whose tables follow from their sizes have a
    method `reset_tables`, which is called when the parameters are there. Raises the ValueError of `load_tensors`.
    """
    with torch.device("meta"):
        module = make()
    given = _fitting(module, tensors, what, ignore)
    types = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in given.items()}
    module.load_state_dict({name: given[name].to(types[name]) for name in given}, assign=True)
    for part in module.modules():
        reset = getattr(part, "reset_tables", None)
        if reset is not None:
            reset()
    has_numbers = not any(tensor.is_meta for tensor in given.values())
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta and has_numbers]
    assert not left, f"{what}: reset_tables leaves {left} without numbers"
    return module.eval().requires_grad_(False)


def _fitting(module: nn.Module, tensors: Mapping[str, Tensor], what: str, ignore: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a module's state dict, in its order; ValueError names every one that does not fit."""
    own = module.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith(tuple(ignore))}
    problems = [f"{name}: missing" for name in own if name not in given]
    problems += [f"{name}: unknown" for name in given if name not in own]
    problems += [
        f"{name}: shape {tuple(given[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    problems += [f"{name}: NaN or Inf" for name in given if name in own and not all_finite(given[name])]
    if problems:
        shown = problems[:_MAX_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ValueError(f"{what}: these tensors do not fit its configuration\n  " + "\n  ".join(shown))
    return {name: given[name] for name in own}


_MAX_PROBLEMS = 20


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that start with `prefix`."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def split_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors whose names start with `prefix`, without it, and the others."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return inside, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
