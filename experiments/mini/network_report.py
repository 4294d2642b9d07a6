"""Measures of mini's networks: its VAE, its CLIP pair, and its adapter with photographs as image prompts."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

from experiments.mini.attribute_classifier import ATTRIBUTES, truth
from experiments.mini.metrics import Eyes, Values
from experiments.mini.scenes.render import render
from experiments.mini.scenes.scene import Scene, make_scene

PROBES = 3000  # scenes of the training split on which the linear probes are fitted


class Distances(NamedTuple):
    """Distances between generated images and image prompts, each (P,): the mean over the images of a prompt."""

    colour: np.ndarray  # RMSE of the mean colors, in [0, 1]
    detail: np.ndarray  # difference of log2 of the strength of detail
    clip: np.ndarray  # 1 - cosine of the embeddings


def psnr(eyes: Eyes, pixels: np.ndarray) -> np.ndarray:
    """The PSNR of the VAE's reconstructions of images (P, 64, 64, 3) uint8: (P,) in dB."""
    error = eyes.reconstructions(pixels).astype(np.float32) - pixels
    return 10 * np.log10(255**2 / (error**2).mean(axis=(1, 2, 3)))


def probes(eyes: Eyes, scenes: list[Scene]) -> Values:
    """By attribute, whether a linear probe of the image embedding classifies each of P scenes of one object correctly.
    The probes are fitted on scenes of the training split."""
    known = [make_scene("train", index, 1) for index in range(PROBES)]
    learnt, asked = (eyes.images(np.stack([render(scene) for scene in some])) for some in (known, scenes))
    mean, deviation = learnt.mean(axis=0), learnt.std(axis=0)
    right = {}
    for name in ATTRIBUTES:
        probe = LogisticRegression(max_iter=1000).fit((learnt - mean) / deviation, getattr(truth(known), name))
        right[name] = (probe.predict((asked - mean) / deviation) == getattr(truth(scenes), name)).astype(float)
    return right


def distances(eyes: Eyes, prompts: np.ndarray, painted: np.ndarray) -> Distances:
    """The distances of generated images (P, K, 64, 64, 3) from image prompts (P, 64, 64, 3), both uint8."""
    flat = painted.reshape(-1, *painted.shape[2:])
    colours = flat.mean(axis=(1, 2)).reshape(*painted.shape[:2], 3) - prompts.mean(axis=(1, 2))[:, None]
    details = np.log2(_detail(flat)).reshape(painted.shape[:2]) - np.log2(_detail(prompts))[:, None]
    embedded = eyes.images(flat).reshape(*painted.shape[:2], -1)
    cosine = np.einsum("pkd,pd->pk", embedded, eyes.images(prompts))
    colour = np.sqrt((colours**2).mean(axis=-1)) / 255
    return Distances(colour.mean(axis=1), np.abs(details).mean(axis=1), 1 - cosine.mean(axis=1))


def _detail(pixels: np.ndarray) -> np.ndarray:
    """The strength of detail of images (B, 64, 64, 3), (B,): the standard deviation of the brightness minus its blur by
    2 pixels. 1 is added so that the logarithm exists for flat images."""
    grey = pixels.astype(np.float32).mean(axis=-1)
    return 1 + (grey - ndimage.gaussian_filter(grey, (0, 2, 2))).std(axis=(1, 2))
