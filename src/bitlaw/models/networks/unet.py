"""The UNets of DDPM and latent diffusion, by diffusers' classes.

The class is `UNet2DModel`, and for a class-conditional model `UNet2DConditionModel` with a table of class vectors that
its blocks attend to. Attention is computed here: diffusers' modules are called as they are, and the operands of the
product can be quantized on the way.

Legend: B images, C channels and H = W side of what is denoised, O output channels, T positions, D width.
"""

import inspect
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from bitlaw.models.generator import Absorber, Site
from bitlaw.models.parts.attention import attend
from bitlaw.models.parts.group_norm import make_exact


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a network.

    settings: arguments of diffusers' class; at least sample_size, block_out_channels and the types of its blocks
    heads: of every attention, whatever its width; None where `settings` say it
    num_classes: of a class-conditional network, which has one more for the unconditional model; 0 for none
    """

    settings: dict[str, Any]
    heads: int | None = None
    num_classes: int = 0

    def __post_init__(self) -> None:
        known = inspect.signature(self.network_class.__init__).parameters
        if unknown := sorted(self.settings.keys() - known):
            raise ValueError(f"UNet: {', '.join(unknown)}: no setting of diffusers' {self.network_class.__name__}")
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in self.settings.items()}
        object.__setattr__(self, "settings", plain)
        smallest = 2 ** (len(plain["block_out_channels"]) - 1)
        if not isinstance(self.side, int) or self.side % smallest:
            raise ValueError(
                f"UNet: side {self.side} of its images must be a multiple of {smallest}, which its levels halve it by"
            )

    @property
    def network_class(self) -> type[nn.Module]:
        """The class of diffusers."""
        return UNet2DConditionModel if self.num_classes else UNet2DModel

    @property
    def side(self) -> int:
        """H = W."""
        side: int = self.settings["sample_size"]
        return side

    @property
    def in_channels(self) -> int:
        """C."""
        channels: int = self.settings["in_channels"]
        return channels


class UNet(nn.Module):
    """(noisy images or latents, timestep, class) -> the noise in them. Class num_classes is the null class.

    Nothing is dropped at random in training, whatever `settings` say.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.unet: Any = config.network_class(**config.settings)
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.settings["cross_attention_dim"])
        make_exact(self.unet)
        for name, module in list(self.unet.named_modules()):
            if isinstance(module, nn.Dropout):
                self.unet.set_submodule(name, nn.Identity())
            if isinstance(module, Attention):
                if config.heads is not None:
                    module.heads = config.heads
                module.quant_q, module.quant_k, module.quant_v = nn.Identity(), nn.Identity(), nn.Identity()
                module.set_processor(AttentionOperands())

    def reset_tables(self) -> None:
        """Kernels as channels last: a fifth faster on a CPU, and to rounding the same."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x_BCHW: Tensor, t: Tensor | int, labels_B: Tensor | None = None) -> Tensor:
        """Output (B, O, H, W), float32, for one timestep or one of each row."""
        x_BCHW = x_BCHW.to(self.unet.conv_in.bias.dtype)
        if not self.config.num_classes:
            return self.unet(x_BCHW, t, return_dict=False)[0].float()
        vectors_B1D = self.class_embedding(labels_B).unsqueeze(1)
        return self.unet(x_BCHW, t, vectors_B1D, return_dict=False)[0].float()

    def sites(self) -> Iterator[Site]:
        """Every linear and convolution in order of execution; `uses` are those of one step.

        Blocks are numbered as diffusers has them: those on the way down, the middle, those on the way up.
        """
        yield from (Site(f"unet.time_embedding.linear_{i}", "time_embedding", None, "embed", 1) for i in (1, 2))
        side = self.config.side
        yield Site("unet.conv_in", "conv_in", None, "embed", side * side)
        names = [f"down_blocks.{i}" for i in range(len(self.unet.down_blocks))]
        names += ["mid_block", *(f"up_blocks.{i}" for i in range(len(self.unet.up_blocks)))]
        for index, name in enumerate(names):
            side = yield from _block_sites(f"unet.{name}", self.get_submodule(f"unet.{name}"), index, side)
        yield Site("unet.conv_out", "conv_out", None, "head", side * side)


class AttentionOperands:
    """Computes an `Attention` of diffusers. Its `quant_q`, `quant_k`, `quant_v` see the operands, (B, heads, T, d)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, D, H, W) with normalisation and residual, or (B, T, D) without, to the same shape."""
        assert attention_mask is None and attn.rescale_output_factor == 1
        x_BTD = hidden_states
        if hidden_states.dim() == 4:
            x_BTD = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        context = x_BTD if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(x_BTD), attn.to_k(context), attn.to_v(context))
        q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts)
        out_BTD = attend(attn.quant_q(q), attn.quant_k(k), attn.quant_v(v), q.shape[-1] ** -0.5)
        out_BTD = attn.to_out[0](out_BTD)
        if hidden_states.dim() == 4:
            return out_BTD.transpose(1, 2).reshape(hidden_states.shape) + hidden_states
        return out_BTD


def _block_sites(name: str, block: Any, index: int, side: int) -> Generator[Site, None, int]:
    """The sites of a block whose input has this side; returns the side of its output."""

    def site(path: str, kind: str, uses: int, absorber: Absorber | None = None) -> Site:
        return Site(f"{name}.{path}", kind, index, "blocks", uses, absorber)

    def resnet_sites(path: str, resnet: Any, side: int) -> Iterator[Site]:
        yield site(f"{path}.conv1", "conv1", side * side)
        yield site(f"{path}.time_emb_proj", "temb", 1)
        yield site(f"{path}.conv2", "conv2", side * side)
        if resnet.conv_shortcut is not None:
            yield site(f"{path}.conv_shortcut", "shortcut", side * side)

    def attention_sites(
        path: str, attention: Any, kv_uses: int, norm: Absorber | None, kv_norm: Absorber | None
    ) -> Iterator[Site]:
        yield site(f"{path}.to_q", "qkv", side * side, norm)
        yield site(f"{path}.to_k", "kv", kv_uses, kv_norm)
        yield site(f"{path}.to_v", "kv", kv_uses, kv_norm)
        width, has_bias = attention.to_v.out_features, attention.to_v.bias is not None
        values = Absorber.rows(f"{name}.{path}.to_v", 0, width, shifts=has_bias)
        yield site(f"{path}.to_out.0", "proj", side * side, values)

    def mixer_sites(path: str, mixer: Any) -> Iterator[Site]:
        if isinstance(mixer, Attention):
            norm = Absorber.norm(f"{name}.{path}.group_norm")
            yield from attention_sites(path, mixer, side * side, norm, norm)
            return
        yield site(f"{path}.proj_in", "proj_in", side * side, Absorber.norm(f"{name}.{path}.norm"))
        for i, inner in enumerate(mixer.transformer_blocks):
            inside = f"{path}.transformer_blocks.{i}"
            is_plain = inner.norm_type == "layer_norm" and inner.norm1.weight is not None and inner.pos_embed is None
            is_plain &= not inner.only_cross_attention  # its keys are not those of norm1's output
            norms = [Absorber.norm(f"{name}.{inside}.norm{j}") if is_plain else None for j in (1, 2, 3)]
            yield from attention_sites(f"{inside}.attn1", inner.attn1, side * side, norms[0], norms[0])
            yield from attention_sites(f"{inside}.attn2", inner.attn2, 1, norms[1], None)
            yield site(f"{inside}.ff.net.0.proj", "fc1", side * side, norms[2])
            gated = None
            if isinstance(inner.ff.net[0], GEGLU):
                width = inner.ff.net[2].in_features  # the first half is multiplied by GELU of the second
                gated = Absorber.rows(f"{name}.{inside}.ff.net.0.proj", 0, width, shifts=False)
            yield site(f"{inside}.ff.net.2", "fc2", side * side, gated)
        yield site(f"{path}.proj_out", "proj_out", side * side)

    mixers = list(getattr(block, "attentions", None) or [])  # one after each residual block, but not the middle's last
    for i, resnet in enumerate(block.resnets):
        yield from resnet_sites(f"resnets.{i}", resnet, side)
        if i < len(mixers):
            yield from mixer_sites(f"attentions.{i}", mixers[i])
    for kind, factor in (("down", 0.5), ("up", 2)):
        for change in getattr(block, f"{kind}samplers", None) or []:
            side = int(side * factor)
            if isinstance(change, ResnetBlock2D):
                yield from resnet_sites(f"{kind}samplers.0", change, side)
            else:
                yield site(f"{kind}samplers.0.conv", kind, side * side)
    return side


def class_settings(config: Mapping[str, Any], network_class: type[nn.Module] = UNet2DModel) -> dict[str, Any]:
    """What of a config.json of diffusers are arguments of its class."""
    known = inspect.signature(network_class.__init__).parameters
    return {key: value for key, value in config.items() if key in known}
