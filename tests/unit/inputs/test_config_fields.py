"""Absurd numbers in the files that describe a model: one line, at once, and nothing made of that size."""

import json
import shutil
import time

import pytest
from helpers import TORCH_MODEL

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.config_fields import short_repr
from ipadapter_jax.models.families import SD1
from ipadapter_jax.weights.base_model import BaseModel
from ipadapter_jax.weights.model_source import ModelSource

SETTINGS = {
    "unet": ["in_channels", "block_out_channels", "layers_per_block", "attention_head_dim", "cross_attention_dim"]
    + ["norm_num_groups", "norm_eps", "sample_size"],
    "vae": ["in_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups"]
    + ["scaling_factor"],
    "text_encoder": ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    + ["max_position_embeddings", "layer_norm_eps", "eos_token_id"],
}
ABSURD = {
    **{"a billion": 10**9, "400 digits": 10**400, "below 0": -1},
    **{"text": "x", "true": True, "not a number": float("nan")},
}


def opened_with(tmp_path, part: str, **changes) -> BaseModel:
    """The recorded model with other settings of one part."""
    folder = tmp_path / "base"
    shutil.copytree(TORCH_MODEL, folder)
    config = folder / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return BaseModel(ModelSource(folder), folder, SD1)


@pytest.mark.parametrize("value", ABSURD.values(), ids=ABSURD)
@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in SETTINGS.items() for name in names])
def test_absurd_numbers_are_refused_by_name(tmp_path, part, name, value):
    listed = name == "block_out_channels" and isinstance(value, int)
    start = time.perf_counter()
    with pytest.raises(InputError, match=rf"base/{part}/config\.json: .*{name}=") as caught:
        opened_with(tmp_path, part, **{name: [value] * 2 if listed else value}).config(part)
    assert time.perf_counter() - start < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_sizes_of_two_sides(tmp_path):
    with pytest.raises(InputError, match="sample_size=.* it must be height and width"):
        opened_with(tmp_path, "unet", sample_size=[8, 8, 8]).config("unet")


def test_a_value_in_a_message_can_be_read():
    assert short_repr(5) == "5" and short_repr("x") == "'x'"
    assert short_repr(-(10**5000)) == "-(over 30 digits)"
    assert len(short_repr("x" * 1000)) == 60
