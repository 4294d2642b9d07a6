"""Measurements on mini's networks themselves: its VAE, its CLIP pair, and photographs as image prompts."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

from experiments.mini.attribute_classifier import ATTRIBUTES, truth
from experiments.mini.metrics import Eyes, Values
from experiments.mini.scenes.render import render
from experiments.mini.scenes.scene import Scene, make_scene

PROBES = 3000  # scenes of the training split that the probes learn from


class Distances(NamedTuple):
    """How far painted images are from an image, each (P,), the mean over the images of a prompt."""

    colour: np.ndarray  # RMSE of the mean colours, in [0, 1]
    detail: np.ndarray  # of the logarithms, to base 2, of the strength of detail
    clip: np.ndarray  # 1 - cosine of the embeddings


def psnr(eyes: Eyes, pixels: np.ndarray) -> np.ndarray:
    """Of what the VAE makes of images (P, 64, 64, 3) uint8, in dB, (P,)."""
    error = eyes.reconstructions(pixels).astype(np.float32) - pixels
    return 10 * np.log10(255**2 / (error**2).mean(axis=(1, 2, 3)))


def probes(eyes: Eyes, scenes: list[Scene]) -> Values:
    """Whether linear classifiers of the image embedding, fitted on scenes of the training split, name the attributes
    of these scenes of one object."""
    known = [make_scene("train", index, 1) for index in range(PROBES)]
    learnt, asked = (eyes.images(np.stack([render(scene) for scene in some])) for some in (known, scenes))
    mean, deviation = learnt.mean(axis=0), learnt.std(axis=0)
    right = {}
    for name in ATTRIBUTES:
        probe = LogisticRegression(max_iter=1000).fit((learnt - mean) / deviation, getattr(truth(known), name))
        right[name] = (probe.predict((asked - mean) / deviation) == getattr(truth(scenes), name)).astype(float)
    return right


def distances(eyes: Eyes, prompts: np.ndarray, painted: np.ndarray) -> Distances:
    """Of images (P, K, 64, 64, 3) from images (P, 64, 64, 3), uint8."""
    flat = painted.reshape(-1, *painted.shape[2:])
    colours = flat.mean(axis=(1, 2)).reshape(*painted.shape[:2], 3) - prompts.mean(axis=(1, 2))[:, None]
    details = np.log2(_detail(flat)).reshape(painted.shape[:2]) - np.log2(_detail(prompts))[:, None]
    embedded = eyes.images(flat).reshape(*painted.shape[:2], -1)
    cosine = np.einsum("pkd,pd->pk", embedded, eyes.images(prompts))
    colour = np.sqrt((colours**2).mean(axis=-1)) / 255
    return Distances(colour.mean(axis=1), np.abs(details).mean(axis=1), 1 - cosine.mean(axis=1))


def _detail(pixels: np.ndarray) -> np.ndarray:
    """The strength of detail of images (B, 64, 64, 3), (B,): the deviation of the brightness from its blur by 2
    pixels, and 1 level more, so that flat images have a logarithm."""
    grey = pixels.astype(np.float32).mean(axis=-1)
    return 1 + (grey - ndimage.gaussian_filter(grey, (0, 2, 2))).std(axis=(1, 2))
