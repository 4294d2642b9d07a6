"""The laboratory, from its data to its report, on a model of random weights; and its statistics."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import reproduce_mini
from judge import judge, truth
from lab_claims import above
from lab_measures import Interval, interval
from lab_report import NAMES
from lab_rows import INKED, MAIN, OTHER_SHAPE, SWEEPS, Painter
from lab_scenes import inked, prompt
from lab_trainings import SHIPPED, TRAININGS, drops
from make_random_weights import write_model
from PIL import Image
from safetensors import safe_open

from ipadapter_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.unet import UNetConfig
from ipadapter_jax.models.vae import VAEConfig
from ipadapter_jax.scenes.render import render
from ipadapter_jax.train.initial import initial_adapter, projection_config
from ipadapter_jax.weights.components import UNET, load_component
from ipadapter_jax.weights.ip_adapter_export import adapter_metadata, save_ip_adapter

UNET_CONFIG = UNetConfig(
    block_out_channels=(32,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=32,
    sample_size=16,
)
VISION = CLIPVisionConfig(32, 64, 32, 2, 2, image_size=64, patch_size=16)
CONFIGS = (
    UNET_CONFIG,
    VAEConfig(block_out_channels=(32,) * 3, layers_per_block=1),
    CLIPTextConfig(514, 32, 64, 1, 2, eos_token_id=513),
    VISION,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder laid out as mini: a tiny model of random weights with image encoder and both adapters."""
    folder = tmp_path_factory.mktemp("mini")
    write_model(folder, CONFIGS, np.dtype(np.float16))
    shutil.move(folder / "ip_adapter" / "models" / "image_encoder", folder)
    shutil.rmtree(folder / "ip_adapter")
    unet = load_component(UNET, folder / "unet", np.dtype(np.float32))
    for variant, name in zip(("base", "plus"), SHIPPED.values(), strict=True):
        projection = projection_config(variant, VISION, UNET_CONFIG.cross_attention_dim, heads=1)
        params = initial_adapter(unet.params, UNET_CONFIG, projection, 0)
        save_ip_adapter(folder / name, params, metadata=adapter_metadata(projection, step=0))
    return folder


def run(base: Path, folder: Path, **changes) -> int:
    counts = {"prompts": 3, "sweep_prompts": 2, "sampling_steps": 2, "steps": 2, "scenes": 40, "batch_size": 4}
    return reproduce_mini.main(folder / "lab", folder / "docs" / "results.md", base, **(counts | changes))


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
    assert len(painted) == 3 * len(MAIN) + 2 * len({*SWEEPS} - {*MAIN})
    report = tmp_path / "docs" / "results.md"
    check_report(report, report.read_text())
    trained = tmp_path / "lab" / "trained"
    assert len(list(trained.glob("*/finished.json"))) == len(TRAININGS)
    for file in trained.glob("*/adapter.safetensors"):
        with safe_open(file, "numpy") as adapter:
            assert adapter.metadata()["step"] == "2"
    assert run(base, tmp_path, sampling_steps=3) == 2  # the rows were painted with 2


def check_report(path: Path, text: str) -> None:
    assert all(f"| {name} | " in text for name in NAMES.values())
    assert "at scale 0 0 values of pixels differ" in text
    assert len(re.findall(r"^\| .* \| (holds|does not hold|undecided|not measured) \|", text, re.MULTILINE)) == 13
    pictures = re.findall(r"\]\((results/[a-z-]+\.png)\)", text)
    assert len(pictures) == 7
    for picture in pictures:
        Image.open(path.parent / picture).verify()
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
