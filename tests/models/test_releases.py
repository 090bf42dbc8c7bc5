"""The table of releases against the manifests of the official classes, and against what the families build."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bitlaw.models import FAMILIES
from bitlaw.models.loading import family_of
from bitlaw.models.official import WeightsFile
from bitlaw.models.releases import RELEASES, release_of

DATA = Path(__file__).parents[1] / "data"
MANIFESTS = {
    **{f"var {size}": ("var", f"var_{size}") for size in ("d16", "d20", "d24", "d30", "d36")},
    **{f"llamagen {size}": ("llamagen", f"GPT-{size}") for size in ("B", "L", "XL", "XXL", "3B")},
    **{f"llamagen XL text, stage {stage}": ("llamagen", "GPT-XL-t2i") for stage in (1, 2)},
    **{f"dit {size}": ("dit", f"DiT-{size}@256") for size in ("S/2", "B/2", "L/2", "XL/2")},
    **{f"large-dit {size}": ("dit", f"DiT_Llama_{size}_patch2") for size in ("600M", "3B", "7B")},
    **{f"mar {size}": ("mar", f"mar_{name}") for size, name in (("B", "base"), ("L", "large"), ("H", "huge"))},
}


def described(release):
    return f"{release.family} {release.size}"


def manifest(release):
    """The tensors of a release, without memory, as a file would hold them."""
    name, key = MANIFESTS[described(release)]
    if release.image_size == 512 and release.family == "dit":
        key = key.replace("256", "512")
    with gzip.open(DATA / f"{name}_manifest.json.gz") as file:
        entries = json.load(file)[key]
    tensors = {
        k: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for k, (shape, dtype) in entries.items()
    }
    return WeightsFile(Path(release.files[0].rpartition("/")[2] if release.files else "weights.pt"), tensors)


@pytest.mark.parametrize("release", [r for r in RELEASES if described(r) in MANIFESTS], ids=described)
def test_every_release_is_built_with_the_keys_and_shapes_of_its_manifest(release, monkeypatch):
    file = manifest(release)
    family = family_of(file)
    assert family.family == release.family
    monkeypatch.setattr("bitlaw.models.storage.all_finite", lambda tensor: True)  # there are no numbers
    model = family.from_official(file, None)
    assert model.image_size == release.image_size
    tensors = model.to_tensors()
    assert sum(math.prod(t.shape) for t in tensors.values()) == release.parameters
    assert release_of(model.family, release.parameters, model.image_size) == release
    sites = [model.net.get_submodule(site.name) for site in model.sites()]
    assert sum(isinstance(site, nn.Linear) for site in sites) == release.num_linears
    assert sum(isinstance(site, nn.Conv2d) for site in sites) == release.num_convolutions
    assert model.recipes["paper"]


def test_every_family_has_releases():
    assert {release.family for release in RELEASES} == set(FAMILIES)
    assert len({(r.family, r.size, r.image_size) for r in RELEASES}) == len(RELEASES)
    assert release_of("var", 1, 256) is None
