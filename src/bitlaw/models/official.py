"""Released files as tensors: what is around the weights is taken off, and nothing in a pickle is executed.

`read_weights` takes a `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors` file, a directory as the Hugging Face libraries
lay it out, or a name on the hub. Tensors stay mapped from the file until they are used, so a file is never twice in
memory. Which family they belong to is asked of the families (`ImageGenerator.recognizes`).
"""

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
DIFFUSERS_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
DIFFUSERS_PARTS = ("transformer", "unet")
AUTOENCODER_PARTS = ("vae", "vqvae")

# Where trainers put the weights; the averaged ones first, because the published scores are theirs.
_WRAPPERS = ("model_ema", "ema", "model", "module", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class WeightsFile:
    """The weights of one network, as a release holds them.

    path: where they come from
    tensors: by name, wrappers and the prefixes of DDP and torch.compile taken off
    wrapper: where in the file they were, e.g. "model_ema"; "" at the top
    metadata: settings that came along: a directory's config.json, a training run's arguments, a safetensors header
    others: further state dicts in the same file by their place, e.g. "vae_local" of VAR's trainer
    """

    path: Path
    tensors: Mapping[str, Tensor]
    wrapper: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor. ValueError naming the file if it is not there."""
        if key not in self.tensors:
            raise ValueError(f"{self.path.name}: {key} is missing")
        return tuple(self.tensors[key].shape)

    def count(self, pattern: str) -> int:
        """How many indices `pattern`, which has one group of digits, finds in the names: blocks, stages, levels."""
        return len({found.group(1) for key in self.tensors if (found := re.match(pattern, key))})

    def describe(self, num_names: int = 4) -> str:
        """What is in the file, for an error."""
        names = list(self.tensors)
        shown = ", ".join(f"{name} {tuple(self.tensors[name].shape)}" for name in names[:num_names])
        inside = f" under '{self.wrapper}'" if self.wrapper else ""
        return f"{len(names)} tensors{inside}: {shown}{' ...' if len(names) > num_names else ''}"


def read_weights(path: Path | str) -> WeightsFile:
    """The weights of a file, of a directory in the layout of the Hugging Face libraries, or of a subfolder of one.

    Raises ValueError, naming the file, if it is missing, damaged, truncated, has code in it, or holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix not in (*PICKLES, ".safetensors"):
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join((*PICKLES, '.safetensors'))}, or a directory"
        )
    return _read_file(path, with_settings=path.name.startswith(_NEVER_ALONE))


# ---- reading ----------------------------------------------------------------------------------------


def _read_directory(directory: Path) -> WeightsFile:
    """A model directory: config.json and one weights file, either here or in its transformer's or UNet's folder."""
    for part in DIFFUSERS_PARTS:
        if (directory / part / "config.json").is_file():
            return _read_directory(directory / part)
    candidates = [directory / f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in DIFFUSERS_STEMS]
    candidates += sorted(directory.glob("consolidated_ema.*.pth")) + sorted(directory.glob("consolidated.*.pth"))
    for file in candidates:
        if file.is_file():
            return _read_file(file, with_settings=True)
    wanted = ", ".join(file.name for file in candidates[: len(DIFFUSERS_STEMS)])
    raise ValueError(f"{directory}: no weights in this directory; expected one of {wanted} (or .bin)")


# Files of releases that are folders, with the settings in another file.
_NEVER_ALONE = ("diffusion_pytorch_model.", "consolidated.", "consolidated_ema.")


def _read_file(path: Path, with_settings: bool) -> WeightsFile:
    """A weights file; `with_settings` adds what config.json and Large-DiT's model_args.pth beside it say."""
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _unwrap(path, _unpickle(path))
    found = _latent_diffusion(found)
    if not with_settings:
        return found
    config, arguments = path.with_name("config.json"), path.with_name("model_args.pth")
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    more = _plain(_unpickle(arguments)) if arguments.is_file() else {}
    return replace(found, metadata={**found.metadata, **settings, **more})


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: _value(text) for key, text in (file.metadata() or {}).items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error})") from error
    return WeightsFile(path, _strip(tensors), metadata=metadata)


def _value(text: str) -> Any:
    """A number or list that a safetensors header has as text."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text


class _Inert:
    """Stands for an object of a training run's bookkeeping: built and filled without running any of its code."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


# Names that published training checkpoints refer to beside their tensors. None of them is imported.
_BOOKKEEPING = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "omegaconf.dictconfig.DictConfig",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def _unpickle(path: Path) -> Any:
    """What a pickle holds, with tensors and plain values only. ValueError names what else is in it."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; fetch it with git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path}: a web page, not weights; the download has failed")
    inert: list[Any] = [argparse.Namespace, *((_Inert, name) for name in _BOOKKEEPING)]
    is_zip = head.startswith(b"PK")
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.findall(r"(?:GLOBAL|Unsupported global:|Unsupported class) ([\w.]+)", str(error))
        names = sorted({name for name in found if name != "GLOBAL"} | _unsafe_names(path, is_zip))
        if not names:
            raise ValueError(f"{path}: damaged or truncated ({_first_line(error)})") from error
        raise ValueError(
            f"{path}: holds more than weights ({', '.join(names)}); bitlaw runs no code from a file. Save its "
            "state dict alone, or as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged or truncated ({_first_line(error)})") from error


def _unsafe_names(path: Path, is_zip: bool) -> set[str]:
    if not is_zip:
        return set()
    return {name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) if name not in _BOOKKEEPING}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# ---- unwrapping -------------------------------------------------------------------------------------


def _unwrap(path: Path, content: Any) -> WeightsFile:
    """The state dict inside what a trainer saved. ValueError says what was found instead."""
    if isinstance(content, list) and content:  # [model, optimizer, ..., average] of the DDIM repository
        for index, part in reversed(list(enumerate(content))):
            if _is_state_dict(part):
                return WeightsFile(path, _strip(part), f"[{index}]")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    if _is_state_dict(content):
        return WeightsFile(path, _strip(content))
    metadata = _plain(content.get("args"))
    trainer = content.get("trainer")
    if isinstance(trainer, Mapping) and _is_state_dict(trainer.get("var_wo_ddp")):  # VAR's trainer
        others = {"vae_local": _strip(trainer["vae_local"])} if _is_state_dict(trainer.get("vae_local")) else {}
        return WeightsFile(path, _strip(trainer["var_wo_ddp"]), "trainer.var_wo_ddp", metadata, others)
    for wrapper in _WRAPPERS:
        if _is_state_dict(content.get(wrapper)):
            return WeightsFile(path, _strip(content[wrapper]), wrapper, metadata)
    held = ", ".join(map(str, list(content)[:8])) or "nothing"
    raise ValueError(f"{path}: no weights found; it holds {held}, expected tensors or one of {', '.join(_WRAPPERS)}")


def _latent_diffusion(file: WeightsFile) -> WeightsFile:
    """Of a training checkpoint of LDM, the UNet with the class vectors, and the first stage apart; others as they are.

    The UNet's weights are the averaged ones where there are such. ValueError names those that have no average.
    """
    raw = {name: tensor for name, tensor in file.tensors.items() if name.startswith(_LDM_UNET)}
    if not raw:
        return file
    unet = dict(raw)
    if any(name.startswith(_LDM_AVERAGE) for name in file.tensors):  # buffers, whose names have no dots
        averages = {name: _LDM_AVERAGE + name.removeprefix("model.").replace(".", "") for name in raw}
        if missing := sorted(set(averages.values()) - set(file.tensors)):
            raise ValueError(f"{file.path}: averaged weights are missing: {', '.join(missing[:8])}")
        unet = {name: file.tensors[average] for name, average in averages.items()}
    own = {name.removeprefix(_LDM_UNET): tensor for name, tensor in unet.items()}
    own |= {k: v for k, v in file.tensors.items() if k == "scale_factor" or k.startswith("cond_stage_model.")}
    first_stage = {k.removeprefix(_LDM_CODEC): v for k, v in file.tensors.items() if k.startswith(_LDM_CODEC)}
    others = {**file.others, **({_LDM_CODEC[:-1]: first_stage} if first_stage else {})}
    return WeightsFile(file.path, own, file.wrapper, file.metadata, others)


_LDM_UNET, _LDM_AVERAGE, _LDM_CODEC = "model.diffusion_model.", "model_ema.", "first_stage_model."


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP and torch.compile put before them."""
    stripped = {}
    for name, tensor in tensors.items():
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        stripped[name] = tensor
    return stripped


def _plain(arguments: Any) -> dict[str, Any]:
    """A training run's arguments as a dictionary of plain values."""
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    if not isinstance(values, Mapping):
        return {}
    return {str(k): v for k, v in values.items() if isinstance(v, str | int | float | bool | list | tuple)}


# ---- the hub ----------------------------------------------------------------------------------------

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w./-]+)?")


def hub_path(name: str) -> Path | None:
    """The local copy of `owner/repository` or `owner/repository/file` on the Hugging Face hub, fetched if need be.

    None if the name is not of that form. ValueError if it cannot be had.
    """
    if not _HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import hf_hub_download, snapshot_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, repository, *rest = name.split("/", 2)
    try:
        if rest:
            return Path(hf_hub_download(f"{owner}/{repository}", rest[0]))
        patterns = ["*.json", "*/*.json", "*.safetensors", "*/*.safetensors", "*.bin", "*/*.bin", "consolidated*.pth"]
        return Path(snapshot_download(f"{owner}/{repository}", allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"{name}: no such file here, and not to be had from the hub ({_first_line(error)})") from error
