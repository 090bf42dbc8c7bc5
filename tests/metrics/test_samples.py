from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bitlaw.metrics.samples import image_grid, read_mask, read_samples, read_square, write_grid, write_samples


def images(num: int = 5, height: int = 4, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num, 3, height, width), dtype=torch.uint8, generator=generator)


def test_adm_layout(tmp_path: Path) -> None:
    """What the field's evaluator reads: `arr_0`, uint8, channels last, in a file of exactly the name given."""
    path = tmp_path / "samples.npz"
    write_samples(path, images(), labels_B=torch.arange(5))
    with np.load(path) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"][2, 1, 3], images()[2, :, 1, 3])
        assert file["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(read_samples(path), images())
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]


def test_folder_in_order_of_names(tmp_path: Path) -> None:
    for name, image in zip(["b.png", "a.PNG", "c.png"], images(), strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    assert torch.equal(read_samples(tmp_path), images()[[1, 0, 2]])


def test_grey_images_are_rgb(tmp_path: Path) -> None:
    Image.new("L", (3, 2), 77).save(tmp_path / "grey.png")
    assert torch.equal(read_samples(tmp_path), torch.full((1, 3, 2, 3), 77, dtype=torch.uint8))


def test_unusable_folders_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        read_samples(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: 8 x 4 pixels, but a\.png has 4 x 4"):
        read_samples(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"b\.png: not an image, or damaged"):
        read_samples(tmp_path)
    Image.new("RGBA", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: has transparency"):
        read_samples(tmp_path)


def test_unusable_npz_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.npz: no such file"):
        read_samples(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: no array arr_0; it holds x"):
        read_samples(tmp_path / "other.npz")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"float\.npz: arr_0 is float64"):
        read_samples(tmp_path / "float.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"single\.npy: a single array"):
        read_samples(tmp_path / "single.npy")
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([object()]))
    with pytest.raises(ValueError, match=r"pickled\.npz: array arr_0 is damaged"):
        read_samples(tmp_path / "pickled.npz")


def test_damaged_npz_names_the_array(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    write_samples(path, images())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"samples\.npz: not a \.npz file, or damaged"):
        read_samples(path)
    flipped = bytearray(whole)
    flipped[200] ^= 1  # in the data of arr_0: the zip's checksum tells
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"samples\.npz: array arr_0 is damaged"):
        read_samples(path)


def test_grid(tmp_path: Path) -> None:
    write_grid(tmp_path / "grid.png", images(), columns=3, zoom=2, gap=1)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.array(picture)
    assert pixels.shape == (2 * 8 + 1, 3 * 12 + 2, 3)
    np.testing.assert_array_equal(pixels[9:17, 13:25][::2, ::2], images()[4].permute(1, 2, 0))
    assert (pixels[8] == 255).all()
    assert (pixels[9:, 26:] == 255).all()  # the place of a sixth image
    assert image_grid(images(2), columns=9, gap=0).size == (12, 4)
    with pytest.raises(ValueError, match="columns and zoom must be 1 or more"):
        image_grid(images(), columns=0)


def test_wrong_labels() -> None:
    with pytest.raises(ValueError, match="5 images but labels of shape"):
        write_samples("never-written.npz", images(), labels_B=torch.arange(4))


def test_a_picture_is_cropped_to_its_middle_and_a_mask_is_what_is_bright(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:20], pixels[:, 20:30] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    square = read_square(tmp_path / "wide.png", 10)
    assert square.shape == (3, 10, 10) and square.dtype == torch.uint8
    assert (square[0, :, :3] > 250).all() and (square[2, :, 7:] > 250).all() and not square[1].any()
    mask = np.zeros((20, 40), dtype=np.uint8)
    mask[:10] = 200
    Image.fromarray(mask).save(tmp_path / "mask.png")
    keep = read_mask(tmp_path / "mask.png", 8)
    assert keep.dtype == torch.bool and keep[:4].all() and not keep[4:].any()
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        read_square(tmp_path / "nowhere.png", 8)
