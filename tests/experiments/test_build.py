"""The parts of the embedded model's build, and (slow) all of its stages with a thousandth of their steps."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.mini import clip as mini_clip
from experiments.mini import tokenizer as mini_tokenizer
from experiments.mini import vae as mini_vae
from experiments.mini.networks import TEXT_CONFIG, TOKENS, VAE_CONFIG, VOCABULARY
from experiments.mini.scenes.examples import example
from experiments.mini.scenes.scene import KINDS
from experiments.mini.simple_trainer import fit
from ipadapter_jax import InputError, StableDiffusion
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.weights.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    mini_tokenizer.write(folder)
    return load_tokenizer(folder)


def test_a_fit_that_was_stopped_gives_the_weights_of_one_that_was_not(tmp_path) -> None:
    def loss(params, batch, key):
        return jnp.mean((params["w"] - batch["x"] + 0.1 * jax.random.normal(key)) ** 2)

    def batch(number):
        return {"x": np.full((4, 3), np.sin(number), np.float32)}

    start = {"w": jnp.zeros(3)}
    options = {"steps": 6, "learning_rate": 0.1}
    whole = fit(tmp_path / "whole", loss, start, batch, **options)
    for _ in range(6):  # each call makes a step before it looks at the clock
        parts = fit(tmp_path / "parts", loss, start, batch, **options, deadline=time.monotonic())
    assert whole is not None and parts is not None
    np.testing.assert_array_equal(parts["w"], whole["w"])
    logged = [
        [json.loads(line)["step"] for line in (tmp_path / name / "log.jsonl").open()] for name in ("whole", "parts")
    ]
    assert logged == [[6], [6]]
    with pytest.raises(InputError, match="other settings .steps.: remove it"):
        fit(tmp_path / "parts", loss, start, batch, **options | {"steps": 7})
    assert np.abs(whole["w"]).max() > 1e-4


def test_every_word_of_a_caption_is_a_token(tokenizer) -> None:
    texts = [example("held_out", i, photographs=0).text for i in range(100)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(re.findall(r"\w+|[,:]", text)) + 2 <= TOKENS
        assert re.sub(r" ([,:])", r"\1", tokenizer.decode(ids[1:-1])) == text
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == VOCABULARY - 1


def test_merges_are_those_of_the_paper() -> None:
    """The example of arXiv 1508.07909, algorithm 1: its first merges are es and est; ties go by the alphabet."""
    merges = mini_tokenizer.pairs_to_merge(Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3}))
    assert merges[:3] == [("e", "s"), ("es", "t</w>"), ("l", "o")]


@pytest.mark.slow  # the whole VAE, in both directions, on 64 images
def test_latents_are_normalised_and_decode_to_the_same() -> None:
    vae = VAE(VAE_CONFIG)
    params = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    params["quant_conv"]["bias"] += jnp.linspace(-2, 2, 32)
    params["quant_conv"]["kernel"] *= jnp.linspace(0.3, 3, 32)
    normalised = mini_vae.normalised(vae, params)
    pixels = jnp.asarray(mini_vae.wholes(0, 64)["pixels"], jnp.float32) / 127.5 - 1
    mean, _ = jax.jit(lambda p: vae.apply({"params": p}, pixels, method=VAE.posterior))(normalised)
    np.testing.assert_allclose(mean.std((0, 1, 2)), 1, atol=0.2)  # these images are others than those it measures on
    np.testing.assert_allclose(mean.mean((0, 1, 2)), 0, atol=0.2)
    again = jax.jit(lambda p: vae.apply({"params": p}, pixels))
    np.testing.assert_allclose(again(normalised), again(params), atol=2e-5)


def test_groups_differ_in_one_attribute_and_show_nothing_held_out(tokenizer) -> None:
    rng = np.random.default_rng(0)
    for number in range(100):
        scene = mini_clip.make_scene("train", number)
        other = mini_clip.changed(scene, rng)
        assert all(thing.kind not in KINDS["held_out"] for thing in other.things)
        changes = [scene.background != other.background]
        for before, after in zip(scene.things, other.things, strict=True):
            changes += [getattr(before, name) != getattr(after, name) for name in tuple(mini_clip.NAMES)[:-1]]
        assert sum(changes) == 1
    batch, again = (mini_clip.make_batch(tokenizer, 3) for _ in range(2))
    for name, array in batch.items():
        np.testing.assert_array_equal(array, again[name])
    assert batch["pixels"].shape == (128, 64, 64, 3) and batch["input_ids"].shape == (128, TOKENS)
    names = [names[i] for names, i in zip(mini_clip.NAMES.values(), batch["labels"][0], strict=True)]
    scene = mini_clip.make_scene("train", 3 * mini_clip.GROUPS)
    thing = scene.things[0]
    assert names == [thing.shape, thing.colour, thing.texture, thing.size, thing.place, scene.background]
    several = [len(mini_clip.make_scene("train", 3 * mini_clip.GROUPS + i).things) > 1 for i in range(16)]
    assert ((batch["labels"][:64:4] == -1).all(axis=1) == several).all() and any(several)
    assert batch["whole"].sum() == 64


def test_equal_captions_are_equally_right() -> None:
    clip = mini_clip.networks()
    ids = tokenize_plain([5, 6, 5])
    text = {"input_ids": ids, "pixels": np.zeros((3, 64, 64, 3), np.uint8)}
    keys = jax.random.split(jax.random.key(0))
    params = {
        "text": clip.text.init(keys[0], ids)["params"],
        "vision": clip.vision.init(keys[1], jnp.zeros((1, 64, 64, 3)))["params"],
        "scale": jnp.float32(1),
    }
    loss = mini_clip.loss(clip, {}, params, text, keys[0])
    images, texts = clip.embeddings(params, text["pixels"], ids)
    images, texts = (np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    logits = (images @ texts.T).astype(np.float64) * np.e
    target = np.array([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])

    def cross_entropy(logits):
        return -np.mean(np.sum(target * (logits - np.log(np.exp(logits).sum(1, keepdims=True))), axis=1))

    np.testing.assert_allclose(loss, (cross_entropy(logits) + cross_entropy(logits.T)) / 2, rtol=1e-5)


def test_images_without_colour_are_named_by_the_rest() -> None:
    """The colours of grey images count for nothing, their shapes do; captions' weights are no part of it."""
    clip, keys = mini_clip.networks(), jax.random.split(jax.random.key(0))
    ids = np.asarray(tokenize_plain([5, 6]))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    params = {"vision": clip.vision.init(keys[1], jnp.zeros((1, 64, 64, 3)))["params"], "scale": jnp.float32(1)}
    text = {"text": clip.text.init(keys[0], ids)["params"]}
    names, width = list(mini_clip.NAMES), TEXT_CONFIG.hidden_size
    params["heads"] = {name: jnp.zeros((width, len(found))) for name, found in mini_clip.NAMES.items()}

    def named(**labels: int) -> float:
        row = [labels.get(name, -1) for name in names]
        batch = {"pixels": pixels, "input_ids": ids, "labels": np.array([row, row]), "whole": np.ones(2, bool)}
        return float(mini_clip.loss_of_vision(clip, text, params, batch, keys[0]))

    contrast = named()
    assert named(colour=2) - contrast == pytest.approx(np.log(6) / 6, rel=1e-3)
    assert named(shape=2) - contrast == pytest.approx(2 * np.log(6) / 6, rel=1e-3)


def tokenize_plain(words: list[int]) -> np.ndarray:
    ids = np.full((len(words), TOKENS), VOCABULARY - 1, np.int32)
    ids[:, 1] = words
    ids[:, 0] = VOCABULARY - 2
    return ids


@pytest.mark.slow
def test_all_stages_in_pieces(tmp_path) -> None:
    """Ten minutes on two cores, most of it compilation."""
    build, target = tmp_path / "build", tmp_path / "mini"
    words = [sys.executable, "-m", "experiments.mini.build", "--out", str(build), "--share", "0.001", "--minutes", "2"]
    for _ in range(12):
        code = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode
        if code == 0:
            break
        assert code == 75
    assert code == 0
    packed = [sys.executable, "-m", "experiments.mini.pack", "--build", str(build), "--target", str(target)]
    subprocess.run(packed, check=True)
    pipe = StableDiffusion.from_pretrained(target)
    for adapter in ("ip-adapter_mini.safetensors", "ip-adapter-plus_mini.safetensors"):
        (image,) = pipe.with_ip_adapter(target / adapter)(
            "a star", ip_adapter_image=target / "reference.png", num_inference_steps=2
        )
        assert image.size == (64, 64)
