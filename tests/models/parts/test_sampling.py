"""Draws, filters, bytes, and the pieces that are written for speed against their plain twins."""

import pytest
import torch
import torch.nn.functional as F

from bitlaw.models.generator import Noise
from bitlaw.models.parts import sampling
from bitlaw.models.parts.attention import attend
from bitlaw.models.parts.gelu import gelu_tanh
from bitlaw.models.parts.guidance import guide, guide_channels, ramp
from bitlaw.models.parts.pixels import from_uint8, to_uint8
from bitlaw.models.parts.sampling import draw, filter_logits, filter_nucleus, soft_embedding


def test_gumbel_numbers_have_their_mean_and_variance():
    gumbel = Noise(0, range(50)).gumbel(1, (4000,))
    # 200,000 numbers: standard errors are 0.003 and 0.008
    assert gumbel.mean().item() == pytest.approx(0.57722, abs=0.012)
    assert gumbel.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.035)


def test_gumbel_max_draws_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    tokens = draw(logits.expand(20, 1000, 5), Noise(1, range(20)).gumbel(1, (1000, 5)))
    counts = tokens.flatten().bincount(minlength=5).double()
    expected = logits.double().softmax(0) * 20_000
    assert counts[4] == 0
    assert ((counts - expected).square() / expected)[:4].sum() < 16.3  # chi-square, 3 degrees, p = 0.001


def test_noise_of_an_image_does_not_depend_on_its_batch():
    for kind in ("normal", "gumbel"):
        together = getattr(Noise(5, range(4)), kind)(2, (3, 7))
        alone = getattr(Noise(5, [2]), kind)(2, (3, 7))
        assert torch.equal(together[2:3], alone)
        assert not torch.equal(alone, getattr(Noise(6, [2]), kind)(2, (3, 7)))
        assert not torch.equal(alone, getattr(Noise(5, [2]), kind)(3, (3, 7)))


def test_top_k_keeps_equals_of_the_last():
    logits = torch.tensor([[[1.0, 3.0, 2.0, 2.0, 0.0]]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[[False, True, True, True, False]]]
    assert torch.equal(filter_logits(logits, top_k=99), logits)
    assert torch.equal(filter_logits(logits), logits)


def test_top_p_removes_a_tail_of_at_most_one_minus_p():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()[None, None]
    for p, kept in ((0.95, [1, 1, 1, 1]), (0.85, [1, 0, 1, 1]), (0.65, [1, 0, 1, 0]), (0.01, [1, 0, 0, 0])):
        assert filter_logits(logits, top_p=p).isfinite().int().tolist() == [[kept]], p


def test_top_p_works_on_what_top_k_left():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()[None, None]  # top-2 renormalized: 4/7, 3/7
    assert filter_logits(logits, top_k=2, top_p=0.55).isfinite().tolist() == [[[True, False, False, False]]]
    assert filter_logits(logits, top_k=2, top_p=0.65).isfinite().tolist() == [[[True, False, True, False]]]


def with_ties(seed, step):
    logits = torch.randn(3, 7, 300, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits / step).round() * step if step else logits


@pytest.mark.parametrize("step", [0.0, 0.01, 0.5])  # from no equals to equals on the edge of both filters
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 0.5), (20, 0.9), (60, 0.96), (299, 0.3)])
def test_both_filters_at_once_keep_what_sorting_everything_keeps(monkeypatch, step, top_k, top_p):
    """Where equals lie on an edge, all is sorted, so that the same of them are kept as ever."""
    for seed in range(5):
        logits = with_ties(seed, step)
        fast = filter_logits(logits, top_k, top_p)
        with monkeypatch.context() as patched:
            patched.setattr(sampling, "_cut", lambda *arguments: None)
            assert torch.equal(fast, filter_logits(logits, top_k, top_p))
        if step == 0:
            assert sampling._cut(logits, top_k, top_p) is not None


def test_nucleus_keeps_the_token_that_passes_p():
    """Tokens go once those before them hold more than p, so the kept ones hold p at least; never all of them go."""
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()[None, None]
    for p, kept in ((1.0, [1, 1, 1, 1]), (0.95, [1, 1, 1, 1]), (0.85, [1, 0, 1, 1]), (0.65, [1, 0, 1, 0])):
        assert filter_nucleus(logits, top_p=p).isfinite().int().tolist() == [[kept]], p
    assert filter_nucleus(logits, top_p=0.0).isfinite().int().tolist() == [[[1, 0, 0, 0]]]
    assert filter_nucleus(logits, 2, 0.55).isfinite().int().tolist() == [[[1, 0, 0, 0]]]  # top-2 renormalized: 4/7
    assert filter_nucleus(logits, 2, 0.6).isfinite().int().tolist() == [[[1, 0, 1, 0]]]
    assert torch.equal(filter_nucleus(logits), logits)


@pytest.mark.parametrize("step", [0.0, 0.01, 0.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 0.5), (20, 0.9), (60, 0.96), (60, 0.0), (299, 0.3)])
def test_nucleus_among_few_survivors_is_that_of_all(step, top_k, top_p):
    """What is below the k-th is not sorted; the same is kept as of logits that were filtered before."""
    for seed in range(5):
        logits = with_ties(seed, step)
        all_sorted = filter_nucleus(filter_nucleus(logits, top_k), top_p=top_p)
        assert torch.equal(filter_nucleus(logits, top_k, top_p), all_sorted)


def test_soft_embedding_sharpens_to_the_drawn_code():
    logits, gumbel = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    codebook = torch.eye(5)
    sums = [soft_embedding(logits, gumbel, codebook, progress).amax(-1).mean() for progress in (0.0, 0.5, 1.0)]
    assert sums[0] < sums[1] < sums[2]
    torch.testing.assert_close(soft_embedding(logits, gumbel, codebook, 0.3).sum(-1), torch.ones(2, 3))


def test_guidance():
    cond, uncond = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 3.0), uncond + 3 * (cond - uncond))
    guided = guide_channels(cond, uncond, 3.0, 3)
    torch.testing.assert_close(guided[:, :3], guide(cond, uncond, 3.0)[:, :3])
    assert torch.equal(guided[:, 3:], cond[:, 3:])
    assert [ramp(2.5, step, 4) for step in range(4)] == [1.0, 1.5, 2.0, 2.5]


def test_bytes():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    half = torch.tensor([10.4, 10.5, 10.6, -5.0, 300.0]) / 127.5 - 1
    assert to_uint8(half).tolist() == [10, 11, 11, 0, 255]
    assert to_uint8(half, "truncate").tolist() == [10, 10, 10, 0, 255]


def test_gelu_and_its_gradient_are_torchs():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -100.0, 100.0])])
    with torch.inference_mode():
        torch.testing.assert_close(gelu_tanh(x), F.gelu(x, approximate="tanh"), atol=1e-6, rtol=1e-6)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    gelu_tanh(ours).square().sum().backward()
    F.gelu(theirs, approximate="tanh").square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("keys", [9, 200])
def test_attention_is_the_fused_one(scale, keys):
    """Few keys take the plain path, many the fused one; under autograd always the fused one."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 5, 8, generator=generator)
    k, v = (torch.randn(2, 3, keys, 8, generator=generator) for _ in range(2))
    bias = torch.zeros(5, keys).masked_fill_(torch.rand(5, keys, generator=generator) < 0.3, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).reshape(2, 5, 24)
    torch.testing.assert_close(attend(q, k, v, scale, bias), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attend(q.requires_grad_(), k, v, scale, bias), expected, atol=1e-5, rtol=1e-5)
