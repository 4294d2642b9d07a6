"""Kernels of accelerators: chosen where they can work, equal to float64 (interpreted), lowered without a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import exact, random
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ipadapter_jax.ops import attention_kernels
from ipadapter_jax.ops.attention import attend
from ipadapter_jax.ops.attention_kernels import kernel_for

BFLOAT16 = jnp.dtype("bfloat16")


def interpreted(num_heads):
    return functools.partial(attention_kernels._splash, num_heads, interpret=True)


@pytest.fixture
def one_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize(("length", "keys", "depth"), [(256, 256, 40), (384, 128, 16)])
def test_the_kernel_of_tpus_equals_float64(length, keys, depth):
    q = random(2, length, 2 * depth)
    k, v = random(2, keys, 2 * depth, seed=1), random(2, keys, 2 * depth, seed=2)
    np.testing.assert_allclose(interpreted(2)(q, k, v), exact(q, k, v, 2), atol=2e-6)


def test_its_gradient_is_that_of_plain_attention():
    q, k, v = (random(1, 128, 16, seed=i) for i in range(3))

    def gradients(function):
        return jax.grad(lambda *given: jnp.sum(jnp.sin(function(*given))), argnums=(0, 1, 2))(q, k, v)

    plain = gradients(lambda q, k, v: attend(q, [(k, v, 1.0)], 2))
    for ours, theirs in zip(gradients(interpreted(2)), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize(("length", "depth"), [(4096, 40), (6144, 40), (1024, 80)])
def test_it_lowers_for_a_tpu_with_its_gradient(one_tpu, length, depth):
    x = jax.ShapeDtypeStruct((2, length, 8 * depth), BFLOAT16)

    def loss(q, k, v):
        return attend(q, [(k, v, 1.0)], 8).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3  # forward; the gradient of queries; of keys and values


@pytest.mark.parametrize(
    ("length", "keys", "dtype"),
    [
        *[(4096, 4096, "float32"), (4096, 4096, "float16")],
        *[(4096, 77, "bfloat16"), (256, 256, "bfloat16"), (1025, 1025, "bfloat16")],
    ],
)
def test_what_a_tpu_computes_as_it_is_written(one_tpu, length, keys, dtype):
    """float32, float16, the short cross-attentions, low resolutions, and lengths that blocks do not divide."""
    assert kernel_for((1, 4096, 320), (1, 4096, 320), 8, BFLOAT16) is not None
    assert kernel_for((1, length, 320), (1, keys, 320), 8, jnp.dtype(dtype)) is None


def test_rows_of_unknown_place_get_no_kernel(one_tpu, monkeypatch):
    """The compiler could not spread it: every device would be given all rows."""
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert kernel_for((1, 4096, 320), (1, 4096, 320), 8, BFLOAT16) is None


def test_a_gpu_without_the_kernel_computes_as_it_is_written(monkeypatch):
    """Here there is no GPU at all, which is no news to anybody: no warning."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert kernel_for((1, 4096, 320), (1, 4096, 320), 8, BFLOAT16) is None


class FakeGpu:
    """What `cudnn_runs` asks of a device."""

    platform, compute_capability = "gpu", "9.0"

    class client:
        platform_version = "cuda 13000"


def test_a_gpu_whose_kernel_fails_is_told_of_once(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeGpu()])
    attention_kernels._cudnn_runs.cache_clear()
    with pytest.warns(UserWarning, match="cuDNN has no attention for heads of 40"):
        assert not attention_kernels.cudnn_runs(40, BFLOAT16)
    assert not attention_kernels.cudnn_runs(40, BFLOAT16)
    assert sorted(attention_kernels.REFUSED) == [40]
    attention_kernels._cudnn_runs.cache_clear()
    attention_kernels.REFUSED.clear()


def test_processes_use_what_all_of_them_have(monkeypatch):
    """This one has cuDNN for both depths, the other one for 80 alone."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(attention_kernels, "_cudnn_runs", lambda depth, dtype: True)
    gathered = lambda own: np.stack([own, [False, True]])  # noqa: E731
    monkeypatch.setattr(attention_kernels.multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(attention_kernels, "_AGREED", set())
    assert not attention_kernels.cudnn_runs(80, BFLOAT16)  # nobody was asked
    attention_kernels.agree([80, 40, 80], "bfloat16")
    assert [attention_kernels.cudnn_runs(depth, BFLOAT16) for depth in (40, 80, 160)] == [False, True, False]
    assert not attention_kernels.cudnn_runs(80, jnp.dtype("float16"))


def test_a_gpu_is_tried_in_the_middle_of_tracing(monkeypatch):
    """Where the question comes up: within a program that is spread over devices."""
    gpu = FakeGpu()
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    device_put, cpu, tried = jax.device_put, jax.devices()[0], []

    def plain(num_heads, q, k, v):
        tried.append(q.shape)
        return attend(q, [(k, v, 1.0)], num_heads)

    monkeypatch.setattr(jax, "device_put", lambda x, device: device_put(x, cpu if device is gpu else device))
    monkeypatch.setattr(attention_kernels, "_cudnn", plain)
    attention_kernels._cudnn_runs.cache_clear()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def body(x):
        return jax.lax.scan(lambda x, _: (x + float(attention_kernels.cudnn_runs(40, BFLOAT16)), None), x, length=2)[0]

    spread = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    np.testing.assert_array_equal(spread(jnp.zeros(4)), np.full(4, 2))
    assert tried == [(1, 256, 80)]
    attention_kernels._cudnn_runs.cache_clear()


@pytest.mark.parametrize(("capability", "depth"), [("7.0", 40), ("9.0", 42), ("9.0", 512), ("8.0", 160)])
def test_a_gpu_that_cannot_have_it_is_not_tried(monkeypatch, recwarn, capability, depth):
    """V100; depths that are no multiple of 8; the VAE's one head; an A100 and heads of more than 128."""
    monkeypatch.setattr(FakeGpu, "compute_capability", capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeGpu()])
    attention_kernels._cudnn_runs.cache_clear()
    assert not attention_kernels.cudnn_runs(depth, BFLOAT16)
    attention_kernels._cudnn_runs.cache_clear()
    assert not recwarn.list


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("length", "depth"), [(4096, 40), (1024, 80), (256, 160)])
def test_cudnn_equals_float64(length, depth, dtype):
    q, k, v = (random(2, length, 8 * depth, seed=i) for i in range(3))
    kernel = kernel_for(q.shape, k.shape, 8, jnp.dtype(dtype))
    assert kernel is not None, "cuDNN's attention is not available here"
    found = kernel(*(jnp.asarray(x, dtype) for x in (q, k, v)))
    np.testing.assert_allclose(found.astype(np.float32), exact(q, k, v, 8), atol=0.02)
