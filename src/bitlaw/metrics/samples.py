"""Images in and out: the ADM `.npz` layout, folders of images, PNG grids.

Legend: B images, C = 3 channels, H height, W width; images are uint8 tensors (B, 3, H, W).
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bitlaw.files import replacing, write_with
from bitlaw.metrics.features import check_images

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_npz(path: Path | str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of a `.npz`, never unpickled. ValueError names the file, and what it lacks or which array is damaged."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    arrays: dict[str, np.ndarray] = {}
    with path.open("rb") as opened:
        try:
            file = np.load(opened, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a .npz file, or damaged: {error}") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"{path}: a single array, not a .npz file")
        if missing := [key for key in required if key not in file.files]:
            raise ValueError(f"{path}: no array {', '.join(missing)}; it holds {', '.join(file.files) or 'nothing'}")
        for key in [*required, *(key for key in optional if key in file.files)]:
            try:
                arrays[key] = file[key]
            except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{path}: array {key} is damaged: {error}") from error
    return arrays


def write_npz(path: Path | str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a `.npz`, atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:  # given a name, numpy would append .npz to it
        np.savez(file, allow_pickle=False, **arrays)


def write_samples(path: Path | str, images_BCHW: Tensor, labels_B: Tensor | None = None) -> None:
    """Write the ADM layout: `arr_0` uint8 (B, H, W, 3), and `arr_1` int64 labels if given. Atomic."""
    check_images(images_BCHW)
    arrays = {"arr_0": images_BCHW.permute(0, 2, 3, 1).contiguous().numpy()}
    if labels_B is not None:
        if labels_B.shape != images_BCHW.shape[:1]:
            raise ValueError(f"{len(images_BCHW)} images but labels of shape {tuple(labels_B.shape)}")
        arrays["arr_1"] = labels_B.to(torch.int64).numpy()
    write_npz(path, arrays)


def read_samples(path: Path | str) -> Tensor:
    """The images of an ADM `.npz` (samples or reference batch) or of a folder, uint8 (B, 3, H, W).

    A folder's images are taken in order of their names and must have one size; other files in it are ignored.
    ValueError names the file that is missing, damaged, of another size, or transparent.
    """
    path = Path(path)
    return _read_folder(path) if path.is_dir() else _read_adm(path)


def image_grid(images_BCHW: Tensor, columns: int, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Images in rows of `columns` on white, each pixel `zoom` wide (nearest), `gap` white pixels between images."""
    check_images(images_BCHW)
    if columns < 1 or zoom < 1 or gap < 0:
        raise ValueError(f"grid: columns and zoom must be 1 or more and gap 0 or more, found {columns}, {zoom}, {gap}")
    images = images_BCHW.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    num_images, _, height, width = images.shape
    columns = min(columns, num_images)
    rows = -(-num_images // columns)
    canvas_HWC = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for index, image_CHW in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas_HWC[top : top + height, left : left + width] = image_CHW.permute(1, 2, 0)
    return Image.fromarray(canvas_HWC.numpy())


def write_grid(path: Path | str, images_BCHW: Tensor, columns: int, **layout: Any) -> None:
    """Write `image_grid(images, columns, **layout)` as PNG. Atomic."""
    picture = image_grid(images_BCHW, columns, **layout)
    write_with(path, lambda temporary: picture.save(temporary, format="PNG"))


def _read_adm(path: Path) -> Tensor:
    array_BHWC = read_npz(path, required=("arr_0",))["arr_0"]
    if array_BHWC.dtype != np.uint8 or array_BHWC.ndim != 4 or array_BHWC.shape[3] != 3:
        raise ValueError(f"{path}: arr_0 is {array_BHWC.dtype} {array_BHWC.shape}, expected uint8 (B, H, W, 3)")
    return torch.from_numpy(array_BHWC).permute(0, 3, 1, 2).contiguous()


def _read_folder(folder: Path) -> Tensor:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)})")
    images = [_read_image(path) for path in paths]
    for path, image_CHW in zip(paths, images, strict=True):
        if image_CHW.shape != images[0].shape:
            sizes = " x ".join(map(str, image_CHW.shape[1:])), " x ".join(map(str, images[0].shape[1:]))
            raise ValueError(f"{path}: {sizes[0]} pixels, but {paths[0].name} has {sizes[1]}; make all images one size")
    return torch.stack(images)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture in a file. ValueError if it is none, or has transparency, or whatever is read of it is damaged."""
    try:
        with Image.open(path) as image:
            if image.has_transparency_data:
                raise ValueError(f"{path}: has transparency, which has no one meaning as RGB; flatten it first")
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image, or damaged: {error}") from error


def _read_image(path: Path) -> Tensor:
    with _opened(path) as image:
        array_HWC = np.array(image.convert("RGB"))
    return torch.from_numpy(array_HWC).permute(2, 0, 1).contiguous()


def check_picture(path: Path | str) -> None:
    """ValueError if a file is no picture, or has transparency, as far as its header and checksums tell."""
    with _opened(Path(path)) as image:
        image.verify()


def read_square(path: Path | str, size: int) -> Tensor:
    """A picture as uint8 (3, size, size): its middle square, scaled as the models' training data were (Lanczos).

    ValueError if it is no picture, or has transparency.
    """
    image = Image.fromarray(_read_image(Path(path)).permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(_square(image, size))).permute(2, 0, 1).contiguous()


def read_mask(path: Path | str, size: int) -> Tensor:
    """A picture as a mask (size, size), cropped and scaled like `read_square`: True where it is bright."""
    image = Image.fromarray(_read_image(Path(path)).permute(1, 2, 0).numpy()).convert("L")
    return torch.from_numpy(np.array(_square(image, size)) > 127)


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
