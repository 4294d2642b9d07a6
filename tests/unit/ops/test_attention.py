"""Every way of computing attention against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import exact, random
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax.ops import attention
from ipadapter_jax.ops.attention import attend
from ipadapter_jax.ops.batch_sharding import batch_sharded
from ipadapter_jax.ops.cpu import per_head_attention

FORMS = ("dense", "per head", "chunked")


@pytest.fixture
def form(request, monkeypatch):
    """One way of writing attention out, whatever the sizes."""
    chosen = request.param
    if chosen == "per head":
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        monkeypatch.setattr(attention, "_CPU_HEAD_LOGITS", 0)
        monkeypatch.setattr(per_head_attention, "HEAD_CHUNK", 128)
    if chosen == "chunked":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(attention, "_DENSE_LOGITS", 0)
        monkeypatch.setattr(attention, "_ACCELERATOR_CHUNK_LOGITS", 1)  # chunks of 128
    if chosen == "dense":
        monkeypatch.setattr(attention, "_DENSE_LOGITS", 1 << 40)
    used = {"per head": "per_head_attention", "chunked": "chunked", "dense": "dense"}[chosen]
    calls, function = [], getattr(attention, used)
    monkeypatch.setattr(attention, used, lambda *given: calls.append(given) or function(*given))
    yield chosen
    assert calls, f"{used} was never called"


@pytest.mark.parametrize("length", [1, 77, 512, 513, 1300])
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_every_form_equals_float64(form, length):
    q, k, v = random(2, length, 24), random(2, 90, 24, seed=1), random(2, 90, 24, seed=2)
    np.testing.assert_allclose(attend(q, [(k, v, 1.0)], 3), exact(q, k, v, 3), atol=2e-6)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_every_form_has_the_gradient_of_the_formula(form):
    """Of decoupled attention with a regional weight, for queries, keys, values and the weight."""
    q, k, v = random(2, 300, 24), random(2, 90, 24, seed=1), random(2, 90, 24, seed=2)
    image_k, image_v, weight = random(2, 4, 24, seed=3), random(2, 4, 24, seed=4), random(2, 300, 1, seed=5)

    def plain(q, k, v):
        split = [x.reshape(*x.shape[:2], 3, -1).transpose(0, 2, 1, 3) for x in (q, k, v)]
        logits = jnp.matmul(split[0], split[1].transpose(0, 1, 3, 2), precision="highest") / np.sqrt(8)
        out = jnp.matmul(jax.nn.softmax(logits), split[2], precision="highest")
        return out.transpose(0, 2, 1, 3).reshape(q.shape)

    def gradients(function):
        def loss(*given):
            return jnp.sum(jnp.sin(function(*given)))

        return jax.grad(loss, argnums=tuple(range(6)))(q, k, v, image_k, image_v, weight)

    found = gradients(lambda q, k, v, ik, iv, w: attend(q, [(k, v, 1.0), (ik, iv, w)], 3))
    expected = gradients(lambda q, k, v, ik, iv, w: plain(q, k, v) + w * plain(q, ik, iv))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=5e-6)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_weight_of_zero_is_the_text_alone_to_the_bit(form):
    q, text, image = random(2, 600, 24), random(2, 77, 24, seed=1), random(2, 4, 24, seed=2)
    plain = attend(q, [(text, text, 1.0)], 3)
    np.testing.assert_array_equal(attend(q, [(text, text, 1.0), (image, image, jnp.zeros(()))], 3), plain)


def test_on_a_mesh_every_device_walks_its_own_rows(monkeypatch):
    """Without a gather, and with the numbers of one device."""
    monkeypatch.setattr(attention, "_CPU_HEAD_LOGITS", 0)
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = (jax.device_put(random(8, 20, 24, seed=i), NamedSharding(mesh, P(("data", "fsdp")))) for i in range(3))

    def spread(q, k, v):
        with batch_sharded(mesh):
            return attend(q, [(k, v, 1.0), (k, v, jnp.float32(0.5))], 3)

    compiled = jax.jit(spread).lower(q, k, v).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(q, k, v), 1.5 * exact(*map(np.asarray, (q, k, v)), 3), atol=3e-6)


def test_causal_attention_sees_no_later_position():
    q, k, v = (random(1, 9, 8, seed=i) for i in range(3))
    np.testing.assert_allclose(attend(q, [(k, v, 1.0)], 2, causal=True), exact(q, k, v, 2, causal=True), atol=2e-6)


def test_entries_have_their_own_softmax_and_weight():
    """A weight may be a number, one per row, or one per position (a regional mask)."""
    q, text, image = random(2, 20, 16), random(2, 7, 16, seed=1), random(2, 4, 16, seed=2)
    for weight in (0.3, random(2, 1, 1, seed=3), random(2, 20, 1, seed=4)):
        expected = exact(q, text, text, 2) + weight * exact(q, image, image, 2)
        found = attend(q, [(text, text, 1.0), (image, image, jnp.asarray(weight))], 2)
        np.testing.assert_allclose(found, expected, atol=3e-6)
    with_zero = attend(q, [(text, text, 1.0), (image, image, jnp.zeros(()))], 2)
    np.testing.assert_array_equal(with_zero, attend(q, [(text, text, 1.0)], 2))


def test_half_precision_keeps_its_dtype_and_sums_in_float32():
    q, k, v = (random(1, 300, 16, seed=i) for i in range(3))
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    found = attend(half[0], [(half[1], half[2], 1.0)], 2)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), exact(q, k, v, 2), atol=0.02)


def test_large_logits_do_not_overflow():
    q, k, v = 1e3 * random(1, 4, 8), 1e3 * random(1, 5, 8, seed=1), random(1, 5, 8, seed=2)
    np.testing.assert_allclose(attend(q, [(k, v, 1.0)], 1), exact(q, k, v, 1), atol=1e-5)
