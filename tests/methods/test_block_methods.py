"""OmniQuant and learned rounding on the ladder's blocks: what a block gives is nearer to full precision than by RTN."""

from dataclasses import replace

import pytest
import torch
from block_tasks import applied, error_of, rtn, task_of

import bitlaw
from bitlaw.methods import METHODS
from bitlaw.methods.method import BlockMethod
from bitlaw.models.loading import ladder_names

SETTINGS = bitlaw.Calibration(num_images=8, batch_size=4)


@pytest.mark.parametrize("name", ["ladder/var-xs", "ladder/dit-xs"])
@pytest.mark.parametrize("method", ["omniquant", "adaround"])
@pytest.mark.parametrize("number", [0, 1])
def test_blocks_lose_less_than_by_rounding_to_nearest(name: str, method: str, number: int) -> None:
    task = task_of(bitlaw.load(name), "W2A16", number, settings=SETTINGS)
    every_call = [*task.calls, *task.held_out]
    nearest = rtn(task)
    chosen = METHODS[method]
    assert isinstance(chosen, BlockMethod)
    short = replace(chosen, steps=40)
    result = short.quantize_block(task)
    assert result.weights.keys() == nearest.weights.keys() and not result.rescalings
    assert error_of(*applied(task, result), every_call) < error_of(*applied(task, nearest), every_call)
    again = short.quantize_block(task)
    assert all(torch.equal(again.weights[n].codes, w.codes) for n, w in result.weights.items())


def ratios(name: str, method: str) -> list[float]:
    """Error of a model's blocks at W3A16 over that by rounding to nearest, on calls held out, behind blocks that are
    quantized already."""
    settings = bitlaw.Calibration(num_images=16, batch_size=4)
    model = bitlaw.load(name)
    small = bitlaw.quantize(model, "W3A16", method, calibration=settings)
    notes = [
        values for note in small.provenance["sites"].values() for values in note.values() if "block_error" in values
    ]
    of_block = {(note["block_error"], note["block_error_rtn"]) for note in notes}
    assert len(of_block) == len(model.blocks)
    return [error / nearest for error, nearest in of_block]


@pytest.mark.slow
@pytest.mark.parametrize("name", ladder_names())
@pytest.mark.parametrize("method", ["omniquant", "adaround"])
def test_every_block_of_the_ladder_loses_less_than_by_rounding_to_nearest(name: str, method: str) -> None:
    assert max(ratios(name, method)) < 1
