"""What devices tell each other in a training step, read from the compiled program, and the reading of such programs."""

import jax
import pytest
from jax.sharding import AxisType

from benchmarks.abstract_programs import abstract_step
from benchmarks.compile_ahead import compiled, devices
from benchmarks.hlo_stats import Group, byte_count, collective_bytes, groups, main_computation
from ipadapter_jax.runtime.mesh import TRAIN_AXES
from ipadapter_jax.testing.sizes import MICRO

SMALL = {"sizes": MICRO, "latent": 8}


def learnt_bytes(step) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.arguments[0].params))


def test_sizes_of_arrays():
    assert byte_count("f32[2,3]{1,0}") == 24
    assert byte_count("(bf16[4]{0}, (pred[], s32[2]{0}))") == 8 + 1 + 8


PROGRAM = """HloModule small

%{called} (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %e = f32[8]{{0}} {inner}(%p)
}}

ENTRY %main (a: f32[8]) -> (f32[8], bf16[8]) {{
  %a = f32[8]{{0}} parameter(0)
  %b = bf16[8]{{0}} fusion(%a), kind=kLoop, calls=%{called}{more}
  ROOT %d = (f32[8]{{0}}, bf16[8]{{0}}) tuple(%a, %b)
}}
"""


def test_a_line_is_a_kernel_with_its_operands():
    text = PROGRAM.format(called="c", inner="exponential", more="")
    (fusion,) = main_computation(text)
    assert (fusion.name, fusion.bytes_read, fusion.bytes_written) == ("b", 32, 16)
    assert groups(text) == {"elementwise": Group(1, 48, 0)}


@pytest.mark.parametrize(
    ("inner", "kind"),
    [("convolution", "product or convolution"), ("reduce", "norm, softmax or sum"), ("negate", "elementwise")],
)
def test_fusions_of_tpus_are_what_is_in_them(inner, kind):
    text = PROGRAM.format(called="c", inner=inner, more=', backend_config={"estimated_cycles":"70"}')
    assert groups(text) == {kind: Group(1, 48, 70)}


def test_what_pallas_notes_may_have_lines_of_its_own():
    noted = ', frontend_attributes={kernel_metadata={\n"blocks":"{512}"\n}}, metadata={op_name="a"}'
    assert groups(PROGRAM.format(called="c", inner="negate", more=noted)) == {"elementwise": Group(1, 48, 0)}


def test_a_step_sends_the_gradients_once():
    """Sums of all gradients of what learns, and the parts of the new weights gathered; beside them a loss, whether all
    is finite, and the gradients' norm. Of what is frozen, nothing."""
    mesh = jax.make_mesh((4, 1), TRAIN_AXES, axis_types=(AxisType.Auto,) * 2)
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
    found, mesh = collective_bytes(text), jax.make_mesh((1, 1), TRAIN_AXES, devices=jax.devices()[:1])
    learnt = learnt_bytes(abstract_step(mesh, batch=1, dtype="float32", **SMALL))
    assert found["reduce-scatter"] + found["all-gather"] <= 2 * learnt and found["all-reduce"] < 0.05 * learnt
    assert sum(group.kernels for group in groups(text).values()) > 100
