"""Prompts through a tiny random T5, and from them to images."""

import sys
from pathlib import Path

import pytest
import torch

import bitlaw
from bitlaw.models.llamagen import LlamaGen
from bitlaw.models.networks.llamagen import LlamaGenConfig, LlamaGenTransformer
from bitlaw.models.text import TextCondition, TextEncoder, clean_prompt

DATA = Path(__file__).parents[1] / "data"
WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "fox", "dog", "blue")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """An encoder of 16 numbers, with a tokenizer of eight words that ends a prompt with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(folder)
    return folder


def text_network(width=16):
    torch.manual_seed(0)
    config = LlamaGenConfig(1, 16, 2, 8, 0, 512, 32, text_tokens=8, text_width=width)
    net = LlamaGenTransformer(config)
    torch.nn.init.normal_(net.output.weight)
    return net.eval().requires_grad_(False)


def test_features_are_those_of_the_encoder_moved_to_the_right(encoder_folder):
    encoder = TextEncoder.open(encoder_folder)
    condition = encoder.encode(["A red  Fox", "a dog"], num_tokens=8)
    assert condition.mask_BT.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
    assert not condition.features_BTE[~condition.mask_BT].any()
    for row, ids in ((0, [3, 4, 5, 1]), (1, [3, 6, 1])):  # alone, without padding
        alone = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(condition.features_BTE[row, -len(ids) :], alone, atol=1e-5, rtol=0)


def test_long_prompts_are_cut(encoder_folder):
    condition = TextEncoder.open(encoder_folder).encode(["a red fox a blue dog a red dog"], num_tokens=8)
    assert condition.mask_BT.all() and condition.features_BTE.shape == (1, 8, 16)


def test_prompts_draw_images(encoder_folder, tmp_path):
    tokenizer = DATA / "llamagen_vq_ch32_f4.fp16.safetensors"
    torch.save({"model": LlamaGen(text_network(), None).to_official()}, tmp_path / "t2i_tiny.pt")
    sizes = {"heads": 2, "image_size": 32, "text_encoder": encoder_folder}
    model = bitlaw.load(tmp_path / "t2i_tiny.pt", tokenizer=tokenizer, **sizes)
    images = model.generate(["a red fox", "a blue dog", "a dog"], seed=3, batch_size=2)
    assert images.shape == (3, 3, 32, 32) and not torch.equal(images[0], images[1])
    features = TextEncoder.open(encoder_folder).encode(["a red fox", "a blue dog", "a dog"], 8)
    assert torch.equal(model.generate((features.features_BTE, features.mask_BT), seed=3, batch_size=2), images)
    assert not torch.equal(model.generate(["a dog"], seed=3), images[:1])
    small = bitlaw.quantize(model, "W8A8")
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")  # knows where its encoder is
    assert torch.equal(again.generate(["a dog"], seed=3), small.generate(["a dog"], seed=3))


def test_an_encoder_of_another_width_is_refused(encoder_folder):
    model = LlamaGen(text_network(width=20), None, text_encoder=str(encoder_folder))
    with pytest.raises(ValueError, match=r"features of 16 numbers, this model was trained on those .* 20"):
        model.check_labels(["a red fox"])


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"empty: no T5 encoder with its tokenizer"):
        (tmp_path / "empty").mkdir()
        TextEncoder.open(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"prompts need transformers .*pip install 'bitlaw\[text\]'"):
        TextEncoder.open(tmp_path)


def test_a_condition_is_cut_like_a_tensor():
    features = torch.arange(24.0).view(3, 4, 2)
    mask = torch.tensor([[0, 0, 1, 1]] * 3)
    condition = TextCondition.of(features, mask)
    assert len(condition) == 3 and len(condition[1:]) == 2 and condition.mask_BT.dtype == torch.bool
    assert torch.equal(condition[1:2].features_BTE[0], features[1] * mask[0][:, None])
    assert torch.equal(condition.to("cpu").mask_BT, condition.mask_BT)
    assert TextCondition.of(features).mask_BT.all()
    with pytest.raises(ValueError, match=r"text features \(3, 4, 2\) with mask \(2, 4\)"):
        TextCondition.of(features, mask[:2])


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("A Red  Fox, sitting.", "a red fox, sitting."),
        ("“Hello” — said the dog\u2019s friend", '"hello" - said the dog\'s friend'),
        ("see https://example.com/fox or www.example.org, <b>bold</b>", "see or , bold"),
        ("rock &amp; roll (live) by @somebody", "rock roll live by"),
        ("a red-and-white, well-known, high-rise-like house", "a red and white, well known, high rise like house"),
        ("fox.png of 192.168.0.1 and no 1234567", "of and no"),
        ("a 10x10 grid, R2D2 and a 4k render", "a grid, and a 4k render"),
        ("'quoted text'", "quoted text"),
    ],
)
def test_prompts_are_cleaned(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned
