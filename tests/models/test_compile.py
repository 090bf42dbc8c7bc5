"""Compiled networks give the numbers of the others."""

import itertools
import shutil

import pytest
import torch

import bitlaw
from bitlaw.allocation.curves import CurveSettings
from bitlaw.allocation.exact import measure_curves
from bitlaw.linear import Linear
from bitlaw.models.generator import Noise, replay, rollout


def compiles(test):
    """Marks of a test that compiles: seconds, a compiler, and torch's own warnings about it."""
    without = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
    return pytest.mark.slow(without(pytest.mark.filterwarnings("ignore")(test)))


@compiles
@pytest.mark.parametrize("precision", ["W16A16", "W4A8"])
@pytest.mark.parametrize("name", ["ladder/var-xs", "ladder/dit-xs"])
def test_compiled_blocks_give_the_same_features(name, precision):
    labels = torch.arange(3)
    plain, compiled = (bitlaw.quantize(bitlaw.load(name), precision) for _ in range(2))
    assert compiled.compile() is compiled and len(compiled.compiled_parts) == len(plain.net.blocks)
    torch._dynamo.utils.counters.clear()
    for step in itertools.islice(rollout(plain, labels, Noise(0, range(3))), 5):  # by then every shape was met
        for _ in range(2):  # compiled, and compiled already
            features = replay(compiled, step.before, step.index).extracted.features
            error = (features - step.extracted.features).norm() / step.extracted.features.norm()
            # Rounding, which A8 turns into a neighbouring code here and there.
            assert error < (1e-5 if precision == "W16A16" else 1e-2)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert precision != "W16A16" or not counters["graph_break"]  # quantizers read the model's clock


@compiles
def test_large_linears_are_compiled_too():
    """They are an operator that torch's compiler has lowerings of its own for."""
    layer = Linear(512, 1024)
    x = torch.randn(40, 512)
    with torch.inference_mode():
        expected = layer(x) * 2
        torch.testing.assert_close(torch.compile(lambda x: layer(x) * 2)(x), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_not_calibrated():
    """Hooks that come after compilation are passed over, so that all would be measured wrong without a word."""
    model = bitlaw.load("ladder/var-xs")
    assert not model.is_compiled
    assert model.compile().is_compiled
    for work in (lambda: bitlaw.quantize(model, "W4A16", "gptq"), lambda: measure_curves(model, CurveSettings())):
        with pytest.raises(ValueError, match="the model is compiled"):
            work()
