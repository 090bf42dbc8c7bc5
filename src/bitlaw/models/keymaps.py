"""Names of the original convolutional networks and of the diffusers classes that compute the same.

A map is a table from module to module (`"down.0.block.1.conv1": "down_blocks.0.resnets.1.conv1"`), made for a network's
number of levels and blocks, so that it can be read in both directions.
"""

from collections.abc import Iterator, Mapping

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


def to_theirs(tensors: Mapping[str, Tensor], modules: Modules) -> dict[str, Tensor]:
    """The inverse of `to_ours`. ValueError for a name that the map does not have."""
    inverse = {ours: official for official, ours in modules.items()}
    renamed = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module not in inverse:
            raise ValueError(f"{name}: the official layout has no place for it")
        if module.endswith(_LINEAR) and leaf == "weight":
            tensor = tensor[:, :, None, None]
        renamed[f"{inverse[module]}.{leaf}"] = tensor
    return renamed
