"""Files that are written here: the library reads them, and writes the same bytes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambadsl.build.shards import CHUNK, DTYPES, Unit, blank, save_shards


def saved(folder, units, **how):
    return save_shards(folder, "weights", units, index="weights.index.json", about={"format": "pt"}, **how)


def unit(**tensors):
    return Unit(tensors, lambda: ((name, [tensor]) for name, tensor in tensors.items()))


def test_every_dtype_and_shape(tmp_path):
    """Odd bytes before wide numbers, views, nothing at all, and names that JSON escapes."""
    made = {
        f'{name}"{i}\u00e9': torch.arange(n).reshape(shape).to(dtype)
        for name, dtype in DTYPES.items() for i, (n, shape) in enumerate([(3, (3,)), (1, ()), (0, (0, 2)), (6, (2, 3))])
    }
    made["view"] = torch.arange(12.0).reshape(3, 4)[:, 1:3].T
    [file] = saved(tmp_path, [unit(**{name: t}) for name, t in made.items()])
    found = load_file(file)
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert found[name].data_ptr() % max(tensor.itemsize, 1) == 0
    save_file({name: t.contiguous() for name, t in made.items()}, tmp_path / "library", {"format": "pt"})
    assert file.read_bytes() == (tmp_path / "library").read_bytes()


def test_what_no_single_write_takes(tmp_path):
    tensor = torch.randint(0, 255, (3 * CHUNK + 5,), dtype=torch.uint8)
    [file] = saved(tmp_path, [unit(a=tensor, b=tensor.flip(0))])
    found = load_file(file)
    assert torch.equal(found["a"], tensor) and torch.equal(found["b"], tensor.flip(0))


def test_rows_that_come_in_parts(tmp_path):
    tensor = torch.randn(7, 3)
    [file] = saved(tmp_path, [Unit({"a": tensor}, lambda: [("a", tensor.split([2, 0, 4, 1]))])])
    assert torch.equal(load_file(file)["a"], tensor)


@pytest.mark.parametrize("made, says", [
    ({"a": torch.zeros(2)}, "not made: b"), ({"a": torch.zeros(2), "b": torch.zeros(3)}, "of 12 bytes where 8"),
    ({"a": torch.zeros(2), "b": torch.zeros(4).half()}, "of torch.float16 where"),
])
def test_units_keep_their_word(tmp_path, made, says):
    held = {name: blank((2,), torch.float32) for name in "ab"}
    with pytest.raises(ValueError, match=says):
        saved(tmp_path, [Unit(held, unit(**made).make)])
    assert not list(tmp_path.iterdir())
