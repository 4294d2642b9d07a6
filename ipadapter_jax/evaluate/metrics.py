"""Scores of embeddings, and confidence intervals of their means. Shapes: P image prompts, n images of each, C captions,
embeddings of D numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.clip_scorer import Scorer
from ipadapter_jax.evaluate.protocol import CaptionChoice
from ipadapter_jax.images.preprocess import clip_pixels, load_image

SEED, RESAMPLES = 0, 2000  # of the bootstrap
CLIP_SCORE = 2.5  # the factor w of CLIPScore
_BLOCK = 50  # resamples in memory at a time


class Embeddings(NamedTuple):
    """Embeddings of images (P, n, D), of image prompts (P, D), and of the captions (C, D) of each prompt, not
    normalized."""

    images: np.ndarray
    references: np.ndarray
    captions: Sequence[np.ndarray]


class Scores(NamedTuple):
    """clip_i and clip_t (P, n), one for each image; diversity (P,), NaN if a prompt has a single image."""

    clip_i: np.ndarray
    clip_t: np.ndarray
    diversity: np.ndarray

    def prompt_means(self) -> dict[str, np.ndarray]:
        """Each score (P,) as its mean over the images of a prompt. With one image per prompt there is no diversity."""
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
    choice: CaptionChoice = "first",
) -> Scores:
    """Scores n images for each of P image prompts with captions, all in memory. Images are what `load_image` takes.
    Raises InputError as it does."""
    every = [*references, *(image for group in images for image in group)]
    embedded = scorer.images(clip_pixels(load_image(image), scorer.side) for image in every)
    texts = scorer.captions([text for group in captions for text in group])
    return compute_scores(group_embeddings(embedded, texts, [len(group) for group in captions]), choice)


def group_embeddings(images: np.ndarray, texts: np.ndarray, captions: Sequence[int]) -> Embeddings:
    """Groups embeddings by prompt. images: first those of the P image prompts, then those of the images, prompt by
    prompt. texts: those of all captions, prompt by prompt. captions: the number of captions of each prompt."""
    prompts = len(captions)
    made = images[prompts:].reshape(prompts, -1, images.shape[-1])
    return Embeddings(made, images[:prompts], np.split(texts, np.cumsum(captions)[:-1]))


def compute_scores(embedded: Embeddings, choice: CaptionChoice = "first") -> Scores:
    """CLIP-I: the cosine of the embeddings of an image and its image prompt. CLIP-T: CLIPScore (arXiv 2104.08718),
    2.5 max(cos, 0) with a caption. Diversity: the mean of 1 - cos over all pairs of images of a prompt.

    choice: of several captions, CLIP-T uses the first, the mean score of all, or the best score.
    """
    images, references = _unit(embedded.images), _unit(embedded.references)
    clip_i = np.einsum("pnd,pd->pn", images, references)
    texts = (
        _clip_scores(own, _unit(captions), choice) for own, captions in zip(images, embedded.captions, strict=True)
    )
    return Scores(clip_i, np.stack([*texts]), _diversity(images))


def _clip_scores(images: np.ndarray, captions: np.ndarray, choice: CaptionChoice) -> np.ndarray:
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
    """The interval of the mean of values (P,): prompts are resampled with replacement, all images of a prompt together,
    RESAMPLES times with a fixed seed. Differences between two methods on the same prompts give the paired interval."""
    rng = np.random.default_rng(SEED)
    resamples = (rng.integers(0, len(values), (_BLOCK, len(values))) for _ in range(RESAMPLES // _BLOCK))
    means = np.concatenate([values[sampled].mean(axis=1) for sampled in resamples])
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    if not np.isfinite(length).all() or not length.all():
        raise InputError("an embedding is zero or not finite: the weights of the scoring CLIP are damaged")
    return x / length
