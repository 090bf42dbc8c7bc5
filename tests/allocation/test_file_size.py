from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitlaw.allocation.file_size import Stored, file_bytes, weight_layout
from bitlaw.formats import FORMATS
from bitlaw.packing import pack
from bitlaw.precision import FULL_BITS, TensorPrecision
from bitlaw.quantized import WeightSpec

SHAPES = [(24, 16), (5, 48), (4, 4, 3, 3)]


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.code_bits < FULL_BITS])
def test_a_weight_takes_what_its_layout_says(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        weight = torch.randn(shape, generator=generator)
        groups = (None,) if name == "int0" else (None, "tensor", 12)
        for group_size in groups:
            precision = TensorPrecision(FORMATS[name], group_size)
            spec = WeightSpec.of(precision)
            if spec.problem(shape):
                continue
            packed = pack("a.b", spec.quantize(weight))
            assert weight_layout("a.b", weight, precision) == {key: Stored.of(tensor) for key, tensor in packed.items()}


def test_a_file_of_any_tensors_has_the_size_that_is_said(tmp_path: Path) -> None:
    types = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int32]
    types += [torch.float32, torch.float64, torch.int64]
    tensors = {}
    for index, dtype in enumerate(types):
        for size in (0, 1, 3, 1000):
            tensors[f"{'äb'[index % 2]}.{index}.{size}"] = torch.zeros(size, 1 + index, dtype=dtype)
            save_file(tensors, tmp_path / "a.safetensors")
            said = file_bytes({name: Stored.of(tensor) for name, tensor in tensors.items()})
            assert (tmp_path / "a.safetensors").stat().st_size == said
    tensors = {"scalar": torch.tensor(1.0), 'quoted "\\ name': torch.zeros(2)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size == file_bytes({n: Stored.of(t) for n, t in tensors.items()})
