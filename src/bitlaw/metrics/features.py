"""Feature networks: what a metric sees of an image.

A metric takes `Features`, never a network, so FID on any network is the same function. Two networks are built in:
the ladder's own (in the package) and Inception-v3 (a TorchScript file that the user names).

Legend: B images, C channels or classes, H height, W width, D pooled features, S spatial features, F latent factors.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

LADDER_WEIGHTS = "features.safetensors"
NUM_FEATURES = 64
NUM_SPATIAL_CHANNELS = 7  # as sFID takes of Inception's `mixed_6/conv`
NUM_CLASSES, NUM_TEXTURES, NUM_BACKGROUNDS, NUM_FACTORS = 12, 3, 2, 15


class Features(NamedTuple):
    """What a network gives for a batch, on the CPU.

    pooled_BD: one vector an image, for FID, KID and precision/recall
    spatial_BS: flattened early feature maps, for sFID; None if the network has none
    logprobs_BC: log-probabilities of the classes, for IS; None if the network has none
    """

    pooled_BD: Tensor
    spatial_BS: Tensor | None = None
    logprobs_BC: Tensor | None = None


@runtime_checkable
class FeatureNetwork(Protocol):
    """A callable from uint8 images (B, 3, H, W) to `Features`.

    `name` says which network, `fingerprint` which weights: the first 16 hex digits of their SHA-256.
    """

    name: str
    fingerprint: str

    def __call__(self, images_BCHW: Tensor) -> Features: ...


def extract_features(
    network: FeatureNetwork, images_BCHW: Tensor, batch_size: int = 250, progress: Callable[[int], Any] | None = None
) -> Iterator[Features]:
    """The features of many images, `batch_size` at a time; `progress` is called with the number just finished."""
    for images in images_BCHW.split(batch_size):
        yield network(images)
        if progress is not None:
            progress(len(images))


def check_images(images_BCHW: Tensor, size: int | None = None) -> None:
    """ValueError unless `images_BCHW` is uint8 (B, 3, H, W) with B > 0, and H = W = `size` if one is given."""
    shape = tuple(images_BCHW.shape)
    if images_BCHW.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[0] == 0:
        raise ValueError(f"images: expected uint8 (B, 3, H, W) with B > 0, found {images_BCHW.dtype} {shape}")
    if size is not None and shape[2:] != (size, size):
        raise ValueError(f"images: this network takes {size} x {size} pixels, found {shape[2]} x {shape[3]}")


# ---- the ladder's network ------------------------------------------------------------------------


class Heads(NamedTuple):
    """The outputs of `LadderFeatureNet`; all heads are linear in `features_B64`.

    spatial: maps (B, 80, 6, 6) from the middle of the network
    factors_BF: the continuous factors, in the units they were trained in
    """

    features_B64: Tensor
    spatial: Tensor
    class_logits_12: Tensor
    texture_logits_3: Tensor
    background_logits_2: Tensor
    factors_BF: Tensor


class ConvNorm(nn.Sequential):
    """3x3 convolution and BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )


class ResidualBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))), as in He et al. 2016."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels)
        self.conv2 = ConvNorm(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(x_BCHW + self.conv2(F.relu(self.conv1(x_BCHW))))


class LadderFeatureNet(nn.Module):
    """The feature network of the ladder's 24x24 images: 0.54 M parameters, 22 MFLOP an image.

    A stride-1 stem sees single pixels; three strided convolutions, each with a residual block, go to 3x3. Features are
    linear in all nine positions (an average would lose the pose) and end in a BatchNorm without affine,
    so that each has mean 0 and variance 1 on training images and none dominates a distance.
    """

    def __init__(self, num_factors: int = NUM_FACTORS):
        super().__init__()
        self.stem = ConvNorm(3, 16)
        self.down12, self.block12 = ConvNorm(16, 32, stride=2), ResidualBlock(32)
        self.down6, self.block6 = ConvNorm(32, 80, stride=2), ResidualBlock(80)
        self.down3, self.block3 = ConvNorm(80, 112, stride=2), ResidualBlock(112)
        self.project = nn.Linear(112 * 3 * 3, NUM_FEATURES)
        self.norm = nn.BatchNorm1d(NUM_FEATURES, affine=False)
        self.class_head = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.texture_head = nn.Linear(NUM_FEATURES, NUM_TEXTURES)
        self.background_head = nn.Linear(NUM_FEATURES, NUM_BACKGROUNDS)
        self.factor_head = nn.Linear(NUM_FEATURES, num_factors)

    def forward(self, images_BCHW: Tensor) -> Heads:
        """`images_BCHW`: float (B, 3, 24, 24) in [-1, 1]."""
        x = F.relu(self.stem(images_BCHW))
        x = self.block12(F.relu(self.down12(x)))
        spatial = self.block6(F.relu(self.down6(x)))
        x = self.block3(F.relu(self.down3(spatial)))
        features = self.norm(self.project(x.flatten(1)))
        return Heads(
            features,
            spatial,
            self.class_head(features),
            self.texture_head(features),
            self.background_head(features),
            self.factor_head(features),
        )


class LadderFeatures:
    """The ladder's feature network on uint8 (B, 3, 24, 24); sFID sees 7 channels of its 6x6 maps.

    `path` names other weights than the package's. Raises ValueError naming the file if they do not fit.
    """

    name = "ladder"

    def __init__(self, path: Path | str | None = None):
        source = resources.files("bitlaw") / "ladder" / "weights" / LADDER_WEIGHTS if path is None else Path(path)
        if not source.is_file():
            raise ValueError(f"{source}: no such file; `bitlaw ladder train` makes the ladder's feature network")
        data = source.read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        try:
            tensors = load_safetensors(data)
            net = LadderFeatureNet(num_factors=tensors["factor_head.bias"].numel())
            net.load_state_dict(tensors)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{source}: not the weights of a ladder feature network: {error}") from error
        self._net = net.eval()

    @torch.inference_mode()
    def __call__(self, images_BCHW: Tensor) -> Features:
        check_images(images_BCHW, size=24)
        x_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1  # a fifth faster so
        heads = self._net(x_BCHW)
        return Features(
            pooled_BD=heads.features_B64,
            spatial_BS=heads.spatial[:, :NUM_SPATIAL_CHANNELS].flatten(1),
            logprobs_BC=heads.class_logits_12.log_softmax(-1),
        )


# ---- Inception-v3 --------------------------------------------------------------------------------

INCEPTION_SIZE = 299


class InceptionTorchScript:
    """Inception-v3 as the FID of the field uses it, from the TorchScript file that the StyleGAN family publishes.

    `path` is that file (`inception-2015-12-05.pt`, a translation of TensorFlow's graph of the same date); it is run,
    never unpickled. pooled: 2048 features; logprobs: 1008 classes, without the output's bias, as the Inception score's
    original has it; spatial: 7 channels of `mixed_6/conv`, 17 x 17 = 2023 numbers, as ADM's sFID.

    The file's own `forward` gives no spatial features, so its layers are run here one by one after TensorFlow's
    resizing; that both ways give the same features is checked once. ValueError if the file is missing or is another
    network.
    """

    name = "inception-v3"

    def __init__(self, path: Path | str, device: torch.device | str = "cpu"):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give StyleGAN's TorchScript file inception-2015-12-05.pt")
        with path.open("rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is; the file is what the field has
                self._net = torch.jit.load(path, map_location=self._device).eval()
            self._check()
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"{path}: not the TorchScript Inception-v3 of the StyleGAN family: {error}") from error

    @torch.inference_mode()
    def __call__(self, images_BCHW: Tensor) -> Features:
        check_images(images_BCHW)
        x_BCHW = resize_as_tensorflow(images_BCHW.to(self._device).float(), INCEPTION_SIZE)
        x_BCHW = (x_BCHW - 128) / 128
        for name, layer in self._net.layers.named_children():
            if name == "mixed_6":
                spatial_BCHW = layer.conv(x_BCHW)[:, :NUM_SPATIAL_CHANNELS]
            x_BCHW = layer(x_BCHW)
        pooled_BD = x_BCHW.flatten(1)
        logits_BC = F.linear(pooled_BD, self._net.output.weight)
        return Features(pooled_BD.cpu(), spatial_BCHW.flatten(1).cpu(), logits_BC.log_softmax(-1).cpu())

    @torch.inference_mode()
    def _check(self) -> None:
        pixels = torch.arange(2 * 3 * 40 * 56) * 37 % 256
        images_BCHW = pixels.to(torch.uint8).reshape(2, 3, 40, 56)
        expected_BD = self._net(images_BCHW.to(self._device), return_features=True).cpu()
        if not torch.allclose(self(images_BCHW).pooled_BD, expected_BD, rtol=1e-3, atol=1e-3):
            raise RuntimeError("its forward gives other features than its layers")


def resize_as_tensorflow(images_BCHW: Tensor, size: int) -> Tensor:
    """Bilinear to `size` x `size` as TensorFlow 1 did it: output pixel i samples input position i * width / size.

    Half-pixel centres, which every later library has, would move FID.
    """
    for dim in (2, 3):
        length = images_BCHW.shape[dim]
        position = torch.arange(size, device=images_BCHW.device, dtype=torch.float32) * (length / size)
        below = position.long()
        above = (below + 1).clamp_max(length - 1)
        shape = [1, 1, 1, 1]
        shape[dim] = size
        weight = (position - below).reshape(shape)
        images_BCHW = torch.lerp(images_BCHW.index_select(dim, below), images_BCHW.index_select(dim, above), weight)
    return images_BCHW
