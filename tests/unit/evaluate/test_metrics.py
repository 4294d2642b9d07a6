"""Measures against numbers worked out by hand."""

import numpy as np
import pytest

from ipadapter_jax import InputError
from ipadapter_jax.evaluate.metrics import Embeddings, compute_scores, group_embeddings, interval

# Two prompts in the plane, two images of each: along the axes and the diagonal, of any length.
IMAGES = np.array([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [1.0, -1.0]]])
REFERENCES = np.array([[5.0, 0.0], [0.0, 0.5]])
CAPTIONS = (np.array([[0.0, 1.0], [4.0, 4.0]]), np.array([[-1.0, 0.0]]))
HALF = np.sqrt(0.5)


def test_by_hand():
    scores = compute_scores(Embeddings(IMAGES, REFERENCES, CAPTIONS))
    np.testing.assert_allclose(scores.clip_i, [[1, 0], [HALF, -HALF]], atol=1e-12)
    np.testing.assert_allclose(scores.clip_t, [[0, 2.5], [0, 0]], atol=1e-12)  # cosines below 0 count as 0
    np.testing.assert_allclose(scores.diversity, [1, 1], atol=1e-12)
    means = scores.prompt_means()
    np.testing.assert_allclose(means["clip_i"], [0.5, 0], atol=1e-12)
    np.testing.assert_allclose(means["clip_t"], [1.25, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("choice", "first"),
    [("first", [0, 2.5]), ("all", [1.25 * HALF, 1.25 * (1 + HALF)]), ("best", [2.5 * HALF, 2.5])],
)
def test_which_caption(choice, first):
    scores = compute_scores(Embeddings(IMAGES, REFERENCES, CAPTIONS), choice)
    np.testing.assert_allclose(scores.clip_t[0], first, atol=1e-12)


def test_diversity_is_the_mean_over_pairs():
    three = np.array([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    assert compute_scores(Embeddings(three, REFERENCES[:1], CAPTIONS[:1])).diversity == pytest.approx([(1 + 1 + 2) / 3])
    alone = compute_scores(Embeddings(three[:, :1], REFERENCES[:1], CAPTIONS[:1]))
    assert "diversity" not in alone.prompt_means()


def test_rows_in_the_order_of_embedding():
    rows = np.concatenate([REFERENCES, IMAGES.reshape(4, 2)])
    found = group_embeddings(rows, np.concatenate(CAPTIONS), [2, 1])
    assert (found.images == IMAGES).all() and (found.references == REFERENCES).all()
    assert all((a == b).all() for a, b in zip(found.captions, CAPTIONS, strict=True))


def test_the_interval_is_the_same_every_time_and_about_right():
    values = np.random.default_rng(3).normal(0.8, 0.1, 400)
    found = interval(values)
    assert found == interval(values.copy())
    assert found.mean == values.mean()
    error = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_embeddings_that_are_none_are_refused(value):
    bad = Embeddings(np.full((1, 2, 3), value), np.ones((1, 3)), [np.ones((1, 3))])
    with pytest.raises(InputError, match="an embedding is zero or not finite: the weights of the scoring CLIP"):
        compute_scores(bad)
