"""Sources of examples, encoding them once, batches, and the teacher's logits.

Legend: B images, L tokens, V vocabulary, C channels, H height, W width.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bitlaw.distill import encoding, sources, teacher_logits
from bitlaw.distill.data import open_examples
from bitlaw.distill.encoding import EncodedData, encode
from bitlaw.distill.examples import DROPPING_SEED, Batch, Examples
from bitlaw.distill.settings import Distillation
from bitlaw.distill.sources import ImageFolder, LadderImages, Part, Source, TeacherImages, open_source
from bitlaw.distill.teacher_logits import TeacherLogits
from bitlaw.ladder import data as ladder
from bitlaw.metrics.samples import read_square
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.dit import DiT
from bitlaw.models.generator import Noise
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.networks.llamagen import LlamaGenConfig, LlamaGenTransformer
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.var import VAR
from tiny_models import awake, tiny_ddpm, tiny_dit, tiny_llamagen, tiny_var

computed = teacher_logits.teacher_logits  # tests put others in its place


def write_image(path: Path, seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(256, size=(9, 12, channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_classes(root: Path, names: Sequence[str] = ("a", "b", "c", "d", "e"), each: int = 4) -> Path:
    for number, name in enumerate(names):
        for i in range(each):
            write_image(root / name / f"{i}.png", seed=100 * number + i)
    return root


def ladder_var() -> VAR:
    """A model that draws the ladder's size and classes."""
    torch.manual_seed(0)
    tokens = VQTokenizer(VQTokenizerConfig(16, 4, 8, (1, 2, 2), 1, (1, 3, 6), norm_groups=0, attention=False))
    return VAR(awake(VARTransformer(VARConfig(1, 16, 2, ladder.NUM_CLASSES, (1, 3, 6), 16, 4))), awake(tokens))


def numbered(count: int = 40, held_out: int = 6) -> EncodedData:
    """Examples whose tokens say which they are."""
    tokens = torch.arange(count + held_out, dtype=torch.int16)[:, None].repeat(1, 3)
    labels = torch.arange(count + held_out) % 5
    return EncodedData(Part(tokens[:count], labels[:count]), Part(tokens[count:], labels[count:]), "numbered", "0")


def assert_same(found: EncodedData, expected: EncodedData) -> None:
    for one, other in ((found.train, expected.train), (found.held_out, expected.held_out)):
        assert one.encoded.dtype == other.encoded.dtype
        assert torch.equal(one.encoded, other.encoded)
        assert torch.equal(one.labels_M, other.labels_M)
        assert one.left_out == other.left_out


# ---- sources -------------------------------------------------------------------------------------


def test_ladder_is_training_images_and_held_out_validation_ones() -> None:
    model = ladder_var()
    encoded = encode(LadderImages(model, 10, 4), batch_size=3)
    for part, split, count in ((encoded.train, "train", 10), (encoded.held_out, "validation", 4)):
        drawn = ladder.draw(split, 0, count)
        assert torch.equal(part.encoded.long(), model.encode_images(drawn.images_BCHW))
        assert torch.equal(part.labels_M, drawn.labels_B)


def test_ladder_needs_its_size_and_classes() -> None:
    with pytest.raises(ValueError, match=r"24 pixels a side, this var draws 8; give a folder"):
        LadderImages(tiny_var())
    model = ladder_var()
    model.num_classes = 7
    with pytest.raises(ValueError, match="12 classes, this var has 7"):
        LadderImages(model)


def test_class_folders_in_order_of_names(tmp_path: Path) -> None:
    model = tiny_var()
    source = ImageFolder(model, write_classes(tmp_path), num_held_out=5)
    assert (source.num_train, source.num_held_out) == (15, 5)
    encoded = encode(source)
    assert sorted(encoded.train.labels_M.tolist() + encoded.held_out.labels_M.tolist()) == sorted([*range(5)] * 4)
    path, label = source.files[3]
    assert label == "abcde".index(path.parent.name)
    image_CHW = read_square(path, model.image_size)
    assert torch.equal(encoded.train.encoded[3].long(), model.encode_images(image_CHW[None])[0])
    assert encoded.train.labels_M[3] == label


def test_folders_named_by_numbers_are_those_classes(tmp_path: Path) -> None:
    source = ImageFolder(tiny_var(), write_classes(tmp_path, ("0003", "1")), num_held_out=2)
    assert {(path.parent.name, label) for path, label in source.files} == {("0003", 3), ("1", 1)}
    write_image(tmp_path / "5" / "x.png")
    with pytest.raises(ValueError, match="class 5: this model has classes 0 to 4"):
        ImageFolder(tiny_var(), tmp_path, num_held_out=2)
    shutil.move(tmp_path / "5", tmp_path / "01")
    with pytest.raises(ValueError, match="two folders of one class"):
        ImageFolder(tiny_var(), tmp_path, num_held_out=2)


def test_folder_without_classes_has_the_null_label(tmp_path: Path) -> None:
    for i in range(4):
        write_image(tmp_path / f"{i}.png", i)
    assert {label for _, label in ImageFolder(tiny_var(), tmp_path, num_held_out=1).files} == {5}
    assert {label for _, label in ImageFolder(tiny_ddpm(), tmp_path, num_held_out=1).files} == {0}
    model = DiT(DiTTransformer(DiTConfig(1, 16, 2, 5, 4, 4, 2, null_class=False)), None)
    with pytest.raises(ValueError, match=r"4 images without classes, but this dit draws 5 classes"):
        ImageFolder(model, tmp_path, num_held_out=1)


def test_unusable_folders_say_what_is_wrong(tmp_path: Path) -> None:
    model = tiny_var()
    with pytest.raises(ValueError, match="no such folder"):
        ImageFolder(model, tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        ImageFolder(model, tmp_path)
    write_classes(tmp_path / "data", ("a", "b", "c"))
    with pytest.raises(ValueError, match="3 folders, but this model has 5 classes"):
        ImageFolder(model, tmp_path / "data")
    (tmp_path / "data" / "d").mkdir()
    with pytest.raises(ValueError, match="folders without images, which classes have: d"):
        ImageFolder(model, tmp_path / "data")
    write_classes(tmp_path / "data", ("d", "e"))
    with pytest.raises(ValueError, match="20 images, of which 20 are to be held out and 1 trained on"):
        ImageFolder(model, tmp_path / "data", num_held_out=20)
    with pytest.raises(ValueError, match="20 images, of which 6 are to be held out and 15 trained on"):
        ImageFolder(model, tmp_path / "data", 15, 6)
    with pytest.raises(ValueError, match="at least one of each"):
        ImageFolder(model, tmp_path / "data", num_held_out=0)
    with pytest.raises(ValueError, match="max_unreadable 1: a share"):
        ImageFolder(model, tmp_path / "data", max_unreadable=1)
    write_image(tmp_path / "data" / "loose.png")
    with pytest.raises(ValueError, match=r"1 images beside folders of images, loose\.png the first"):
        ImageFolder(model, tmp_path / "data")


def damage(path: Path) -> None:
    """Cut off the end: its header stays whole."""
    path.write_bytes(path.read_bytes()[:-40])


def test_too_many_unreadable_images_are_found_before_any_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_classes(tmp_path)
    damage(root / "a" / "0.png")
    write_image(root / "b" / "1.png", mode="RGBA")
    (root / "c" / "2.jpeg").write_text("not a picture")
    (root / "c" / "3.png").unlink()
    (root / "c" / "3.png").symlink_to(root / "nothing.png")
    source = ImageFolder(tiny_var(), root, num_held_out=5, max_unreadable=0.15)
    monkeypatch.setattr(source, "examples", lambda first, count: pytest.fail("encoded"))
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(ValueError, match=r"4 of 21 images cannot be used, and at most 15\.00%") as error:
        encode(source, progress=lambda *told: seen.append(told))
    named = str(error.value).splitlines()[1:]
    assert len(named) == 4 and named[-1] == "and 1 more"
    assert all(line.startswith(f"{root}{os.sep}") for line in named[:3])
    assert seen[-1] == ("looking at images", 21, 21)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_few_unreadable_images_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, batch_size: int
) -> None:
    model, root = tiny_var(), write_classes(tmp_path / "images")
    whole = encode(ImageFolder(model, root, num_held_out=5))
    source = ImageFolder(model, root, num_held_out=5, max_unreadable=0.1)
    bad = source.files[3][0], source.files[18][0]
    damage(bad[0])
    write_image(bad[1], mode="RGBA")
    keep_train, keep_held_out = [i for i in range(15) if i != 3], [i for i in range(5) if i != 3]
    for _ in range(2):  # encoded, and then found
        caplog.clear()
        encoded = encode(source, tmp_path / "work", batch_size=batch_size)
        assert torch.equal(encoded.train.encoded, whole.train.encoded[keep_train])
        assert torch.equal(encoded.train.labels_M, whole.train.labels_M[keep_train])
        assert torch.equal(encoded.held_out.encoded, whole.held_out.encoded[keep_held_out])
        assert caplog.messages[-1].startswith(f"2 of 20 images are left out, the first: {bad[0]}: not an image")
    with pytest.raises(ValueError, match="2 of 20 images cannot be used"):
        encode(ImageFolder(model, root, num_held_out=5, max_unreadable=0.05), tmp_path / "work")


def test_images_that_break_after_the_look_are_treated_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JPEG has no checksums: a scan of headers finds it whole, and decoding does not."""
    monkeypatch.setattr(sources, "check_picture", lambda path: None)
    root = write_classes(tmp_path)
    source = ImageFolder(tiny_var(), root, num_held_out=1, max_unreadable=0.9)
    for path, _ in source.files[:3]:
        damage(path)
    with pytest.raises(ValueError, match="3 of 20 images cannot be used"):
        encode(ImageFolder(tiny_var(), root, num_held_out=1, max_unreadable=0.1))
    assert len(encode(source).train.labels_M) == 16
    damage(source.files[-1][0])
    with pytest.raises(ValueError, match="none of the images to train on or to hold out can be read"):
        encode(source)


def test_damaged_jpeg_is_found_when_it_is_read(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg")
    damage(tmp_path / "a.jpg")
    sources.check_picture(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: not an image, or damaged"):
        read_square(tmp_path / "a.jpg", 8)


def test_held_out_images_do_not_depend_on_how_many_are_trained_on(tmp_path: Path) -> None:
    few, all_ = (ImageFolder(tiny_var(), write_classes(tmp_path), num, 5).files for num in (6, None))
    assert few[:6] == all_[:6] and few[-5:] == all_[-5:]
    assert not {path for path, _ in all_[:15]} & {path for path, _ in all_[15:]}
    assert all_ != sorted(all_)


@pytest.mark.parametrize("make", [tiny_var, tiny_llamagen, tiny_dit, tiny_ddpm])
def test_teacher_images_are_what_it_generates(make: Callable[[], Any]) -> None:
    model = make()
    source = TeacherImages(model, 5, 3)
    encoded = encode(source, batch_size=8)
    labels = [i % model.num_classes for i in range(8)]
    assert [*encoded.train.labels_M.tolist(), *encoded.held_out.labels_M.tolist()] == labels
    # A batch of 8 is 5 + 3, to rounding, which decides no token and no pixel here.
    images_BCHW = model.generate(labels, source.seed)
    if make is tiny_var:
        latents = model.tokenizer.tokens_to_latent
        sides = [side**2 for side in model.net.config.patch_nums]
        tokens = encoded.train.encoded.long().split(sides, 1)
        state = model.start(encoded.train.labels_M, Noise(0, range(5)))._replace(latent_BZhw=latents(tokens))
    else:
        field = "tokens_Bn" if make is tiny_llamagen else "x_BCHW"
        noise = Noise(0, range(5))
        wide = encoded.train.encoded.long() if make is tiny_llamagen else encoded.train.encoded
        state = model.start(encoded.train.labels_M, noise)._replace(**{field: wide})
    with torch.inference_mode():
        decoded = model.decode(state)
    assert (decoded.int() - images_BCHW[:5].int()).abs().max() <= 1  # stages are added up in another order


def test_teacher_seed_is_no_other() -> None:
    from bitlaw.calibration.settings import Calibration

    assert len({sources.GENERATED_SEED, DROPPING_SEED, Calibration().seed, 0}) == 4
    one, other = (encode(TeacherImages(tiny_var_of(0), 4, 1, seed=seed)) for seed in (1, 2))
    assert not torch.equal(one.train.encoded, other.train.encoded)


def test_model_of_texts_has_no_examples() -> None:
    config = LlamaGenConfig(1, 16, 2, side=4, num_classes=0, vocab_size=16, hidden=32, text_tokens=3, text_width=8)
    from bitlaw.models.llamagen import LlamaGen

    with pytest.raises(ValueError, match="draws from texts"):
        TeacherImages(LlamaGen(LlamaGenTransformer(config), None))


def test_sources_by_name(tmp_path: Path) -> None:
    assert isinstance(open_source("ladder", ladder_var(), 4, 2), LadderImages)
    assert isinstance(open_source(None, ladder_var(), 4, 2), LadderImages)
    assert isinstance(open_source(None, tiny_var(), 4, 2), TeacherImages)
    assert isinstance(open_source("generated", ladder_var(), 4, 2), TeacherImages)
    folder = open_source(write_classes(tmp_path), tiny_var(), 4, 2, max_unreadable=0.5)
    assert isinstance(folder, ImageFolder)
    assert (folder.num_train, folder.num_held_out, folder.max_unreadable) == (4, 2, 0.5)


# ---- encoding once -------------------------------------------------------------------------------


def tiny_var_of(seed: int) -> VAR:
    torch.manual_seed(seed)
    return tiny_var()


class Counting:
    """A source that counts what is asked of it, and may be killed."""

    def __init__(self, source: Source, dies_at: int | None = None):
        self.source, self.dies_at, self.asked = source, dies_at, []

    def examples(self, first: int, count: int) -> Part:
        if self.dies_at is not None and first + count > self.dies_at:
            raise KeyboardInterrupt
        self.asked += range(first, first + count)
        return self.source.examples(first, count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PART", 4)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("make", [tiny_var, tiny_ddpm])
def test_encoding_goes_on_where_it_was(tmp_path: Path, make: Callable[[], Any]) -> None:
    source = TeacherImages(make(), 10, 3)
    whole = encode(source, batch_size=2)
    dying = Counting(source, dies_at=7)
    with pytest.raises(KeyboardInterrupt):
        encode(dying, tmp_path, batch_size=2)
    assert dying.asked == [*range(6)]
    # A kill in the middle of a write leaves a file of numbers without the one that says it is whole.
    folder = tmp_path / source.fingerprint()
    (folder / "train-4.npy").write_bytes(b"half of a")
    (folder / ".train-4.npy.abc.tmp").write_bytes(b"a quarter")
    told: list[tuple[str, int, int]] = []
    resumed = Counting(source)
    assert_same(encode(resumed, tmp_path, batch_size=2, progress=lambda *x: told.append(x)), whole)
    assert resumed.asked == [*range(4, 13)]
    assert [done for _, done, total in told if total == 13] == [4, 6, 8, 10, 12, 13]
    again = Counting(source)
    assert_same(encode(again, tmp_path, batch_size=2), whole)
    assert again.asked == []
    assert {path.name for path in folder.glob("[!.]*")} == {
        "train.npy", "train.json", "held_out.npy", "held_out.json"
    }  # fmt: skip


def test_damaged_files_are_made_again(tmp_path: Path) -> None:
    source = TeacherImages(tiny_var(), 6, 2)
    whole = encode(source)
    folder = tmp_path / whole.key
    encode(source, tmp_path)
    for name, content in (("train.npy", b"\x93NUMPY"), ("held_out.json", b"{")):
        (folder / name).write_bytes(content)
        assert_same(encode(source, tmp_path), whole)
    about = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps({**about, "labels": about["labels"][:-1]}))
    assert_same(encode(source, tmp_path), whole)


def test_types_on_disk(tmp_path: Path) -> None:
    for make, dtype in ((tiny_var, torch.int16), (tiny_dit, torch.float32)):
        source = TeacherImages(make(), 3, 2)
        assert encode(source, tmp_path).train.encoded.dtype == dtype
        assert_same(encode(source, tmp_path), encode(source))
    part = encoding._compact(Part(torch.tensor([[2**15]]), torch.tensor([0])), 2**15 + 1)
    assert part.encoded.dtype == torch.int32 and part.encoded.item() == 2**15


def test_fingerprints(tmp_path: Path) -> None:
    """They depend on the tokenizer's weights and on the source; on the network only where it draws."""
    root = write_classes(tmp_path)

    def prints(model: VAR, num_train: int = 6) -> tuple[str, ...]:
        folder, ladder_like = ImageFolder(model, root, num_train, 2), TeacherImages(model, num_train, 2)
        return folder.fingerprint(), ladder_like.fingerprint()

    base = prints(tiny_var_of(0))
    assert prints(tiny_var_of(0)) == base
    assert all(a != b for a, b in zip(prints(tiny_var_of(0), 7), base, strict=True))

    changed = tiny_var_of(0)
    assert changed.autoencoder is not None
    next(changed.autoencoder.parameters()).data[0] += 1
    assert all(a != b for a, b in zip(prints(changed), base, strict=True))

    changed = tiny_var_of(0)
    next(changed.net.parameters()).data[0] += 1
    assert prints(changed)[0] == base[0]
    assert prints(changed)[1] != base[1]

    guided = tiny_var_of(0).with_sampling(guidance=1.5)
    assert prints(guided)[0] == base[0]
    assert prints(guided)[1] != base[1]

    assert TeacherImages(tiny_var_of(0), 6, 2, seed=1).fingerprint() != base[1]
    write_image(root / "a" / "0.png", seed=77)
    os.utime(root / "a" / "0.png", ns=(1, 1))
    whole = [ImageFolder(tiny_var_of(0), root, 18, 2) for _ in range(2)]
    before = whole[0].fingerprint()
    os.utime(root / "a" / "0.png", ns=(2, 2))
    assert whole[1].fingerprint() != before
    assert LadderImages(ladder_var(), 4, 2).fingerprint() != LadderImages(ladder_var(), 4, 3).fingerprint()


# ---- batches -------------------------------------------------------------------------------------


def joined(parts: Sequence[Batch]) -> tuple[Tensor, Tensor, list[int], Tensor]:
    return (
        torch.cat([part.encoded for part in parts]),
        torch.cat([part.labels_B for part in parts]),
        [image for part in parts for image in part.image_ids],
        torch.cat([part.rows_B for part in parts]),
    )


@pytest.mark.parametrize("by_example", [False, True])
def test_batches_are_the_same_however_they_are_split(by_example: bool) -> None:
    examples = Examples(numbered(), 5, seed=3, label_dropout=0.5, dropped_by_example=by_example)
    for step in (0, 7):
        whole = joined([examples.batch(step, 8)])
        for world in (2, 8):
            shares = joined([examples.batch(step, 8, rank, world) for rank in range(world)])
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(shares, whole, strict=True))


def test_an_epoch_has_every_example_once() -> None:
    examples = Examples(numbered(), None)
    epochs = [joined([examples.batch(step, 8) for step in range(5 * e, 5 * e + 5)]) for e in range(2)]
    for encoded, labels, _, rows in epochs:
        assert sorted(rows.tolist()) == [*range(40)]
        assert torch.equal(encoded[:, 0], rows) and torch.equal(labels, rows % 5)
        assert encoded.dtype == torch.int64
    assert not torch.equal(epochs[0][3], epochs[1][3])
    assert not torch.equal(Examples(numbered(), None, seed=1).batch(0, 8).rows_B, epochs[0][3][:8])
    assert [image for epoch in epochs for image in epoch[2]] == [*range(80)]


def test_labels_are_dropped_at_each_use_or_for_each_example() -> None:
    for by_example in (False, True):
        examples = Examples(numbered(), 5, label_dropout=0.3, dropped_by_example=by_example)
        dropped: list[dict[int, bool]] = []
        for epoch in range(8):
            _, labels, _, rows = joined([examples.batch(step, 8) for step in range(5 * epoch, 5 * epoch + 5)])
            assert torch.equal(labels[labels != 5], (rows % 5)[labels != 5])
            dropped.append(dict(zip(rows.tolist(), (labels == 5).tolist(), strict=True)))
        assert (dropped[0] == dropped[1]) == by_example
        if not by_example:  # 320 uses: the standard deviation of the share is 0.026
            assert sum(sum(epoch.values()) for epoch in dropped) / 320 == pytest.approx(0.3, abs=0.1)
        assert 0 < sum(dropped[0].values()) < 40
    assert (Examples(numbered(), None, label_dropout=1.0).batch(0, 8).labels_B < 5).all()
    assert (Examples(numbered(), 5, label_dropout=1.0).batch(0, 8).labels_B == 5).all()
    assert (Examples(numbered(), 5, label_dropout=0.0).batch(0, 8).labels_B < 5).all()


def test_held_out_examples_keep_their_labels_and_have_ids_of_their_own() -> None:
    examples = Examples(numbered(), 5, label_dropout=1.0)
    encoded, labels, ids, rows = joined([*examples.held_out(4)])
    assert torch.equal(encoded[:, 0], torch.arange(40, 46)) and torch.equal(rows, torch.arange(40, 46))
    assert torch.equal(labels, rows % 5)
    assert ids == [*range(-6, 0)]
    assert (examples.num_train, examples.num_held_out, examples.example_numel, examples.name) == (40, 6, 3, "numbered")


def test_batches_that_cannot_be() -> None:
    examples = Examples(numbered(), 5)
    with pytest.raises(ValueError, match="batch size 41: from 1 to the 40 examples"):
        examples.batch(0, 41)
    with pytest.raises(ValueError, match="batch size 8: cannot be shared evenly, share 0 of 3"):
        examples.batch(0, 8, 0, 3)
    with pytest.raises(ValueError, match=r"label_dropout 1\.5"):
        Examples(numbered(), 5, label_dropout=1.5)


# ---- what the teacher says -----------------------------------------------------------------------


def cached(
    model: Any, work: Path, dtype: Any = "float32", label_dropout: float = 0.5, **more: Any
) -> tuple[Examples, TeacherLogits]:
    encoded = encode(TeacherImages(model, 12, 3))
    examples = Examples(encoded, model.null_label, 1, label_dropout, dropped_by_example=True)
    return examples, TeacherLogits(model, examples, work, dtype=dtype, **more)


def on_the_fly(model: Any, batch: Batch) -> Tensor:
    return computed(model, batch, Noise(0, batch.image_ids))


@pytest.mark.parametrize("make", [tiny_var, tiny_llamagen])
def test_cached_logits_are_those_on_the_fly(tmp_path: Path, make: Callable[[], Any]) -> None:
    model = make()
    examples, logits = cached(model, tmp_path)
    batches = [*(examples.batch(step, 4) for step in range(3)), *examples.held_out(3)]
    expected = [on_the_fly(model, batch) for batch in batches]
    assert expected[0].shape == (4, examples.example_numel, 16)
    for again in (logits, cached(model, tmp_path)[1]):  # computed when asked for; and found in the file
        for batch, logits_BLV in zip(batches, expected, strict=True):
            assert torch.equal(again.of(batch), logits_BLV)
    # An example met again in another batch, in another epoch.
    batch = examples.batch(4, 4)
    torch.testing.assert_close(logits.of(batch), on_the_fly(model, batch))
    assert (batch.labels_B == model.null_label).any() or (examples.batch(5, 4).labels_B == model.null_label).any()


def test_cached_logits_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_var()
    examples, logits = cached(model, tmp_path, batch_size=4)
    asked: list[int] = []

    def counting(teacher: Any, batch: Batch, noise: Noise) -> Tensor:
        if len(asked) == 8:
            raise KeyboardInterrupt
        asked.extend([len(batch.labels_B)] * len(batch.labels_B))
        return computed(teacher, batch, noise)

    monkeypatch.setattr(teacher_logits, "teacher_logits", counting)
    with pytest.raises(KeyboardInterrupt):
        logits.fill()
    assert len(asked) == 8
    monkeypatch.setattr(teacher_logits, "teacher_logits", lambda *given: asked.append(0) or computed(*given))
    told: list[tuple[str, int, int]] = []
    _, again = cached(model, tmp_path, batch_size=4, progress=lambda *x: told.append(x))
    again.fill()
    assert asked[8:] == [0, 0]  # 4 of the 12 that are trained on, and the 3 that are held out
    assert told[0] == (f"teacher logits take {again.num_bytes:,} bytes of {tmp_path}", 0, 0)
    assert told[1:] == [("teacher logits", done, 15) for done in (4, 8, 12, 15)]
    monkeypatch.setattr(teacher_logits, "teacher_logits", lambda *given: pytest.fail("computed again"))
    for batch in (examples.batch(0, 12), *examples.held_out(2)):
        torch.testing.assert_close(again.of(batch), on_the_fly(model, batch))


def test_size_is_known_before_and_is_that_of_the_file(tmp_path: Path) -> None:
    for dtype, size in (("float32", 4), ("float16", 2)):
        examples, logits = cached(tiny_var(), tmp_path, dtype)
        assert not logits.path.exists()
        assert logits.num_bytes == 4096 + 15 * 21 * 16 * size
        logits.of(examples.batch(0, 4))
        assert logits.path.stat().st_size == logits.num_bytes


def test_float16_rounds(tmp_path: Path) -> None:
    model = tiny_var()
    examples, logits = cached(model, tmp_path, "float16")
    batch = examples.batch(0, 4)
    found = logits.of(batch)
    assert found.dtype == torch.float32
    assert torch.equal(found, on_the_fly(model, batch).half().float())


def test_a_file_that_was_only_just_begun_holds_nothing(tmp_path: Path) -> None:
    model = tiny_var()
    examples, logits = cached(model, tmp_path)
    logits.path.write_bytes(b"\0" * 7)  # a kill while it was made
    batch = examples.batch(0, 4)
    assert torch.equal(logits.of(batch), on_the_fly(model, batch))


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    model = tiny_var()
    examples, one = cached(model, tmp_path)
    other = cached(model, tmp_path)[1]
    shares = [examples.batch(0, 8, rank, 2) for rank in range(2)]
    expected = [on_the_fly(model, share) for share in shares]
    assert torch.equal(one.of(shares[0]), expected[0])
    assert torch.equal(other.of(shares[1]), expected[1])
    assert torch.equal(one.of(shares[1]), expected[1])
    assert torch.equal(other.of(shares[0]), expected[0])


def test_files_of_logits_are_told_apart(tmp_path: Path) -> None:
    paths = {cached(tiny_var_of(seed), tmp_path)[1].path for seed in (0, 0, 1)}
    assert len(paths) == 2
    model = tiny_var_of(0)
    paths.add(cached(model, tmp_path, "float16")[1].path)
    paths.add(cached(model, tmp_path, label_dropout=0.2)[1].path)
    assert len(paths) == 4
    # What is teacher forced does not depend on the sampler; here the examples stay the same as well.
    examples, _ = cached(model, tmp_path)
    twins = (model, model.with_sampling(guidance=1.5))
    assert len({TeacherLogits(twin, examples, tmp_path).path for twin in twins}) == 1


def test_logits_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"teacher logits of dit: it is asked about new noise in every step"):
        cached(tiny_dit(), tmp_path)
    model = tiny_var()
    with pytest.raises(ValueError, match="must be float32 or float16"):
        cached(model, tmp_path, "bfloat16")
    encoded = encode(TeacherImages(model, 12, 3))
    with pytest.raises(ValueError, match="set dropped_by_example=True or label_dropout=0"):
        TeacherLogits(model, Examples(encoded, model.null_label), tmp_path)
    TeacherLogits(model, Examples(encoded, model.null_label, label_dropout=0), tmp_path)

    examples, logits = cached(model, tmp_path / "later", "float16")
    model.net.head.weight.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"cannot be kept in float16; use float32"):
        logits.of(examples.batch(0, 4))
    model.net.head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the teacher is broken"):
        cached_logits = TeacherLogits(model, examples, tmp_path)
        cached_logits.of(examples.batch(0, 4))

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20000))
    with pytest.raises(ValueError, match=r"take 24,256 bytes in .*, which has 20,000 free; use fewer examples"):
        cached(tiny_var(), tmp_path / "not" / "yet" / "there")


def test_a_file_that_is_there_needs_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_var()
    examples, logits = cached(model, tmp_path)
    logits.of(examples.batch(0, 4))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert cached(model, tmp_path)[1].path == logits.path


# ---- all together --------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_examples_of_a_distillation(tmp_path: Path, cache: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = tiny_var()
    settings = Distillation(num_examples=8, num_held_out=2, batch_size=4, label_dropout=0.5, cache_teacher=cache)
    examples = open_examples(model, settings, tmp_path)
    assert (examples.name, examples.num_train, examples.num_held_out) == ("generated", 8, 2)
    for batch in (examples.batch(0, 4), *examples.held_out(2)):
        assert (batch.logits_BLV is not None) == cache
        if batch.logits_BLV is not None:
            assert torch.equal(batch.logits_BLV, on_the_fly(model, batch))
    assert not caplog.messages


def test_a_cache_that_cannot_be_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    settings = Distillation(num_examples=8, num_held_out=2, batch_size=4, cache_teacher=True)
    with pytest.raises(ValueError, match="teacher logits of dit"):
        open_examples(tiny_dit(), settings, tmp_path)
    assert not [*tmp_path.iterdir()]
