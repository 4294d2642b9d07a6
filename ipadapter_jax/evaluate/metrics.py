"""What is measured on embeddings, and how sure the means are. Shapes: P image prompts, n images of each, D numbers of
an embedding, C captions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.clip_scorer import Scorer
from ipadapter_jax.evaluate.protocol import Choice
from ipadapter_jax.images.preprocess import clip_pixels, load_image

SEED, DRAWS = 0, 2000  # of the bootstrap
CLIP_SCORE = 2.5  # the factor w of CLIPScore
_BLOCK = 50  # draws in memory at once

"""Of several captions of an image prompt CLIP-T takes the first, the mean over all, or the best for each image."""


class Embedded(NamedTuple):
    """Embeddings of any length: images (P, n, D), image prompts (P, D), and for each prompt its captions (C, D)."""

    images: np.ndarray
    references: np.ndarray
    captions: Sequence[np.ndarray]


class Scores(NamedTuple):
    """clip_i and clip_t (P, n), one for each image; diversity (P,), NaN where there is one image alone."""

    clip_i: np.ndarray
    clip_t: np.ndarray
    diversity: np.ndarray

    def of_prompts(self) -> dict[str, np.ndarray]:
        """Each measure (P,), the mean over the images of a prompt, leaving out a diversity that there is none of."""
        means = {"clip_i": self.clip_i.mean(axis=1), "clip_t": self.clip_t.mean(axis=1)}
        return means if self.clip_i.shape[1] == 1 else means | {"diversity": self.diversity}


class Interval(NamedTuple):
    """A mean over image prompts and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def score(
    scorer: Scorer,
    images: Sequence[Sequence[Image.Image | np.ndarray]],
    references: Sequence[Image.Image | np.ndarray],
    captions: Sequence[Sequence[str]],
    choice: Choice = "first",
) -> Scores:
    """Scores n images for each of P image prompts with their captions, all in memory. Images are whatever
    `load_image` takes. Raises InputError as that does."""
    every = [*references, *(image for group in images for image in group)]
    embedded = scorer.images(clip_pixels(load_image(image), scorer.side) for image in every)
    texts = scorer.captions([text for group in captions for text in group])
    return measure(embedded_of(embedded, texts, [len(group) for group in captions]), choice)


def embedded_of(images: np.ndarray, texts: np.ndarray, captions: Sequence[int]) -> Embedded:
    """From rows in the order that they are embedded in: the P image prompts, then their images, prompt by prompt; and
    the texts, of which prompt p has captions[p]."""
    prompts = len(captions)
    made = images[prompts:].reshape(prompts, -1, images.shape[-1])
    return Embedded(made, images[:prompts], np.split(texts, np.cumsum(captions)[:-1]))


def measure(embedded: Embedded, choice: Choice = "first") -> Scores:
    """CLIP-I: the cosine of an image's embedding with that of its image prompt. CLIP-T: CLIPScore (arXiv 2104.08718),
    2.5 max(cos, 0) with the caption. Diversity: the mean of 1 - cos over all pairs of images of a prompt."""
    images, references = _unit(embedded.images), _unit(embedded.references)
    clip_i = np.einsum("pnd,pd->pn", images, references)
    texts = (
        _clip_scores(own, _unit(captions), choice) for own, captions in zip(images, embedded.captions, strict=True)
    )
    return Scores(clip_i, np.stack([*texts]), _diversity(images))


def _clip_scores(images: np.ndarray, captions: np.ndarray, choice: Choice) -> np.ndarray:
    """Unit embeddings (n, D) and (C, D) -> (n,)."""
    scores = CLIP_SCORE * np.maximum(images @ captions.T, 0)
    if choice == "first":
        return scores[:, 0]
    return scores.mean(axis=1) if choice == "all" else scores.max(axis=1)


def _diversity(images: np.ndarray) -> np.ndarray:
    """Unit embeddings (P, n, D) -> (P,)."""
    first, second = np.triu_indices(images.shape[1], 1)
    if not len(first):
        return np.full(len(images), np.nan)
    return 1 - np.einsum("pkd,pkd->pk", images[:, first], images[:, second]).mean(axis=1)


def interval(values: np.ndarray) -> Interval:
    """Of values (P,): prompts are drawn with replacement, all images of a prompt together, DRAWS times with a fixed
    seed. Of differences between two methods on the same prompts it is the paired interval."""
    rng = np.random.default_rng(SEED)
    draws = (rng.integers(0, len(values), (_BLOCK, len(values))) for _ in range(DRAWS // _BLOCK))
    means = np.concatenate([values[drawn].mean(axis=1) for drawn in draws])
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    if not np.isfinite(length).all() or not length.all():
        raise InputError("an embedding is zero or not finite: the weights of the scoring CLIP are damaged")
    return x / length
