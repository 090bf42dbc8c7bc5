"""The network of VAR (Tian et al. 2024): next-stage prediction over the token maps of a multi-scale tokenizer.

State-dict keys on disk are those of the official checkpoints (FoundationVision/VAR). In memory q and v biases are one
fused bias of `mat_qkv`, whose key part is always zero, so that it is an ordinary linear to hooks and quantizers.

Legend: B images, R rows (B, or 2 B with guidance: conditional, then unconditional), N tokens of a stage, L tokens of
all stages, M tokens seen so far, C width, H heads, d = C / H, V vocabulary, Z latent channels, K distinct classes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.linear import Linear, linear
from bitlaw.models.parts.attention import attend
from bitlaw.models.parts.gelu import gelu_tanh
from bitlaw.models.parts.key_values import KeyValues, LayerKeyValues


@dataclass(frozen=True)
class VARConfig:
    """Sizes of a network. qk_norm: cosine attention with a learned temperature (all current releases)."""

    depth: int
    width: int
    heads: int
    num_classes: int = 1000
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocab_size: int = 4096
    latent_channels: int = 32
    shared_adaln: bool = False
    qk_norm: bool = True
    norm_eps: float = 1e-6
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        if self.width % self.heads:
            raise ValueError(f"VAR width {self.width} is not a multiple of its {self.heads} heads")

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one image."""
        return sum(side * side for side in self.patch_nums)

    def span(self, stage: int) -> slice:
        """Where a stage's tokens are among all."""
        begin = sum(side * side for side in self.patch_nums[:stage])
        return slice(begin, begin + self.patch_nums[stage] ** 2)


class Conditions(NamedTuple):
    """What the class of every row makes of the network; it depends on nothing else, so it is computed once a rollout.

    blocks: for each block gamma1, gamma2, scale1, scale2, shift1, shift2; head: scale, shift; each (R, 1, C)
    """

    class_RC: Tensor
    blocks: list[tuple[Tensor, ...]]
    head: tuple[Tensor, ...]


class VARTransformer(nn.Module):
    """The network: (class, latent accumulated over the stages before) -> logits of a stage's tokens."""

    mask_LL: Tensor
    stage_L: Tensor

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config = config
        width, length = config.width, config.num_tokens
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, width))
        self.lvl_embed = nn.Embedding(len(config.patch_nums), width)
        self.word_embed = Linear(config.latent_channels, width)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(config)
        self.head = Linear(width, config.vocab_size)
        self.register_buffer("stage_L", torch.empty(0), persistent=False)
        self.register_buffer("mask_LL", torch.empty(0), persistent=False)
        self.reset_tables()
        self._initialize()

    def reset_tables(self) -> None:
        """The stage of every token, and the mask of a teacher-forced pass."""
        device = self.pos_start.device
        sides = self.config.patch_nums
        self.stage_L = torch.cat([torch.full((side * side,), s, device=device) for s, side in enumerate(sides)])
        later_LL = self.stage_L[:, None] < self.stage_L
        self.mask_LL = torch.zeros(later_LL.shape, device=device).masked_fill_(later_LL, -torch.inf)

    def forward(self, labels_B: Tensor, latents_BLZ: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, V) from the latent inputs (B, L - 1, Z) of all stages but the first.

        Label num_classes is the null class. No label is dropped here, unlike in the official forward.
        """
        conditions = self.conditions(labels_B)
        first_B1C = self._first(conditions)
        x_BLC = torch.cat([first_B1C, self.word_embed(latents_BLZ.to(first_B1C.dtype))], 1) + self._positions()
        mask_LL = self.mask_LL.to(x_BLC.dtype)
        for block, modulation in zip(self.blocks, conditions.blocks, strict=True):
            x_BLC = block(x_BLC, modulation, bias_NM=mask_LL)
        return self.logits(x_BLC, conditions.head)

    def conditions(self, labels_R: Tensor) -> Conditions:
        """Class vectors and modulations of every row, each distinct class computed once."""
        classes_K, row_R = labels_R.unique(return_inverse=True)
        class_KC = self.class_emb(classes_K)
        silu_KC = F.silu(class_KC)
        shared_KX = self.shared_ada_lin[1](silu_KC) if self.config.shared_adaln else None
        return Conditions(
            class_KC[row_R],
            [_parts(block.modulation(silu_KC, shared_KX)[row_R], 6) for block in self._typed_blocks()],
            _parts(self.head_nm.ada_lin[1](silu_KC)[row_R], 2),
        )

    def begin(self, labels_R: Tensor) -> "Memory":
        """Memory of rows that no stage has been run on."""
        config = self.config
        num_kept = config.num_tokens - config.patch_nums[-1] ** 2
        shape = (config.depth, 2, len(labels_R), config.heads, num_kept, config.width // config.heads)
        return Memory(self.conditions(labels_R), self._positions(), KeyValues(self.pos_1LC.new_empty(shape)), 0)

    def run_stage(self, memory: "Memory", stage: int, latents_BNZ: Tensor | None = None) -> tuple[Tensor, "Memory"]:
        """Hidden states (R, N, C) of one stage, and the memory grown by it; the memory given stays as it is.

        `latents_BNZ` are the stage's inputs (None for stage 0), the same for both halves of the rows.
        """
        span = self.config.span(stage)
        positions_NC = memory.positions_LC[span]
        if latents_BNZ is None:
            x_RNC = self._first(memory.conditions) + positions_NC
        else:
            x_BNC = self.word_embed(latents_BNZ.to(positions_NC.dtype)) + positions_NC
            x_RNC = x_BNC.repeat(len(memory.conditions.class_RC) // len(x_BNC), 1, 1)
        is_last = stage == len(self.config.patch_nums) - 1
        store = memory.store if is_last else memory.store.writable(memory.length)
        for i, (block, modulation) in enumerate(zip(self.blocks, memory.conditions.blocks, strict=True)):
            layer = LayerKeyValues(store.layers[i], memory.length, keeps=not is_last)
            x_RNC = block(x_RNC, modulation, memory=layer)
        if is_last:
            return x_RNC, memory
        store.filled = span.stop
        return x_RNC, memory._replace(store=store, length=span.stop)

    def logits(self, x_RNC: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Logits (R, N, V) of hidden states; float32. The head computes in the network's type, what is before not."""
        scale, shift = (part.float() for part in modulation)
        normed_RNC = _modulated_norm(x_RNC.float(), scale, shift, self.config.norm_eps)
        return self.head(normed_RNC.to(x_RNC.dtype)).float()

    def _first(self, conditions: Conditions) -> Tensor:
        return conditions.class_RC.unsqueeze(1) + self.pos_start

    def _positions(self) -> Tensor:
        return self.lvl_embed(self.stage_L) + self.pos_1LC[0]

    def _typed_blocks(self) -> Iterable["Block"]:
        return cast(Iterable[Block], self.blocks)

    def _initialize(self) -> None:
        """As the official training: narrow normals, residual branches and their gates small, logits near zero."""
        width, depth = self.config.width, self.config.depth
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not name.endswith(("scale_mul_1H11", "ada_gss")):
                nn.init.trunc_normal_(parameter, std=math.sqrt(1 / (3 * width)))
            with torch.no_grad():
                if name == "head.weight":
                    parameter.mul_(0.02)
                elif name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                    parameter.div_(math.sqrt(2 * depth))
                elif name.startswith("blocks") and name.endswith("ada_lin.1.weight"):
                    parameter[: 2 * width].mul_(1e-3)
                    parameter[2 * width :].mul_(0.5)
                elif name == "head_nm.ada_lin.1.weight":
                    parameter.mul_(0.5)


class Memory(NamedTuple):
    """What earlier stages left: the first `length` tokens of a store that later memories may share.

    Conditions and positions (L, C) are those of all stages.
    """

    conditions: Conditions
    positions_LC: Tensor
    store: KeyValues
    length: int


class QKVLinear(nn.Linear):
    """The fused projection to q, k and v. Keys have no bias: their part of it is zero and gets no gradient."""

    has_bias: Tensor

    def __init__(self, width: int):
        super().__init__(width, 3 * width)
        self.register_buffer("has_bias", torch.empty(0), persistent=False)
        self.reset_tables()

    def reset_tables(self) -> None:
        """Ones where there is a bias, zeros for the keys."""
        width = self.in_features
        self.has_bias = torch.ones(3 * width, device=self.weight.device)
        self.has_bias[width : 2 * width] = 0

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        bias = self.bias * self.has_bias.to(self.bias.dtype) if torch.is_grad_enabled() else self.bias
        return linear(input, self.weight, bias)


class Attention(nn.Module):
    """Multi-head attention. `quant_q`, `quant_k`, `quant_v` see the operands (R, H, N, d), q and k normalized."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.heads, self.qk_norm = config.heads, config.qk_norm
        self.mat_qkv = QKVLinear(config.width)
        self.proj = Linear(config.width, config.width)
        if config.qk_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), math.log(4.0)))
        self.quant_q: nn.Module = nn.Identity()
        self.quant_k: nn.Module = nn.Identity()
        self.quant_v: nn.Module = nn.Identity()

    def forward(self, x_RNC: Tensor, bias_NM: Tensor | None = None, memory: LayerKeyValues | None = None) -> Tensor:
        """(R, N, C) -> (R, N, C)."""
        rows, tokens, width = x_RNC.shape
        heads_3RHNd = self.mat_qkv(x_RNC).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = (part.contiguous() for part in heads_3RHNd)  # the norms and products below are twice as fast so
        if self.qk_norm:
            temperature = self.scale_mul_1H11.float().clamp_max(math.log(100)).exp()
            q, k, scale = _unit(q, temperature), _unit(k), 1.0
        else:
            scale = 0.25 / math.sqrt(width // self.heads)
        q, k, v = self.quant_q(q), self.quant_k(k), self.quant_v(v)
        if memory is not None:
            k, v = memory.join(k, v)
        return self.proj(attend(q, k, v, scale, bias_NM))


def _unit(x: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """Vectors of this length. Norms are float32: scores are up to 100 long, and would feel a norm's rounding."""
    wide = x.float()
    return (wide * (length / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12))).to(x.dtype)


class FFN(nn.Module):
    """Two linears with the tanh approximation of GELU between them."""

    def __init__(self, config: VARConfig):
        super().__init__()
        hidden = round(config.width * config.mlp_ratio)
        self.fc1 = Linear(config.width, hidden)
        self.fc2 = Linear(hidden, config.width)

    def forward(self, x_RNC: Tensor) -> Tensor:
        """(R, N, C) -> (R, N, C)."""
        return self.fc2(gelu_tanh(self.fc1(x_RNC)))


class Block(nn.Module):
    """Transformer block; gate, scale and shift of both branches come from the class."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.norm_eps = config.norm_eps
        self.attn = Attention(config)
        self.ffn = FFN(config)
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(config.width, 6 * config.width))

    def modulation(self, silu_KC: Tensor, shared_KX: Tensor | None) -> Tensor:
        """The six modulations (K, 6 C): of the block's own linear, or the shared one's plus the block's offsets."""
        if shared_KX is None:
            return self.ada_lin[1](silu_KC)
        return shared_KX + self.ada_gss.flatten()

    def forward(
        self,
        x_RNC: Tensor,
        modulation: tuple[Tensor, ...],
        bias_NM: Tensor | None = None,
        memory: LayerKeyValues | None = None,
    ) -> Tensor:
        """(R, N, C) -> (R, N, C)."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        attended = self.attn(_modulated_norm(x_RNC, scale1, shift1, self.norm_eps), bias_NM, memory)
        x_RNC = torch.addcmul(x_RNC, gamma1, attended)
        return torch.addcmul(x_RNC, gamma2, self.ffn(_modulated_norm(x_RNC, scale2, shift2, self.norm_eps)))


class HeadNorm(nn.Module):
    """The linear that modulates the normalisation before the head."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(config.width, 2 * config.width))


def _parts(out_RX: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """The parts of a modulation, each (R, 1, C)."""
    return out_RX.unsqueeze(1).chunk(num_parts, dim=-1)


def _modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


# ---- state dicts ------------------------------------------------------------------------------------

# Buffers of official checkpoints that hold nothing: masks, stage indices, zero biases, usage statistics.
IGNORED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state dict under official keys: the fused bias becomes q_bias and v_bias."""
    official: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("attn.mat_qkv.bias"):
            official[name] = tensor
            continue
        q, k, v = tensor.chunk(3)
        if not k.is_meta and k.any():
            raise ValueError(f"{name}: its key part is not zero, and official checkpoints have no place for it")
        attn = name.removesuffix("mat_qkv.bias")
        official |= {attn + "q_bias": q.clone(), attn + "v_bias": v.clone()}
    return official


def official_buffers(net: VARTransformer) -> dict[str, Tensor]:
    """The buffers that the official class has beside its parameters, which its strict loading asks for."""
    config, stage_L = net.config, net.stage_L.cpu()
    masked_LL = stage_L[:, None] < stage_L
    buffers = {
        "lvl_1L": stage_L[None].clone(),
        "attn_bias_for_masking": torch.zeros(masked_LL.shape).masked_fill_(masked_LL, -torch.inf)[None, None],
    }
    return buffers | {f"blocks.{i}.attn.zero_k_bias": torch.zeros(config.width) for i in range(config.depth)}


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_official`; buffers that hold nothing are left out."""
    ours = {name: tensor for name, tensor in tensors.items() if not name.endswith((*IGNORED, "q_bias", "v_bias"))}
    for name, q in tensors.items():
        if name.endswith("attn.q_bias"):
            attn = name.removesuffix("q_bias")
            v = tensors.get(attn + "v_bias")
            if v is None:
                raise ValueError(f"{attn}v_bias: missing")
            ours[attn + "mat_qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return ours
