"""What devices tell each other in a training step, read from the compiled program, and the reading of such programs."""

import jax
import pytest
from abstract_programs import abstract_step
from compile_for_gpu import compiled, devices
from compiled_text import byte_count, collective_bytes, groups, instructions, main_computation
from jax.sharding import AxisType
from make_random_weights import MICRO

from ipadapter_jax.train.sharding import AXES

SMALL = {"sizes": MICRO, "latent": 8}


def learnt_bytes(step) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.arguments[0].params))


def test_sizes_of_arrays():
    assert byte_count("f32[2,3]{1,0}") == 24
    assert byte_count("(bf16[4]{0}, (pred[], s32[2]{0}))") == 8 + 1 + 8


def test_a_line_is_a_kernel_with_its_operands():
    body = """
      %a = f32[8]{0} parameter(0)
      %b = bf16[8]{0} fusion(%a), kind=kLoop, calls=%c
      ROOT %d = (f32[8]{0}, bf16[8]{0}) tuple(%a, %b)
    """
    (fusion,) = instructions(body)
    assert (fusion.name, fusion.bytes_read, fusion.bytes_written) == ("b", 32, 16)
    assert {name: tuple(vars(group).values()) for name, group in groups([fusion]).items()} == {"elementwise": (1, 48)}


def test_a_step_sends_the_gradients_once():
    """Sums of all gradients of what learns, and the parts of the new weights gathered; beside them a loss, whether all
    is finite, and the gradients' norm. Of what is frozen, nothing."""
    mesh = jax.make_mesh((4, 1), AXES, axis_types=(AxisType.Auto,) * 2)
    step = abstract_step(mesh, batch=8, dtype="float32", **SMALL)
    found = collective_bytes(step.trace().lower().compile().as_text())
    learnt = learnt_bytes(step)
    assert set(found) == {"all-reduce", "all-gather"}
    assert learnt <= found["all-reduce"] < learnt + 200
    assert found["all-gather"] <= learnt


@pytest.mark.slow
def test_on_gpus_the_sum_is_split():
    """XLA sums only the part that a device updates: with the gathering as many bytes as one sum of the gradients."""
    try:
        gpus = devices("H200", 8)
    except Exception as error:
        pytest.skip(f"no CUDA plugin: {error}")
    text, _ = compiled("step", 1, gpus, {}, dtype="float32", **SMALL)
    found, mesh = collective_bytes(text), jax.make_mesh((1, 1), AXES, devices=jax.devices()[:1])
    learnt = learnt_bytes(abstract_step(mesh, batch=1, dtype="float32", **SMALL))
    assert found["reduce-scatter"] + found["all-gather"] <= 2 * learnt and found["all-reduce"] < 0.05 * learnt
    assert sum(group.kernels for group in groups(main_computation(text)).values()) > 100
