"""The procedural images of the ladder: twelve shapes with pose, colour, texture, light and shadow, drawn analytically.

Every image is a function of (seed, index): shapes are signed distance fields over [-1, 1]^2 with y down, so edges,
bevels and shadows come from one distance. Splits are seeds; each is unlimited.

Legend: B images, H = W pixels a side, F latent factors.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 24
SPLITS = {"train": 1, "validation": 2, "reference": 3, "test": 4, "guidance": 5, "features": 6}
TEXTURES = ("plain", "stripes", "checker")
BACKGROUNDS = ("gradient", "horizon")


class Images(NamedTuple):
    """uint8 images (B, 3, H, W), class labels (B,), and the latent factors they were drawn from."""

    images_BCHW: Tensor
    labels_B: Tensor
    factors: "Factors"


@dataclass(frozen=True)
class Factors:
    """The latent factors of a batch; each a tensor (B,). Angles in radians, lengths in half image sides, HSV."""

    shape: Tensor
    texture: Tensor
    background: Tensor
    center_x: Tensor
    center_y: Tensor
    radius: Tensor
    rotation: Tensor
    light: Tensor
    hue: Tensor
    saturation: Tensor
    value: Tensor
    second_saturation: Tensor
    second_value: Tensor
    background_hue: Tensor
    background_saturation: Tensor
    background_value: Tensor
    dark_saturation: Tensor
    dark_value: Tensor
    horizon: Tensor
    tilt: Tensor
    frequency: Tensor
    texture_angle: Tensor
    bevel: Tensor
    glossy: Tensor
    shadow_distance: Tensor
    shadow_softness: Tensor
    shadow_strength: Tensor

    def continuous_BF(self) -> Tensor:
        """What the feature network regresses: pose, light and colours, in units of about 1; hues as sine and cosine."""
        hue, background = 2 * math.pi * self.hue, 2 * math.pi * self.background_hue
        return torch.stack(
            [
                self.center_x / 0.15, self.center_y / 0.15, (self.radius - 0.7) / 0.12, self.rotation / 0.3,
                (self.light + 1.575) / 0.825, hue.sin(), hue.cos(), background.sin(), background.cos(),
                (self.saturation - 0.75) / 0.2, (self.value - 0.875) / 0.125, (self.background_saturation - 0.4) / 0.2,
                (self.background_value - 0.7) / 0.25, (self.bevel - 0.25) / 0.09, self.glossy * 2 - 1,
            ],
            dim=-1,
        )  # fmt: skip


NUM_CONTINUOUS_FACTORS = 15


# ---- shapes: signed distances (negative inside) of points p = (x, y), for a radius of about 1 ------------


def _orb(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def _box(x: Tensor, y: Tensor) -> Tensor:
    qx, qy = x.abs() - 0.76, y.abs() - 0.76
    return torch.hypot(qx.clamp_min(0), qy.clamp_min(0)) + torch.maximum(qx, qy).clamp_max(0)


def _polygon(corners: np.ndarray) -> Callable[[Tensor, Tensor], Tensor]:
    """Exact signed distance to a simple polygon, by its edges and the crossing rule."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        squared = torch.full_like(x, math.inf)
        inside = torch.zeros_like(x, dtype=torch.bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            ex, ey, wx, wy = float(bx - ax), float(by - ay), x - float(ax), y - float(ay)
            t = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            squared = torch.minimum(squared, (wx - t * ex).square() + (wy - t * ey).square())
            if ey != 0:
                crosses = (y >= min(ay, by)) & (y < max(ay, by)) & (wx < wy * (ex / ey))
                inside ^= crosses
        return torch.where(inside, -squared.sqrt(), squared.sqrt())

    return distance


def _regular(num: int, radius: float = 1.0, inner: float | None = None, phase: float = -math.pi / 2) -> np.ndarray:
    """Corners of a regular polygon, or of a star if `inner` is given, the first one upwards."""
    count = num if inner is None else 2 * num
    radii = np.full(count, radius)
    if inner is not None:
        radii[1::2] = inner
    angles = phase + 2 * math.pi * np.arange(count) / count
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.66).abs() - 0.25


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.8 - torch.hypot(x - 0.5, y))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A square on its corner and discs over its two upper edges."""
    half, cy = 0.82, 0.08  # half diagonal, centre
    lobes = torch.hypot(x.abs() - half / 2, y - cy + half / 2) - half / math.sqrt(2)
    square = (x.abs() + (y - cy).abs() - half) / math.sqrt(2)
    return torch.minimum(lobes, square)


def _flower(x: Tensor, y: Tensor) -> Tensor:
    """Six round petals, by folding the plane into one sector."""
    radius, angle = torch.hypot(x, y), torch.atan2(x, -y)
    folded = torch.remainder(angle + math.pi / 6, math.pi / 3) - math.pi / 6
    petal = torch.hypot(radius * folded.cos() - 0.66, radius * folded.sin()) - 0.31
    return torch.minimum(petal, radius - 0.5)


def _drop(x: Tensor, y: Tensor) -> Tensor:
    """A disc below, and the tangent cone that meets it above."""
    cy, radius, tip = 0.3, 0.62, -1.0
    reach = cy - tip
    sine = radius / reach
    cosine = math.sqrt(1 - sine * sine)
    cone = x.abs() * cosine - (y - tip) * sine
    below = y > cy - radius * sine
    disc = torch.hypot(x, y - cy) - radius
    return torch.where(below, disc, torch.maximum(cone, tip - y))


_PLUS = np.array([(-0.32, -0.95), (0.32, -0.95), (0.32, -0.32), (0.95, -0.32), (0.95, 0.32), (0.32, 0.32),
                  (0.32, 0.95), (-0.32, 0.95), (-0.32, 0.32), (-0.95, 0.32), (-0.95, -0.32), (-0.32, -0.32)],
)  # fmt: skip
_ARROW = np.array([(0.0, -1.0), (0.85, -0.1), (0.34, -0.1), (0.34, 0.9), (-0.34, 0.9), (-0.34, -0.1), (-0.85, -0.1)])

SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "orb": _orb,
    "box": _box,
    "triangle": _polygon(_regular(3, 1.1) + np.array([0.0, 0.15])),
    "star": _polygon(_regular(5, 1.08, 0.46)),
    "ring": _ring,
    "crescent": _crescent,
    "plus": _polygon(_PLUS),
    "heart": _heart,
    "hexagon": _polygon(_regular(6, 0.98)),
    "flower": _flower,
    "drop": _drop,
    "arrow": _polygon(_ARROW),
}
NUM_CLASSES = len(SHAPES)


def draw_factors(seed: int, first: int, count: int, labels_B: Tensor | None = None) -> Factors:
    """The latent factors of images `first .. first + count - 1` of a seed; `labels_B` overrides the drawn shapes.

    Counter-based: image i has row i of a Philox stream, whatever the range it is asked for in.
    """
    columns = len(fields(Factors))
    bit_generator = np.random.Philox(key=seed)
    # Philox advances by blocks of four 64-bit draws; a row of `stride` draws is a whole number of blocks.
    stride = -(-columns // 4) * 4
    bit_generator.advance(first * stride // 4)
    u = torch.from_numpy(np.random.Generator(bit_generator).random((count, stride))[:, :columns].T.astype(np.float32))

    def uniform(row: int, low: float, high: float) -> Tensor:
        return low + (high - low) * u[row]

    background_hue = uniform(13, 0, 1)
    background_value = uniform(15, 0.45, 0.95)
    return Factors(
        shape=(u[0] * NUM_CLASSES).long().clamp_max(NUM_CLASSES - 1) if labels_B is None else labels_B.cpu().long(),
        texture=(u[1] * 3).long().clamp_max(2),
        background=(u[2] * 2).long().clamp_max(1),
        center_x=uniform(3, -0.15, 0.15),
        center_y=uniform(4, -0.15, 0.15),
        radius=uniform(5, 0.58, 0.82),
        rotation=uniform(6, -0.3, 0.3),
        light=uniform(7, -2.4, -0.75),
        hue=background_hue + uniform(8, 0.22, 0.78),
        saturation=uniform(9, 0.55, 0.95),
        value=uniform(10, 0.75, 1.0),
        second_saturation=uniform(11, 0.5, 0.8),
        second_value=uniform(12, 0.25, 0.45),
        background_hue=background_hue,
        background_saturation=uniform(14, 0.2, 0.6),
        background_value=background_value,
        dark_saturation=uniform(16, 0.3, 0.6),
        dark_value=background_value * uniform(17, 0.35, 0.6),
        horizon=uniform(18, 0.15, 0.5),
        tilt=uniform(19, -0.05, 0.05),
        frequency=uniform(20, 4, 6),
        texture_angle=uniform(21, -0.8, 0.8),
        bevel=uniform(22, 0.16, 0.34),
        glossy=(u[23] < 0.5).float(),
        shadow_distance=uniform(24, 0.12, 0.2),
        shadow_softness=uniform(25, 0.08, 0.16),
        shadow_strength=uniform(26, 0.45, 0.6),
    )


def render(factors: Factors, image_size: int = IMAGE_SIZE) -> Tensor:
    """uint8 images (B, 3, image_size, image_size) of the factors."""
    count = len(factors.shape)
    grid = (torch.arange(image_size, dtype=torch.float32) + 0.5) * (2 / image_size) - 1
    y_HW, x_HW = torch.meshgrid(grid, grid, indexing="ij")

    def per_image(value: Tensor) -> Tensor:
        return value[:, None, None]

    light_x, light_y = per_image(factors.light.cos()), per_image(factors.light.sin())

    # Background: a gradient that brightens towards the light, or a horizon with darker ground.
    toward_light = 0.5 + 0.35 * (x_HW * light_x + y_HW * light_y)
    ground = torch.sigmoid((y_HW - per_image(factors.horizon) - per_image(factors.tilt) * x_HW) * 30)
    brightness = torch.where(
        per_image(factors.background) == 0, toward_light, (1 - ground) * (0.75 + 0.25 * toward_light)
    )
    bright_B3 = _hsv(factors.background_hue, factors.background_saturation, factors.background_value)
    dark_B3 = _hsv(factors.background_hue + 0.05, factors.dark_saturation, factors.dark_value)
    image = _mix(dark_B3, bright_B3, brightness.clamp(0, 1))

    # The shape's distance here, and at the shadow's offset away from the light.
    cx, cy, radius = per_image(factors.center_x), per_image(factors.center_y), per_image(factors.radius)
    shift = per_image(factors.shadow_distance)
    distance = _distance(factors, x_HW - cx, y_HW - cy)
    shadow_distance = _distance(factors, x_HW - cx + light_x * shift, y_HW - cy + light_y * shift)
    shadow = torch.sigmoid(-shadow_distance / per_image(factors.shadow_softness) * 2) * per_image(
        factors.shadow_strength
    )
    image = image * (1 - shadow[:, None])

    # Surface: texture, bevel normals from the distance gradient, Lambert light and half the time a highlight.
    angle = per_image(factors.texture_angle)
    u, v = (x_HW - cx) * angle.cos() + (y_HW - cy) * angle.sin(), (y_HW - cy) * angle.cos() - (x_HW - cx) * angle.sin()
    frequency = per_image(factors.frequency) * (math.pi / 1.4)
    wave_u, wave_v = (u * frequency).sin(), (v * frequency).sin()
    texture = per_image(factors.texture)
    pattern = torch.where(texture == 1, wave_u, wave_u * wave_v * 1.6)
    amount = torch.where(texture == 0, torch.zeros_like(pattern), torch.sigmoid(pattern * 6))
    first_B3 = _hsv(factors.hue, factors.saturation, factors.value)
    second_B3 = _hsv(factors.hue + 0.06, factors.second_saturation, factors.second_value)
    surface = _mix(first_B3, second_B3, amount)

    bevel = per_image(factors.bevel) * radius / 0.7
    step = 2 / image_size
    slope_x, slope_y = torch.zeros_like(distance), torch.zeros_like(distance)
    slope_x[:, :, 1:-1] = (distance[:, :, 2:] - distance[:, :, :-2]) / (2 * step)
    slope_y[:, 1:-1] = (distance[:, 2:] - distance[:, :-2]) / (2 * step)
    lean = (1 + distance / bevel).clamp(0, 1)  # 0 on the flat top, 1 at the edge
    normal_x, normal_y = slope_x * lean, slope_y * lean
    normal_z = (1 - (normal_x.square() + normal_y.square()).clamp(max=0.96)).sqrt()
    length = math.sqrt(1 + 0.9**2)
    lambert = ((normal_x * light_x + normal_y * light_y + 0.9 * normal_z) / length).clamp(0, 1)
    # Blinn's half vector between the light and a viewer straight above.
    half_z = 0.9 / length + 1
    half_length = math.sqrt((1 / length) ** 2 + half_z**2)
    highlight = ((normal_x * light_x / length + normal_y * light_y / length + half_z * normal_z) / half_length).clamp(
        0, 1
    ) ** 18
    gloss = 0.55 * per_image(factors.glossy) * highlight * lean.clamp_min(0.25)
    surface = surface * (0.35 + 0.75 * lambert)[:, None] + gloss[:, None]

    edge = torch.sigmoid(-distance * (image_size * 1.6))[:, None]
    image = image * (1 - edge) + surface * edge
    assert image.shape == (count, 3, image_size, image_size)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def draw(split: str, first: int, count: int, labels_B: Tensor | None = None) -> Images:
    """Images `first .. first + count - 1` of a split, drawn now."""
    factors = draw_factors(SPLITS[split], first, count, labels_B)
    return Images(render(factors), factors.shape, factors)


def batches(split: str, count: int, batch_size: int = 512, first: int = 0) -> Iterator[Images]:
    """Images first .. first + count - 1 of a split in batches, in order."""
    for begin in range(first, first + count, batch_size):
        yield draw(split, begin, min(batch_size, first + count - begin))


def to_float(images_BCHW: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images_BCHW.float() / 127.5 - 1


def _distance(factors: Factors, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    """Signed distance (B, H, W) to each image's shape, rotated and scaled, in image units."""
    radius, rotation = factors.radius[:, None, None], factors.rotation[:, None, None]
    u = (x_BHW * rotation.cos() + y_BHW * rotation.sin()) / radius
    v = (y_BHW * rotation.cos() - x_BHW * rotation.sin()) / radius
    out = torch.empty_like(u)
    for index, shape in enumerate(SHAPES.values()):
        rows = (factors.shape == index).nonzero().squeeze(1)
        if len(rows):
            out[rows] = shape(u[rows], v[rows])
    return out * radius


def _mix(first_B3: Tensor, second_B3: Tensor, amount_BHW: Tensor) -> Tensor:
    return torch.lerp(first_B3[:, :, None, None], second_B3[:, :, None, None], amount_BHW[:, None])


def _hsv(hue_B: Tensor, saturation_B: Tensor, value_B: Tensor) -> Tensor:
    """RGB (B, 3) in [0, 1]; hue in turns, any integer part is dropped."""
    k_B3 = (torch.tensor([5.0, 3.0, 1.0]) + hue_B[:, None] * 6) % 6
    fall = torch.minimum(k_B3, 4 - k_B3).clamp(0, 1)
    return value_B[:, None] * (1 - saturation_B[:, None] * fall)
