"""A tiny model of every family, of random weights that leave no branch at zero."""

from torch import nn

from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.autoencoders.token_vq import TokenVQ
from bitlaw.models.ddpm import DDPM, UNetSampling
from bitlaw.models.dit import DiT, DiTSampling
from bitlaw.models.large_dit import LargeDiT
from bitlaw.models.ldm import LDM
from bitlaw.models.llamagen import LlamaGen
from bitlaw.models.mar import MAR, MARSampling
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.networks.large_dit import LargeDiTConfig, LargeDiTTransformer
from bitlaw.models.networks.llamagen import LlamaGenConfig, LlamaGenTransformer
from bitlaw.models.networks.mar import MARConfig, MARTransformer
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.var import VAR, VARSampling


def tokenizer():
    return VQTokenizer(VQTokenizerConfig(16, 4, 8, (1, 2), 1, (1, 2, 4), norm_groups=0, attention=False))


def awake(module):
    """Linears at random, so that no branch starts at zero; the key part of VAR's bias stays zero."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.normal_(linear.bias, std=0.1)
            if hasattr(linear, "has_bias"):
                linear.bias.data.mul_(linear.has_bias)
    return module.eval().requires_grad_(False)


def tiny_var():
    net = VARTransformer(VARConfig(2, 16, 2, 5, (1, 2, 4), 16, 4))
    return VAR(awake(net), awake(tokenizer()), VARSampling(guidance=2.0, top_k=0, top_p=0.0))


def tiny_dit():
    net = DiTTransformer(DiTConfig(2, 16, 2, 5, 4, 4, 2, learn_sigma=False))
    process = Diffusion(schedule="squaredcos_cap_v2", prediction="v", variance="fixed_small")
    sampling = DiTSampling(guidance=2.0, num_steps=4, sampler="ddim", eta=0.5, guided_channels=None)
    return DiT(awake(net), awake(tokenizer()), process, sampling, latent_scale=0.7)


def tiny_dit_learned_variance():
    net = DiTTransformer(DiTConfig(2, 16, 2, 5, 4, 4, 2))
    latents = awake(tokenizer())
    return DiT(awake(net), latents, Diffusion(), DiTSampling(num_steps=4), latent_scale=0.7)


def tiny_large_dit():
    net = LargeDiTTransformer(LargeDiTConfig(2, 16, 2, 5, 4, 4, 2, hidden=24))
    return LargeDiT(awake(net), awake(tokenizer()), Diffusion(), DiTSampling(num_steps=4), latent_scale=0.7)


def tiny_llamagen():
    from diffusers import VQModel  # slow to import

    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 8), "latent_channels": 4, "norm_num_groups": 2}
    tokens = VQModel(**levels, **sizes, num_vq_embeddings=16, vq_embed_dim=4, mid_block_add_attention=False)
    net = LlamaGenTransformer(LlamaGenConfig(2, 16, 2, side=4, num_classes=5, vocab_size=16, hidden=32))
    return LlamaGen(awake(net), awake(TokenVQ(tokens)))


def tiny_mar():
    net = MARTransformer(MARConfig(16, 2, 2, 2, 2, 12, num_classes=5, side=4, latent_channels=4, buffer_size=3))
    sampling = MARSampling(guidance=2.0, num_steps=4, head_steps="ddim4")
    return MAR(awake(net), awake(tokenizer()), sampling, latent_scale=0.7)


def tiny_unet(down, up, num_classes=0, **settings):
    from bitlaw.models.networks.unet import UNet, UNetConfig  # slow to import

    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    types = {"down_block_types": (down,) * 2, "up_block_types": (up,) * 2}
    return awake(UNet(UNetConfig({**sizes, **types, **settings}, num_classes=num_classes)))


def tiny_ddpm():
    more = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "attention_head_dim": None}
    net = tiny_unet("AttnDownBlock2D", "AttnUpBlock2D", **more)
    return DDPM(net, sampling=UNetSampling(num_steps=4))


def tiny_ldm():
    more = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "attention_head_dim": 8}
    net = tiny_unet("AttnDownBlock2D", "AttnUpBlock2D", **more)
    sampling = UNetSampling(num_steps=4, sampler="ddim", eta=0.5, clip=False, first_timestep=1, to_x0=False)
    return LDM(net, awake(tokenizer()), sampling=sampling, latent_scale=0.7)


def tiny_ldm_of_classes():
    more = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "attention_head_dim": 1, "cross_attention_dim": 12}
    net = tiny_unet("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", num_classes=5, **more)
    sampling = UNetSampling(guidance=2.0, num_steps=4, sampler="ddim", clip=False, first_timestep=1, to_x0=False)
    return LDM(net, awake(tokenizer()), sampling=sampling)


TINY = {
    "var": tiny_var,
    "dit": tiny_dit,
    "dit-learned-variance": tiny_dit_learned_variance,
    "large-dit": tiny_large_dit,
    "llamagen": tiny_llamagen,
    "mar": tiny_mar,
    "ddpm": tiny_ddpm,
    "ldm": tiny_ldm,
    "ldm-of-classes": tiny_ldm_of_classes,
}
