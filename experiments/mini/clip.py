"""The CLIP pair of mini (arXiv 2103.00020): matching images and captions get similar embeddings.

The text encoder has no projection: its pooled state is the embedding. So the pair consists of the two networks that
mini needs anyway. Training has three stages:

1. The contrastive loss alone. With so few pairs it teaches colors and textures, but hardly shapes and places.
2. Linear heads, which are discarded after training, also classify every attribute from an embedding.
3. Only the vision encoder is trained. The heads also classify gray images, except for their color, so that shapes are
   recognized in held-out combinations.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.mini.networks import SIDE, TEXT_CONFIG, TOKENS, VISION_CONFIG
from experiments.mini.scenes.captions import caption
from experiments.mini.scenes.examples import Example, example
from experiments.mini.scenes.render import render
from experiments.mini.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    make_scene,
)
from experiments.mini.simple_trainer import fit
from ipadapter_jax.images.preprocess import CLIP_TABLE
from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.weights.load_tree import Tree
from ipadapter_jax.weights.tokenizer import load_tokenizer, tokenize

GROUPS, ALIKE, OTHERS = 16, 4, 64  # a batch: GROUPS of ALIKE scenes that differ in one attribute, and OTHERS
_GREATEST_SCALE = 100.0  # largest scale of the logits, as in the paper
NAMES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": SIZES,
    "place": PLACES,
    "background": tuple(BACKGROUNDS),
}
_MIRRORED = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


class CLIP(NamedTuple):
    text: CLIPText
    vision: CLIPVision

    def embeddings(self, params: Tree, pixels: Any, ids: Any) -> tuple[jax.Array, jax.Array]:
        """pixels (B, S, S, 3) uint8, ids (B, T) -> embeddings of images and of captions, each (B, 128)."""
        text: Any = self.text.apply({"params": params["text"]}, ids)
        return self.images(params, pixels), text.pooled

    def images(self, params: Tree, pixels: Any) -> jax.Array:
        image: Any = self.vision.apply({"params": params["vision"]}, jnp.asarray(CLIP_TABLE)[pixels, jnp.arange(3)])
        return image.image_embeds


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def networks() -> CLIP:
    return CLIP(CLIPText(TEXT_CONFIG), CLIPVision(VISION_CONFIG))


def train(folder: Path, tokenizer: Path, steps: Mapping[str, int], deadline: float) -> tuple[CLIP, Tree] | None:
    """Trains the pair and gives it with its weights {"text", "vision", ...}, or gives None if the deadline is reached.

    steps: the training steps of the stages "clip", "clip-attributes" and "clip-vision".
    """
    clip, reader = networks(), load_tokenizer(tokenizer)
    keys = jax.random.split(random_keys.key(0), 3)
    params = {
        "text": jax.jit(clip.text.init)(keys[0], jnp.zeros((1, TOKENS), jnp.int32))["params"],
        "vision": jax.jit(clip.vision.init)(keys[1], jnp.zeros((1, SIDE, SIDE, 3)))["params"],
        "scale": jnp.log(jnp.float32(1 / 0.07)),
    }
    batch = functools.partial(make_batch, reader)
    fixed: Tree = {}
    for name, error in (("clip", loss), ("clip-attributes", loss_with_heads), ("clip-vision", loss_of_vision)):
        if error is loss_with_heads:
            params["heads"] = _heads(keys[2])
        if error is loss_of_vision:
            fixed = {"text": params.pop("text")}
        rates = {"steps": steps[name], "learning_rate": 1e-3}
        found = fit(folder / name, functools.partial(error, clip, fixed), params, batch, **rates, deadline=deadline)
        if found is None:
            return None
        params = found
    return clip, params | fixed


def loss(clip: CLIP, fixed: Tree, params: Tree, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """The contrastive loss in both directions. Equal captions in a batch are equally correct targets."""
    return _contrast(*clip.embeddings(params, batch["pixels"], batch["input_ids"]), params["scale"], batch["input_ids"])


def _contrast(images: jax.Array, texts: jax.Array, scale: jax.Array, input_ids: jax.Array) -> jax.Array:
    logits = _unit(images) @ _unit(texts).T * jnp.minimum(jnp.exp(scale), _GREATEST_SCALE)
    same = jnp.all(input_ids[:, None] == input_ids[None], axis=-1)
    target = same / same.sum(axis=1, keepdims=True)
    cross_entropy = optax.losses.softmax_cross_entropy
    return (cross_entropy(logits, target).mean() + cross_entropy(logits.T, target).mean()) / 2


def loss_with_heads(clip: CLIP, fixed: Tree, params: Tree, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """`loss` plus the cross-entropy of the heads on images, and on captions that name all attributes."""
    images, texts = clip.embeddings(params, batch["pixels"], batch["input_ids"])
    named = _naming(params["heads"], images, batch["labels"])
    said = _naming(params["heads"], texts, jnp.where(batch["whole"][:, None], batch["labels"], -1))
    return _contrast(images, texts, params["scale"], batch["input_ids"]) + named + said


def loss_of_vision(clip: CLIP, fixed: Tree, params: Tree, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """`loss` plus the cross-entropy of the heads on images, and on gray versions of the images in groups."""
    images, texts = clip.embeddings(params | fixed, batch["pixels"], batch["input_ids"])
    pixels = batch["pixels"][: GROUPS * ALIKE]
    brightness = jnp.round(pixels @ jnp.array([0.299, 0.587, 0.114])).astype(jnp.uint8)
    grey = clip.images(params, jnp.broadcast_to(brightness[..., None], pixels.shape))
    uncoloured = jnp.array([name not in ("colour", "background") for name in NAMES])
    labels = jnp.where(uncoloured, batch["labels"][: len(pixels)], -1)
    named = _naming(params["heads"], images, batch["labels"]) + _naming(params["heads"], grey, labels)
    return _contrast(images, texts, params["scale"], batch["input_ids"]) + named


def _naming(heads: Tree, embeddings: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of the heads, averaged over the attributes. Labels of -1 are left out."""
    total = jnp.float32(0)
    for place, name in enumerate(NAMES):
        logits, label = embeddings @ heads[name], labels[:, place]
        errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
        total += jnp.sum(jnp.where(label >= 0, errors, 0)) / jnp.maximum((label >= 0).sum(), 1)
    return total / len(NAMES)


def _heads(key: jax.Array) -> Tree:
    width = TEXT_CONFIG.hidden_size
    keys = jax.random.split(key, len(NAMES))
    return {
        name: jax.random.normal(own, (width, len(names))) / width**0.5
        for own, (name, names) in zip(keys, NAMES.items(), strict=True)
    }


def make_batch(tokenizer: Any, number: int) -> dict[str, np.ndarray]:
    """Batch `number`, by name: pixels (B, S, S, 3) uint8; input_ids (B, T); labels (B, attributes), -1 for images that
    do not show exactly one object; whole (B,): the caption names all attributes. The images of a group differ
    in one attribute only, so every attribute is needed to tell captions apart."""
    rng = np.random.default_rng([2, number])
    made: list[Example] = []
    for group in range(GROUPS):
        scene = make_scene("train", number * GROUPS + group)
        for alike in (scene, *(changed(scene, rng) for _ in range(ALIKE - 1))):
            made.append(Example(render(alike, SIDE), caption(alike, rng, whole=True), alike))
    made += [example("train", number * OTHERS + i) for i in range(OTHERS)]
    return {
        "pixels": np.stack([e.pixels for e in made]),
        "input_ids": tokenize(tokenizer, [e.text for e in made], TOKENS),
        "labels": np.stack([labels(e.scene) for e in made]),
        "whole": np.arange(len(made)) < GROUPS * ALIKE,
    }


def labels(scene: Scene | None) -> np.ndarray:
    """The index of each attribute in its NAMES, int32; -1 if there is not exactly one object."""
    things = scene.things if scene else ()
    if scene is None or len(things) != 1:
        return np.full(len(NAMES), -1, np.int32)
    own = {**dataclasses.asdict(things[0]), "background": scene.background}
    return np.array([names.index(own[name]) for name, names in NAMES.items()], np.int32)


def changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with another attribute of one object, or another background. Never a held-out combination."""
    attribute = str(rng.choice(("shape", "shape", "colour", "texture", "place", "background")))
    if attribute == "background":
        name = str(rng.choice([b for b in BACKGROUNDS if b != scene.background]))
        return dataclasses.replace(scene, background=name, rgb=BACKGROUNDS[name])
    which = int(rng.integers(len(scene.things)))
    thing, other = scene.things[which], scene.things[which]
    if attribute == "place" and len(scene.things) == 1 and thing.place in _MIRRORED:
        other = dataclasses.replace(thing, place=_MIRRORED[thing.place], x=1 - thing.x, y=1 - thing.y)
    elif attribute == "place":
        attribute = "shape"
    while other == thing or other.kind in KINDS["held_out"]:
        other = dataclasses.replace(thing, **{attribute: str(rng.choice(NAMES[attribute]))})
    other = dataclasses.replace(other, rgb=COLOURS[other.colour])
    return dataclasses.replace(scene, things=(*scene.things[:which], other, *scene.things[which + 1 :]))
