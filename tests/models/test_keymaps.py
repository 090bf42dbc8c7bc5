"""Key maps: they read in both directions, and refuse what has no place."""

import pytest
import torch

from bitlaw.models.keymaps import ddpm_unet, openai_unet, openai_unet_of, present_names, to_ours, to_theirs

MAPS = {
    "ddpm": ddpm_unet(4, 2),
    "ldm": openai_unet([False, True, True, True], 2, resnet_resampling=False, spatial=False),
    "churches": openai_unet([True] * 4 + [False], 2, resnet_resampling=True, spatial=False),
    "classes": openai_unet([False, True, True, True], 2, resnet_resampling=False, spatial=True),
}


@pytest.mark.parametrize("name", MAPS)
def test_no_two_modules_have_one_name(name):
    assert len(set(MAPS[name].values())) == len(MAPS[name])


@pytest.mark.parametrize(
    ("name", "official", "ours"),
    [
        ("ddpm", "temb.dense.1", "time_embedding.linear_2"),
        ("ddpm", "down.1.attn.0.proj_out", "down_blocks.1.attentions.0.to_out.0"),
        ("ddpm", "up.3.block.2.nin_shortcut", "up_blocks.0.resnets.2.conv_shortcut"),
        ("ddpm", "up.1.upsample.conv", "up_blocks.2.upsamplers.0.conv"),
        ("ddpm", "mid.block_2.temb_proj", "mid_block.resnets.1.time_emb_proj"),
        ("ldm", "input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("ldm", "input_blocks.4.0.in_layers.2", "down_blocks.1.resnets.0.conv1"),
        ("ldm", "input_blocks.11.1.k", "down_blocks.3.attentions.1.to_k"),
        ("ldm", "output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("ldm", "output_blocks.9.0.skip_connection", "up_blocks.3.resnets.0.conv_shortcut"),
        ("ldm", "out.2", "conv_out"),
        ("churches", "input_blocks.3.0.in_layers.2", "down_blocks.0.downsamplers.0.conv1"),
        ("churches", "output_blocks.2.1.out_layers.3", "up_blocks.0.upsamplers.0.conv2"),  # no attention before it
        ("churches", "output_blocks.5.2.emb_layers.1", "up_blocks.1.upsamplers.0.time_emb_proj"),
        (
            "classes",
            "middle_block.1.transformer_blocks.0.attn2.to_k",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        ),
        ("classes", "output_blocks.0.1.proj_in", "up_blocks.0.attentions.0.proj_in"),
    ],
)
def test_places(name, official, ours):
    assert MAPS[name][official] == ours


@pytest.mark.parametrize("name", ["ldm", "churches", "classes"])
def test_the_map_of_a_file_is_read_from_its_names(name):
    absent = "skip_connection"  # in some blocks only, which is nothing to go by
    tensors = {f"{module}.weight": torch.empty(0) for module in MAPS[name] if not module.endswith(absent)}
    assert openai_unet_of(tensors) == MAPS[name]


@pytest.mark.parametrize(("name", "module", "dims"), [("ddpm", "down.1.attn.0.q", 2), ("ldm", "input_blocks.4.1.q", 1)])
def test_kernels_of_attention_become_matrices_and_kernels_again(name, module, dims):
    kernel = torch.randn(4, 3, *[1] * dims)
    tensors = {f"{module}.weight": kernel, f"{module}.bias": torch.randn(4)}
    ours = to_ours(tensors, MAPS[name])
    assert ours[f"{MAPS[name][module]}.weight"].shape == (4, 3)
    again = to_theirs(ours, MAPS[name], kernel_dims=dims)
    assert set(again) == set(tensors) and all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_matrices_of_spatial_transformers_stay_matrices():
    module = "middle_block.1.transformer_blocks.0.attn1.to_out.0"
    tensors = {f"{module}.weight": torch.randn(4, 4)}
    again = to_theirs(to_ours(tensors, MAPS["classes"]), MAPS["classes"], kernel_dims=1)
    assert torch.equal(again[f"{module}.weight"], tensors[f"{module}.weight"])


def test_what_has_no_place():
    assert set(to_ours({"extra.weight": torch.zeros(1)}, MAPS["ddpm"])) == {"extra.weight"}  # for the loader to name
    with pytest.raises(ValueError, match=r"class_embedding\.weight: the official layout has no place"):
        to_theirs({"class_embedding.weight": torch.zeros(1)}, MAPS["ddpm"])


def test_names_of_2022():
    tensors = {"mid_block.attentions.0.proj_attn.weight": torch.zeros(1), "key.weight": torch.zeros(1)}
    assert set(present_names(tensors)) == {"mid_block.attentions.0.to_out.0.weight", "key.weight"}
