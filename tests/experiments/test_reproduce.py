"""The laboratory, from its data to its report, on a model of random weights; and its statistics."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from experiments.mini import reproduce
from experiments.mini.attribute_classifier import judge, truth
from experiments.mini.claims import Measured, above, bars, claims
from experiments.mini.joint_training import join, with_image
from experiments.mini.metrics import Eyes, Interval, Measures, diversity, interval, share
from experiments.mini.report import NAMES
from experiments.mini.rows import (
    BY_DROP,
    BY_SCALE,
    CHANCE,
    DECOUPLED,
    FULL,
    INKED,
    MAIN,
    MINI,
    OTHER_SHAPE,
    PLUS,
    ROWS,
    SIMPLE,
    TEXT,
    Painter,
    Row,
)
from experiments.mini.scenes.render import render
from experiments.mini.test_scenes import inked, prompt
from experiments.mini.trainings import SHIPPED, TRAININGS, drops
from ipadapter_jax import StableDiffusion
from ipadapter_jax.images.preprocess import CLIP_TABLE
from ipadapter_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.vae import VAEConfig
from ipadapter_jax.testing.random_weights import write_model
from ipadapter_jax.testing.sizes import NANO, ModelConfigs
from ipadapter_jax.train.init import init_adapter, projection_config
from ipadapter_jax.weights.components import UNET
from ipadapter_jax.weights.ip_adapter_export import adapter_metadata, save_ip_adapter
from ipadapter_jax.weights.open_component import load_component

UNET_CONFIG = dataclasses.replace(NANO.unet, sample_size=16)
VISION = CLIPVisionConfig(32, 64, 32, 2, 2, image_size=64, patch_size=16)
CONFIGS = ModelConfigs(
    UNET_CONFIG,
    VAEConfig(block_out_channels=(32,) * 3, layers_per_block=1),
    CLIPTextConfig(514, 32, 64, 1, 2, eos_token_id=513),
    VISION,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder laid out as mini: a tiny model of random weights with image encoder and both adapters."""
    folder = tmp_path_factory.mktemp("mini")
    write_model(folder, CONFIGS)
    shutil.move(folder / "ip_adapter" / "models" / "image_encoder", folder)
    shutil.rmtree(folder / "ip_adapter")
    unet = load_component(UNET, folder / "unet", np.dtype(np.float32))
    for variant, name in zip(("base", "plus"), SHIPPED.values(), strict=True):
        projection = projection_config(variant, VISION, UNET_CONFIG.cross_attention_dim, heads=1)
        params = init_adapter(unet.params, UNET_CONFIG, projection, 0)
        save_ip_adapter(folder / name, params, metadata=adapter_metadata(projection, step=0))
    return folder


def run(base: Path, folder: Path, **changes) -> int:
    counts = {"prompts": 3, "sampling_steps": 2, "steps": 2, "scenes": 40, "batch_size": 4}
    return reproduce.main(folder / "lab", folder / "docs" / "results.md", base, **(counts | changes))


@pytest.mark.slow  # eight trainings are compiled
def test_from_data_to_report(base, tmp_path, monkeypatch) -> None:
    """All of it, stopped in the middle and gone on with."""
    paint, painted = Painter._one, []

    def stopping(painter, pipe, row, given):
        if row == INKED:
            raise KeyboardInterrupt
        painted.append((row, given.index))
        return paint(painter, pipe, row, given)

    def going_on(painter, pipe, row, given):
        assert (row, given.index) not in painted, "painted twice"
        painted.append((row, given.index))
        return paint(painter, pipe, row, given)

    monkeypatch.setattr(Painter, "_one", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path)
    assert {row for row, _ in painted} >= {*MAIN, *OTHER_SHAPE}
    monkeypatch.setattr(Painter, "_one", going_on)
    assert run(base, tmp_path) == 0
    assert len(painted) == 3 * (len(ROWS) + 1)
    report = tmp_path / "docs" / "results.md"
    check_report(report, report.read_text())
    trained = tmp_path / "lab" / "trained"
    assert len(list(trained.glob("*/finished"))) == len(TRAININGS)
    for file in trained.glob("*/adapter.safetensors"):
        with safe_open(file, "numpy") as adapter:
            assert adapter.metadata()["step"] == "2"
    assert run(base, tmp_path, sampling_steps=3) == 2  # the rows were painted with 2
    assert run(base, tmp_path, steps=1) == 2  # and trained for 2


def clip_values(image: np.ndarray) -> np.ndarray:
    return CLIP_TABLE[image, np.arange(3)][None]


def check_report(path: Path, text: str) -> None:
    assert all(f"| {name} | " in text for name in NAMES.values())
    assert "at scale 0 0 pixel values differ" in text
    assert len(re.findall(r"^\| .* \| (holds|does not hold|undecided|not measured) \|", text, re.MULTILINE)) == 15
    images = re.findall(r"\]\((results/[a-z-]+\.png)\)", text)
    assert len(images) == 8
    for image in images:
        Image.open(path.parent / image).verify()
    assert "nan" not in text


def test_intervals() -> None:
    """Of a share of 0.3 in 400 prompts the interval is that of the binomial."""
    mean, low, high = interval(np.repeat([1.0, 0.0], [120, 280]))
    assert mean == pytest.approx(0.3)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == (pytest.approx(0.3 - half, abs=0.005), pytest.approx(0.3 + half, abs=0.005))


def test_verdicts() -> None:
    assert above(Interval(0.1, 0.05, 0.15)) == "holds"
    assert above(Interval(0.1, -0.05, 0.25)) == "undecided"
    assert above(Interval(-0.1, -0.15, -0.05)) == "does not hold"
    assert above(Interval(-0.01, -0.015, -0.005), -0.02) == "holds"


def test_shares_of_all_or_none_have_an_interval() -> None:
    """Clopper and Pearson's for 500 of 500 and 0 of 500."""
    assert share(np.ones(500)) == (1.0, pytest.approx(0.99265, abs=1e-5), 1.0)
    assert share(np.zeros(500)) == (0.0, 0.0, pytest.approx(0.00735, abs=1e-5))
    mixed = np.repeat([1.0, 0.0], [450, 50])
    assert share(mixed) == interval(mixed)


def rows(changed: dict[Row, float]) -> dict:
    """Rows as the paper wants them, 500 prompts each; `changed` are values of all three."""
    best = {"CLIP-I": 0.9, "all three": 0.9, "diversity, RMSE": 0.2, "asked shape and colour": 0.7, "ink": 0.05}
    good = best | {"CLIP-I": 0.85, "diversity, RMSE": 0.3}
    values = dict.fromkeys(ROWS, good) | {PLUS: best, TEXT: good | {"CLIP-I": 0.6, "all three": 0.6}}
    values |= {SIMPLE: good | {"CLIP-I": 0.8}, MINI: best | {"ink": 0.0}, CHANCE: good}
    values |= {row: values[row] | {"all three": 0.1 + 0.8 * row.scale} for row in BY_SCALE}
    values |= {row: good | {"all three": 0.5} for guided in BY_DROP.values() for row in guided if row != DECOUPLED}
    shares = {"colour": 0.95, "shape": 0.95, "background": 0.95}
    guess = {"colour": 1 / 6, "shape": 1 / 6, "background": 1 / 6}
    found = {row: (guess if row == CHANCE else shares) | own for row, own in values.items()}
    found |= {row: found[row] | {"all three": value} for row, value in changed.items()}
    noise = np.random.default_rng(0).normal(0, 1e-4, 500)
    return {row: {name: value + noise for name, value in own.items()} for row, own in found.items()}


def verdicts(changed: dict[Row, float], judge: float = 1.0, unlike: int = 0) -> list[str]:
    exact = {name: np.full(500, judge) for name in ("background", "colour", "shape", "texture", "size", "place")}
    measured = Measured(rows(changed), {"renders": exact}, unlike, 1, 10)
    return [claim.verdict for claim in (*claims(measured), *bars(measured))]


@pytest.mark.parametrize(
    ("place", "changed", "others"),
    [
        (1, {TEXT: 0.95}, {}),
        (2, {FULL: 0.95}, {}),
        (6, {INKED: 0.6}, {}),
        (7, {}, {"unlike": 1}),
        (10, {}, {"judge": 0.9}),
    ],
)
def test_a_claim_can_fail(place, changed, others) -> None:
    as_wanted, found = verdicts({}), verdicts(changed, **others)
    assert [i for i, verdict in enumerate(as_wanted) if verdict == "not measured"] == [0, 9]
    assert set(as_wanted) == {"holds", "not measured"} and len(as_wanted) == 15
    assert [i for i, verdict in enumerate(found) if verdict != as_wanted[i]] == [place]
    assert found[place] == "does not hold"


def test_diversity_and_ink() -> None:
    """Of images of one colour each: RMSE over the pairs; and pixels that are black where the background is right."""
    pixels = np.zeros((1, 3, 64, 64, 3), np.uint8) + np.array([0, 51, 102], np.uint8)[None, :, None, None, None]
    embedded = np.array([[[1.0, 0], [1, 0], [0, 1]]])
    found = diversity(pixels, embedded)
    np.testing.assert_allclose(found["diversity, RMSE"], [(0.2 + 0.2 + 0.4) / 3], atol=1e-6)
    np.testing.assert_allclose(found["diversity, CLIP"], [2 / 3])


def test_measures_know_the_prompts_themselves(base) -> None:
    """Renders agree with their scenes and are like themselves, those of the neighbour are not; ink is counted on a
    background that is right."""
    pipe = StableDiffusion.from_pretrained(base)
    pipe = pipe.with_ip_adapter(base / SHIPPED["mini"], image_encoder=base / "image_encoder")
    given = [prompt(index) for index in range(8)]
    measures, plain = Measures(Eyes(pipe), given), np.stack([[one.pixels] * 2 for one in given])
    own, other = measures.of(plain), measures.of(np.roll(plain, 1, axis=0))
    np.testing.assert_allclose(own["CLIP-I"], 1, atol=1e-5)
    assert (other["CLIP-I"] < own["CLIP-I"]).all() and (own["all three"] == 1).all() and (own["ink"] < 0.001).all()
    assert other["all three"].mean() < 0.5
    assert (own["diversity, RMSE"] == 0).all()
    inks = measures.agreement(np.stack([[render(inked(one.scene))] for one in given]))
    assert (inks["ink"] > 0.01).all()
    black = np.zeros_like(plain)
    wrong = np.array([one.scene.background != "black" for one in given])
    assert (measures.agreement(black)["ink"][wrong] == 0).all()


@pytest.mark.parametrize("how", ["simple", "full"])
def test_joined_tokens_are_sampled_as_they_were_trained(base, how) -> None:
    """What the UNet reads of an image and a text in sampling, for both branches, is what training's `join` gives."""
    pipe = StableDiffusion.from_pretrained(base)
    pipe = pipe.with_ip_adapter(base / SHIPPED["mini"], image_encoder=base / "image_encoder")
    image, ids = prompt(0).pixels, np.array([[0, 5, 513], [0, 513, 513]])
    adapter: Any = pipe.adapters[0]
    seen = adapter.feature_encoder.encode(clip_values(image))
    features = jnp.concatenate([jnp.zeros_like(seen), seen])
    tokens = adapter.projection.apply({"params": adapter.params["image_proj"]}, features)
    encoder: Any = pipe.text_encoder
    text = encoder.apply({"params": pipe.params["text_encoder"]}, ids).last_hidden_state
    told = with_image(pipe, how, image, guided=True)
    found = told.text.encoders({"text_encoder": told.params["text_encoder"]}, {"text_encoder": ids}).states
    np.testing.assert_allclose(found, join(how, text, tokens), atol=1e-5)
    assert found.shape[1] == (3 + 4 if how == "simple" else 4)


def test_the_judge_reads_scenes_in_ink() -> None:
    scenes = [prompt(index).scene for index in range(200)]
    found, right = judge(np.stack([render(inked(scene)) for scene in scenes])), truth(scenes)
    for name in ("background", "colour", "shape"):
        assert (getattr(found, name) == getattr(right, name)).mean() >= 0.98
    assert (found.texture == right.texture).mean() >= 0.9  # 0.94 when measured


def test_another_shape_is_asked_for() -> None:
    given = [prompt(index) for index in range(50)]
    assert all(one.other_shape != one.scene.things[0].shape for one in given)
    assert {one.other_caption for one in given} >= {"a star", "a circle"}
    assert drops("little text dropped") == (0.05, 0.05, 0.05)
