"""What a job keeps of its model and its files, so that one that goes on with others is refused."""

import dataclasses
import hashlib
import json
import shutil

import pytest

from ipadapter_jax import StableDiffusion
from ipadapter_jax.cli.batch import Batch
from ipadapter_jax.cli.run.image_batches import settings
from ipadapter_jax.cli.run.sampling import configurations
from ipadapter_jax.weights.bundled import FOLDER, REFERENCE


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion.from_pretrained("mini")


def change(folder, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("part", "name", "changes"),
    [
        ("scheduler", "scheduler/scheduler_config.json", {"beta_end": 0.013}),
        ("unet", "unet/config.json", {"attention_head_dim": 2}),
        ("tokenizer", "tokenizer/tokenizer_config.json", {"pad_token": "!"}),
        ("text_encoder", "text_encoder/config.json", {"num_attention_heads": 2}),
    ],
)
def test_settings_of_a_part(pipe, tmp_path, part, name, changes):
    """The same weights with other settings paint otherwise."""
    shutil.copytree(FOLDER, tmp_path / "base")
    assert configurations(StableDiffusion.from_pretrained(tmp_path / "base")) == configurations(pipe)
    change(tmp_path / "base", name, **changes)
    before, now = configurations(pipe), configurations(StableDiffusion.from_pretrained(tmp_path / "base"))
    assert {name for name in before if before[name] != now[name]} == {part}


def test_a_negative_image_is_known_by_what_it_holds(pipe, tmp_path):
    image = tmp_path / "not this.png"
    shutil.copy(REFERENCE, image)
    args = Batch(source=tmp_path, out=tmp_path / "out", negative_image=str(image))
    found = settings(args, pipe)["sha256"]["negative_image"]
    assert found == {"not this.png": hashlib.sha256(image.read_bytes()).hexdigest()}
    without = settings(dataclasses.replace(args, negative_image=None), pipe)
    assert "negative_image" not in without["sha256"] and without["configurations"] == configurations(pipe)
