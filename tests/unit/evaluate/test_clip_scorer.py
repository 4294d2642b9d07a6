"""The scoring CLIP gives the scores of transformers' PyTorch CLIP; what is no whole CLIP is refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import clip_models
import numpy as np
import pytest
from helpers import IMAGE_ENCODER, TORCH_MODEL
from safetensors.numpy import load_file, save_file

from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.clip_scorer import _REFERENCE_CONFIG, open_scorer
from ipadapter_jax.evaluate.metrics import score

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

CAPTIONS, SIDE = clip_models.CAPTIONS, clip_models.SIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    clip_models.clip_model(folder)
    return folder


def theirs(model, folder: Path, images, texts) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings by transformers: its processor, its tokenizer, its networks."""
    processor = transformers.CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    ids = tokenizer(texts, padding="max_length", max_length=clip_models.LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(
            input_ids=ids["input_ids"], pixel_values=processor(images=images, return_tensors="pt")["pixel_values"]
        )
    return output.image_embeds.double().numpy(), output.text_embeds.double().numpy()


@pytest.mark.parametrize(("safe", "eos"), [(True, clip_models.VOCABULARY - 1), (False, 2)])
def test_scores_are_those_of_pytorch(tmp_path, safe, eos):
    """Either file, and either way that published configs name the end of a text."""
    model = clip_models.clip_model(tmp_path, safe=safe, eos=eos)
    references, made = clip_models.images(3), clip_models.images(6, seed=1)
    images, texts = theirs(model, tmp_path, references + made, [text for group in CAPTIONS for text in group])
    opened = open_scorer(tmp_path)
    scorer = opened.load()
    found = score(scorer, [made[:2], made[2:4], made[4:]], references, CAPTIONS, "all")
    owners = np.repeat(np.arange(3), [len(group) for group in CAPTIONS])
    for prompt in range(3):
        own = images[3 + 2 * prompt : 5 + 2 * prompt]
        np.testing.assert_allclose(found.clip_i[prompt], own @ images[prompt], atol=1e-5)
        clip_t = 2.5 * np.maximum(own @ texts[owners == prompt].T, 0)
        np.testing.assert_allclose(found.clip_t[prompt], clip_t.mean(axis=1), atol=1e-5)
        np.testing.assert_allclose(found.diversity[prompt], 1 - own[0] @ own[1], atol=1e-5)
    assert np.ptp(found.clip_i) > 0.05  # no scores that anything would give
    embedded = scorer.captions([text for group in CAPTIONS for text in group])  # cosines below 0 do not show above
    np.testing.assert_allclose(embedded / np.linalg.norm(embedded, axis=1, keepdims=True), texts, atol=1e-5)
    assert not opened.is_reference


def test_every_tensor_is_used_once(folder, tmp_path):
    """And what is left over is named."""
    shutil.copytree(folder, tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    used = open_scorer(folder).opened.weights.tensors
    assert used.keys() == tensors.keys() - {"logit_scale"}
    save_file({**tensors, "text_model.extra": np.zeros(2, np.float32)}, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(InputError, match=r"without a place in the model: text_model.extra"):
        open_scorer(tmp_path / "clip")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks text_projection.weight"):
        open_scorer(tmp_path / "clip")


def test_a_batch_of_any_size_gives_the_same(folder):
    """As many as the networks read at once and one more."""
    scorer = open_scorer(folder).load()
    squares = np.random.default_rng(0).integers(0, 256, (65, SIDE, SIDE, 3), np.uint8)
    whole = scorer.images(squares)
    assert whole.shape == (65, 24)
    np.testing.assert_allclose(scorer.images(squares[64:]), whole[64:], atol=1e-5)
    with pytest.warns(UserWarning, match="longer than 24 tokens"):
        assert scorer.captions(["word " * 40, "word"]).shape == (2, 24)


@pytest.mark.parametrize(
    ("place", "message"),
    [(TORCH_MODEL / "text_encoder", "no whole CLIP model"), (IMAGE_ENCODER, "there is no text_config")],
)
def test_half_a_clip_is_refused(place, message):
    with pytest.raises(InputError, match=message):
        open_scorer(place)


def test_a_file_or_another_preparation_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="give its folder"):
        open_scorer(folder / "model.safetensors")
    shutil.copytree(folder, tmp_path / "clip")
    settings = {"image_mean": [0.5, 0.5, 0.5], "size": {"shortest_edge": SIDE}}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="image_mean=.* is not CLIP's"):
        open_scorer(tmp_path / "clip")


def test_the_reference_is_known_by_its_config(folder):
    """With either end of text; with another activation it is another CLIP."""
    opened = open_scorer(folder)

    def with_config(config):
        return dataclasses.replace(opened, opened=dataclasses.replace(opened.opened, component_config=fake(config)))

    def fake(config):
        return dataclasses.replace(opened.opened.component_config, config=config)

    for end in (2, 49407, None):
        text = dataclasses.replace(_REFERENCE_CONFIG.text, eos_token_id=end)
        assert with_config(dataclasses.replace(_REFERENCE_CONFIG, text=text)).is_reference
    other = dataclasses.replace(_REFERENCE_CONFIG.vision, hidden_act="gelu")
    assert not with_config(dataclasses.replace(_REFERENCE_CONFIG, vision=other)).is_reference
