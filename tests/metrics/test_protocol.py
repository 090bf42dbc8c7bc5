import json
from dataclasses import replace

import pytest
import torch

from bitlaw.metrics.protocol import ACROSS_FAMILIES, Interval, Protocol, Score

PROTOCOL = Protocol(
    num_images=2500,
    seed=0,
    labels="cyclic",
    guidance=1.5,
    num_steps=5,
    sampler="gumbel",
    rounding="half up",
    features="ladder",
    features_fingerprint="0123456789abcdef",
    reference="ladder reference split",
    num_reference=50_000,
)


def score(value: float, metric: str = "fd", **changes: object) -> Score:
    return Score(metric, value, Interval(value - 0.1, value + 0.1), replace(PROTOCOL, **changes))  # type: ignore[arg-type]


def test_scores_of_one_protocol_compare() -> None:
    assert min(score(5.5), score(4.5)).value == 4.5
    assert score(5.5).minus(score(4.5)) == pytest.approx(1)


def test_scores_of_different_protocols_refuse_and_name_the_fields() -> None:
    other = score(4.5, num_images=5000, rounding="truncate")
    with pytest.raises(ValueError, match=r"num_images: 2500 and 5000; rounding: 'half up' and 'truncate'"):
        score(5.5).minus(other)
    with pytest.raises(ValueError, match="num_images"):
        sorted([score(5.5), other])
    with pytest.raises(ValueError, match="fd and kid are different metrics"):
        score(5.5).check_comparable(score(0.1, metric="kid"))


def test_families_differ_in_their_samplers_only() -> None:
    diffusion = score(4.5, num_steps=20, sampler="ddim", guidance=2.0)
    with pytest.raises(ValueError, match=r"guidance: .*num_steps: .*sampler: "):
        score(5.5).check_comparable(diffusion)
    assert score(5.5).minus(diffusion, may_differ=ACROSS_FAMILIES) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"\(seed: 0 and 1\)"):
        score(5.5).minus(score(4.5, seed=1, num_steps=20), may_differ=ACROSS_FAMILIES)


def test_every_field_counts() -> None:
    for name, value in PROTOCOL.as_dict().items():
        changed = replace(PROTOCOL, **{name: value * 2})
        assert PROTOCOL.differing(changed) == ([name] if value else [])


def test_record_survives_json() -> None:
    record = json.loads(json.dumps(PROTOCOL.as_dict()))
    assert Protocol.from_dict(record) == PROTOCOL
    record["extra"] = record.pop("seed")
    with pytest.raises(ValueError, match="missing or unknown extra, seed"):
        Protocol.from_dict(record)


def test_interval_cancels_the_bias_of_resamples() -> None:
    resampled = torch.linspace(10, 12, 201)
    assert Interval.around(3.0, resampled, level=0.9) == pytest.approx((2.1, 3.9))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Interval.around(3.0, resampled, level=95)
