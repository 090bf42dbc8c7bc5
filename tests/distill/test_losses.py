"""Losses against their definitions, written out in float64, and against torch's own."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bitlaw.distill.losses import JS, LOSSES, MSE, CrossEntropy, ForwardKL, ReverseKL, TopKLD, make_loss

V = 7
TEACHED = ("mse", "js", "forward-kl", "reverse-kl", "topkld", "topkld-printed")
WITH_TEMPERATURE = TEACHED[1:]
SETTINGS = {"topkld": {"top_k": 3}, "topkld-printed": {"top_k": 3}}
ROUNDING = {"atol": 1e-12, "rtol": 1e-12}  # of sums of a few float64 logarithms


def draw(num_tokens=6, vocab_size=V, seed=0, dtype=torch.float64, spread=2.0):
    """Logits of student and teacher, and true tokens."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_tokens, vocab_size, generator=g, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(vocab_size, (num_tokens,), generator=g)
    return (student * spread).to(dtype), (teacher * spread).to(dtype), tokens


def made(name, vocab_size=V, **given):
    """The loss of that name, K = 3 for TopKLD unless given, without the warning of the printed one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_loss(name, vocab_size=vocab_size, **(SETTINGS.get(name, {}) | given))


def gradient(loss, student, teacher, tokens=None, **options):
    """Of the sum over tokens, by the student's logits."""
    student = student.detach().requires_grad_()
    loss(student, teacher, tokens, **options).sum().backward()
    return student.grad


def by_definition(name, student, teacher, top_k=3):
    """Plain sums over codes, of logits without ties."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    forward, reverse = q * (q / p).log(), p * (p / q).log()
    if name == "mse":
        return (student - teacher).square().mean(-1)
    if name == "js":
        mean = (p + q) / 2
        return ((p * (p / mean).log() + q * (q / mean).log()) / 2).sum(-1)
    if name in ("forward-kl", "reverse-kl"):
        return (forward if name == "forward-kl" else reverse).sum(-1)
    in_set = torch.zeros_like(p).scatter_(1, q.topk(top_k).indices, 1).bool()
    mass = 0 if name == "topkld-printed" else q - p
    return torch.where(in_set, reverse + mass, forward - mass).sum(-1)


@pytest.mark.parametrize("name", TEACHED)
def test_the_definition(name):
    student, teacher, _ = draw()
    torch.testing.assert_close(made(name)(student, teacher), by_definition(name, student, teacher), **ROUNDING)


@pytest.mark.parametrize(
    ("name", "temperature"), [(name, 1.0) for name in LOSSES] + [(name, 1.7) for name in WITH_TEMPERATURE]
)
def test_gradients(name, temperature):
    student, teacher, tokens = draw()
    loss = made(name, temperature=temperature)
    for chunk_bytes in (None, 2 * V * 8):
        assert torch.autograd.gradcheck(
            lambda x, size=chunk_bytes: loss(x, teacher, tokens, chunk_bytes=size), student.requires_grad_()
        )


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_change_nothing(name):
    student, teacher, tokens = draw(num_tokens=11)
    loss = made(name)
    whole, grad = loss(student, teacher, tokens), gradient(loss, student, teacher, tokens)
    for rows in (1, 4, 11, 100):
        size = {"chunk_bytes": rows * V * 8}
        torch.testing.assert_close(loss(student, teacher, tokens, **size), whole, **ROUNDING)
        torch.testing.assert_close(gradient(loss, student, teacher, tokens, **size), grad, **ROUNDING)


def test_no_chunk_is_larger_than_asked_for():
    seen = []

    class Watched(MSE):
        def value(self, chunk):
            seen.append(tuple(chunk.student_CV.shape))
            return super().value(chunk)

    Watched()(*draw(num_tokens=5, dtype=torch.float32)[:2], chunk_bytes=2 * V * 4 + 3)
    assert seen == [(2, V), (2, V), (1, V)]


@pytest.mark.parametrize(("top_k", "other"), [(0, ForwardKL()), (V, ReverseKL())])
def test_topkld_has_forward_and_reverse_kl_at_its_ends(top_k, other):
    student, teacher, _ = draw()
    loss = TopKLD(top_k)
    torch.testing.assert_close(loss(student, teacher), other(student, teacher), **ROUNDING)
    torch.testing.assert_close(gradient(loss, student, teacher), gradient(other, student, teacher), **ROUNDING)


# Spread over fifty orders of magnitude of probability.
logits = st.lists(st.floats(-60, 60), min_size=V, max_size=V)
temperatures = st.sampled_from([0.5, 1.0, 3.0])


@given(student=logits, teacher=logits, top_k=st.integers(0, V), temperature=temperatures)
@settings(max_examples=60, deadline=None)
def test_topkld_is_not_negative(student, teacher, top_k, temperature):
    loss = TopKLD(top_k, temperature=temperature)
    value = loss(torch.tensor([student], dtype=torch.float64), torch.tensor([teacher], dtype=torch.float64))
    assert math.isfinite(value.item()) and value.item() >= 0


@given(both=logits, top_k=st.integers(0, V), temperature=temperatures, shift=st.floats(-5, 5))
@settings(max_examples=60, deadline=None)
def test_topkld_and_its_gradient_vanish_where_both_agree(both, top_k, temperature, shift):
    loss, teacher = TopKLD(top_k, temperature=temperature), torch.tensor([both], dtype=torch.float64)
    assert loss(teacher.clone(), teacher).item() == 0
    assert not gradient(loss, teacher.clone(), teacher).any()
    # A constant added to all logits changes no probability; 1e-14 is the rounding of the sum.
    assert abs(loss(teacher + shift, teacher).item()) < 1e-12
    assert gradient(loss, teacher + shift, teacher).abs().max() < 1e-12


@given(student=logits, top_k=st.integers(1, V - 1))
@settings(max_examples=30, deadline=None)
def test_topkld_is_zero_only_where_both_agree(student, top_k):
    student = torch.tensor([student], dtype=torch.float64)
    teacher = student.roll(1, -1)
    distance = (student.softmax(-1) - teacher.softmax(-1)).abs().sum().item()
    # As Pinsker's inequality, for one of two generalised divergences; the constant is generous.
    assert TopKLD(top_k)(student, teacher).item() >= distance**2 / 16 - 1e-15


def test_printed_topkld_goes_below_zero_and_pushes_where_both_agree():
    """A student that moves probability out of the set gains log-ratio there, and nothing holds it."""
    teacher = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    printed = made("topkld-printed", 4, top_k=2)
    assert printed(student, teacher).item() < -0.1
    assert made("topkld", 4, top_k=2)(student, teacher).item() > 0.01
    push = gradient(printed, teacher, teacher)
    assert (push[:, :2] > 0.1).all() and (push[:, 2:] < -0.1).all()  # descent lowers the logits of the set


def test_codes_as_probable_as_the_last_of_the_set_are_in_it():
    teacher = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    student, *_ = draw(num_tokens=1, vocab_size=5)
    two, three, four, five = (TopKLD(k)(student, teacher).item() for k in (2, 3, 4, 5))
    assert two == three == four != five
    order = torch.tensor([0, 3, 1, 2, 4])
    assert TopKLD(2)(student[:, order], teacher[:, order]).item() == pytest.approx(two, rel=1e-13)


@given(student=logits, teacher=logits)
@settings(max_examples=40, deadline=None)
def test_js_is_symmetric_and_bounded(student, teacher):
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in (student, teacher))
    value = JS()(student, teacher).item()
    assert value == pytest.approx(JS()(teacher, student).item(), rel=1e-12, abs=1e-15)
    assert -1e-15 <= value <= math.log(2) + 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_has_the_same(dtype):
    student, teacher, tokens = draw(num_tokens=40, dtype=dtype)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else ROUNDING
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(
        CrossEntropy()(student, None, tokens), F.cross_entropy(student, tokens, reduction="none"), **close
    )
    torch.testing.assert_close(
        MSE()(student, teacher), F.mse_loss(student, teacher, reduction="none").mean(-1), **close
    )
    for loss, target, other in ((ForwardKL(), log_q, log_p), (ReverseKL(), log_p, log_q)):
        expected = F.kl_div(other, target, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(loss(student, teacher), expected, **close)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_computed_in_float32(name):
    student, teacher, tokens = draw(num_tokens=20, dtype=torch.bfloat16)
    loss = made(name)
    value, exact = loss(student, teacher, tokens), loss(student.double(), teacher.double(), tokens)
    assert value.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(value, exact.float(), atol=2e-6, rtol=2e-6)
    grad = gradient(loss, student, teacher, tokens)
    assert grad.dtype == torch.bfloat16
    expected = gradient(loss, student.float(), teacher.float(), tokens).bfloat16()
    torch.testing.assert_close(grad, expected, atol=0, rtol=2**-7)  # one bfloat16 spacing


@pytest.mark.parametrize("name", ["forward-kl", "reverse-kl", "js", "topkld"])
def test_hot_distributions_compare_logits_by_their_variance(name):
    """Near the uniform distribution every divergence is half the variance of the difference of logits, JS a quarter."""
    student, teacher, _ = draw()
    half_variance = (student - teacher).var(-1, correction=0) / 2
    value = made(name, temperature=1e4)(student, teacher)
    expected = half_variance / 4 if name == "js" else half_variance
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=0)  # the next term is smaller by spread / 1e4


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_temperature_divides_the_logits_and_its_square_multiplies_the_loss(name):
    student, teacher, _ = draw()
    expected = 2.5**2 * made(name)(student / 2.5, teacher / 2.5)
    torch.testing.assert_close(made(name, temperature=2.5)(student, teacher), expected, **ROUNDING)


@pytest.mark.parametrize("name", TEACHED)
def test_codes_that_both_leave_out_might_as_well_not_be_there(name):
    student, teacher, _ = draw()
    left_out = torch.full((len(student), 2), -torch.inf, dtype=torch.float64)
    wide = [torch.cat([x[:, :4], left_out, x[:, 4:]], 1) for x in (student, teacher)]
    # A mean over codes has two more of them.
    share = V / (V + 2) if name == "mse" else 1
    loss = made(name)
    torch.testing.assert_close(loss(*wide), share * loss(student, teacher), **ROUNDING)
    grad = gradient(loss, *wide)
    assert not grad[:, 4:6].any()
    kept = torch.cat([grad[:, :4], grad[:, 6:]], 1)
    torch.testing.assert_close(kept, share * gradient(loss, student, teacher), **ROUNDING)


def test_a_code_that_one_leaves_out():
    """Infinite where the divergence is, else finite; the gradient never NaN where the loss is finite."""
    both = torch.tensor([[2.0, 1.0, 0.5, 0.0]], dtype=torch.float64)
    without = both.clone()
    without[0, 3] = -torch.inf
    for loss, student, teacher in (
        (ForwardKL(), both, without),
        (ReverseKL(), without, both),
        (TopKLD(2), both, without),
        (JS(), both, without),
        (JS(), without, both),
    ):
        assert 0 < loss(student, teacher).item() < 1, loss
        assert gradient(loss, student, teacher).isfinite().all(), loss
    for loss, student, teacher in (
        (ForwardKL(), without, both),
        (ReverseKL(), both, without),
        (TopKLD(2), without, both),
        (TopKLD(4), both, without),
        (MSE(), both, without),
    ):
        assert loss(student, teacher).item() == torch.inf, loss
    # With the first code alone in the set: the student's share of the last one counts in full.
    p, q = both.softmax(-1)[0], without.softmax(-1)[0]
    rest = (q[1:3] * (q[1:3] / p[1:3]).log() + p[1:3] - q[1:3]).sum() + p[3]
    expected = p[0] * (p[0] / q[0]).log() + q[0] - p[0] + rest
    assert TopKLD(1)(both, without).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", TEACHED)
def test_probabilities_that_underflow(name):
    """Logits 2,000 apart, in float32: numbers, not NaN; and so of the least that float32 has, which masks write."""
    teacher = torch.tensor([[0.0, -1000.0, -2000.0, 3.0], [1.0, 2.0, 3.0, torch.finfo(torch.float32).min]])
    student = torch.tensor([[-1000.0, 0.0, -1.0, -2000.0], [1.5, 2.0, 2.0, torch.finfo(torch.float32).min]])
    loss = made(name, 4, **({"top_k": 2} if name.startswith("topkld") else {}))
    assert loss(student, teacher).isfinite().all()
    assert gradient(loss, student, teacher).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("with_infinity", [False, True])
def test_nan_is_seen(name, with_infinity):
    for index in range(1 if name == "ce" else 2):
        student, teacher, tokens = draw()
        tokens[:] = 0
        if with_infinity:
            student[:, 5], teacher[:, 5] = -torch.inf, -torch.inf
        (student, teacher)[index][2, 3] = torch.nan
        value = made(name)(student, teacher, tokens)
        assert value.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("name", LOSSES)
def test_each_token_has_its_gradient(name):
    student, teacher, tokens = draw()
    loss, weights = made(name), torch.arange(6, dtype=torch.float64)
    x = student.requires_grad_()
    value = loss(x, teacher.requires_grad_(), tokens)
    (weighted,) = torch.autograd.grad(value, x, weights, retain_graph=True)
    torch.testing.assert_close(weighted, weights[:, None] * gradient(loss, x, teacher, tokens), **ROUNDING)
    (again,) = torch.autograd.grad(value, x, weights, retain_graph=True)
    assert torch.equal(weighted, again)
    value.sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_inputs_are_left_as_they_are_and_no_tokens_are_fine(name):
    tensors = draw(dtype=torch.float32)
    copies = [x.clone() for x in tensors]
    gradient(made(name), *tensors)
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))
    assert made(name)(*(x[:0] for x in tensors)).shape == (0,)
    assert gradient(made(name), *(x[:0] for x in tensors)).shape == (0, V)


def test_the_printed_form_warns_when_it_is_made_and_not_when_it_is_used():
    with pytest.warns(UserWarning, match="not a divergence.*'topkld' adds the mass terms"):
        loss = make_loss("topkld-printed", vocab_size=V, top_k=2)
    assert loss == TopKLD(2, as_printed=True)
    loss(*draw())  # a warning would be an error
    assert make_loss("topkld", vocab_size=V, top_k=V, temperature=2) == TopKLD(V, temperature=2)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("forward_kl", {}, "unknown loss 'forward_kl'; did you mean forward-kl"),
        ("topkld", {}, "needs top_k.*7 codes.*give the top-k that the sampler draws with"),
        ("topkld", {"top_k": 8}, "top_k is 8, but the vocabulary has 7 codes; give a number from 0"),
        ("topkld", {"top_k": -1}, "top_k is -1"),
        ("js", {"top_k": 3}, "'js' has no top_k, but 3 was given.*topkld, topkld-printed"),
        ("ce", {"temperature": 2.0}, "'ce' has no temperature, but 2.0 was given.*js, forward-kl"),
        ("mse", {"temperature": 2.0}, "'mse' has no temperature"),
        ("js", {"temperature": 0.0}, "temperature is 0.0; give a number above 0"),
        ("js", {"temperature": math.nan}, "temperature is nan"),
    ],
)
def test_settings_that_cannot_be(name, given, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, vocab_size=V, **given)


def test_tensors_that_cannot_be():
    student, teacher, tokens = draw()
    for loss, tensors, message in (
        (ForwardKL(), (student,), "ForwardKL compares with a teacher"),
        (ForwardKL(), (student, teacher[:, :5]), r"teacher's logits have shape \(6, 5\), the student's \(6, 7\)"),
        (ForwardKL(), (student[None], teacher[None]), r"shape \(1, 6, 7\); give floating-point numbers"),
        (ForwardKL(), (student.long(), teacher), "torch.int64"),
        (CrossEntropy(), (student, teacher), "true tokens; give them"),
        (CrossEntropy(), (student, None, tokens[:4]), r"shape \(4,\); give int64, \(6,\)"),
        (CrossEntropy(), (student, None, tokens + 100), "vocabulary has 7 codes"),
        (TopKLD(), (student, teacher), "needs top_k"),
        (TopKLD(8), (student, teacher), "top_k is 8, but the vocabulary has 7"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LOSSES)
def test_a_gpu_gives_the_same(name):
    student, teacher, tokens = draw(num_tokens=50, vocab_size=300, dtype=torch.float32)
    loss = made(name, 300)
    on_gpu = [x.cuda() for x in (student, teacher, tokens)]
    close = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums in another order
    torch.testing.assert_close(loss(*on_gpu).cpu(), loss(student, teacher, tokens), **close)
    torch.testing.assert_close(gradient(loss, *on_gpu).cpu(), gradient(loss, student, teacher, tokens), **close)
