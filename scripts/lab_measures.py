"""What is measured on pictures, one number per image prompt, and how sure the means are."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from judge import ATTRIBUTES, judge, truth
from lab_scenes import Prompt

from ipadapter_jax import StableDiffusion, sampling
from ipadapter_jax.preprocess import CLIP_TABLE
from ipadapter_jax.tokens import tokenize

SEED, DRAWS = 0, 2000  # of the bootstrap
_INK, _CHALK = 60, 195  # of 255: all channels of ink are darker, those of chalk brighter, and of no tone of a colour
_BATCH = 200  # pictures that a network reads at once

Values = dict[str, np.ndarray]
"""Measures by name, each (P,): the mean over the pictures of each prompt."""


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(values: np.ndarray) -> Interval:
    """The mean over prompts and its 95 % bootstrap interval: prompts are drawn with replacement, all pictures of a
    prompt together. Of differences between two rows of the same prompts it is the paired interval."""
    drawn = np.random.default_rng(SEED).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


class Measures:
    """Measures of pictures that were painted for these prompts."""

    def __init__(self, pipe: StableDiffusion, prompts: Sequence[Prompt]):
        """The CLIP pair is `pipe`'s text encoder and the image encoder of its adapter."""
        self._pipe, self._encoder, self._prompts = pipe, pipe.adapters[0].encoder, prompts
        self._truth = truth([prompt.scene for prompt in prompts])
        self._references = self._embedded(self.references)
        self._captions = self._texts([prompt.caption for prompt in prompts])

    @property
    def references(self) -> np.ndarray:
        """The prompts themselves, (P, 64, 64, 3)."""
        return np.stack([prompt.pixels for prompt in self._prompts])

    def reconstructions(self) -> np.ndarray:
        """What the VAE makes of the prompts, (P, 64, 64, 3)."""
        params = {"params": self._pipe.params["vae"]}
        run = jax.jit(functools.partial(self._pipe.vae.apply, params))
        decoded = _in_batches(lambda x: run(x.astype(np.float32) / 127.5 - 1), self.references)
        return np.clip((decoded + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)

    def agreement(self, pixels: np.ndarray) -> Values:
        """The share of pictures (n, K, 64, 64, 3) of the first n prompts that have an attribute of their prompt."""
        found = self._verdicts(pixels)
        count = len(pixels)
        right = {name: found[name] == getattr(self._truth, name)[:count, None] for name in ATTRIBUTES}
        asked = found["shape"] == np.array([prompt.other_shape for prompt in self._prompts[:count]])[:, None]
        right |= {
            "all three": right["colour"] & right["shape"] & right["background"],
            "one object": found["count"] == 1,
            "asked shape": asked,
            "asked shape and colour": asked & right["colour"],
        }
        return {name: array.mean(axis=1) for name, array in right.items()}

    def of(self, pixels: np.ndarray) -> Values:
        """All measures of pictures (n, K, 64, 64, 3) of the first n prompts."""
        count, each = pixels.shape[:2]
        embedded = self._embedded(pixels.reshape(-1, *pixels.shape[2:])).reshape(count, each, -1)
        ink, chalk = pixels.max(axis=-1) < _INK, pixels.min(axis=-1) > _CHALK
        own = {
            "CLIP-I": np.einsum("pkd,pd->p", embedded, self._references[:count]) / each,
            "CLIP-T": np.einsum("pkd,pd->p", embedded, self._captions[:count]) / each,
            "ink": np.where(
                self._truth.background[:count] == "black", chalk.mean(axis=(1, 2, 3)), ink.mean(axis=(1, 2, 3))
            ),
        }
        return self.agreement(pixels) | own | _diversity(pixels, embedded)

    def _verdicts(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The judge's, each (n, K)."""
        verdicts = judge(pixels.reshape(-1, *pixels.shape[2:]))
        return {name: array.reshape(pixels.shape[:2]) for name, array in verdicts._asdict().items()}

    def _embedded(self, pixels: np.ndarray) -> np.ndarray:
        """Unit embeddings (B, D) of pictures (B, 64, 64, 3) uint8."""

        def run(batch: np.ndarray) -> Any:
            return sampling.encode_image(self._encoder.module, False, self._encoder.params, batch)

        return _unit(_in_batches(lambda part: run(CLIP_TABLE[part, np.arange(3)]), pixels))

    def _texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings (B, D): the pooled state, as mini's pair was trained without a projection of the text."""
        encoder: Any = self._pipe.text_encoder
        ids = tokenize(self._pipe.tokenizer, texts, encoder.config.max_position_embeddings)
        params = self._pipe.params["text_encoder"]
        return _unit(np.asarray(jax.jit(encoder.apply)({"params": params}, jnp.asarray(ids)).pooled))


def _diversity(pixels: np.ndarray, embedded: np.ndarray) -> Values:
    """How far the pictures of a prompt are from one another, over all pairs: RMSE of pixels in [0, 1], and 1 - cosine
    of embeddings."""
    first, second = np.triu_indices(pixels.shape[1], 1)
    shown = pixels.astype(np.float32) / 255
    error = np.sqrt(((shown[:, first] - shown[:, second]) ** 2).mean(axis=(2, 3, 4)))
    cosine = np.einsum("pkd,pkd->pk", embedded[:, first], embedded[:, second])
    return {"diversity, RMSE": error.mean(axis=1), "diversity, CLIP": 1 - cosine.mean(axis=1)}


def _in_batches(run: Any, rows: np.ndarray) -> np.ndarray:
    """`run` over rows (B, ...) in batches of one size, so that one program serves all."""
    filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % _BATCH, axis=0)])
    parts = [np.asarray(run(filled[start : start + _BATCH])) for start in range(0, len(filled), _BATCH)]
    return np.concatenate(parts)[: len(rows)]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
