"""LlamaGen against the official one: logits, gradients, caches, draws, keys at full size, loading and saving."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import bitlaw
from bitlaw.models.generator import Noise, replay, rollout
from bitlaw.models.llamagen import LlamaGen, LlamaGenSampling
from bitlaw.models.networks.llamagen import LlamaGenConfig, LlamaGenTransformer
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.pixels import from_uint8
from bitlaw.models.storage import load_tensors
from bitlaw.models.text import TextCondition

DATA = Path(__file__).parents[1] / "data"
NETWORK, TOKENIZER = DATA / "llamagen_gpt_b.fp16.safetensors", DATA / "llamagen_vq_ch32_f4.fp16.safetensors"
SIZES = {"heads": 4, "image_size": 32}  # what the shapes of the small network do not tell
TEXT = LlamaGenConfig(2, 32, 2, side=4, num_classes=0, vocab_size=64, hidden=64, text_tokens=6, text_width=12)


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(DATA / "llamagen_gpt_b_teacher_forced.npz")
    return {k: torch.from_numpy(v) if v.dtype.kind in "fi" else v for k, v in arrays.items()}


@pytest.fixture(scope="module")
def model():
    return bitlaw.load(NETWORK, tokenizer=TOKENIZER, **SIZES)


@pytest.fixture(scope="module")
def text_model():
    torch.manual_seed(0)
    net = LlamaGenTransformer(TEXT)
    for name, parameter in net.named_parameters():
        if not name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return LlamaGen(net.eval().requires_grad_(False), None)


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


class MultinomialNoise(Noise):
    """The numbers that torch.multinomial takes from the global generator, so that drawing with them is its draw."""

    def gumbel(self, step, shape):
        return torch.empty(len(self), *shape).exponential_().log().neg()


# ---- the network ----------------------------------------------------------------------------------------


def test_the_small_file_is_recognized(model):
    assert isinstance(model, LlamaGen) and model.net.config == LlamaGenConfig(3, 80, 4, 8, 10, 512, 256)
    assert model.image_size == 32 and model.num_steps == 64 and model.null_label == 10


def test_teacher_forced_logits_of_any_length(model, golden):
    labels, tokens = golden["labels"], golden["tokens"]
    assert torch.equal(model.net.cos_sin_MP2, golden["freqs_cis"])
    with torch.inference_mode():
        logits = model.net(labels, tokens)
        close(logits, golden["eval_logits_full"], 2e-4)
        close(logits[:, :-1], golden["train_logits"], 2e-4)
        for length in (0, 1, 17, 63):
            close(model.net(labels, tokens[:, :length]), golden["eval_logits_full"][:, : length + 1], 2e-4)
        with pytest.raises(ValueError, match="65 tokens given, an image has 64"):
            model.net(labels, torch.zeros(2, 65, dtype=torch.int64))


def test_losses_gradients_and_layers(golden):
    net = LlamaGenTransformer(LlamaGenConfig(3, 80, 4, 8, 10, 512, 256))
    load_tensors(net, load_file(NETWORK), "LlamaGen")
    outputs = []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    logits = net(golden["labels"], golden["tokens"][:, :-1])
    close(torch.stack(outputs), golden["block_out"], 2e-4)
    losses = F.cross_entropy(logits.transpose(1, 2), golden["tokens"], reduction="none")
    close(losses[0].mean(), golden["train_loss_valid10"], 1e-4)
    loss = losses.mean()
    close(loss, golden["train_loss"], 1e-4)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert set(gradients) == set(golden["grad_keys"])
    for name, norm in zip(golden["grad_keys"], golden["grad_l2"], strict=True):
        assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=1e-3), name


def test_bfloat16_is_the_official_bfloat16_and_near_float32(golden):
    half = bitlaw.load(NETWORK, tokenizer=TOKENIZER, dtype=torch.bfloat16, **SIZES)
    with torch.inference_mode():
        logits = half.net(golden["labels"], golden["tokens"])
    assert logits.dtype == torch.float32
    assert (logits - golden["bf16_eval_logits"]).square().mean().sqrt() < 0.05
    assert (logits - golden["eval_logits_full"]).square().mean().sqrt() < 0.1  # 0.044 by itself
    step = next(rollout(half, torch.tensor([3]), Noise(0, [0])))
    assert step.extracted.features.dtype == torch.float32 and step.extracted.cache.store.layers.dtype == torch.bfloat16
    assert half.generate([3, 5]).shape == (2, 3, 32, 32)


def test_cached_logits_are_the_teacher_forced_ones(model, golden):
    labels, tokens = golden["labels"], golden["tokens"]
    with torch.inference_mode():
        logits, memory = model.net.begin(labels)
        close(logits, golden["eval_logits_full"][:, :1], 2e-4)
        for i in range(63):
            logits, memory = model.net.step(memory, tokens[:, i], len(labels))
            close(logits, golden["eval_logits_full"][:, i + 1 : i + 2], 2e-4)
    assert memory.length == memory.store.layers.shape[4] == 64  # no room for the last token, which nothing sees


def test_loss_of_images_is_the_official_loss(model, golden):
    images = torch.from_numpy(np.load(DATA / "llamagen_vq.npz")["img_u8"])
    with torch.inference_mode():
        losses = model.loss(images, golden["labels"], Noise(0, range(2)))
    assert losses.shape == (2,)
    close(losses.mean(), golden["train_loss"], 1e-4)
    close(losses[0], golden["train_loss_valid10"], 1e-4)


@pytest.mark.parametrize(
    ("name", "heads", "num_parameters"),
    [
        ("GPT-B", 12, 110_888_448),
        ("GPT-L", 16, 342_910_976),
        ("GPT-XL", 20, 774_699_520),
        ("GPT-XXL", 24, 1_410_972_672),
        ("GPT-XXXL", 40, 3_893_027_840),
        ("GPT-1B", 32, 1_199_616_000),
        ("GPT-3B", 32, 3_096_659_200),
        ("GPT-7B", 32, 6_614_589_440),
        ("GPT-XL-t2i", 20, 777_678_080),
    ],
)
def test_official_keys_and_shapes_at_full_size(name, heads, num_parameters):
    with gzip.open(DATA / "llamagen_manifest.json.gz") as file:
        manifest = json.load(file)[name]
    with torch.device("meta"):
        official = {key: torch.empty(shape) for key, (shape, _) in manifest.items()}
    config = LlamaGen.config_of(WeightsFile(Path(f"{name}_384.pt"), official), None)["net"]
    with torch.device("meta"):
        net = LlamaGenTransformer(LlamaGenConfig(**config))
    assert {key: tensor.shape for key, tensor in net.state_dict().items()} == {k: v.shape for k, v in official.items()}
    assert config["heads"] == heads and config["side"] == 24
    assert sum(parameter.numel() for parameter in net.parameters()) == num_parameters
    # The width of the feed-forward layers is also what it is by default.
    assert LlamaGenConfig(1, config["width"], heads).hidden == config["hidden"]


# ---- sampling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [-1, 0, 20])
def test_a_rollout_is_teacher_forcing_of_its_own_tokens_with_guidance(model, interval):
    labels = torch.tensor([3, 7])
    greedy = model.with_sampling(guidance=4.0, sample=False, guidance_interval=interval)
    rows = []
    handle = model.net.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    steps = list(rollout(greedy, labels, Noise(0, range(2))))
    handle.remove()
    tokens = steps[-1].after.tokens_Bn
    with torch.inference_mode():
        cond, null = model.net(labels, tokens), model.net(torch.tensor([10, 10]), tokens)
    for i, step in enumerate(steps):
        guided = interval < 0 or i <= interval + 1  # the prefill, and decode steps 0 .. interval
        assert rows[i] == (4 if guided else 2)  # the unconditional half goes when it has no weight any more
        expected = null[:, i] + (4.0 if guided else 1.0) * (cond - null)[:, i]
        close(step.extracted.features[:, 0], expected, 5e-4)
        assert torch.equal(tokens[:, i], step.extracted.features[:, 0].argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 2.0, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
        {"guidance": 1.0, "top_p": 0.7},
        {"guidance": 2.0},
    ],
)
def test_draws_are_those_of_multinomial_from_the_filtered_softmax(model, settings):
    """The loop of the specification without a cache, on torch.multinomial with its own random numbers."""
    w, temperature = settings["guidance"], settings.get("temperature", 1.0)
    labels, tokens = torch.tensor([3, 7]), torch.empty(2, 0, dtype=torch.int64)
    torch.manual_seed(1234)
    with torch.inference_mode():
        for _ in range(20):
            cond, null = (model.net(x, tokens)[:, -1] for x in (labels, torch.tensor([10, 10])))
            probabilities = plain_filter((null + w * (cond - null)) / temperature, **settings)
            tokens = torch.cat([tokens, probabilities.multinomial(1)], 1)
    torch.manual_seed(1234)
    state = (changed := model.with_sampling(**settings)).start(labels, MultinomialNoise(0, range(2)))
    for i in range(20):
        state = replay(changed, state, i).after
    assert torch.equal(state.tokens_Bn, tokens)


def plain_filter(logits, top_k=0, top_p=1.0, **_):
    """Probabilities after top-k and top-p, row by row and token by token."""
    rows = []
    for row in logits:
        order = row.argsort(descending=True)[: top_k or None]
        kept, mass = torch.zeros_like(row), 0.0
        for index, p in zip(order, row[order].softmax(0), strict=True):
            kept[index] = p if mass <= top_p else 0.0
            mass += p.item()
        rows.append(kept / kept.sum())
    return torch.stack(rows)


def test_an_older_state_may_grow_another_branch(model):
    """Keys and values are shared between states, so a second branch must not write into the first one's."""
    short = model.with_sampling(guidance=2.0)
    steps = [next(rollout(short, torch.tensor([3]), Noise(0, [0])))]
    for i in range(1, 8):
        steps.append(replay(short, steps[-1].after, i))
    other = steps[4].before._replace(tokens_Bn=torch.zeros_like(steps[4].before.tokens_Bn))
    for i in (4, 5, 6):
        other = replay(short, other, i).after
    for step in steps:
        assert torch.equal(replay(short, step.before, step.index).extracted.features, step.extracted.features)


def test_images_are_scaled_before_they_become_bytes(model):
    state = model.start(torch.tensor([3]), Noise(0, [0]))._replace(tokens_Bn=torch.arange(64)[None] * 7)
    pixels = model.tokenizer.decode(model.tokenizer.embed(state.tokens_Bn))
    whole, small = model.decode(state), model.with_sampling(output_size=20).decode(state)
    assert torch.equal(whole, (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8))
    scaled = F.interpolate(pixels, size=(20, 20), mode="bicubic")
    assert torch.equal(small, (127.5 * scaled + 128).clamp(0, 255).to(torch.uint8))
    assert from_uint8(whole).abs().max() <= 1


def test_recipes_are_those_of_the_sizes():
    def recipes(width, side, **text):
        with torch.device("meta"):
            return LlamaGen(LlamaGenTransformer(LlamaGenConfig(1, width, width // 64, side, **text)), None).recipes

    for width, guidance in ((768, 2.0), (1024, 2.0), (1280, 1.75), (1536, 1.75), (3200, 1.65)):
        assert recipes(width, 16)["paper"] == LlamaGenSampling(guidance=guidance)
        assert recipes(width, 24)["paper"] == LlamaGenSampling(guidance=guidance, output_size=256)
        assert recipes(width, 24)["demo"] == LlamaGenSampling(guidance=4.0, top_k=2000)
    text = recipes(1280, 32, num_classes=0, text_tokens=120, text_width=2048)
    assert text["paper"] == LlamaGenSampling(guidance=7.5, top_k=1000)


def test_sampler_settings_that_make_no_sense_are_refused(model):
    for wrong, message in (
        ({"guidance": 0.5}, "guidance 0.5: must be 1 or more"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"output_size": -256}, "output_size -256"),
    ):
        with pytest.raises(ValueError, match=message):
            model.with_sampling(**wrong)
    name = model.with_sampling(guidance_interval=3, sample=False, output_size=256, top_p=0.9).sampler_name
    assert name == "temperature=1 top_k=0 top_p=0.9 guidance_interval=3 argmax output_size=256"


def test_guidance_cannot_come_back_once_its_half_is_gone(model):
    alone = replay(one := model.with_sampling(guidance=1.0), one.start(torch.tensor([3]), Noise(0, [0])), 0).after
    with pytest.raises(ValueError, match="step 1 with guidance 3 from a state that was grown without guidance"):
        replay(model.with_sampling(guidance=3.0), alone, 1)


def test_a_table_without_a_row_for_no_class():
    config = LlamaGenConfig(1, 16, 1, 2, 5, 8, 16, null_class=False)
    model = LlamaGen(LlamaGenTransformer(config), None, LlamaGenSampling(guidance=1.0))
    assert model.net.cls_embedding.embedding_table.num_embeddings == 5 and model.null_label is None
    assert len(list(rollout(model, model.check_labels([4]), Noise(0, [0])))) == 4
    with pytest.raises(ValueError, match="guidance must be 1"):
        list(rollout(model.with_sampling(guidance=2.0), torch.tensor([4]), Noise(0, [0])))
    with pytest.raises(ValueError, match="label -1 out of range"):
        model.check_labels([-1])


# ---- texts ----------------------------------------------------------------------------------------------


@pytest.fixture
def texts():
    """Three prompts of 6, 4 and 1 tokens."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) >= 6 - torch.tensor([[6], [4], [1]])
    return TextCondition.of(torch.randn(3, 6, 12, generator=generator), mask)


def test_cached_logits_of_texts_are_the_teacher_forced_ones(text_model, texts):
    tokens = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = text_model.net(texts.features_BTE, tokens, texts.mask_BT)
        assert expected.shape == (3, 17, 64)
        logits, memory = text_model.net.begin(texts.features_BTE, texts.mask_BT)
        close(logits, expected[:, :1], 1e-4)
        for i in range(15):
            logits, memory = text_model.net.step(memory, tokens[:, i], 3)
            close(logits, expected[:, i + 1 : i + 2], 1e-4)


def test_padding_is_not_seen(text_model, texts):
    """Neither in the prefill nor later; a prompt without padding sees all of its tokens."""
    tokens = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = text_model.net(texts.features_BTE, tokens, texts.mask_BT)
        noise = torch.randn(3, 6, 12) * ~texts.mask_BT[..., None]
        close(text_model.net(texts.features_BTE + noise, tokens, texts.mask_BT), plain, 1e-5)
        seen = text_model.net(texts.features_BTE, tokens)  # without the mask padding counts
        close(seen[0], plain[0], 1e-5)
        assert (seen - plain)[1:].abs().amax((1, 2)).min() > 1e-2


def test_the_text_tokens_that_are_seen_count_alike(text_model):
    """Keys of text are zero vectors, so the image sees the mean of the text's values, in whatever order."""
    features = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(0))
    net = LlamaGenTransformer(LlamaGenConfig(**{**vars(TEXT), "depth": 1})).eval()
    torch.nn.init.normal_(net.output.weight)
    with torch.inference_mode():  # of the last text token the residual branch is seen too, so it stays in its place
        order = torch.tensor([3, 0, 4, 1, 2, 5])
        close(net.begin(features[:, order])[0], net.begin(features)[0], 1e-5)


def test_texts_are_guided_by_the_unconditional_embedding(text_model, texts):
    guided = list(rollout(text_model.with_sampling(guidance=7.5, top_k=1), texts, Noise(0, range(3))))
    tokens = guided[-1].after.tokens_Bn
    with torch.inference_mode():
        null = text_model.net.cls_embedding.uncond_embedding.expand(3, -1, -1)
        cond, uncond = (text_model.net(x, tokens, texts.mask_BT) for x in (texts.features_BTE, null))
    for i, step in enumerate(guided):
        close(step.extracted.features[:, 0], uncond[:, i] + 7.5 * (cond - uncond)[:, i], 1e-3)


def test_conditions_that_do_not_fit_are_refused(text_model, model, texts):
    with pytest.raises(ValueError, match=r"load the model with text_encoder='google/flan-t5-xl'"):
        text_model.generate(["a red fox"])
    with pytest.raises(ValueError, match="give prompts, such as"):
        text_model.generate([3, 7])
    with pytest.raises(ValueError, match="give prompts, such as"):
        text_model.generate("a red fox")
    with pytest.raises(ValueError, match=r"text features \(3, 5, 12\): expected \(prompts, 6, 12\)"):
        text_model.check_labels(texts.features_BTE[:, 1:])
    with pytest.raises(ValueError, match="no prompts given"):
        text_model.check_labels(texts[:0])
    with pytest.raises(ValueError, match="no prompts given"):
        text_model.check_labels([])
    with pytest.raises(ValueError, match="give class numbers 0 to 9"):
        model.check_labels(texts)
    pair = text_model.check_labels((texts.features_BTE, texts.mask_BT))
    assert torch.equal(pair.features_BTE, texts.features_BTE) and len(pair[1:]) == 2
    assert text_model.null_label is None and text_model.num_classes == 0


def test_sites_of_a_text_model_are_its_linears(text_model):
    linears = {name for name, module in text_model.net.named_modules() if isinstance(module, torch.nn.Linear)}
    sites = {site.name: site for site in text_model.sites()}
    assert set(sites) == linears and sites["cls_embedding.cap_proj.fc1"].uses == 6
    rows = {name: 0 for name in sites}

    def count(name):
        def hook(module, inputs):
            rows[name] += inputs[0].numel() // module.in_features

        return hook

    handles = [text_model.net.get_submodule(name).register_forward_pre_hook(count(name)) for name in sites]
    condition = TextCondition.of(torch.randn(1, 6, 12))
    list(rollout(text_model.with_sampling(guidance=1.0), condition, Noise(0, [0])))
    for handle in handles:
        handle.remove()
    assert rows == {name: site.uses for name, site in sites.items()}


# ---- files ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A download: the network as its trainer saved it, with a rotary table, and the tokenizer beside it."""
    network = load_file(NETWORK) | {"freqs_cis": torch.zeros(65, 10, 2)}
    torch.save({"model": network, "steps": 300}, tmp_path / "c2i_tiny.pt")
    torch.save({"model": load_file(TOKENIZER)}, tmp_path / "vq_ds16_c2i.pt")
    return tmp_path


def test_load_generate_quantize_save_load(folder):
    model = bitlaw.load(folder / "c2i_tiny.pt", **SIZES)
    images = model.generate([3, -1], seed=1)
    assert images.shape == (2, 3, 32, 32) and torch.equal(
        images, bitlaw.load(NETWORK, TOKENIZER, **SIZES).generate([3, -1], seed=1)
    )
    small = bitlaw.quantize(model, "W4A8")
    drawn = small.generate([3, 7], seed=1, top_k=100, top_p=0.9)
    assert not torch.equal(drawn, model.generate([3, 7], seed=1, top_k=100, top_p=0.9))
    small.save(folder / "small")
    again = bitlaw.load(folder / "small")
    assert torch.equal(again.generate([3, 7], seed=1, top_k=100, top_p=0.9), drawn)
    assert again.sampling == model.sampling and again.net.config == model.net.config


@pytest.mark.parametrize("wrapper", ["", "module", "state_dict", "model"])
def test_wrappers_of_trainers(folder, wrapper):
    """FSDP exports are bare; DDP and torch.compile put prefixes before the names."""
    tensors = {f"_orig_mod.module.{name}": tensor for name, tensor in load_file(NETWORK).items()}
    torch.save({wrapper: tensors} if wrapper else tensors, folder / "c2i_other_256.pt")
    assert bitlaw.load(folder / "c2i_other_256.pt", **SIZES).net.config.width == 80


def test_official_names_come_back(folder):
    model = bitlaw.load(folder / "c2i_tiny.pt", **SIZES)
    official = model.to_official()
    assert {name: tensor.shape for name, tensor in official.items()} == {
        name: tensor.shape for name, tensor in load_file(NETWORK).items()
    }
    assert all(torch.equal(tensor, official[name]) for name, tensor in load_file(NETWORK).items() if name in official)


def meta_file(name, metadata=None, width=768, rows=1001):
    shapes = {
        "cls_embedding.embedding_table.weight": (rows, width),
        "tok_embeddings.weight": (16384, width),
        "layers.0.feed_forward.w1.weight": (2048, width),
    }
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return WeightsFile(Path(name), tensors, metadata=metadata or {})


def test_where_the_size_of_images_comes_from(model):
    def side(name, metadata=None, autoencoder=None, **options):
        return LlamaGen.config_of(meta_file(name, metadata), autoencoder, **options)["net"]["side"]

    assert side("c2i_B_256.pt") == 16 and side("c2i_B_384.pt") == 24 and side("t2i_XL_stage2_512.pt") == 32
    assert side("model.pt") == 16 and side("run_2565.pt") == 16
    assert side("model.pt", {"image_size": 384, "downsample_size": 8}) == 48
    assert side("c2i_B_256.pt", image_size=512) == 32
    assert side("c2i_B_256.pt", autoencoder=model.tokenizer) == 64  # four pixels to a token
    with pytest.raises(ValueError, match="image_size 100 is not a multiple of the 16 pixels"):
        side("model.pt", image_size=100)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"unknown option of LlamaGen 'head'; did you mean heads"):
        LlamaGen.config_of(meta_file("m.pt"), None, head=4)
    with pytest.raises(ValueError, match="width 80 does not go with 3 heads; give heads="):
        LlamaGen.config_of(meta_file("m.pt", width=80), None, heads=3)
    with pytest.raises(ValueError, match="text_encoder is for text-conditional models"):
        LlamaGen.config_of(meta_file("m.pt"), None, text_encoder="t5")
    fine_tune = LlamaGen.config_of(meta_file("m.pt", rows=11), None)["net"]
    assert fine_tune["num_classes"] == 10 and fine_tune["null_class"]
    assert LlamaGen.config_of(meta_file("m.pt", rows=1000), None, null_class=False)["net"]["num_classes"] == 1000


def test_a_wrong_or_missing_tokenizer_is_said(folder):
    tensors = load_file(TOKENIZER)
    tensors["quantize.embedding.weight"] = tensors["quantize.embedding.weight"][:100]
    torch.save(tensors, folder / "vq_ds16_c2i.pt")
    with pytest.raises(ValueError, match=r"c2i_tiny\.pt: LlamaGen vocab_size 512 does not go with the tokenizer's 100"):
        bitlaw.load(folder / "c2i_tiny.pt", **SIZES)
    with pytest.raises(ValueError, match="LlamaGen needs its VQ tokenizer, and this is a multi-scale-vq autoencoder"):
        bitlaw.load(folder / "c2i_tiny.pt", tokenizer=DATA / "vae_small.fp16.safetensors", heads=4)
    (folder / "vq_ds16_c2i.pt").unlink()
    with pytest.raises(ValueError, match=r"expected vq_ds16_c2i\.pt or vq_ds8_c2i\.pt beside it"):
        bitlaw.load(folder / "c2i_tiny.pt", **SIZES)
    alone = bitlaw.load(folder / "c2i_tiny.pt", tokenizer="none", heads=4)
    with pytest.raises(ValueError, match=r"loaded without its tokenizer \(vq_ds16_c2i\.pt\)"):
        alone.generate([3], sample=False)


def test_a_text_model_takes_the_tokenizer_of_texts(folder, text_model):
    """It has the shapes of the other one, so that nothing but its name tells them apart."""
    torch.save({"model": text_model.to_official()}, folder / "t2i_tiny.pt")
    with pytest.raises(ValueError, match=r"expected vq_ds16_t2i\.pt beside it"):
        bitlaw.load(folder / "t2i_tiny.pt", heads=2, image_size=16)
    loaded = bitlaw.load(folder / "t2i_tiny.pt", tokenizer="none", heads=2, image_size=64)
    assert loaded.net.config == TEXT and loaded.sampling == LlamaGenSampling(guidance=7.5, top_k=1000)
    with pytest.raises(ValueError, match=r"loaded without its tokenizer \(vq_ds16_t2i\.pt\)"):
        loaded.tokenizer  # noqa: B018
