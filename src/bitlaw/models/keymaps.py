"""Names of the original convolutional networks and of the diffusers classes that compute the same.

A map is a table from module to module (`"down.0.block.1.conv1": "down_blocks.0.resnets.1.conv1"`), made for a network's
number of levels and blocks, so that it can be read in both directions.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Modules = dict[str, str]

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
    "temb_proj": "time_emb_proj",
}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LINEAR = tuple(f".{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))


def resnet(official: str, ours: str) -> Iterator[tuple[str, str]]:
    """The modules of a residual block."""
    return ((f"{official}.{a}", f"{ours}.{b}") for a, b in _RESNET.items())


def attention(official: str, ours: str) -> Iterator[tuple[str, str]]:
    """The modules of an attention block over positions."""
    return ((f"{official}.{a}", f"{ours}.{b}") for a, b in _ATTENTION.items())


def taming_half(half: str, num_levels: int, num_blocks: int, *, inner: str = "") -> Modules:
    """The encoder ("down") or decoder ("up") of a VQGAN-style autoencoder, or of a DDPM UNet, which has both.

    half: "down" or "up"; inner: what stands before the names, "encoder." or "decoder."
    """
    modules: Modules = {}
    for level in range(num_levels):
        there = level if half == "down" else num_levels - 1 - level
        for block in range(num_blocks):
            modules |= resnet(f"{inner}{half}.{level}.block.{block}", f"{inner}{half}_blocks.{there}.resnets.{block}")
            modules |= attention(
                f"{inner}{half}.{level}.attn.{block}", f"{inner}{half}_blocks.{there}.attentions.{block}"
            )
        change = f"{half}sample"
        modules[f"{inner}{half}.{level}.{change}.conv"] = f"{inner}{half}_blocks.{there}.{change}rs.0.conv"
    return modules


def taming_middle(inner: str = "") -> Modules:
    """What lies between the halves, and the convolutions at both ends."""
    modules = {f"{inner}{name}": f"{inner}{name}" for name in ("conv_in", "conv_out")}
    modules |= {f"{inner}norm_out": f"{inner}conv_norm_out"}
    for number in (1, 2):
        modules |= resnet(f"{inner}mid.block_{number}", f"{inner}mid_block.resnets.{number - 1}")
    modules |= attention(f"{inner}mid.attn_1", f"{inner}mid_block.attentions.0")
    return modules


def taming_autoencoder(num_levels: int, num_blocks: int) -> Modules:
    """LDM's and MAR's autoencoders; the decoder has a block more on each level."""
    modules = {name: name for name in ("quant_conv", "post_quant_conv", "quantize.embedding")}
    for inner, half, blocks in (("encoder.", "down", num_blocks), ("decoder.", "up", num_blocks + 1)):
        modules |= taming_middle(inner) | taming_half(half, num_levels, blocks, inner=inner)
    return modules


def ddpm_unet(num_levels: int, num_blocks: int) -> Modules:
    """The UNets of the DDPM and DDIM repositories; on the way up there is a block more on each level."""
    modules = {f"temb.dense.{i}": f"time_embedding.linear_{i + 1}" for i in (0, 1)}
    modules |= taming_middle()
    return modules | taming_half("down", num_levels, num_blocks) | taming_half("up", num_levels, num_blocks + 1)


_OPENAI_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TRANSFORMER = (
    *("norm", "proj_in", "proj_out"),
    *(f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)),
    *(f"transformer_blocks.0.attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"),
)


def openai_unet(
    attention_levels: Sequence[bool], num_blocks: int, *, resnet_resampling: bool, spatial: bool
) -> Modules:
    """The UNets of guided-diffusion and latent diffusion, whose blocks are numbered through.

    attention_levels: which levels have attention; the middle always has
    resnet_resampling: sides change by residual blocks and not by a convolution
    spatial: attention is a spatial transformer; its modules have the same names in both
    Fused attention has to be split by `split_qkv` before.
    """

    def openai_resnet(official: str, ours: str) -> Modules:
        return {f"{official}.{a}": f"{ours}.{b}" for a, b in _OPENAI_RESNET.items()}

    def mixer(official: str, ours: str) -> Modules:
        if spatial:
            return {f"{official}.{name}": f"{ours}.{name}" for name in _TRANSFORMER}
        return dict(attention(official, ours))

    def resampler(official: str, ours: str, conv: str) -> Modules:
        if resnet_resampling:
            return openai_resnet(official, ours)
        return {f"{official}.{conv}": f"{ours}.conv"}

    modules = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    modules |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    last = len(attention_levels) - 1
    number = 1
    for level, has_attention in enumerate(attention_levels):
        for block in range(num_blocks):
            modules |= openai_resnet(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{block}")
            if has_attention:
                modules |= mixer(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{block}")
            number += 1
        if level < last:
            modules |= resampler(f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0", "op")
            number += 1
    modules |= openai_resnet("middle_block.0", "mid_block.resnets.0")
    modules |= mixer("middle_block.1", "mid_block.attentions.0")
    modules |= openai_resnet("middle_block.2", "mid_block.resnets.1")
    number = 0
    for level, has_attention in enumerate(reversed(attention_levels)):
        for block in range(num_blocks + 1):
            modules |= openai_resnet(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{block}")
            if has_attention:
                modules |= mixer(f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{block}")
            if level < last and block == num_blocks:
                place = f"output_blocks.{number}.{2 if has_attention else 1}"
                modules |= resampler(place, f"up_blocks.{level}.upsamplers.0", "conv")
            number += 1
    return modules


def openai_unet_of(tensors: Mapping[str, Tensor]) -> Modules:
    """The map of a UNet in a file, read from its names."""

    def numbers(pattern: str) -> list[int]:
        found = {int(match.group(1)) for name in tensors if (match := re.match(pattern, name))}
        return sorted(found)

    by_resnet = numbers(r"output_blocks\.(\d+)\.[12]\.in_layers\.")
    upsampled = by_resnet or numbers(r"output_blocks\.(\d+)\.[12]\.conv\.")
    blocks, num_levels = numbers(r"output_blocks\.(\d+)\."), len(upsampled) + 1
    num_blocks = len(blocks) // num_levels - 1
    with_attention = numbers(r"input_blocks\.(\d+)\.1\.norm\.")
    return openai_unet(
        [1 + level * (num_blocks + 1) in with_attention for level in range(num_levels)],
        num_blocks,
        resnet_resampling=bool(by_resnet),
        spatial=any("transformer_blocks." in name for name in tensors),
    )


def split_qkv(tensors: Mapping[str, Tensor], heads_of: Callable[[int], int]) -> dict[str, Tensor]:
    """Fused attention of openai's UNets as q, k and v. Rows are ordered (head, q k v, row of the head).

    heads_of: number of heads for a width
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        if not parent.endswith(".qkv"):
            split[name] = tensor
            continue
        heads = heads_of(len(tensor) // 3)
        if len(tensor) % (3 * heads):
            raise ValueError(f"{name}: {len(tensor)} rows are not q, k and v of {heads} heads")
        parts = tensor.unflatten(0, (heads, 3, -1)).unbind(1)
        for letter, part in zip("qkv", parts, strict=True):
            split[f"{parent.removesuffix('qkv')}{letter}.{leaf}"] = part.flatten(0, 1)
    return split


def join_qkv(tensors: Mapping[str, Tensor], heads_of: Callable[[int], int]) -> dict[str, Tensor]:
    """The inverse of `split_qkv`."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        attention_module, _, letter = parent.rpartition(".")
        if letter in ("k", "v"):
            continue
        if letter != "q":
            joined[name] = tensor
            continue
        heads = heads_of(len(tensor))
        parts = [tensors[f"{attention_module}.{part}.{leaf}"].unflatten(0, (heads, -1)) for part in "qkv"]
        joined[f"{attention_module}.qkv.{leaf}"] = torch.stack(parts, 1).flatten(0, 2)
    return joined


def present_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file of diffusers under the names of today: attention had other ones in the releases of 2022."""
    renamed = {}
    for name, tensor in tensors.items():
        *parents, module, leaf = name.split(".")
        if "attentions" in parents:
            module = _OLD_ATTENTION.get(module, module)
        renamed[".".join((*parents, module, leaf))] = tensor
    return renamed


def to_ours(tensors: Mapping[str, Tensor], modules: Modules) -> dict[str, Tensor]:
    """Tensors under the names of diffusers; 1 x 1 kernels of attention become matrices.

    Names that the map does not have are kept, for the loader to refuse.
    """
    renamed = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        ours = modules.get(module, module)
        if ours.endswith(_LINEAR) and leaf == "weight":
            tensor = tensor.flatten(1)
        renamed[f"{ours}.{leaf}"] = tensor
    return renamed


def to_theirs(tensors: Mapping[str, Tensor], modules: Modules, *, kernel_dims: int = 2) -> dict[str, Tensor]:
    """The inverse of `to_ours`. ValueError for a name that the map does not have.

    kernel_dims: of the convolutions that attention is made of in the official layout
    """
    inverse = {ours: official for official, ours in modules.items()}
    renamed = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module not in inverse:
            raise ValueError(f"{name}: the official layout has no place for it")
        if module.endswith(_LINEAR) and leaf == "weight" and not inverse[module].endswith(_LINEAR):
            tensor = tensor[(..., *[None] * kernel_dims)]
        renamed[f"{inverse[module]}.{leaf}"] = tensor
    return renamed
