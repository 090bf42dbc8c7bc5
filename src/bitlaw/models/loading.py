"""Load a model in one line, quantized or not.

bitlaw.load("ladder/var-s")            a built-in model
bitlaw.load("var-s-w4a8")              a directory that `model.save` or `bitlaw quantize` wrote
bitlaw.load("var_d16.pth")             a released file, its tokenizer beside it
bitlaw.load("google/ddpm-cifar10-32")  a repository of the Hugging Face hub
"""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from bitlaw.install import SiteParts, install
from bitlaw.models import FAMILIES
from bitlaw.models.autoencoders import Autoencoder, open_autoencoder
from bitlaw.models.generator import ImageGenerator
from bitlaw.models.official import AUTOENCODER_PARTS, WeightsFile, hub_path, read_weights
from bitlaw.models.storage import (
    CONFIG_FILE,
    FORMAT_VERSION,
    QUANTIZATION_FILE,
    TENSORS_FILE,
    read_checkpoint,
    read_json,
)
from bitlaw.names import lookup, unknown_name
from bitlaw.packing import unpack_network
from bitlaw.precision import BitPlan

LADDER_PREFIX = "ladder/"
NO_TOKENIZER = "none"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def ladder_names() -> list[str]:
    """Names of the built-in models, smallest first in each family."""

    def names() -> Iterator[tuple[str, int, str]]:
        for entry in (resources.files("bitlaw") / "ladder" / "weights").iterdir():
            if (entry / CONFIG_FILE).is_file():
                size = len((entry / TENSORS_FILE).read_bytes())
                yield entry.name.split("-")[0], size, f"{LADDER_PREFIX}{entry.name}"

    return [name for _, _, name in sorted(names())]


def load(
    source: str | Path,
    tokenizer: str | Path | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> ImageGenerator[Any]:
    """A model by its ladder name, checkpoint directory, released file, directory in diffusers' layout, or hub name.

    tokenizer: the file or directory of its tokenizer or VAE; by default it is looked for beside the model under its
    usual name, and "none" does without (such a model can be quantized and saved, but draws no images)
    dtype: of the network's weights and arithmetic, also by name ("bfloat16"); tokenizers stay in float32
    options: what the tensors of a released file do not tell, such as heads=4 or image_size=384

    Raises ValueError for a name that is nothing of these (with the nearest ones), for a damaged, truncated or newer
    checkpoint (naming the file and the tensor), for a file with code in it, and for weights of no family that is known.
    """
    found, name = resolve(source)
    if isinstance(dtype, str):
        dtype = lookup(DTYPES, dtype, "type")
    if is_checkpoint(found):
        if tokenizer is not None or options:
            given = ", ".join(["tokenizer"] * (tokenizer is not None) + sorted(options))
            raise ValueError(f"{name}: a checkpoint of bitlaw says itself what {given} would; leave that out")
        model = _load_checkpoint(found, name, dtype)
    else:
        model = load_official(read_weights(found), tokenizer, dtype=dtype, **options)
    return model.to(device)


def load_official(
    file: WeightsFile,
    tokenizer: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> ImageGenerator[Any]:
    """The model in a released file; see `load`."""
    family = family_of(file)
    autoencoder = _autoencoder_for(family, file, tokenizer)
    model = family.from_official(file, autoencoder, dtype=dtype, **options)
    model.storage_dtype = dtype
    model.provenance = {"source": file.path.name}
    return model


def family_of(file: WeightsFile) -> type[ImageGenerator[Any]]:
    """The family that a released file belongs to. ValueError says what was found if it is none."""
    for family in FAMILIES.values():
        if family.recognizes(file):
            return family
    raise ValueError(
        f"{file.path}: weights of no model that is known; it holds {file.describe()}. Families: {', '.join(FAMILIES)}; "
        "`bitlaw models` lists their files"
    )


def _autoencoder_for(
    family: type[ImageGenerator[Any]], file: WeightsFile, given: str | Path | None
) -> Autoencoder | None:
    """The autoencoder that was named, or that lies beside the file or in it. ValueError names what was expected."""
    if not family.autoencoder_names or str(given) == NO_TOKENIZER:
        return None
    if given is not None:
        path = Path(given)
        path = path if path.exists() else hub_path(str(given)) or path
        return open_autoencoder(read_weights(path))
    for place, tensors in file.others.items():
        return open_autoencoder(WeightsFile(file.path, tensors, place))
    folder, names = file.path.parent, family.autoencoder_names_for(file)
    # Beside a file, and beside the folder of one that came with its folder, as a pipeline's transformer does.
    beside = [place / name for place in (folder, folder.parent) for name in (*names, *AUTOENCODER_PARTS)]
    for path in beside:
        if path.exists():
            return open_autoencoder(read_weights(path))
    wanted = " or ".join(names)
    raise ValueError(
        f"{file.path}: its {family.family} tokenizer is missing; expected {wanted} beside it. Give tokenizer=PATH, or "
        f"tokenizer='{NO_TOKENIZER}' to do without images"
    )


# ---- checkpoints of bitlaw ----------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    """Whether a path that `resolve` gave is a checkpoint of bitlaw and not a released file.

    That is a directory whose config.json bitlaw wrote, or one that is damaged so that this cannot be told.
    """
    config = path / CONFIG_FILE
    if not path.is_dir() or not config.is_file():
        return path.is_dir() and (path / QUANTIZATION_FILE).is_file()
    content = read_json(config)
    return "_class_name" not in content and ("family" in content or not _looks_like_diffusers(path))


def _looks_like_diffusers(path: Path) -> bool:
    return any(path.glob("diffusion_pytorch_model.*")) or (path / "model_index.json").is_file()


def _load_checkpoint(directory: Path, name: str, dtype: torch.dtype) -> ImageGenerator[Any]:
    config, tensors, quantization = read_checkpoint(directory)
    if "family" not in config:
        raise ValueError(f"{directory / CONFIG_FILE}: names no family; is it a checkpoint of bitlaw?")
    family = lookup(FAMILIES, config["family"], f"family in {directory / CONFIG_FILE}")
    plan: BitPlan | None = None
    parts: dict[str, SiteParts] = {}
    try:
        if quantization is not None:
            plan = _read_plan(quantization, directory / QUANTIZATION_FILE)
            parts, tensors = unpack_network(tensors, plan)
        model = family.from_checkpoint(config, tensors, dtype)
    except KeyError as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    model.storage_dtype = getattr(torch, config.get("dtype", "float32"))
    model.provenance = {"source": name}
    if quantization is not None:
        assert plan is not None
        model.net = install(model.net, plan, parts, model.clock)
        model.provenance = quantization.get("provenance", {})
    return model


def _read_plan(quantization: dict[str, Any], path: Path) -> BitPlan:
    found = quantization.get("format_version")
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise ValueError(f"{path.name}: format version {found}, this bitlaw reads up to {FORMAT_VERSION}; update it")
    if "plan" not in quantization:
        raise ValueError(f"{path.name}: the plan is missing")
    return BitPlan.from_json(quantization["plan"])


def resolve(source: str | Path) -> tuple[Path, str]:
    """The file or directory of a model, and the name under which it was asked for."""
    path, name = Path(source), str(source)
    if path.is_dir():
        return path, path.name
    if path.is_file():
        return path, path.name
    known = ladder_names()
    if name in known:
        root = resources.files("bitlaw") / "ladder" / "weights" / name.removeprefix(LADDER_PREFIX)
        with resources.as_file(root) as directory:
            return directory, name
    local = name.startswith((LADDER_PREFIX, ".", "/")) or (path.suffix and len(path.parts) < 3)
    if local or (on_hub := hub_path(name)) is None:
        raise unknown_name(name, known, "model (no such file or directory, and no built-in model)")
    return on_hub, name
