"""Networks with the stages, tokens and vocabularies of the released models, narrow and of random weights, learn."""

import pytest

import bitlaw
from bitlaw.distill import Distillation, distill
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.autoencoders.token_vq import TokenVQ
from bitlaw.models.llamagen import LlamaGen
from bitlaw.models.networks.llamagen import LlamaGenConfig, LlamaGenTransformer
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.var import VAR
from tiny_models import awake

SHORT = Distillation(start="gptq", data="generated", num_examples=4, num_held_out=2, steps=16, batch_size=2, lr=3e-3)


def official_var():
    """256 pixels: ten stages, 680 tokens of 4096 codes of 32 numbers; 1000 classes; the sampler of the evaluation."""
    tokens = VQTokenizer(VQTokenizerConfig(ch=4, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, norm_groups=0))
    return VAR(awake(VARTransformer(VARConfig(2, 64, 2))), awake(tokens))


def official_llamagen():
    """A token map of 16384 codes of 8 numbers, with a side of 6 instead of 16; 1000 classes."""
    from diffusers import VQModel

    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 8), "latent_channels": 8, "norm_num_groups": 2, "mid_block_add_attention": False}
    tokens = VQModel(**levels, **sizes, num_vq_embeddings=16384, vq_embed_dim=8)
    return LlamaGen(awake(LlamaGenTransformer(LlamaGenConfig(2, 64, 2, side=6))), awake(TokenVQ(tokens)))


@pytest.mark.parametrize(("model", "top_k"), [(official_var, 900), (official_llamagen, 16384 // 4)])
def test_it_learns(model, top_k, monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", "")
    teacher = model()
    small = distill(teacher, "W2A16", SHORT, calibration=bitlaw.Calibration(num_images=2, batch_size=2))
    done = small.provenance["distillation"]
    assert done["top_k"] == top_k
    errors = done["held_out_loss"]
    assert errors[str(done["kept_step"])] < errors["0"]
