"""VAR against the official one: teacher-forced and cached logits, gradients, keys at full size, guidance."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import bitlaw
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.generator import Noise, replay, rollout
from bitlaw.models.networks.var import VARConfig, VARTransformer, from_official, to_official
from bitlaw.models.official import WeightsFile
from bitlaw.models.storage import load_tensors
from bitlaw.models.var import VAR, VARSampling

DATA = Path(__file__).parents[1] / "data"
SIDES = (1, 2, 3, 4, 5, 6)
CONFIG = VARConfig(2, 128, 2, 10, SIDES, 512, 32)
GREEDY = VARSampling(guidance=2.5, top_k=1, top_p=0.0)


@pytest.fixture(scope="module")
def golden():
    arrays = {**np.load(DATA / "vae_6s.npz"), **np.load(DATA / "var_d2_teacher_forced.npz")}
    return {k: torch.from_numpy(v) if v.dtype.kind in "fiu" else v for k, v in arrays.items()}


@pytest.fixture(scope="module")
def tensors():
    return load_file(DATA / "var_d2.fp16.safetensors")


@pytest.fixture
def net(tensors):
    net = VARTransformer(CONFIG).eval()
    load_tensors(net, from_official(tensors), "VAR")
    return net


@pytest.fixture
def model(net):
    tokenizer = VQTokenizer(VQTokenizerConfig(512, 32, 32, (1, 1, 1, 2, 2), 2, SIDES)).eval().requires_grad_(False)
    load_tensors(tokenizer, load_file(DATA / "vae_small.fp16.safetensors"), "tokenizer", ignore=("ema_vocab_hit_SV",))
    return VAR(net.requires_grad_(False), tokenizer, GREEDY)


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_teacher_forced_logits_loss_and_gradients(net, golden):
    logits = net(golden["labels"], golden["var_input"])
    close(logits, golden["logits"], 2e-4)
    loss = F.cross_entropy(logits.transpose(1, 2), golden["tokens"])
    close(loss, golden["loss_ls0.0"], 1e-4)
    loss.backward()
    gradients = to_official({name: p.grad for name, p in net.named_parameters()})
    assert set(gradients) == set(golden["grad_keys"])
    for name, norm in zip(golden["grad_keys"], golden["grad_l2"], strict=True):
        assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=1e-3), name


def test_blocks_give_the_official_hidden_states(net, golden):
    seen = []
    handles = [block.register_forward_hook(lambda block, inputs, output: seen.append(output)) for block in net.blocks]
    with torch.no_grad():
        net(golden["labels"], golden["var_input"])
    for handle in handles:
        handle.remove()
    close(torch.stack(seen), golden["block_out"], 2e-4)


def test_training_losses_and_accuracies_are_the_official_ones(net, golden):
    """With label smoothing, over the last stage alone, and in percent."""
    tokens, last = golden["tokens"], CONFIG.span(5)
    with torch.no_grad():
        logits = net(golden["labels"], golden["var_input"])
    close(F.cross_entropy(logits.transpose(1, 2), tokens, label_smoothing=0.1), golden["loss_ls0.1"], 1e-4)
    close(F.cross_entropy(logits[:, last].transpose(1, 2), tokens[:, last]), golden["L_tail"], 1e-4)
    hits = (logits.argmax(-1) == tokens).float() * 100
    close(hits.mean(), golden["acc_mean"], 1e-3)
    close(hits[:, last].mean(), golden["acc_tail"], 1e-3)


def test_legacy_attention_without_qk_norm(tensors, golden):
    """Files of before April 2024 have no temperature; heads of 64 channels are assumed."""
    older = {name: tensor for name, tensor in tensors.items() if "scale_mul" not in name}
    model = VAR.from_official(WeightsFile(Path("var_d2.pth"), older), None)
    assert not model.net.config.qk_norm and model.net.config.heads == 2
    with torch.no_grad():
        close(model.net(golden["labels"], golden["var_input"]), golden["logits_no_qk_l2"], 2e-4)
    other = VAR.from_official(WeightsFile(Path("var_d2.pth"), older), None, heads=4)
    assert other.net.config.heads == 4
    with pytest.raises(ValueError, match=r"var_d2\.pth: heads=4, but its scale_mul_1H11 has 2"):
        VAR.from_official(WeightsFile(Path("var_d2.pth"), tensors), None, heads=4)


def test_cached_logits_are_the_teacher_forced_ones(net, golden):
    with torch.inference_mode():
        memory = net.begin(golden["labels"])
        for stage in range(len(SIDES)):
            span = CONFIG.span(stage)
            inputs = golden["var_input"][:, span.start - 1 : span.stop - 1] if stage else None
            hidden, memory = net.run_stage(memory, stage, inputs)
            close(net.logits(hidden, memory.conditions.head), golden["logits"][:, span], 2e-4)


def test_a_rollout_is_teacher_forcing_of_its_own_tokens_with_guidance_ramped(model):
    labels = torch.tensor([3, 7])
    steps = list(rollout(model, labels, Noise(0, range(2))))
    with torch.inference_mode():
        latents = [step.after.latent_BZhw for step in steps]
        inputs = torch.cat([model.tokenizer.next_input(f, s) for s, f in enumerate(latents[:-1], 1)], 1)
        cond, null = model.net(labels, inputs), model.net(torch.tensor([10, 10]), inputs)
    for stage, step in enumerate(steps):
        t, span = 1.5 * stage / 5, CONFIG.span(stage)
        guided = (1 + t) * cond[:, span] - t * null[:, span]
        close(step.extracted.features, guided, 4e-4)
        assert torch.equal(step.after.tokens[-1], guided.argmax(-1))  # top_k=1
    close(model.tokenizer.tokens_to_latent(steps[-1].after.tokens), latents[-1], 1e-5)


def test_an_older_state_may_grow_another_branch(model):
    """Keys and values are shared between states, so a second branch must not write into the first one's."""
    steps = list(rollout(model, torch.tensor([3]), Noise(0, [0])))
    other = steps[2].before._replace(latent_BZhw=torch.ones_like(steps[2].before.latent_BZhw))
    for stage in (2, 3, 4):
        other = replay(model, other, stage).after
    for step in steps:
        assert torch.equal(replay(model, step.before, step.index).extracted.features, step.extracted.features)


def test_loss_of_images_is_the_official_loss(model, golden):
    with torch.inference_mode():
        losses = model.loss(golden["img_u8"], golden["labels"], Noise(0, range(2)))
    assert losses.shape == (2,)
    close(losses.mean(), golden["loss_ls0.0"], 1e-4)


SIDES_OF = {36: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


@pytest.mark.parametrize("depth", [12, 16, 20, 24, 30, 36])
def test_released_sizes_are_read_off_their_keys_and_shapes(depth):
    with gzip.open(DATA / "var_manifest.json.gz") as file:
        manifest = json.load(file)[f"var_d{depth}"]
    with torch.device("meta"):
        official = {key: torch.empty(shape) for key, (shape, _) in manifest.items()}
        config = VARConfig(**VAR.config_of(WeightsFile(Path(f"var_d{depth}.pth"), official), None)["net"])
        net = VARTransformer(config)
    sides = SIDES_OF.get(depth, VARConfig(1, 1, 1).patch_nums)
    assert config == VARConfig(depth, 64 * depth, depth, patch_nums=sides, shared_adaln=depth == 36)
    ours = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    assert ours == {key: tuple(tensor.shape) for key, tensor in from_official(official).items()}


def saved(tmp_path, tensors, tokenizer, **arguments):
    """A checkpoint of the official trainer, with what DDP and torch.compile put before names."""
    trainer = {
        "config": {"depth": 2},
        "var_wo_ddp": {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
        "vae_local": {f"module.{name}": tensor for name, tensor in tokenizer.items()},
        "var_opt": {"optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    }
    torch.save({"epoch": 3, "iter": 0, "trainer": trainer, "args": arguments}, tmp_path / "ar-ckpt-last.pth")
    return tmp_path / "ar-ckpt-last.pth"


def test_a_training_checkpoint_has_its_tokenizer_and_says_its_stages(tmp_path, tensors, model):
    """Stages that no release has: the tables' sizes alone do not tell them."""
    tokenizer = load_file(DATA / "vae_small.fp16.safetensors")
    path = saved(tmp_path, tensors, tokenizer)
    for loaded in (bitlaw.load(path), bitlaw.load(path, tokenizer=path)):
        assert torch.equal(loaded.generate([3, 7], recipe="paper"), model.generate([3, 7], recipe="paper"))
    fewer = tensors | {"lvl_embed.weight": tensors["lvl_embed.weight"][:4], "pos_1LC": tensors["pos_1LC"][:, :46]}
    with pytest.raises(
        ValueError, match=r"4 stages of 46 tokens in all are no schedule that is known; give patch_nums"
    ):
        bitlaw.load(saved(tmp_path, fewer, tokenizer))
    sides = {"patch_nums": (1, 2, 4, 5)}
    for arguments, options in ((sides, {}), ({}, sides)):
        path = saved(tmp_path, fewer, tokenizer, depth=2, **arguments)
        loaded = bitlaw.load(path, **options)
        assert loaded.net.config.patch_nums == loaded.tokenizer.config.patch_nums == (1, 2, 4, 5)
        assert loaded.generate([1]).shape == (1, 3, 80, 80)
    with pytest.raises(ValueError, match=r"patch_nums=\(1, 2, 3\) does not go with its tables, which are of 4 stages"):
        bitlaw.load(path, patch_nums=(1, 2, 3))


def test_a_tokenizer_of_another_size_takes_the_transformers_stages(tmp_path, model):
    """There is one released tokenizer for 256 and 512 pixels; whether a phi is used twice follows from the stages."""
    config = VARConfig(1, 32, 2, 10, SIDES_OF[36], 512, 32, shared_adaln=True)
    torch.manual_seed(0)
    torch.save(to_official(VARTransformer(config).state_dict()), tmp_path / "var_d1.pth")
    loaded = bitlaw.load(tmp_path / "var_d1.pth", tokenizer=DATA / "vae_small.fp16.safetensors", heads=2)
    assert loaded.net.config == config and loaded.image_size == 512
    assert loaded.tokenizer.config.patch_nums == SIDES_OF[36]
    assert loaded.tokenizer.phi_for_stage(2) is loaded.tokenizer.quantize.quant_resi.qresi_ls[1]


@pytest.mark.parametrize("shared_adaln", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_quantized_models_are_saved_and_loaded_bit_for_bit(tmp_path, tensors, shared_adaln, qk_norm):
    if shared_adaln:
        offsets = {f"blocks.{i}.ada_gss": torch.randn(1, 1, 6, 128) for i in range(2)}
        shared = {f"shared_ada_lin.1.{part}": tensors[f"blocks.0.ada_lin.1.{part}"] for part in ("weight", "bias")}
        tensors = {name: tensor for name, tensor in tensors.items() if "blocks" not in name or "ada_lin" not in name}
        tensors |= offsets | shared
    if not qk_norm:
        tensors = {name: tensor for name, tensor in tensors.items() if "scale_mul" not in name}
    torch.save(tensors, tmp_path / "var_d2.pth")
    loaded = bitlaw.load(tmp_path / "var_d2.pth", tokenizer=DATA / "vae_small.fp16.safetensors")
    images = loaded.generate([3, -1])
    small = bitlaw.quantize(loaded, "W4A8KV8")
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert (again.net.config.shared_adaln, again.net.config.qk_norm) == (shared_adaln, qk_norm)
    assert torch.equal(again.generate([3, -1]), small.generate([3, -1]))
    assert torch.equal(loaded.generate([3, -1]), images) and not torch.equal(images, small.generate([3, -1]))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_is_near_the_official_logits(tensors, golden, model, dtype, atol):
    """Logits have a deviation of 2.1. Rounding is 2^-9 and 2^-12 a number; latents and codes stay in float32."""
    short = VAR.from_official(WeightsFile(Path("var_d2.pth"), tensors), model.tokenizer, dtype).with_sampling(
        guidance=2.5, top_k=1, top_p=0.0
    )
    assert {p.dtype for p in short.net.parameters()} == {dtype}
    with torch.inference_mode():
        logits = short.net(golden["labels"], golden["var_input"])
        error = (logits - golden["logits"]).abs()
        assert logits.dtype == torch.float32 and error.max() < 4 * atol and error.mean() < atol / 4
        memory = short.net.begin(golden["labels"])
        for stage in range(len(SIDES)):
            span = CONFIG.span(stage)
            inputs = golden["var_input"][:, span.start - 1 : span.stop - 1] if stage else None
            hidden, memory = short.net.run_stage(memory, stage, inputs)
            cached = short.net.logits(hidden, memory.conditions.head)
            assert hidden.dtype == memory.store.layers.dtype == memory.positions_LC.dtype == dtype
            assert (cached - golden["logits"][:, span]).abs().mean() < atol / 4
        loss = short.loss(golden["img_u8"], golden["labels"], Noise(0, range(2))).mean()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(golden["loss_ls0.0"].item(), abs=atol)
    for step in rollout(short, golden["labels"], Noise(0, range(2))):
        assert step.extracted.features.dtype == step.after.latent_BZhw.dtype == torch.float32
    gradients = torch.autograd.grad(
        short.net.requires_grad_()(golden["labels"], golden["var_input"]).mean(), list(short.net.parameters())
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_shared_adaln_adds_the_blocks_offsets_to_one_modulation():
    torch.manual_seed(0)
    net = VARTransformer(VARConfig(2, 16, 2, 3, (1, 2), 8, 4, shared_adaln=True))
    with torch.no_grad():
        conditions = net.conditions(torch.tensor([1, 3]))
        shared = net.shared_ada_lin(net.class_emb(torch.tensor([1, 3])))
        for block, parts in zip(net.blocks, conditions.blocks, strict=True):
            close(torch.stack(parts, 2).flatten(1), shared + block.ada_gss.flatten(), 1e-6)


def test_conversion_to_official_keys_round_trips(net, tensors):
    official = to_official(net.state_dict())
    ignored = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    assert set(official) == {name for name in tensors if not name.endswith(ignored)}
    for name, tensor in official.items():
        assert torch.equal(tensor, tensors[name].float()), name


def test_keys_have_no_bias_before_and_after_training(net, golden):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    net.train()
    net(golden["labels"], golden["var_input"]).square().mean().backward()
    optimizer.step()
    q, k, v = net.blocks[0].attn.mat_qkv.bias.chunk(3)
    assert not k.any() and q.any() and v.any()
    with torch.no_grad():
        k += 1
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.mat_qkv\.bias"):
        to_official(net.state_dict())


def test_a_missing_half_of_the_bias_is_named(tensors):
    damaged = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.attn.v_bias"}
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.v_bias"):
        from_official(damaged)


def test_more_smooth_feeds_mixtures_and_nearly_codes_at_the_end(model):
    """The temperature falls to 0.0135, so the last stage's mixtures are next to single codes; the first's are not."""
    with torch.no_grad():  # a last stage without phi, so that its mixtures can be read
        model.tokenizer.phi_for_stage(5).weight.zero_()
        model.tokenizer.phi_for_stage(5).bias.zero_()
    smooth = model.with_sampling(more_smooth=True, top_k=50)
    steps = list(rollout(smooth, torch.tensor([3]), Noise(0, [0])))
    mixtures = 2 * (steps[-1].after.latent_BZhw - steps[-1].before.latent_BZhw)
    codes = model.tokenizer.embed(model.tokenizer.quantize.nearest(mixtures[0].flatten(1).T)[None])
    distance = (mixtures - codes).norm(dim=1).flatten()
    assert distance.median() < 1e-3 < distance.max()
    of_tokens = model.tokenizer.tokens_to_latent(steps[-1].after.tokens)
    assert not torch.allclose(of_tokens, steps[-1].after.latent_BZhw, atol=1e-2)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((256, 32), "vocab_size 512 does not .* tokenizer's 256"), ((512, 16), "latent_channels 32 does not .* 16")],
)
def test_network_and_tokenizer_must_fit(model, sizes, said):
    other = VQTokenizer(VQTokenizerConfig(*sizes, 32, (1, 1), 1, SIDES))
    with pytest.raises(ValueError, match=f"VAR {said}"):
        VAR(model.net, other)


def test_fresh_network_starts_near_uniform_and_trains():
    torch.manual_seed(0)
    net = VARTransformer(VARConfig(2, 32, 2, 3, (1, 2, 3), 16, 4))
    labels, tokens = torch.tensor([0, 1, 2, 3]), torch.randint(16, (4, 14))
    inputs = torch.randn(4, 13, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(net(labels, inputs).transpose(1, 2), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(16), abs=0.01)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in net.parameters())
