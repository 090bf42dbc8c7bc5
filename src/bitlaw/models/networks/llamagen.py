"""The network of LlamaGen (Sun et al. 2024): LLaMA on the tokens of an image, one after the other in row-major order.

State-dict keys are those of the official checkpoints (FoundationVision/LlamaGen). A class is one token in front of the
image's; a text is 120 of them, projected from T5 features and padded on the left.

Legend: B images, R rows (B, or 2 B with guidance: conditional, then unconditional), T condition tokens, L image tokens
given, N = g^2 image tokens in all, X new tokens of a call, M tokens with those before, C width, H heads, d = C / H,
P = d / 2 rotary pairs, V vocabulary, E width of text features.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.linear import Linear
from bitlaw.models.parts.attention import attend
from bitlaw.models.parts.gelu import gelu_tanh
from bitlaw.models.parts.key_values import KeyValues, LayerKeyValues
from bitlaw.models.parts.rotary import grid_table, rotate


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of a network.

    side: g, image tokens in a row
    hidden: channels between the linears of the feed-forward layer; 0 for 8 C / 3 rounded up to a multiple of 256
    num_classes: 0 for a text-conditional model, which has text_tokens and text_width
    null_class: whether the class table has a row for the unconditional model
    """

    depth: int
    width: int
    heads: int
    side: int = 16
    num_classes: int = 1000
    vocab_size: int = 16384
    hidden: int = 0
    text_tokens: int = 0
    text_width: int = 0
    null_class: bool = True
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % (4 * self.heads):
            raise ValueError(
                f"LlamaGen width {self.width} does not go with {self.heads} heads, whose width must be a multiple of 4"
            )
        if bool(self.num_classes) == bool(self.text_tokens):
            raise ValueError(
                f"LlamaGen with {self.num_classes} classes and {self.text_tokens} text tokens: must have one of them"
            )
        if not self.hidden:
            object.__setattr__(self, "hidden", -(-int(8 * self.width / 3) // 256) * 256)

    @property
    def num_tokens(self) -> int:
        """N, the tokens of one image."""
        return self.side * self.side

    @property
    def condition_tokens(self) -> int:
        """T, the tokens before the image's."""
        return self.text_tokens or 1


class LlamaGenTransformer(nn.Module):
    """The network: (condition, image tokens so far) -> logits of the next one."""

    cos_sin_MP2: Tensor

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.config = config
        self.cls_embedding: ClassEmbedding | TextEmbedding = (
            TextEmbedding(config) if config.text_tokens else ClassEmbedding(config)
        )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("cos_sin_MP2", torch.empty(0), persistent=False)
        self.reset_tables()
        self._initialize()

    def reset_tables(self) -> None:
        """Rotations of all T + N positions."""
        config = self.config
        table = grid_table(config.side, config.width // config.heads, config.condition_tokens, config.rope_base)
        self.cos_sin_MP2 = table.to(self.norm.weight.device)

    def forward(self, condition: Tensor, tokens_BL: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Teacher-forced logits (B, L + 1, V), float32: of image token i given those before it, for i = 0 to L.

        condition: classes (B,), or text features (B, T, E) with `mask_BT`, which is False where a text is padded
        tokens_BL: the first L <= N tokens of each image. After all N there is one prediction beyond the image.
        No condition is dropped here, unlike in the official forward in training.
        """
        config = self.config
        if tokens_BL.shape[1] > config.num_tokens:
            raise ValueError(f"{tokens_BL.shape[1]} tokens given, an image has {config.num_tokens}")
        x_BMC = torch.cat([self.cls_embedding(condition), self.tok_embeddings(tokens_BL)], 1)
        length = x_BMC.shape[1]
        bias = _causal_bias(length, None if mask_BT is None else _columns(mask_BT, length), x_BMC)
        for layer in self._typed_layers():
            x_BMC = layer(x_BMC, self.cos_sin_MP2[:length], bias)
        return self.logits(x_BMC[:, config.condition_tokens - 1 :])

    def begin(self, condition: Tensor, mask_RT: Tensor | None = None) -> tuple[Tensor, "Memory"]:
        """Logits (R, 1, V) of token 0, and the memory of the condition, with room for a whole image.

        condition: classes (R,), or text features (R, T, E) with `mask_RT`, which is False where a text is padded
        """
        config = self.config
        x_RTC = self.cls_embedding(condition)
        rows, length, width = x_RTC.shape
        room = length + config.num_tokens - 1  # the last token is drawn, and never seen by another
        layers = x_RTC.new_empty(config.depth, 2, rows, config.heads, room, width // config.heads)
        store, columns = KeyValues(layers), None
        if mask_RT is not None:
            columns = _columns(mask_RT, room)
        bias = _causal_bias(length, columns, x_RTC) if length > 1 else None
        return self._run(x_RTC, store, 0, bias, None if columns is None else _additive(columns, x_RTC)[:, None, None])

    def step(self, memory: "Memory", tokens_B: Tensor, rows: int) -> tuple[Tensor, "Memory"]:
        """Logits (rows, 1, V) of the token after `tokens_B`, and the memory grown by it; the one given stays as it is.

        The tokens are the same for both halves of the rows. With `rows` less than the memory has, the first ones go on
        without the others.
        """
        store = memory.store.writable(memory.length)
        x_R1C = self.tok_embeddings(tokens_B)[:, None].repeat(rows // len(tokens_B), 1, 1)
        bias = None if memory.bias is None else memory.bias[:rows]
        return self._run(x_R1C, store, memory.length, bias, bias)

    def _run(
        self, x_RXC: Tensor, store: KeyValues, length: int, bias: Tensor | None, kept_bias: Tensor | None
    ) -> tuple[Tensor, "Memory"]:
        rows, end = len(x_RXC), length + x_RXC.shape[1]
        cos_sin_XP2 = self.cos_sin_MP2[length:end]
        seen = None if bias is None else bias[..., :end]
        for i, layer in enumerate(self._typed_layers()):
            memory = LayerKeyValues(store.layers[i, :, :rows], length, keeps=True)
            x_RXC = layer(x_RXC, cos_sin_XP2, seen, memory)
        store.filled = end
        return self.logits(x_RXC[:, -1:]), Memory(store, end, rows, kept_bias)

    def logits(self, x_BXC: Tensor) -> Tensor:
        """Logits (B, X, V) of hidden states; float32."""
        return self.output(self.norm(x_BXC)).float()

    def _typed_layers(self) -> Iterable["Layer"]:
        return cast(Iterable[Layer], self.layers)

    def _initialize(self) -> None:
        """As the official training: narrow normals, and a head of zeros."""
        for name, parameter in self.named_parameters():
            if not name.endswith("norm.weight"):
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.output.weight)


class Memory(NamedTuple):
    """What earlier tokens left: the first `length` tokens of a store that later memories may share, for `rows` rows.

    bias: (R, 1, 1, M), -inf at the padding of texts; None for classes
    """

    store: KeyValues
    length: int
    rows: int
    bias: Tensor | None


class ClassEmbedding(nn.Module):
    """A table of class vectors; the row after the last class is that of no class."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + config.null_class, config.width)

    def forward(self, labels_B: Tensor) -> Tensor:
        """(B,) -> (B, 1, C)."""
        return self.embedding_table(labels_B)[:, None]


class TextEmbedding(nn.Module):
    """Text features projected to the width; `uncond_embedding` (T, E) stands for no text."""

    uncond_embedding: Tensor

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cap_proj = Projection(config.text_width, config.width)
        unit = torch.randn(config.text_tokens, config.text_width)
        self.register_buffer("uncond_embedding", unit / config.text_width**0.5)

    def forward(self, features_BTE: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, C)."""
        return self.cap_proj(features_BTE)


class Projection(nn.Module):
    """Two linears without bias with the tanh approximation of GELU between them."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.fc1 = Linear(width_in, width, bias=False)
        self.fc2 = Linear(width, width, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, C)."""
        return self.fc2(gelu_tanh(self.fc1(x_BTE)))


class RMSNorm(nn.Module):
    """Root mean square normalisation: in float32, cast back, then times the weight in that type."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BXC: Tensor) -> Tensor:
        """The same shape and type."""
        return F.rms_norm(x_BXC.float(), x_BXC.shape[-1:], eps=self.eps).type_as(x_BXC) * self.weight


class Attention(nn.Module):
    """Multi-head attention. `quant_q`, `quant_k`, `quant_v` see the operands (R, H, X, d), q and k rotated."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.heads = config.heads
        self.wqkv = Linear(config.width, 3 * config.width, bias=False)
        self.wo = Linear(config.width, config.width, bias=False)
        self.quant_q: nn.Module = nn.Identity()
        self.quant_k: nn.Module = nn.Identity()
        self.quant_v: nn.Module = nn.Identity()

    def forward(
        self,
        x_RXC: Tensor,
        cos_sin_XP2: Tensor,
        bias: Tensor | None = None,
        memory: LayerKeyValues | None = None,
    ) -> Tensor:
        """(R, X, C) -> (R, X, C)."""
        rows, tokens, width = x_RXC.shape
        head_width = width // self.heads
        qkv_RX3Hd = self.wqkv(x_RXC).view(rows, tokens, 3, self.heads, head_width)
        q, k = rotate(qkv_RX3Hd[:, :, :2], cos_sin_XP2[:, None, None]).permute(2, 0, 3, 1, 4)
        v = qkv_RX3Hd[:, :, 2].transpose(1, 2)
        q, k, v = self.quant_q(q), self.quant_k(k), self.quant_v(v)
        if memory is not None:
            k, v = memory.join(k, v)
        return self.wo(attend(q, k, v, head_width**-0.5, bias))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.w1 = Linear(config.width, config.hidden, bias=False)
        self.w3 = Linear(config.width, config.hidden, bias=False)
        self.w2 = Linear(config.hidden, config.width, bias=False)

    def forward(self, x_RXC: Tensor) -> Tensor:
        """(R, X, C) -> (R, X, C)."""
        return self.w2(F.silu(self.w1(x_RXC)) * self.w3(x_RXC))


class Layer(nn.Module):
    """Transformer block."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x_RXC: Tensor,
        cos_sin_XP2: Tensor,
        bias: Tensor | None = None,
        memory: LayerKeyValues | None = None,
    ) -> Tensor:
        """(R, X, C) -> (R, X, C)."""
        h_RXC = x_RXC + self.attention(self.attention_norm(x_RXC), cos_sin_XP2, bias, memory)
        return h_RXC + self.feed_forward(self.ffn_norm(h_RXC))


def _columns(mask_BT: Tensor, length: int) -> Tensor:
    """Which keys may be seen at all (B, M): the texts' mask, then every image token."""
    return F.pad(mask_BT.bool(), (0, length - mask_BT.shape[1]), value=True)


def _causal_bias(length: int, columns_BM: Tensor | None, like: Tensor) -> Tensor:
    """What is added to the scores of the first `length` tokens among themselves: -inf for later and padded keys.

    Every token sees itself, so that padding, which sees nothing else, stays finite. (M, M), or (B, 1, M, M).
    """
    causal_MM = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
    if columns_BM is None:
        return _additive(causal_MM, like)
    eye_MM = torch.eye(length, dtype=torch.bool, device=like.device)
    return _additive(causal_MM & columns_BM[:, None, :length] | eye_MM, like)[:, None]


def _additive(allowed: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, -torch.inf)
