"""Attention to image tokens: what is recorded, against the softmax written out, and heat over the image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ORACLES, conditioned, recorded_pipe
from PIL import Image

from ipadapter_jax import InputError, Scale
from ipadapter_jax.diffusion.samplers import sample_table
from ipadapter_jax.models.transformer import Attention
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import CrossAttentionLayer, attention_grids, cross_attention_layers
from ipadapter_jax.ops.attention import AttentionBranch, attention_map
from ipadapter_jax.pipelines import stable_diffusion
from ipadapter_jax.pipelines.attention_maps import AttentionMaps
from ipadapter_jax.pipelines.conditioning import ImageBranch
from ipadapter_jax.pipelines.denoise import run_sampler
from ipadapter_jax.pipelines.sample_batch import SampleBatch

CAT, DOG = (ORACLES / "assets" / f"img_{name}.png" for name in "ab")
SMALL = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def by_hand(query, key, heads: int) -> np.ndarray:
    """In float64, head by head."""
    q, k = (np.asarray(x, np.float64).reshape(*x.shape[:2], heads, -1) for x in (query, key))
    seen = np.zeros((query.shape[0], query.shape[1], key.shape[1]))
    for head in range(heads):
        logits = np.einsum("bld,bsd->bls", q[:, :, head], k[:, :, head]) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        seen += weights / weights.sum(-1, keepdims=True) / heads
    return seen


@pytest.mark.parametrize(("heads", "tokens"), [(1, 4), (8, 4), (2, 50), (4, 1)])
def test_a_map_is_the_softmax_averaged_over_heads(heads, tokens):
    query, key = 3 * drawn(2, 35, 16), drawn(2, tokens, 16)
    found = attention_map(query, key, heads)
    np.testing.assert_allclose(found, by_hand(query, key, heads), atol=1e-6)


def test_maps_of_half_precision_are_in_float32():
    query, key = drawn(1, 9, 16).astype(jnp.bfloat16), drawn(1, 4, 16).astype(jnp.bfloat16)
    found = attention_map(jnp.asarray(query), jnp.asarray(key), 2)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(found, by_hand(query, key, 2), atol=0.01)  # queries are scaled in 8 bits of mantissa


def test_a_layer_records_its_attention_to_the_tokens_of_every_image_branch():
    """Not to those of the text, whatever the weight of the branch; without the collection nothing is recorded."""
    x, text, images = drawn(2, 12, 16), (drawn(2, 7, 16), drawn(2, 7, 16)), [drawn(2, 4, 16), drawn(2, 9, 16)]
    prompts = [AttentionBranch(images[0], images[0], 0.0), AttentionBranch(images[1], images[1], 2.0)]
    branches = [AttentionBranch(*text), *prompts]
    layer = Attention(16, 2, jnp.float32)
    params = layer.init(jax.random.key(0), x, [AttentionBranch(x, x)], method=_all_parameters)["params"]
    output, found = layer.apply({"params": params}, x, branches, mutable=["maps"])
    query = x @ params["to_q"]["kernel"]
    for seen, key in zip(found["maps"]["images"], images, strict=True):
        np.testing.assert_allclose(seen, by_hand(query, key, 2), atol=1e-6)
    np.testing.assert_allclose(layer.apply({"params": params}, x, branches), output, atol=1e-6)


def _all_parameters(module: Attention, x, branches):
    module.key_value(x)
    return module(x, branches)


# --- of whole images -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(pipe):
    """Latents and maps of two images."""
    return pipe("a cat", ip_adapter_image=CAT, num_images_per_prompt=2, return_attention_maps=True, **SMALL)


def test_recording_maps_does_not_change_the_images(pipe, recorded):
    plain = pipe("a cat", ip_adapter_image=CAT, num_images_per_prompt=2, **SMALL)
    np.testing.assert_allclose(recorded[0], plain, atol=1e-5)  # measured 0; a compiler may fuse otherwise


def test_there_is_a_map_for_every_step_image_query_and_token(pipe, recorded):
    maps = recorded[1]
    assert isinstance(maps, AttentionMaps) and maps.count == 2
    assert maps.layers == cross_attention_layers(pipe.unet.config)
    assert list(maps.grids) == attention_grids(pipe.unet.config, 8, 8)
    np.testing.assert_array_equal(maps.timesteps, [501, 1])
    [entry] = maps.maps
    for seen, (h, w) in zip(entry, maps.grids, strict=True):
        assert seen.shape == (2, 2, h * w, 4)  # on any number of devices
        assert seen.min() >= 0
        np.testing.assert_allclose(seen.sum(-1), 1, atol=1e-6)


def test_the_first_steps_maps_are_those_of_the_network_on_the_initial_latents(pipe, recorded):
    """Of the conditional branch: the very prompt and image, with guidance left out."""
    [adapter] = pipe.adapters
    features = adapter.encode(adapter.inputs.from_images([[CAT]], "crop", guided=False))
    image_kv = jax.tree.map(lambda x: x[0], adapter.keys_values(features, np.ones((1, 1), np.float32)))
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    arguments = {"ip_adapter_image": CAT, "latents": np.concatenate([noise, noise[:, ::-1]]), **SMALL}
    _, found = pipe("a cat", num_images_per_prompt=2, return_attention_maps=True, **arguments)
    unet, params = pipe.unet, pipe.params["unet"]
    text_kv = unet.apply({"params": params}, pipe.text.encode(pipe.params, ["a cat"]).states, method=UNet.text_kv)

    @jax.jit
    def run(latents):
        weight = np.ones((1, len(text_kv)), np.float32)
        inputs = latents, np.full(1, 501.0, np.float32), text_kv, [image_kv], weight
        return UNet.maps_of(unet.apply({"params": params}, *inputs, mutable=["maps"])[1]["maps"], unet.config)

    for image, latents in enumerate((noise, noise[:, ::-1])):
        [expected] = run(latents)
        for seen, one in zip(found.maps[0], expected, strict=True):
            np.testing.assert_allclose(seen[0, image], one[0], atol=1e-5)


@pytest.mark.parametrize("on_step", [None, lambda *_: None], ids=["one call", "one call a step"])
def test_maps_of_all_steps_are_one_array_without_padding_samples(pipe, on_step):
    batch = SampleBatch(pipe.mesh, np.zeros(3, np.uint32), np.zeros(3, np.int64))
    run = sample_table("ddim", pipe.schedule, 5)
    whole = drawn(5, 4, 6, 2)

    def denoise(state, steps, conditioning):
        numbers = [list(run.steps.timestep).index(t) for t in steps.table.timestep]
        assert [len(branch.weight) for branch in conditioning.image_branches] == [len(numbers)]
        return state, [[whole[numbers]]]

    branch = ImageBranch(kv=[], weight=np.zeros((5, 2, 4)), mask=[])
    conditioning = conditioned(pipe, batch, [branch])
    latents = batch.noise((8, 8, 4), 0)
    _, [[found]] = run_sampler(denoise, run.steps, latents, conditioning, batch, on_step)
    np.testing.assert_array_equal(found, whole[:, :3])


def test_scale_and_mask_do_not_enter_the_first_maps(pipe, recorded):
    """At the first layer of the first step: later ones see what the image did before."""
    given = {"ip_adapter_image": CAT, "num_images_per_prompt": 2, "return_attention_maps": True, **SMALL}
    _, found = pipe("a cat", ip_adapter_scale=Scale(0.1), ip_adapter_masks=[np.eye(64)], **given)
    np.testing.assert_allclose(found.maps[0][0][0], recorded[1].maps[0][0][0], atol=1e-6)
    assert np.abs(found.maps[0][0][1] - recorded[1].maps[0][0][1]).max() > 1e-6


def test_a_precise_preset_gives_no_maps_of_its_swapped_branch(monkeypatch):
    """Which is a second image branch of the same adapter, without weight in the conditional branch of guidance."""

    def run_sampler(_denoise, _steps, latents, conditioning, *_):
        return latents, [[np.full(1, branch)] for branch in range(len(conditioning.image_branches))]

    monkeypatch.setattr(stable_diffusion, "run_sampler", run_sampler)
    recorded = recorded_pipe()
    two = dataclasses.replace(recorded, adapters=recorded.adapters * 2)
    given = {"ip_adapter_image": [CAT, DOG], "ip_adapter_scale": ["precise style", 1.0], **SMALL}
    _, found = two("a cat", return_attention_maps=True, **given)
    assert [entry[0][0] for entry in found.maps] == [0, 2]


def test_maps_need_an_image_prompt(pipe):
    with pytest.raises(InputError, match="return_attention_maps needs an image prompt"):
        dataclasses.replace(pipe, adapters=())("a cat", return_attention_maps=True, **SMALL)


# --- heat ------------------------------------------------------------------------------------------------------------

LAYERS = (CrossAttentionLayer("down_blocks_0", 0, 0, 32, 0), CrossAttentionLayer("mid_block", 0, 0, 32, 1))


@pytest.fixture(scope="module")
def maps() -> AttentionMaps:
    """Three steps, two images, two image branches of 4 and 5 tokens, layers of 4 x 6 and 2 x 3 queries."""
    return AttentionMaps(
        [[drawn(3, 2, 24, n), drawn(3, 2, 6, n)] for n in (4, 5)],
        LAYERS,
        [(4, 6), (2, 3)],
        np.array([9.0, 5.0, 1.0]),
        2,
    )


def test_heat_has_a_image_for_each_token(maps, recorded):
    assert maps.heat((32, 48)).shape == (4, 32, 48)
    assert maps.heat((32, 48), branch=1).shape == (5, 32, 48)
    np.testing.assert_allclose(recorded[1].heat((64, 64), image=1).sum(0), 1, atol=1e-5)  # shares of attention


def test_heat_of_the_own_grid_is_the_mean_over_steps(maps):
    found = maps.heat((4, 6), image=1, layers=[0])
    expected = maps.maps[0][0][:, 1].mean(0).T.reshape(4, 4, 6)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "chosen"), [(slice(None), [0, 1, 2]), (slice(1), [0]), (slice(1, None), [1, 2]), (slice(-1, None), [2])]
)
def test_heat_of_chosen_steps(maps, steps, chosen):
    found = maps.heat((2, 3), branch=1, steps=steps, layers=[1])
    expected = np.mean([maps.maps[1][1][step, 0] for step in chosen], axis=0).T.reshape(5, 2, 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_heat_is_the_mean_over_layers_resized_to_one_size(maps):
    """Each is enlarged between its own pixels, whose values stay between the least and the greatest."""
    each = [maps.heat((32, 48), layers=[layer]) for layer in (0, 1)]
    np.testing.assert_allclose(maps.heat((32, 48)), np.mean(each, axis=0), atol=1e-6)
    np.testing.assert_allclose(maps.heat((32, 48), layers=[1, 0]), maps.heat((32, 48)), atol=1e-6)
    for layer, heat in enumerate(each):
        seen = maps.maps[0][layer][:, 0].mean(0)
        assert seen.min() - 1e-6 <= heat.min() and heat.max() <= seen.max() + 1e-6


def test_heat_lies_where_the_attention_is():
    """The upper right query of six sees token 1 alone, all others token 0."""
    seen = np.zeros((1, 1, 6, 2), np.float32)
    seen[..., 0] = 1
    seen[0, 0, 2] = 0, 1
    heat = AttentionMaps([[seen]], LAYERS[:1], [(2, 3)], np.zeros(1), 1).heat((20, 30))
    assert np.unravel_index(heat[1].argmax(), (20, 30))[0] < 5 and heat[1][:5, 25:].min() > 0.9
    assert heat[1][11:, :20].max() < 0.5 and heat[0][15:, :15].min() == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": 2},
        {"image": -1},
        {"branch": 2},
        {"branch": -1},
        {"layers": [2]},
        {"layers": [-1]},
        {"layers": [0.5]},
        {"layers": []},
        {"steps": slice(3, None)},
    ],
)
def test_heat_of_what_is_not_there_is_refused(maps, wrong):
    with pytest.raises(InputError, match="there are 3 steps, 2 images, 2 image branches, 2 layers"):
        maps.heat((8, 8), **wrong)


def test_maps_can_be_shown(recorded):
    """As an image: a float array in [0, 1] for each token."""
    heat = recorded[1].heat((64, 64))
    assert Image.fromarray((heat[0] * 255).astype(np.uint8)).size == (64, 64)
