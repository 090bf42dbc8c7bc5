"""Load a model in one line, quantized or not.

bitlaw.load("ladder/var-s")        a built-in model
bitlaw.load("var-s-w4a8")          a directory that `model.save` or `bitlaw quantize` wrote
"""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from bitlaw.install import install
from bitlaw.models import FAMILIES
from bitlaw.models.generator import ImageGenerator
from bitlaw.models.storage import CONFIG_FILE, FORMAT_VERSION, QUANTIZATION_FILE, TENSORS_FILE, read_checkpoint
from bitlaw.names import lookup, unknown_name
from bitlaw.packing import unpack_network
from bitlaw.precision import BitPlan
from bitlaw.quantized import QuantizedTensor

LADDER_PREFIX = "ladder/"


def ladder_names() -> list[str]:
    """Names of the built-in models, smallest first in each family."""

    def names() -> Iterator[tuple[str, int, str]]:
        for entry in (resources.files("bitlaw") / "ladder" / "weights").iterdir():
            if (entry / CONFIG_FILE).is_file():
                size = len((entry / TENSORS_FILE).read_bytes())
                yield entry.name.split("-")[0], size, f"{LADDER_PREFIX}{entry.name}"

    return [name for _, _, name in sorted(names())]


def load(source: str | Path) -> ImageGenerator[Any]:
    """A model by its ladder name or its checkpoint directory.

    Raises ValueError for a name that is neither (with the nearest ones), and for a damaged, truncated or newer
    checkpoint, naming the file and the tensor.
    """
    directory, name = _resolve(source)
    config, tensors, quantization = read_checkpoint(directory)
    if "family" not in config:
        raise ValueError(f"{directory / CONFIG_FILE}: names no family; is it a checkpoint of bitlaw?")
    family = lookup(FAMILIES, config["family"], f"family in {directory / CONFIG_FILE}")
    plan: BitPlan | None = None
    quantized: dict[str, QuantizedTensor] = {}
    try:
        if quantization is not None:
            plan = _read_plan(quantization, directory / QUANTIZATION_FILE)
            quantized, tensors = unpack_network(tensors, plan)
        model = family.from_checkpoint(config, tensors)
    except KeyError as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    model.storage_dtype = getattr(torch, config.get("dtype", "float32"))
    model.provenance = {"source": name}
    if quantization is not None:
        assert plan is not None
        model.net = install(model.net, plan, quantized, model.clock)
        model.provenance = quantization.get("provenance", {})
    return model


def _read_plan(quantization: dict[str, Any], path: Path) -> BitPlan:
    found = quantization.get("format_version")
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise ValueError(f"{path.name}: format version {found}, this bitlaw reads up to {FORMAT_VERSION}; update it")
    if "plan" not in quantization:
        raise ValueError(f"{path.name}: the plan is missing")
    return BitPlan.from_json(quantization["plan"])


def _resolve(source: str | Path) -> tuple[Path, str]:
    """The directory of a model, and the name under which it was asked for."""
    path, name = Path(source), str(source)
    if path.is_dir():
        return path, path.name
    known = ladder_names()
    if name in known:
        root = resources.files("bitlaw") / "ladder" / "weights" / name.removeprefix(LADDER_PREFIX)
        with resources.as_file(root) as directory:
            return directory, name
    if path.is_file():
        raise ValueError(f"{path}: a file; give the checkpoint's directory")
    raise unknown_name(name, known, "model (no such directory, and no built-in model)")
