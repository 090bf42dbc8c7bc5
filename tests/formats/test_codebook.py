"""Codebooks: k-means against known optima, groups that are rectangles, what is stored and what it costs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import bitlaw
from bitlaw.formats import FORMATS, Codebook
from bitlaw.formats.codebook import k_means, look_up, nearest
from bitlaw.packing import pack, unpack
from bitlaw.precision import Precision
from bitlaw.quantized import StoredBits, WeightSpec
from bitlaw.scaling.bits import count_bits

CODEBOOKS = [name for name, format in FORMATS.items() if isinstance(format, Codebook)]


def codebook(name: str) -> Codebook:
    format = FORMATS[name]
    assert isinstance(format, Codebook)
    return format


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sqnr_db(x: Tensor, approximation: Tensor) -> float:
    return float(10 * torch.log10(x.square().mean() / (x - approximation).square().mean()))


# ---- k-means ------------------------------------------------------------------------------------------


def test_clusters_are_found() -> None:
    """Sixteen well separated clouds of different sizes, in two groups: each gets its centroid, at its mean."""
    grid_KD = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    centers_GKD = torch.stack([grid_KD, grid_KD @ torch.tensor([[1.0, 0.3], [-0.4, 2.0]]) - 7])
    label_M = torch.arange(16).repeat_interleave(torch.arange(20, 36))
    x_GMD = centers_GKD[:, label_M] + 0.01 * randn(2, len(label_M), 2)
    found_GKD = k_means(x_GMD, 4)
    for x_MD, centroids_KD in zip(x_GMD, found_GKD, strict=True):
        means_KD = torch.stack([x_MD[label_M == k].mean(0) for k in range(16)])
        distance_KK = torch.cdist(means_KD, centroids_KD)
        assert distance_KK.amin(1).max() < 1e-5 and len(set(distance_KK.argmin(1).tolist())) == 16


@pytest.mark.parametrize(("bits", "db"), [(1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22)])
def test_normal_numbers_reach_the_lloyd_max_quantizer(bits: int, db: float) -> None:
    """Max 1960, table I; of 2^16 numbers the error is known to 0.05 dB, and k-means of 4 bits has not quite ended."""
    x = randn(1, 2**16)
    centroids = k_means(x[..., None], bits)
    index, _ = nearest(x[..., None], centroids)
    assert abs(sqnr_db(x, look_up(centroids, index)[..., 0]) - db) < 0.15


def test_importance_moves_centroids_to_where_it_is() -> None:
    x, importance = randn(3, 512), torch.ones(3, 512)
    importance[:, ::2] = 100

    def error(centroids: Tensor) -> Tensor:
        """Of each group, weighted."""
        index, _ = nearest(x.view(3, -1, 2), centroids, importance.view(3, -1, 2))
        return ((look_up(centroids, index).flatten(1) - x).square() * importance).sum(1)

    weighted = error(k_means(x.view(3, -1, 2), 4, importance.view(3, -1, 2)))
    assert (weighted < 0.8 * error(k_means(x.view(3, -1, 2), 4))).all()


def test_importance_of_one_number_makes_a_centroid_of_it() -> None:
    x, importance = randn(1, 64), torch.ones(1, 64)
    importance[0, 10] = 1e9
    centroids = k_means(x[..., None], 2, importance[..., None])
    assert (centroids - x[0, 10]).abs().min() < 1e-5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [2, 6, 10])
def test_nearest_is_the_nearest(width: int, weighted: bool) -> None:
    """Among as many vectors as are told apart by 23 - width bits of a distance."""
    y, vectors = randn(3, 200, 2), randn(3, 2**width, 2, seed=1)
    weight = randn(3, 200, 2, seed=2).exp() if weighted else torch.ones(3, 200, 2)
    distance = (weight[:, :, None] * (y[:, :, None] - vectors[:, None]).square()).sum(-1)
    index, half = nearest(y, vectors, weight if weighted else None)
    least = distance.amin(-1)
    assert (distance.gather(2, index[..., None])[..., 0] <= least * (1 + 2.0 ** (width - 22)) + 1e-5).all()
    assert torch.allclose(2 * half, least, rtol=2.0 ** (width - 22), atol=1e-5)


def test_of_equal_vectors_the_first_is_taken() -> None:
    vectors = torch.tensor([[[1.0], [2.0], [2.0], [1.0]]])
    index, distance = nearest(torch.tensor([[[2.0], [1.0]]]), vectors)
    assert index.tolist() == [[1, 0]] and distance.tolist() == [[0, 0]]


# ---- the format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3])
def test_more_dimensions_lose_less_at_equal_bits(bits: int) -> None:
    x = randn(1, 2**15)
    db = [sqnr_db(x, FORMATS[f"v{dim}b{bits}"].fake(x)) for dim in (1, 2, 4)]
    assert db[0] + 0.2 < db[1] and db[1] + 0.2 < db[2]


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("value", [0.1, -0.3, 7e4, -1e-12, 0.0])
def test_constant_groups_come_back_exactly(name: str, value: float) -> None:
    x = torch.full((2, 16), value)
    assert torch.equal(FORMATS[name].fake(x), x)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_no_more_vectors_than_entries_are_kept_to_8_bits(name: str) -> None:
    """2 vectors, of which each has its own entry: they lose only what rounding to 127 steps takes."""
    x = randn(5, 2 * codebook(name).dim)
    assert ((FORMATS[name].fake(x) - x).abs().amax(1) <= x.abs().amax(1) / 127).all()


@pytest.mark.parametrize("magnitude", [1e-35, 1e-6, 1e6, 1e30])
def test_magnitude_does_not_matter(magnitude: float) -> None:
    x = randn(2, 256)
    assert sqnr_db(x, FORMATS["v2b3"].fake(x * magnitude) / magnitude) > sqnr_db(x, FORMATS["v2b3"].fake(x)) - 0.1


@pytest.mark.parametrize("name", ["v1b4", "v2b3", "v4b2"])
def test_far_outside_it_is_an_entry_all_the_same(name: str) -> None:
    format = codebook(name)
    params = format.fit(randn(1, 512))
    x = torch.tensor([[1e30, -1e30, 0.0, 1e38]])
    decoded = format.decode(format.encode(x, params), params)
    assert decoded.isfinite().all()
    assert decoded[0, 3] > 0 and (format.dim > 1 or decoded[0, 0] == format.vectors(params).max())


@pytest.mark.parametrize(("dim", "bits"), [(3, 2), (0, 2), (1, 9), (2, 7), (4, 4), (2, 0)])
def test_impossible_codebooks_are_refused(dim: int, bits: int) -> None:
    with pytest.raises(ValueError, match=r"codebooks (have vectors of|of \d dimensions have)"):
        Codebook(dim, bits)


# ---- groups -------------------------------------------------------------------------------------------


def test_groups_are_rectangles_and_join_undoes_split() -> None:
    weight, spec = randn(6, 16), WeightSpec(FORMATS["v2b1"], 32)
    assert spec.rectangle((6, 16)) == (2, 16)
    weight = randn(6, 1024)
    spec = WeightSpec(FORMATS["v2b1"], 768)
    assert spec.rectangle(weight.shape) == (3, 256)
    groups = spec.groups(weight)
    assert groups.shape == (8, 768)
    assert torch.equal(groups[5], weight[3:, 256:512].flatten())  # of the second band the second group
    assert torch.equal(spec.join(groups, weight.shape), weight)


@pytest.mark.parametrize("name", ["v1b2", "v2b2", "v2b3", "v4b2"])
@pytest.mark.parametrize("shape", [(768, 768), (1152, 4608), (1024, 27 * 64), (4608, 1152), (1280, 514 * 2)])
def test_without_a_group_size_codebooks_cost_an_eighth_of_a_bit(name: str, shape: tuple[int, int]) -> None:
    """At most, and a scale of 16 bits; a quarter of that where it must, not less: sizes are divisors.

    Of 1028 inputs no more than 4 are at most 256 and divide it: there a codebook may be wider.
    """
    rows, columns = WeightSpec(FORMATS[name]).rectangle(shape)
    assert shape[0] % rows == 0 and shape[1] % columns == 0 and columns % FORMATS[name].values_per_code == 0
    assert columns <= 256 or shape[1] == 1028
    entries, dim = FORMATS[name].codebook_shape
    assert 1 / 32 <= 8 * entries * dim / (rows * columns) <= 1 / 8


def test_a_small_weight_has_one_codebook() -> None:
    assert WeightSpec(FORMATS["v2b3"]).rectangle((48, 48)) == (48, 48)
    assert WeightSpec(FORMATS["v2b3"], "tensor").rectangle((4096, 4096)) == (4096, 4096)


def test_groups_that_do_not_fit_name_one_that_does() -> None:
    spec = WeightSpec(FORMATS["v2b3"], 2000)
    problem = spec.problem((384, 1152))
    assert problem == (
        "no rectangle of 2000 weights divides 384 rows of 1152 input channels; use g2048, no g, or protect this site"
    )
    assert WeightSpec(FORMATS["v2b3"], 2048).problem((384, 1152)) is None
    with pytest.raises(ValueError, match="fc1: no rectangle of 2000"):
        spec.quantize(randn(384, 1152), name="fc1")
    odd = WeightSpec(FORMATS["v2b3"]).problem((8, 3, 3, 3))
    assert odd is not None and "27 inputs (3 channels x 3 x 3 kernel), not a multiple of the 2" in odd
    assert WeightSpec(FORMATS["v1b3"]).problem((8, 3, 3, 3)) is None


def test_groups_have_codebooks_of_their_own() -> None:
    """Rectangles quantized alone are those of the whole, and neighbours in a row make a vector."""
    weight, spec = randn(8, 512), WeightSpec(FORMATS["v2b2"], 1024)
    weight[4:] *= 10
    quantized = spec.quantize(weight)
    assert quantized.params["codebook_GKD"].shape == (4, 16, 2) and quantized.codes.shape == (8, 256)
    alone = WeightSpec(FORMATS["v2b2"], "tensor").quantize(weight[4:, :256]).decode()
    assert torch.equal(quantized.decode()[4:, :256], alone)
    assert len(torch.unique(quantized.decode()[:4, 256:].reshape(-1, 2), dim=0)) <= 16


def test_a_convolution_is_the_linear_of_its_windows() -> None:
    weight, spec = randn(6, 4, 3, 3), WeightSpec(FORMATS["v2b2"])
    assert torch.equal(spec.quantize(weight).decode().flatten(1), spec.quantize(weight.flatten(1)).decode())


# ---- stored -------------------------------------------------------------------------------------------


def test_bits_count_codebooks_and_scales() -> None:
    """Wv2b3g8192: 3 bits of index, 64 x 2 bytes and a scale for 8192 weights. 10 bits are two planes of a row."""
    bits = WeightSpec(FORMATS["v2b3"], 8192).quantize(randn(64, 512)).bits()
    assert bits == StoredBits(codes=3 * 64 * 512, scales=4 * 16, other=4 * 64 * 2 * 8)
    assert bits.total / (64 * 512) == 3 + 1 / 8 + 16 / 8192
    assert WeightSpec(FORMATS["v2b5"]).quantize(randn(4, 6)).bits() == StoredBits(4 * 64, 16, 0, 1024 * 2 * 8)


def test_names_and_types_of_the_layout() -> None:
    tensors = pack("a", WeightSpec(FORMATS["v2b3"], 768).quantize(randn(6, 512)))
    assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items() if "shape" not in key} == {
        "a.bitlaw_codes": (torch.int32, (6, 48)),
        "a.weight_scale": (torch.float16, (2, 2)),
        "a.bitlaw_codebook": (torch.int8, (4, 64, 2)),
    }


@pytest.mark.parametrize(
    ("damage", "named", "what"),
    [
        (lambda t: t.pop("a.bitlaw_codebook"), "a.bitlaw_codebook", "missing"),
        (lambda t: t.update({"a.bitlaw_codebook": t["a.bitlaw_codebook"].float()}), "a.bitlaw_codebook", "int8"),
        (lambda t: t.update({"a.bitlaw_codebook": t["a.bitlaw_codebook"][:1]}), "a.bitlaw_codebook", r"\(2, 16, 2\)"),
        (lambda t: t.update({"a.bitlaw_codes": t["a.bitlaw_codes"][:, 1:]}), "a.bitlaw_codes", "shape"),
        (lambda t: t["a.weight_scale"].fill_(torch.nan), "a.weight_scale", "NaN or Inf"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([4, 31])}), "a.weight_shape", "not a multiple of the 2"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([5, 32])}), "a.weight_shape", "no rectangle of 64"),
    ],
)
def test_damage_is_an_error_that_names_the_tensor(damage: Callable[[dict[str, Tensor]], object], named: str, what: str):
    spec = WeightSpec(FORMATS["v2b2"], 64)
    tensors = pack("a", spec.quantize(randn(4, 32)))
    damage(tensors)
    with pytest.raises(ValueError, match=rf"^{named}: .*{what}"):
        unpack("a", tensors, spec)


def test_a_saved_ladder_model_draws_the_same_and_is_as_small_as_it_says(tmp_path: Path) -> None:
    small = bitlaw.quantize(bitlaw.load("ladder/var-xs"), "Wv2b3A16", method="rtn")
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert torch.equal(again.generate([0, 1], seed=0), small.generate([0, 1], seed=0))
    assert count_bits(again) == count_bits(small)
    path = tmp_path / "small" / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    shapes = 16 * sum(name.endswith(".weight_shape") for name in load_file(path))
    assert 8 * (path.stat().st_size - header - shapes) == count_bits(small).model_bits


# ---- notation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Wv2b3g2048A8", "Wv4b2A16", "Wv1b8tA8"])
def test_precisions_are_written_as_they_are_read(text: str) -> None:
    assert str(Precision.parse(text)) == text


@pytest.mark.parametrize(("text", "named"), [("W4Av2b3", "activations"), ("W4A8KVv1b4", "attention operands")])
def test_only_weights_have_codebooks(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"is a codebook, which only weights can have; give {named} integers or"):
        Precision.parse(text)
