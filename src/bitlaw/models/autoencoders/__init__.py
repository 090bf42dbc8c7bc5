"""Autoencoders, by the name that a checkpoint's configuration has for them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bitlaw.models.autoencoders.autoencoder import Autoencoder
from bitlaw.models.autoencoders.kl import KLAutoencoder
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer
from bitlaw.models.autoencoders.token_vq import TokenVQ
from bitlaw.models.autoencoders.vq import VQAutoencoder
from bitlaw.models.official import WeightsFile
from bitlaw.models.storage import build
from bitlaw.names import lookup

AUTOENCODERS: dict[str, type[Autoencoder]] = {
    kind.kind: kind for kind in (VQTokenizer, KLAutoencoder, TokenVQ, VQAutoencoder)
}


def autoencoder_config(autoencoder: Autoencoder) -> dict[str, Any]:
    """Kind and sizes, for a checkpoint; `restore_autoencoder` reads them."""
    return {"kind": autoencoder.kind, **autoencoder.to_config()}


def restore_autoencoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Autoencoder:
    """The autoencoder of a checkpoint. ValueError names each tensor that does not fit.

    A configuration without "kind" is that of VAR's tokenizer, as the first checkpoints had it.
    """
    sizes = dict(config)
    kind = lookup(AUTOENCODERS, sizes.pop("kind", VQTokenizer.kind), "kind of autoencoder")
    return build(lambda: kind.from_config(sizes), tensors, "tokenizer", ignore=("ema_vocab_hit_SV",))


def open_autoencoder(file: WeightsFile, **sizes: Any) -> Autoencoder:
    """The autoencoder of a released file, or beside the network of a training checkpoint.

    ValueError says what was found if there is none.
    """
    parts = [file, *(WeightsFile(file.path, tensors, place) for place, tensors in file.others.items())]
    for part in parts:
        for kind in AUTOENCODERS.values():
            if kind.recognizes(part):
                return kind.from_official(part, **sizes)
    raise ValueError(f"{file.path}: not an autoencoder that is known ({', '.join(AUTOENCODERS)}); {file.describe()}")


__all__ = [
    "AUTOENCODERS",
    "Autoencoder",
    "KLAutoencoder",
    "TokenVQ",
    "VQAutoencoder",
    "VQTokenizer",
    "autoencoder_config",
    "open_autoencoder",
    "restore_autoencoder",
]
