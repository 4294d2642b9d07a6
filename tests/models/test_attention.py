"""Every way of computing attention against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipadapter_jax.models import attention
from ipadapter_jax.models.attention import attend


def exact(q, k, v, heads, causal=False):
    """softmax(q k^T / sqrt(d)) v in float64."""
    split = [x.astype(np.float64).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v)]
    logits = split[0] @ split[1].transpose(0, 1, 3, 2) / np.sqrt(split[0].shape[-1])
    if causal:
        logits = np.where(np.tri(*logits.shape[-2:], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ split[2]).transpose(0, 2, 1, 3).reshape(q.shape)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("length", [1, 77, 512, 513, 1300])
@pytest.mark.parametrize("form", ["dense", "per head", "chunked"])
def test_every_form_equals_float64(monkeypatch, form, length):
    monkeypatch.setattr(attention, "_DENSE_LOGITS", 1 << 40 if form == "dense" else 0)
    monkeypatch.setattr(attention, "_ACCELERATOR_CHUNK_LOGITS", 1)  # chunks of 128
    if form == "chunked":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k, v = random(2, length, 24), random(2, 90, 24, seed=1), random(2, 90, 24, seed=2)
    np.testing.assert_allclose(attend(q, [(k, v, 1.0)], 3), exact(q, k, v, 3), atol=2e-6)


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
