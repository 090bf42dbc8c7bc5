"""Decoding with LlamaGen-L at 384 pixels against the official loop, at three positions of an image.

Four layers of L's width with random weights, the same for both; every layer does the same, so the ratio is about that
of all 24. The official side is `decode_one_token` of a model with caches for the whole image (576 tokens, 584 places),
ours is a step of the rollout with its draw. Both have guidance, float32, and start from the same keys and values.

Example: python benchmarks/official_llamagen.py --official ~/LlamaGen
"""

import sys
from typing import Any

import torch
from torch import Tensor

from bitlaw.models.generator import Noise, replay
from bitlaw.models.llamagen import LlamaGen, LlamaGenSampling, LlamaGenState
from bitlaw.models.networks.llamagen import LlamaGenConfig, LlamaGenTransformer, Memory
from bitlaw.models.parts.key_values import KeyValues
from bitlaw.models.storage import build
from harness import compare, finish, official_arguments, one_thread

DEPTH, WIDTH, HEADS, SIDE = 4, 1024, 16, 24
POSITIONS, NUM_STEPS = (0, 288, 560), 4
GUIDANCE = 2.0
REQUIRED = {1: 1.3, 8: 2.5}


def models() -> tuple[Any, LlamaGen]:
    """Both models with the same random weights."""
    from autoregressive.models.gpt import ModelArgs, Transformer

    torch.manual_seed(0)
    official = Transformer(ModelArgs(n_layer=DEPTH, dim=WIDTH, n_head=HEADS, block_size=SIDE**2)).eval()
    torch.nn.init.normal_(official.output.weight, std=2 / WIDTH**0.5)
    config = LlamaGenConfig(DEPTH, WIDTH, HEADS, SIDE)
    net = build(lambda: LlamaGenTransformer(config), official.state_dict(), "LlamaGen")
    return official, LlamaGen(net, None, LlamaGenSampling(guidance=GUIDANCE))


class Official:
    """The official loop from a position on."""

    def __init__(self, model: Any, layers: Tensor, token_B: Tensor, position: int):
        self.model, self.layers, self.token_B, self.position = model, layers, token_B, position
        model.setup_caches(layers.shape[2], 1 + SIDE**2, torch.float32)
        self.caches = [block.attention.kv_cache for block in model.layers]
        for cache, (keys, values) in zip(self.caches, layers, strict=True):
            cache.k_cache[:, :, : keys.shape[2]], cache.v_cache[:, :, : keys.shape[2]] = keys, values
        self.mask = model.causal_mask

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The tokens (B, 1) after the last step."""
        from autoregressive.models.generate import decode_one_token

        for block, cache in zip(self.model.layers, self.caches, strict=True):
            block.attention.kv_cache = cache
        self.model.causal_mask = self.mask
        token_B1 = self.token_B[:, None]
        input_pos = torch.tensor([1 + self.position])
        for _ in range(NUM_STEPS):
            token_B1, _ = decode_one_token(
                self.model, token_B1, input_pos, GUIDANCE, True, temperature=1.0, top_k=0, top_p=1.0
            )
            input_pos += 1
        return token_B1

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Guided logits (B, 1, V) of the first step."""
        tokens = torch.cat([self.token_B, self.token_B])[:, None]
        cond, uncond = self.model(tokens, cond_idx=None, input_pos=torch.tensor([1 + self.position]))[0].chunk(2)
        return uncond + GUIDANCE * (cond - uncond)


class Ours:
    """Steps of the rollout from a position on."""

    def __init__(self, model: LlamaGen, layers: Tensor, token_B: Tensor, position: int):
        self.model, self.position, self.length = model, position, 1 + position
        self.labels_B = torch.zeros_like(token_B)
        self.noise = Noise(0, range(len(token_B)))
        self.tokens_Bn = token_B[:, None].repeat(1, position + 1)
        room = SIDE**2
        self.layers = layers.new_empty(*layers.shape[:4], room, layers.shape[-1])
        self.layers[..., : self.length, :] = layers[..., : self.length, :]

    def state(self) -> LlamaGenState:
        """The state before the first step."""
        memory = Memory(KeyValues(self.layers, self.length), self.length, 2 * len(self.labels_B), None)
        return LlamaGenState(self.labels_B, self.tokens_Bn, memory, self.noise)

    def __call__(self) -> Tensor:
        """All tokens (B, n) after the last step."""
        state = self.state()
        for k in range(1, NUM_STEPS + 1):
            state = replay(self.model, state, self.position + k).after
        return state.tokens_Bn

    def logits(self) -> Tensor:
        """Guided logits (B, 1, V) of the first step."""
        return replay(self.model, self.state(), self.position + 1).extracted.features


def main() -> int:
    """Run the comparisons."""
    one_thread()
    options = official_arguments(__doc__, "official_llamagen", rounds=7)
    official_model, model = models()
    comparisons, requirements = [], {}
    for batch, required in REQUIRED.items():
        for position in POSITIONS:
            generator = torch.Generator().manual_seed(position)
            token_B = torch.randint(16384, (batch,), generator=generator)
            shape = (DEPTH, 2, 2 * batch, HEADS, 1 + position, WIDTH // HEADS)
            layers = torch.randn(shape, generator=generator)
            layers[:, 0, :, :, 0] = 0  # the key of the class token
            official = Official(official_model, layers, token_B, position)
            ours = Ours(model, layers, token_B, position)
            difference = (official.logits() - ours.logits()).abs().max().item()
            comparison = compare(
                f"LlamaGen-L ({DEPTH} layers), position {position}, batch {batch}, {NUM_STEPS} steps",
                {"official": official, "bitlaw": ours},
                baseline="official",
                rounds=options.rounds,
            )
            comparisons.append(comparison)
            where = f"position {position}, batch {batch}"
            speedup = comparison.speedup("bitlaw")
            requirements[f"{where}: at least {required} times as fast ({speedup:.2f})"] = speedup >= required
            requirements[f"{where}: the same logits, to {difference:.1e} (at most 1e-3)"] = difference <= 1e-3
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
