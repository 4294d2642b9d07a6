"""Measures of images, one number per image prompt, and confidence intervals of their means."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mini.attribute_classifier import ATTRIBUTES, judge, truth
from experiments.mini.test_scenes import Prompt
from ipadapter_jax import StableDiffusion
from ipadapter_jax.images.preprocess import CLIP_TABLE
from ipadapter_jax.models.image_features import FeatureKind
from ipadapter_jax.models.vae import normalize
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.ip_adapter import encoders_of
from ipadapter_jax.weights.tokenizer import tokenize

SEED, DRAWS = 0, 2000  # of the bootstrap
_INK, _CHALK = 60, 195  # of 255: bounds of all channels of ink (below) and chalk (above); colors are neither
_BATCH = 200  # images per call of a network

Values = dict[str, np.ndarray]
"""Measures by name, each (P,): the mean over the images of each prompt."""


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(values: np.ndarray) -> Interval:
    """The mean of values (P,) and its 95 % bootstrap interval. Prompts are resampled with replacement, all images of a
    prompt together. For differences between two rows of the same prompts this is the paired interval."""
    drawn = np.random.default_rng(SEED).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def share(values: np.ndarray) -> Interval:
    """`interval` for fractions (P,) in [0, 1]. If all are 0 or all are 1, where the bootstrap's interval has length
    0, it is Clopper and Pearson's for P trials."""
    if values.min() < values.max() or values[0] not in (0, 1):
        return interval(values)
    rare = 1 - 0.025 ** (1 / len(values))
    return Interval(1.0, 1 - rare, 1.0) if values[0] == 1 else Interval(0.0, 0.0, rare)


class Eyes:
    """The encoders of a pipeline, for measuring: its VAE, its text encoder, and the image encoder of its adapter."""

    def __init__(self, pipe: StableDiffusion):
        self._pipe, [self._encoder] = pipe, encoders_of(pipe.adapters)

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """Unit embeddings (B, D) of images (B, 64, 64, 3) uint8."""

        def run(batch: np.ndarray) -> Any:
            return programs.encode_image(self._encoder.module, FeatureKind.IMAGE_EMBEDS, self._encoder.params, batch)

        return _unit(_in_batches(lambda part: run(CLIP_TABLE[part, np.arange(3)]), pixels))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings (B, D) of texts: the pooled states, because mini's CLIP pair has no text projection."""
        encoder: Any = self._pipe.text_encoder
        ids = tokenize(self._pipe.tokenizer, texts, encoder.config.max_position_embeddings)
        params = self._pipe.params["text_encoder"]
        return _unit(np.asarray(jax.jit(encoder.apply)({"params": params}, jnp.asarray(ids)).pooled))

    def reconstructions(self, pixels: np.ndarray) -> np.ndarray:
        """Images (B, 64, 64, 3) uint8, encoded and decoded by the VAE."""
        params = {"params": self._pipe.params["vae"]}
        run = jax.jit(functools.partial(self._pipe.vae.apply, params))
        decoded = _in_batches(lambda x: run(normalize(x)), pixels)
        return np.clip((decoded + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


class Measures:
    """Measures of images that were generated for these prompts."""

    def __init__(self, eyes: Eyes, prompts: Sequence[Prompt]):
        self._eyes, self._truth = eyes, truth([prompt.scene for prompt in prompts])
        self._asked = np.array([prompt.other_shape for prompt in prompts])[:, None]
        self._references = eyes.images(np.stack([prompt.pixels for prompt in prompts]))
        self._captions = eyes.texts([prompt.caption for prompt in prompts])

    def agreement(self, pixels: np.ndarray) -> Values:
        """By attribute, the fraction of each prompt's images (P, K, 64, 64, 3) uint8 that have it; and that of ink."""
        found = judge(pixels.reshape(-1, *pixels.shape[2:]))
        right, shape = {}, found.shape.reshape(pixels.shape[:2])
        for name in ATTRIBUTES:
            right[name] = getattr(found, name).reshape(shape.shape) == getattr(self._truth, name)[:, None]
        right |= {
            "all three": right["colour"] & right["shape"] & right["background"],
            "one object": found.count.reshape(shape.shape) == 1,
            "asked shape": shape == self._asked,
            "asked shape and colour": (shape == self._asked) & right["colour"],
            "ink": right["background"] * self._ink(pixels),
        }
        return {name: array.mean(axis=1) for name, array in right.items()}

    def of(self, pixels: np.ndarray) -> Values:
        """All measures of images (P, K, 64, 64, 3) uint8."""
        count, each = pixels.shape[:2]
        embedded = self._eyes.images(pixels.reshape(-1, *pixels.shape[2:])).reshape(count, each, -1)
        clip = {
            "CLIP-I": np.einsum("pkd,pd->p", embedded, self._references) / each,
            "CLIP-T": np.einsum("pkd,pd->p", embedded, self._captions) / each,
        }
        return self.agreement(pixels) | clip | diversity(pixels, embedded)

    def _ink(self, pixels: np.ndarray) -> np.ndarray:
        """The fraction of nearly black pixels (P, K); of nearly white ones if the prompt's background is black."""
        ink, chalk = pixels.max(axis=-1) < _INK, pixels.min(axis=-1) > _CHALK
        black = (self._truth.background == "black")[:, None]
        return np.where(black, chalk.mean(axis=(2, 3)), ink.mean(axis=(2, 3)))


def diversity(pixels: np.ndarray, embedded: np.ndarray) -> Values:
    """The mean distance between the images of a prompt, over all pairs: RMSE of pixels in [0, 1], and 1 - cosine of
    embeddings. Images (P, K, 64, 64, 3), unit embeddings (P, K, D) -> values (P,)."""
    first, second = np.triu_indices(pixels.shape[1], 1)
    shown = pixels.astype(np.float32) / 255
    error = np.sqrt(((shown[:, first] - shown[:, second]) ** 2).mean(axis=(2, 3, 4)))
    cosine = np.einsum("pkd,pkd->pk", embedded[:, first], embedded[:, second])
    return {"diversity, RMSE": error.mean(axis=1), "diversity, CLIP": 1 - cosine.mean(axis=1)}


def _in_batches(run: Any, rows: np.ndarray) -> np.ndarray:
    """Applies `run` to an array (B, ...) in batches of one size, so that it is compiled once."""
    filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % _BATCH, axis=0)])
    parts = [np.asarray(run(filled[start : start + _BATCH])) for start in range(0, len(filled), _BATCH)]
    return np.concatenate(parts)[: len(rows)]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
