"""The sampler and the training step at their real size in bfloat16, as they are compiled for GPUs and TPUs: what they
compute, in which precision, and that they lower from a machine that has neither."""

import functools
from collections import Counter

import jax
import pytest
from jax.sharding import AxisType

from benchmarks.abstract_programs import abstract_sampler, abstract_step, as_on
from ipadapter_jax.runtime.flops import attention_kernel, count_flops, count_recomputed_flops, programs
from ipadapter_jax.runtime.mesh import TRAIN_AXES

STEPS, BATCH = 50, 8
PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
SELF_ATTENTIONS = {"gpu": 15, "tpu": 10}  # by a kernel: cuDNN's down to 16x16 positions, Pallas's to 32x32
GRADIENT_KERNELS = {"gpu": 1, "tpu": 2}  # one for all three gradients; one for the queries', one for the others


def mesh(axes=("data",)):
    return jax.make_mesh((1,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes), devices=jax.devices()[:1])


@functools.cache
def traced(platform: str, what: str):
    with as_on(platform):
        if what == "sampler":
            return abstract_sampler(mesh(), steps=STEPS).trace()
        return abstract_step(mesh(TRAIN_AXES), batch=BATCH).trace()


def instructions(jaxpr):
    """Every one, and the text of where it stands."""
    for eqn in jaxpr.eqns:
        yield eqn
        for program in programs(eqn.params.values()):
            yield from instructions(getattr(program, "jaxpr", program))


def in_every(platform: str):
    return [traced(platform, what) for what in ("sampler", "step")]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_work_of_a_guided_sampling_step(platform):
    """Twice 803.6 GFLOP without what both branches share (41.7), the keys and values, which are computed before (3.1
    each), and what is saved where the last image is doubled (15.9 each). The goal is at most 1.57 TFLOP."""
    found = count_flops(traced(platform, "sampler").jaxpr).total() / STEPS
    assert found == pytest.approx(2 * 803.62e9 - 41.7e9 - 2 * (3.1e9 + 15.9e9), rel=1e-3)
    assert found < 1.57e12


@pytest.mark.parametrize("platform", PLATFORMS)
def test_work_of_a_training_step(platform):
    """The goal is at most 1.70 TFLOP a sample. What kernels form again stands apart: the weights, and for Pallas one
    gradient; 122 GFLOP would be all self-attentions' forward products once."""
    program = traced(platform, "step").jaxpr
    assert count_flops(program).total() / BATCH < 1.70e12
    again = count_recomputed_flops(program).total() / BATCH
    assert again < {"gpu": 0.06e12, "tpu": 0.16e12}[platform]


# In float32 although the policy is bfloat16: (shapes of both sides without what is batched) and why.
ALLOWED = {
    "tpu": {
        # Pallas multiplies the values by weights that it has not rounded; the matrix unit rounds them.
        ((512, 512), (512, 40)),
        ((512, 512), (512, 80)),
        # Its backward pass sums gradient times output along the depth of a head, elementwise, no matrix product.
        ((8, 8, 4096, 40), (8, 8, 4096, 40)),
        ((8, 8, 1024, 80), (8, 8, 1024, 80)),
    },
    "gpu": set(),
}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_product_or_convolution_is_in_float32(platform):
    found = {
        tuple(var.aval.shape for var in eqn.invars)
        for program in in_every(platform)
        for eqn in instructions(program.jaxpr.jaxpr)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
        and all(var.aval.dtype == "float32" for var in eqn.invars)
    }
    assert found == ALLOWED[platform]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_long_self_attention_is_a_kernel(platform):
    sampling, training = (
        Counter(filter(None, map(attention_kernel, instructions(program.jaxpr.jaxpr))))
        for program in in_every(platform)
    )
    count, forward = SELF_ATTENTIONS[platform], (2, 0)
    assert sampling == {forward: count}
    assert training[forward] == count
    # The first one comes before anything that learns.
    assert training.total() - count == (count - 1) * GRADIENT_KERNELS[platform]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_they_lower_from_here(platform):
    """With their kernels, and nothing that would call back to Python."""
    kernel = {"gpu": "__cudnn$fmhaSoftmax", "tpu": "tpu_custom_call"}[platform]
    for program in in_every(platform):
        text = program.lower(lowering_platforms=(PLATFORMS[platform],)).as_text()
        assert kernel in text
        assert "callback" not in text


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_whole_state_is_donated(platform):
    text = traced(platform, "step").lower(lowering_platforms=(PLATFORMS[platform],)).as_text()
    state = abstract_step(mesh(TRAIN_AXES), batch=BATCH).arguments[0]
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(state))
