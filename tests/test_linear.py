"""Products through oneDNN against torch's own, and what they are not meant for."""

import pytest
import torch
import torch.nn.functional as F

from bitlaw import linear as module
from bitlaw.linear import Linear, linear, product


def inputs(*shape, outputs=1024, inputs=512):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return torch.randn(*shape, inputs, generator=generator), weight, torch.randn(outputs, generator=generator)


@pytest.mark.parametrize("shape", [(1,), (5,), (6,), (40,), (2, 3, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_product_of_torch(shape, with_bias):
    x, weight, bias = inputs(*shape)
    bias = bias if with_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.inference_mode():
        out = linear(x, weight, bias)
        strided = linear(x.expand(2, *x.shape), weight, bias)
        layer = Linear(512, 1024, bias=with_bias)
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
        assert torch.equal(layer(x), out)
    assert out.shape == (*shape, 1024) and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)  # sums of 512 numbers of size 1
    torch.testing.assert_close(strided[1], out, atol=1e-5, rtol=0)


def test_gradients_and_other_types_are_torchs():
    x, weight, bias = inputs(8)
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(1024, -1))
    with torch.inference_mode():
        short = [t.detach().bfloat16() for t in (x, weight, bias)]
        assert torch.equal(linear(*short), F.linear(*short))
        assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


def test_small_weights_keep_the_bits_they_had():
    """The shipped scores of the ladder, whose weights are smaller than this, were computed with F.linear."""
    x, weight, bias = inputs(100, outputs=512, inputs=511)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.skipif(not module._HAS_ONEDNN, reason="a processor without AVX-512")
def test_large_products_go_to_onednn(monkeypatch):
    x, weight, bias = inputs(64)
    asked = []
    monkeypatch.setattr(F, "linear", lambda *arguments: asked.append(arguments))
    with torch.inference_mode():
        assert linear(x, weight, bias) is not None and not asked
        linear(x, weight[:100], bias[:100])
    assert len(asked) == 1


@torch.no_grad()
def test_products_of_any_layout() -> None:
    """Weights as they are, transposed, and with gaps, which oneDNN would be slow at; rounding of 300 products."""
    g = torch.Generator().manual_seed(0)
    x_RI, weight_OI = torch.randn(70, 300, generator=g), torch.randn(200, 300, generator=g)
    for weight in (weight_OI, weight_OI.T.contiguous().T, torch.cat([weight_OI, weight_OI], 1)[:, :300]):
        for rows in (x_RI, x_RI.T.contiguous().T, x_RI.repeat(1, 2)[:, :300]):
            assert torch.allclose(product(rows, weight).double(), x_RI.double() @ weight_OI.double().T, atol=1e-4)
