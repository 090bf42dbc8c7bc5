"""OmniQuant and learned rounding on the ladder's blocks: what a block gives is nearer to full precision than by RTN."""

from dataclasses import replace

import pytest
import torch
from block_tasks import applied, error_of, rtn, task_of

import bitlaw
from bitlaw.methods import METHODS
from bitlaw.methods.method import BlockMethod

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
