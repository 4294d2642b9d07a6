"""A family of models is an entry in a registry: a stub family needs no change to any existing file."""

import json

import numpy as np
import pytest

from ipadapter_jax import InputError, Scale
from ipadapter_jax.models import families
from ipadapter_jax.models.families import SD1, SD2, SDXL, Family, FamilyTextEncoder, LayerPreset, family_of
from ipadapter_jax.models.unet_config import CrossAttentionLayer
from ipadapter_jax.pipelines.scales import preset_names, scale_table
from ipadapter_jax.weights.unsupported_families import unsupported

STUB = Family(
    title="Stub Diffusion",
    pipelines=("StableDiffusionXLPipeline",),
    recognizes=lambda settings: settings.get("addition_embed_type") == "text_time",
    text_encoders=(FamilyTextEncoder("text_encoder", "tokenizer", "stub."),),
    transformers=2,
    layer_presets={"stub style": LayerPreset({0: 0.5}, swapped={1: 1.0})},
)
# Three layers, two of them in one transformer, in file order; executed down, mid, up.
LAYERS = (
    CrossAttentionLayer("down_blocks_0", 0, 0, 8, 0),
    CrossAttentionLayer("down_blocks_0", 0, 1, 8, 0),
    CrossAttentionLayer("mid_block", 0, 0, 8, 1),
)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, STUB))


@pytest.fixture
def folder(tmp_path):
    """The settings of a base model whose text is not all that conditions it."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"addition_embed_type": "text_time"}))
    return tmp_path


def test_a_family_that_is_not_registered_is_refused(folder):
    assert unsupported(folder) == "an SDXL model of another kind"
    with pytest.raises(InputError, match="no preset 'stub style'"):
        scale_table(Scale(layers="stub style"), LAYERS, 1)


@pytest.mark.usefixtures("stub")
def test_a_registered_family_is_recognized_and_brings_its_presets(folder):
    assert unsupported(folder) is None
    assert preset_names()[-1] == "stub style"
    table = scale_table(Scale(0.5, layers="stub style"), LAYERS, 2)
    np.testing.assert_array_equal(table.weight, [[0.25, 0.25, 0]] * 2)
    np.testing.assert_array_equal(table.swapped, [[0, 0, 0.5]] * 2)
    with pytest.raises(InputError, match="'style' is for the 16 transformers of SD 1.x and .*, this UNet has 2"):
        scale_table(Scale(layers="style"), LAYERS, 1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cross_attention_dim": 768}, SD1),
        ({"in_channels": 9}, SD1),
        ({"in_channels": 8}, None),
        ({"cross_attention_dim": 1024, "use_linear_projection": True}, SD2),
        ({"use_linear_projection": True, "in_channels": 5}, None),
        ({"use_linear_projection": True, "class_embed_type": "projection"}, None),
        ({"addition_embed_type": "text_time"}, None),
        ({"addition_embed_type": "text_time", "use_linear_projection": True}, SDXL),
        ({"addition_embed_type": "text_time", "use_linear_projection": True, "cross_attention_dim": 1280}, None),
    ],
)
def test_the_settings_of_a_unet_name_its_family(settings, expected):
    assert family_of(settings) is expected
