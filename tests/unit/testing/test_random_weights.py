"""Random weights are the same everywhere, and make a pipeline in one call."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ipadapter_jax import testing
from ipadapter_jax.testing import random_weights, tiny_pipeline


def test_the_numbers_are_those_of_the_recorded_full_size_model():
    """What was recorded of PyTorch at full size was computed with them."""
    found = random_weights.draw("unet", "conv_in.weight", (2, 3), "kernel")
    np.testing.assert_array_equal(found, np.float16(RECORDED))


RECORDED = [[0.68115234375, -0.486572265625, -0.3291015625], [-0.0200653076171875, 0.15087890625, 0.004497528076171875]]


def test_the_command_writes_the_same_numbers_in_both_dtypes(tmp_path, monkeypatch, capsys):
    for dtype in ("float16", "float32"):
        words = ["random_weights", "--size", "nano", "--dtype", dtype, "--out", str(tmp_path / dtype)]
        monkeypatch.setattr(sys, "argv", words)
        random_weights.main()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "UNet: 252,420 parameters" and len(lines) == 5
    half, single = (sorted((tmp_path / dtype).rglob("*.safetensors")) for dtype in ("float16", "float32"))
    assert len(half) == len(single) == 5
    for files in zip(half, single, strict=True):
        a, b = map(load_file, files)
        assert {array.dtype.name for array in (*a.values(), *b.values())} == {"float16", "float32"}
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("one_device")
def test_a_tiny_pipeline_is_the_same_at_every_call():
    pipes = [tiny_pipeline(dtype=dtype) for dtype in ("float32", "float32", "bfloat16")]
    jax.tree.map(np.testing.assert_array_equal, *(pipe.params for pipe in pipes[:2]))
    for pipe, dtype in zip(pipes[1:], ("float32", "bfloat16"), strict=True):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(pipe.params)} == {dtype}
        assert len(pipe.adapters) == 1 and not any(Path(place).exists() for place in pipe.sources.values())
    image = np.zeros((8, 8, 3), np.uint8)
    found = pipes[0]("a cat", ip_adapter_image=image, num_inference_steps=2, output_type="np")
    assert found.shape == (1, 8, 8, 3) and np.ptp(found) > 0.01


def test_only_what_it_offers_is_found():
    assert testing.tiny_pipeline is tiny_pipeline
    with pytest.raises(AttributeError, match="has no attribute 'tiny_pipe'"):
        _ = testing.tiny_pipe
