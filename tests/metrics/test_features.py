"""The feature networks: shapes, files that do not fit, and Inception's resizing against an independent formula."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from bitlaw.metrics.features import (
    FeatureNetwork,
    InceptionTorchScript,
    LadderFeatureNet,
    LadderFeatures,
    extract_features,
    resize_as_tensorflow,
)


def images(num: int, side: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights and BatchNorms that have seen some images, as a file."""
    torch.manual_seed(0)
    net = LadderFeatureNet(num_factors=5)
    net(images(64).float() / 127.5 - 1)
    path = tmp_path_factory.mktemp("weights") / "features.safetensors"
    save_file(net.state_dict(), path)
    return path


def test_ladder_network() -> None:
    torch.manual_seed(0)
    net = LadderFeatureNet(num_factors=5)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(0.55e6, rel=0.05)
    heads = net(torch.randn(64, 3, 24, 24))
    assert [tuple(head.shape[1:]) for head in heads] == [(64,), (80, 6, 6), (12,), (3,), (2,), (5,)]
    torch.testing.assert_close(heads.features_B64.mean(0), torch.zeros(64), rtol=0, atol=1e-4)
    # BatchNorm divides by sqrt(variance + 1e-5), so that the variance is slightly below 1
    torch.testing.assert_close(heads.features_B64.var(0, correction=0), torch.ones(64), rtol=1e-3, atol=0)


def test_ladder_features(weights: Path) -> None:
    network = LadderFeatures(weights)
    assert isinstance(network, FeatureNetwork)
    found = network(images(6))
    assert found.pooled_BD.shape == (6, 64)
    assert found.spatial_BS is not None and found.spatial_BS.shape == (6, 7 * 6 * 6)
    assert found.logprobs_BC is not None
    torch.testing.assert_close(found.logprobs_BC.exp().sum(1), torch.ones(6))


def test_features_do_not_depend_on_the_batch(weights: Path) -> None:
    network = LadderFeatures(weights)
    seen: list[int] = []
    parts = list(extract_features(network, images(11), batch_size=4, progress=seen.append))
    assert seen == [4, 4, 3]
    pooled_ND = torch.cat([part.pooled_BD for part in parts])
    torch.testing.assert_close(pooled_ND, network(images(11)).pooled_BD, rtol=1e-4, atol=1e-5)


def test_fingerprint_is_of_the_weights(weights: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(LadderFeatureNet(num_factors=5).state_dict(), tmp_path / "other.safetensors")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    assert LadderFeatures(copy).fingerprint == LadderFeatures(weights).fingerprint
    assert LadderFeatures(tmp_path / "other.safetensors").fingerprint != LadderFeatures(weights).fingerprint


def test_wrong_images(weights: Path) -> None:
    network = LadderFeatures(weights)
    with pytest.raises(ValueError, match="24 x 24 pixels, found 32 x 32"):
        network(images(2, side=32))
    with pytest.raises(ValueError, match=r"uint8 .* found torch.float32"):
        network(images(2).float())
    with pytest.raises(ValueError, match="B > 0"):
        network(images(2)[:0])


def test_unusable_ladder_weights_name_the_file(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-100])
    save_file({"factor_head.bias": torch.zeros(5)}, tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(5)}, tmp_path / "foreign.safetensors")
    for name in ("cut", "other", "foreign"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: not the weights of a ladder feature network"):
            LadderFeatures(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"absent\.safetensors: no such file"):
        LadderFeatures(tmp_path / "absent.safetensors")


# ---- Inception: a small network with the same parts ----------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(8, 9, 1), nn.ReLU())
        self.tower = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x)], 1)


class SmallInception(nn.Module):
    """The published file's structure and its resizing: a sampling grid moved by half a pixel's difference."""

    def __init__(self, center: float) -> None:
        super().__init__()
        self.center = center
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Conv2d(3, 8, 16, stride=16))
        self.layers.add_module("mixed_6", Mixed())
        self.layers.add_module("pool2", nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(13, 5)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        batch, channels, height, width = img.shape
        theta = torch.eye(2, 3)
        theta[0, 2] += 1 / width - 1 / 299
        theta[1, 2] += 1 / height - 1 / 299
        grid = F.affine_grid(theta.unsqueeze(0).repeat([batch, 1, 1]), [batch, channels, 299, 299], False)
        x = F.grid_sample(img.to(torch.float32), grid, "bilinear", "border", False)
        features = self.layers((x - self.center) / self.center).flatten(1)
        return features if return_features else self.output(features).softmax(1)


def script(net: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript as a whole is deprecated
        torch.jit.script(net.eval()).save(path)
    return path


def test_inception(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = SmallInception(center=128.0)
    network = InceptionTorchScript(script(net, tmp_path / "inception.pt"))
    found = network(images(3, side=40))
    with torch.no_grad():
        pooled_BD = net(images(3, side=40), return_features=True)
        probs_BC = net(images(3, side=40))
    torch.testing.assert_close(found.pooled_BD, pooled_BD, rtol=1e-4, atol=1e-5)
    assert found.spatial_BS is not None and found.spatial_BS.shape == (3, 7 * 18 * 18)
    assert found.logprobs_BC is not None
    with_bias_BC = (found.logprobs_BC + net.output.bias.detach()).softmax(1)
    torch.testing.assert_close(with_bias_BC, probs_BC, rtol=1e-4, atol=1e-5)


def test_inception_that_is_another_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pt: no such file"):
        InceptionTorchScript(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not a network")
    for path in (
        tmp_path / "text.pt",
        script(nn.Linear(2, 2), tmp_path / "linear.pt"),
        script(SmallInception(center=100.0), tmp_path / "scaling.pt"),
    ):
        with pytest.raises(ValueError, match=rf"{path.name}: not the TorchScript Inception-v3"):
            InceptionTorchScript(path)


def test_resizing_samples_at_multiples_of_the_ratio() -> None:
    ramp = torch.arange(10.0).expand(1, 1, 10, 10)
    resized = resize_as_tensorflow(ramp, 25)
    expected = (torch.arange(25) * 0.4).clamp_max(9)
    torch.testing.assert_close(resized[0, 0], expected.expand(25, 25))
    assert torch.equal(resize_as_tensorflow(ramp, 10), ramp)
