"""Image prompts and their controls against the same said by hand: in images, or in tokens that are attended to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    IMAGE_ENCODER,
    ORACLES,
    assert_same,
    compilations,
    conditioned,
    handed_to_sampler,
    recorded_pipe,
)
from PIL import Image
from small_model import small_adapter

from ipadapter_jax import InputError, PerPrompt, Scale, StableDiffusion
from ipadapter_jax.errors import errors_name_options
from ipadapter_jax.images.preprocess import CLIP_MEAN, CLIP_STD, clip_pixel_values
from ipadapter_jax.models.unet_config import attention_grids, cross_attention_layers
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.conditioning import ImageBranch
from ipadapter_jax.pipelines.denoiser import branch_weights
from ipadapter_jax.pipelines.image_prompt_settings import ImagePromptSettings
from ipadapter_jax.pipelines.image_prompts import PlannedImageBranch, PlannedImagePrompt, plan_image_prompts
from ipadapter_jax.pipelines.ip_adapter import Adapter
from ipadapter_jax.pipelines.sample_batch import SampleBatch
from ipadapter_jax.weights.image_embeds import save_image_embeds

CAT, DOG = (ORACLES / "assets" / f"img_{name}.png" for name in "ab")
SMALL = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
pytestmark = pytest.mark.usefixtures("one_device")
BASE, PLUS = "ip-adapter_tiny", "ip-adapter-plus_tiny"


@pytest.fixture(scope="module")
def plus(base) -> StableDiffusion:
    return base.with_ip_adapter(small_adapter(PLUS), image_encoder=IMAGE_ENCODER)


@pytest.fixture(scope="module")
def recorded() -> StableDiffusion:
    return recorded_pipe()


def encoded(pipe: StableDiffusion, pixels: np.ndarray) -> np.ndarray:
    """What the encoder gives for normalized pixels (n, 224, 224, 3)."""
    [adapter] = pipe.adapters
    return np.asarray(adapter.feature_encoder.encode(pixels))


def features(pipe: StableDiffusion, *images) -> np.ndarray:
    return encoded(pipe, clip_pixel_values(list(images)))


@dataclasses.dataclass(frozen=True)
class Branch:
    """A planned image branch with the adapter that encodes it."""

    planned: PlannedImageBranch
    prompt: PlannedImagePrompt
    adapter: Adapter

    def __getattr__(self, name: str):
        return getattr(self.planned, name)

    def features(self):
        return self.adapter.encode(self.prompt.features)

    def keys_values(self):
        return self.planned.keys_values(self.adapter, self.features())


def entries(pipe: StableDiffusion, guided: bool = True, steps: int = 2, size=(64, 64), prompts: int = 1, **controls):
    layers, settings = cross_attention_layers(pipe.unet.config), ImagePromptSettings(**controls)
    inputs = [adapter.inputs for adapter in pipe.adapters]
    planned = plan_image_prompts(settings, inputs, layers, steps, guided, size, prompts)
    pairs = zip(pipe.adapters, planned, strict=True)
    return [Branch(branch, prompt, adapter) for adapter, prompt in pairs for branch in prompt.branches]


handed = functools.partial(handed_to_sampler, **SMALL)


# --- which image goes where ----------------------------------------------------------------------------------------


def test_a_image_for_each_prompt_is_as_calls_for_each(pipe):
    """test_stable_diffusion.py makes the images."""
    prompts = ["a cat", "a dog"]
    both = handed(pipe, prompts, ip_adapter_image=PerPrompt([CAT, DOG]), num_images_per_prompt=2)
    np.testing.assert_array_equal(both.prompt_of_sample, [0, 0, 1, 1])
    for i, (prompt, image) in enumerate(zip(prompts, (CAT, DOG), strict=True)):
        alone = handed(pipe, prompt, ip_adapter_image=image, num_images_per_prompt=2)
        for found, expected in (
            (both.text_kv, alone.text_kv),
            (both.image_branches[0].kv, alone.image_branches[0].kv),
        ):
            assert_same(jax.tree.map(lambda x, i=i: x[i : i + 1], found), expected, atol=1e-5)


def test_a_image_for_all_prompts_is_picked_for_every_sample(pipe):
    found = handed(pipe, ["a cat", "a dog"], ip_adapter_image=CAT, num_images_per_prompt=2)
    [branch] = found.image_branches
    for given, samples in ((branch.kv, [0, 0, 0, 0]), (found.text_kv, [0, 0, 1, 1])):
        for one, picked in zip(jax.tree.leaves(given), jax.tree.leaves(found.by_sample(given)), strict=True):
            expected = [np.asarray(one)[sample, guidance] for sample in samples for guidance in (0, 1)]
            np.testing.assert_array_equal(picked, expected)


def test_each_prompt_may_have_several_images(pipe):
    [entry] = entries(pipe, images=PerPrompt([[CAT, DOG], [DOG, DOG]]), prompts=2, scale=[[0.5, 2.0]])
    [first] = entries(pipe, images=[CAT, DOG], scale=[[0.5, 2.0]])
    for (k, v), (k1, v1) in zip(entry.keys_values(), first.keys_values(), strict=True):
        assert k.shape == v.shape and k.shape[:3] == (2, 2, 8)  # prompts, branches, tokens
        np.testing.assert_allclose(k[:1], k1, atol=1e-5)
        np.testing.assert_allclose(v[:1], v1, atol=1e-5)
        assert np.abs(k[1] - k[0]).max() > 0.01


def test_prompts_must_have_as_many_images_each(pipe):
    with pytest.raises(InputError, match="must have the same number of images"):
        entries(pipe, images=PerPrompt([[CAT, DOG], [DOG]]), prompts=2)


def test_a_list_for_several_adapters_goes_to_them_in_order(pipe):
    two = pipe.with_ip_adapter(small_adapter(BASE), image_encoder=IMAGE_ENCODER)
    found = entries(two, images=[CAT, [DOG, CAT]], scale=[0.3, [0.2, 0.9]], negative=[DOG, None])
    expected = [
        *entries(pipe, images=CAT, scale=0.3, negative=DOG),
        *entries(pipe, images=[DOG, CAT], scale=[[0.2, 0.9]]),
    ]
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert_same(one.keys_values(), other.keys_values())
        np.testing.assert_array_equal(one.weight, other.weight)


def test_per_prompt_for_several_adapters(pipe):
    """Either adapter may take one image for all prompts, or one for each."""
    two = pipe.with_ip_adapter(small_adapter(BASE), image_encoder=IMAGE_ENCODER)
    shared, own = entries(two, images=[CAT, PerPrompt([CAT, DOG])], prompts=2)
    assert (shared.keys_values()[0][0].shape[0], own.keys_values()[0][0].shape[0]) == (1, 2)


# --- weights and masks -----------------------------------------------------------------------------------------------


def test_weights_of_images_scale_their_values_alone(pipe):
    """The tokens share one softmax: keys stay as they are."""
    [adapter] = pipe.adapters
    given = features(pipe, CAT, DOG)
    each = [
        programs.image_keys_values(
            adapter.projection,
            adapter.keys,
            adapter.params,
            np.stack([np.zeros_like(image), image])[None, :, None],
            np.ones((1, 1), np.float32),
        )
        for image in given
    ]
    [entry] = entries(pipe, images=[CAT, DOG], scale=[[0.7, 0.2]])
    assert entry.weight.shape == (2, 2, 4) and (entry.weight == 1).all()
    for (k, v), (k1, v1), (k2, v2) in zip(entry.keys_values(), *each, strict=True):
        np.testing.assert_allclose(k, np.concatenate([k1, k2], axis=2), atol=1e-5)
        np.testing.assert_allclose(v, np.concatenate([0.7 * v1, 0.2 * v2], axis=2), atol=1e-5)


def test_a_weight_of_zero_is_not_leaving_a_image_out(pipe):
    """The other's tokens keep their share of attention. test_stable_diffusion.py makes the images."""
    run = functools.partial(handed, pipe, "a cat", ip_adapter_image=[CAT, DOG])
    both = run()
    assert_same(run(ip_adapter_scale=[[1.0, 1.0]]), both)
    [plain], [first] = both.image_branches, run(ip_adapter_scale=[[1.0, 0.0]]).image_branches
    np.testing.assert_array_equal(first.weight, plain.weight)
    for (k, v), (k1, v1) in zip(first.kv, plain.kv, strict=True):
        np.testing.assert_array_equal(k, k1)
        np.testing.assert_array_equal(v[:, :, :4], v1[:, :, :4])
        assert v.shape[2] == 8 and not v[:, :, 4:].any() and v1[:, :, 4:].any()
    [each], [half] = run(ip_adapter_scale=[[0.5, 0.5]]).image_branches, run(ip_adapter_scale=0.5).image_branches
    assert (each.weight == 1).all() and (half.weight == 0.5).all()
    for (k, v), (k1, v1) in zip(each.kv, half.kv, strict=True):
        np.testing.assert_array_equal(k, k1)
        np.testing.assert_array_equal(v, 0.5 * v1)


def test_weights_may_be_numbers_of_numpy(pipe):
    [entry] = entries(pipe, images=[CAT, DOG], scale=[[np.float32(0.5), np.int64(2)]])
    np.testing.assert_array_equal(entry.image_weight, [[0.5, 2]])


def test_a_mask_of_everything_is_no_mask(pipe):
    plain = handed(pipe, "a cat", ip_adapter_image=CAT)
    masked = handed(pipe, "a cat", ip_adapter_image=CAT, ip_adapter_masks=[np.ones((64, 64))])
    assert_same(masked, plain, atol=1e-6)  # the four weights of a bicubic point sum to 1 but for rounding


def test_a_mask_of_nothing_is_refused(pipe):
    """It would be as a scale of zero, which is how to say it."""
    for nothing in (np.zeros((64, 64)), Image.new("RGBA", (64, 64)), np.full((64, 64), 3, np.uint8)):
        with pytest.raises(InputError, match="the mask 2 is black .* nothing is inside; paint"):
            entries(pipe, images=[CAT, DOG], masks=[np.ones((64, 64)), nothing])


def test_a_mask_of_nearly_nothing_is_a_warning(pipe):
    dot = np.zeros((64, 64), np.uint8)
    dot[20:24, 20:24] = 255
    with pytest.warns(UserWarning, match="the mask 1 has about 16 pixels inside, fewer than one point"):
        entries(pipe, images=CAT, masks=[dot])


def test_each_masked_image_is_an_image_branch(recorded):
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 1
    found = entries(recorded, images=[CAT, DOG], masks=[left, 1 - left], scale=[[0.3, "style"]])
    assert len(found) == 2
    for entry, image, scale, mask in zip(found, (CAT, DOG), (0.3, "style"), (left, 1 - left), strict=True):
        [alone] = entries(recorded, images=image, scale=scale)
        np.testing.assert_array_equal(entry.weight, alone.weight)
        np.testing.assert_array_equal(entry.mask, mask)
        for (k, v), (k1, v1) in zip(entry.keys_values(), alone.keys_values(), strict=True):
            np.testing.assert_allclose(k, k1, atol=1e-5)  # encoded in one batch, or alone
            np.testing.assert_allclose(v, v1, atol=1e-5)


@pytest.mark.parametrize(
    "nest",
    [lambda m: m, lambda m: [m], lambda m: [np.stack(m)[None]], np.stack, lambda m: np.stack(m)[:, None], jnp.stack],
    ids=["flat", "nested", "4d", "(n, H, W)", "(n, 1, H, W)", "jax"],
)
def test_masks_may_be_nested_as_diffusers_has_them(pipe, nest):
    masks = [np.eye(64), 1 - np.eye(64)]
    found = entries(pipe, images=[[CAT, DOG]], masks=nest(masks))
    assert_same([entry.mask for entry in found], masks)


def test_masks_are_for_images_of_another_shape_too(pipe):
    [entry] = entries(pipe, images=CAT, masks=[np.eye(32, 48)], size=(64, 96))
    assert entry.mask.shape == (64, 96)
    with pytest.raises(InputError, match="mask 1 is 64 x 64 pixels, the image 96 x 64"):
        entries(pipe, images=CAT, masks=[np.eye(64)], size=(64, 96))


# --- the unconditional branch ----------------------------------------------------------------------------------------


def test_a_negative_image_is_its_features_as_the_negative_branch(pipe):
    given = np.stack([features(pipe, DOG), features(pipe, CAT)])
    found = handed(pipe, "a cat", ip_adapter_image=CAT, negative_ip_adapter_image=DOG)
    assert_same(found, handed(pipe, "a cat", ip_adapter_image_embeds=[given]))
    [own], [plain] = found.image_branches, handed(pipe, "a cat", ip_adapter_image=CAT).image_branches
    for one, other in zip(jax.tree.leaves(own.kv), jax.tree.leaves(plain.kv), strict=True):
        np.testing.assert_allclose(one[:, 1], other[:, 1], atol=1e-5)
        assert np.abs(one[:, 0] - other[:, 0]).max() > 0.01


def test_one_negative_image_serves_all_or_each_has_its_own(pipe):
    one = features(pipe, DOG)
    [entry] = entries(pipe, images=[CAT, DOG], negative=DOG)
    np.testing.assert_allclose(entry.features()[0, 0], np.concatenate([one, one]), atol=1e-5)
    [entry] = entries(pipe, images=[CAT, DOG], negative=[DOG, CAT])
    np.testing.assert_allclose(entry.features()[0, 0], features(pipe, DOG, CAT), atol=1e-5)


def uncond_pixels(uncond: str) -> np.ndarray | None:
    """What the encoder sees; None for zeros in place of its features."""
    zeros = np.zeros((1, 224, 224, 3), np.float32)
    black = zeros - np.float32(CLIP_MEAN) / np.float32(CLIP_STD)
    return {"zeros": None, "zero-pixels": zeros, "black": black}[uncond]


@pytest.mark.parametrize("uncond", ["default", "zeros", "zero-pixels", "black"])
def test_uncond_of_a_base_adapter_is_embeddings_made_by_hand(pipe, uncond):
    pixels = uncond_pixels("zeros" if uncond == "default" else uncond)
    positive = features(pipe, CAT)
    negative = np.zeros_like(positive) if pixels is None else encoded(pipe, pixels)
    expected = handed(pipe, "a cat", ip_adapter_image_embeds=[np.stack([negative, positive])])
    assert_same(handed(pipe, "a cat", ip_adapter_image=CAT, ip_adapter_uncond=uncond), expected, atol=1e-6)


@pytest.mark.parametrize("uncond", ["default", "zeros", "zero-pixels", "black"])
def test_uncond_of_a_plus_adapter_is_by_default_zero_pixels(plus, uncond):
    pixels = uncond_pixels("zero-pixels" if uncond == "default" else uncond)
    [entry] = entries(plus, images=[CAT, DOG], uncond=uncond)
    found = np.asarray(entry.features())
    assert found.shape == (1, 2, 2, 50, 48)
    expected = np.zeros_like(found[0, 0]) if pixels is None else np.repeat(encoded(plus, pixels), 2, 0)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-5)
    np.testing.assert_array_equal(found[0, 1], features(plus, CAT, DOG))


def test_without_guidance_there_is_one_branch(pipe):
    for controls in ({"images": CAT}, {"embeds": [np.ones((2, 1, 40))]}):
        [entry] = entries(pipe, guided=False, **controls)
        assert entry.features().shape == (1, 1, 1, 40) and entry.weight.shape == (2, 1, 4)
        assert entry.features().any()  # the positive one


@pytest.mark.parametrize("control", [{"negative": DOG}, {"uncond": "black"}])
def test_nothing_is_ignored_without_guidance(pipe, control):
    with pytest.raises(InputError, match="need guidance: guidance_scale above 1"):
        entries(pipe, guided=False, images=CAT, **control)


@pytest.mark.parametrize(
    ("control", "words"),
    [({"negative": DOG}, "hold their negative branch"), ({"uncond": "black"}, "hold the negative")],
)
def test_embeddings_bring_their_own_negative_branch(pipe, control, words):
    with pytest.raises(InputError, match=words):
        entries(pipe, embeds=[np.ones((2, 1, 40))], **control)


def test_embeddings_of_the_positive_branch_may_choose_the_other(pipe):
    one = features(pipe, CAT)[None]
    black, zeros = (entries(pipe, embeds=[one], uncond=uncond)[0].features() for uncond in ("black", "zeros"))
    assert np.abs(black[0, 0]).max() > 0 and not np.asarray(zeros[0, 0]).any()
    np.testing.assert_array_equal(black[0, 1], zeros[0, 1])


def test_one_for_each_prompt_goes_to_every_adapter(base, pipe):
    two = dataclasses.replace(pipe, adapters=pipe.adapters * 2)
    made = entries(two, images=PerPrompt([CAT, DOG]), prompts=2)
    assert [entry.keys_values()[0][0].shape[0] for entry in made] == [2, 2]
    for controls, words in (
        ({"embeds": PerPrompt([1, 2])}, "are the same for all prompts"),
        ({"images": CAT, "scale": PerPrompt(["style", "linear"])}, "is not a finite number"),
        ({"images": [CAT, DOG], "masks": [np.ones((64, 64))] * 2, "scale": PerPrompt([1, 2])}, "goes without masks"),
    ):
        with pytest.raises(InputError, match=words):
            entries(pipe, prompts=2, **controls)


WRONG = [
    ({"images": PerPrompt([CAT, DOG, CAT])}, 1, "ip_adapter_image", "has 3 image prompts for 2 prompts"),
    ({"images": CAT, "scale": PerPrompt([1])}, 1, "ip_adapter_scale", "PerPrompt takes one for each"),
    ({"images": CAT, "scale": [1, 2]}, 1, "ip_adapter_scale", "has 2 values for 1 adapters"),
    ({"images": CAT, "masks": CAT}, 1, "ip_adapter_masks", "is a list with one mask for each image"),
    ({"embeds": [PerPrompt([1, 2])]}, 1, "ip_adapter_image_embeds", "PerPrompt goes with ip_adapter_image"),
    ({"images": [CAT]}, 2, "ip_adapter_image", "need as many image prompts"),
    ({"embeds": [1]}, 2, "ip_adapter_image_embeds", "need as many image prompts"),
    ({"images": [CAT, CAT], "negative": DOG}, 2, "negative_ip_adapter_image", "for each of the 2 adapters"),
    ({"embeds": [np.full((2, 1, 40), 1e39)]}, 1, "ip_adapter_image_embeds", "reaches 1e+39"),
]


@pytest.mark.parametrize(("controls", "adapters", "name", "words"), WRONG)
def test_arguments_are_named_as_options_on_a_command_line(pipe, controls, adapters, name, words):
    """Here as they are called in Python."""
    several = dataclasses.replace(pipe, adapters=pipe.adapters * adapters)
    messages = []
    for options in ({}, {name: "--told", "ip_adapter_image": "--told"}):
        with errors_name_options(options), pytest.raises(InputError) as caught:
            entries(several, prompts=2, **controls)
        messages.append(str(caught.value))
    python, line = messages
    assert name in python and words in python
    assert "--told" in line and name not in line


# --- tiles and files -------------------------------------------------------------------------------------------------


def test_tiles_are_squares_of_one_image(pipe):
    wide = np.concatenate([np.asarray(Image.open(path).convert("RGB").resize((60, 60))) for path in (CAT, DOG)], axis=1)
    found = handed(pipe, "a cat", ip_adapter_image=wide, fit="tile")
    assert_same(found, handed(pipe, "a cat", ip_adapter_image=[wide[:, :60], wide[:, 60:]]))


def test_embeddings_in_a_file_need_no_encoder(base, pipe, tmp_path):
    """The same conditioning; where the file holds the positive branch alone, a base adapter's negative is zeros."""
    expected = handed(pipe, "a cat", ip_adapter_image=CAT)
    positive = features(pipe, CAT)
    without = base.with_ip_adapter(small_adapter(BASE), image_encoder=False)
    for name, given in (("both", np.stack([np.zeros_like(positive), positive])), ("one", positive[None])):
        save_image_embeds(tmp_path / f"{name}.safetensors", given, {"variant": "base"})
        for place in (tmp_path / f"{name}.safetensors", str(tmp_path / f"{name}.safetensors")):
            assert_same(handed(without, "a cat", ip_adapter_image_embeds=[place]), expected)
    with pytest.raises(InputError, match="without an image encoder .* name the encoder with image_encoder"):
        without("a cat", ip_adapter_image=CAT, **SMALL)


def test_plus_adapters_need_both_branches_or_the_encoder(base, plus, tmp_path):
    both = np.concatenate([encoded(plus, uncond_pixels("zero-pixels"))[None], features(plus, CAT)[None]])
    without = base.with_ip_adapter(small_adapter(PLUS), image_encoder=False)
    for name, given in (("both", both), ("one", both[1:])):
        save_image_embeds(tmp_path / f"{name}.safetensors", given, {})
    one = tmp_path / "one.safetensors"
    [found], [made] = entries(without, embeds=[tmp_path / "both.safetensors"]), entries(plus, embeds=[one])
    assert_same(found.features(), both[None])
    np.testing.assert_allclose(made.features(), both[None], atol=1e-5)
    assert entries(without, guided=False, embeds=[one])[0].features().shape == (1, 1, 1, 50, 48)
    with pytest.raises(InputError, match="without an image encoder and takes embeddings of both branches"):
        entries(without, embeds=[one])


def test_a_file_of_another_adapters_embeddings_is_refused(pipe, tmp_path):
    path = tmp_path / "plus.safetensors"
    save_image_embeds(path, np.ones((2, 1, 50, 48)), {})
    with pytest.raises(InputError, match=r"plus.safetensors of shape \(2, 1, 50, 48\): .* needs \(2, images, 40\)"):
        entries(pipe, embeds=[path])


# --- precise presets -------------------------------------------------------------------------------------------------


def test_a_precise_preset_shows_the_other_layers_to_the_unconditional_branch_alone(recorded):
    """By hand: two image branches; the second has swapped guidance branches and no weight in the conditional one."""
    [adapter] = recorded.adapters
    positive = features(recorded, CAT)
    given = np.stack([np.zeros_like(positive), positive])[None]
    kv = [
        programs.image_keys_values(adapter.projection, adapter.keys, adapter.params, order, np.ones((1, 1), np.float32))
        for order in (given, given[:, ::-1])
    ]
    in_file_order = (*range(6), *range(7, 16), 6)
    acts = np.array([t in {0, 1, 2, 3, *range(9, 16)} for t in in_file_order])
    weights = np.zeros((2, 2, 2, 16), np.float32)  # image branches, steps, branches of guidance, layers
    weights[0] = 0.8 * acts
    weights[1, :, 0] = 0.8 * np.array([{4: 0.25, 5: 1.0}.get(t, 0) for t in in_file_order])
    mask = [np.ones(h * w, np.float32) for h, w in attention_grids(recorded.unet.config, 8, 8)]
    branches = [ImageBranch(kv=kv, weight=weight, mask=mask) for kv, weight in zip(kv, weights, strict=True)]
    batch = SampleBatch(recorded.mesh, np.zeros(1, np.uint32), np.zeros(1, np.int64))
    found = handed(recorded, "a cat", ip_adapter_image=CAT, ip_adapter_scale=Scale(0.8, "precise style"))
    assert_same(found, conditioned(recorded, batch, branches), atol=1e-6)
    [plain] = handed(recorded, "a cat", ip_adapter_image=CAT, ip_adapter_scale=Scale(0.8, "style")).image_branches
    assert_same(plain, found.image_branches[0])
    assert found.image_branches[1].weight.any()


def test_each_guidance_branch_has_its_own_weight():
    """At every layer, where the mask is: element b G + g of the network's batch is guidance branch g of sample b."""
    weight, mask = np.float32([[0.1, 0.2], [0.3, 0.4]]), [np.float32([1, 0.5, 0]), np.float32([1])]
    found = branch_weights(ImageBranch(kv=[], weight=weight, mask=mask), 3)
    for layer, of_layer in enumerate(found):
        assert of_layer.shape == (6, len(mask[layer]), 1)
        for element, of_element in enumerate(of_layer):
            np.testing.assert_array_equal(of_element[:, 0], weight[element % 2, layer] * mask[layer])


def test_a_precise_preset_without_guidance_is_the_plain_one(recorded):
    [precise] = entries(recorded, guided=False, images=CAT, scale="precise style")
    [plain] = entries(recorded, guided=False, images=CAT, scale="style")
    np.testing.assert_array_equal(precise.weight, plain.weight)


# --- nothing compiles again ------------------------------------------------------------------------------------------


def half() -> np.ndarray:
    mask = np.zeros((64, 64), np.uint8)
    mask[:20] = 255
    return mask


def test_no_control_compiles_again(recorded):
    """Of one image; the first call brings the shapes, the rest are other numbers: neither an encoder is compiled, nor
    would the sampler be."""
    call = {"ip_adapter_image": CAT}
    shapes = jax.tree.map(jax.typeof, handed(recorded, "a cat", **call))
    changes = [
        {"ip_adapter_scale": 0.3},
        {"ip_adapter_scale": "style"},
        {"ip_adapter_scale": {"down": 0.2, "up": {"block_1": [0, 1, 0]}}},
        {"ip_adapter_scale": Scale(0.8, "ease in", start=0.5, steps=(1, 0))},
        {"ip_adapter_scale": [[0.4]]},
        {"ip_adapter_masks": [half()]},
        {"ip_adapter_masks": [255 - half()], "ip_adapter_scale": [["composition"]]},
        {"negative_ip_adapter_image": DOG},
        {"ip_adapter_uncond": "black"},
        {"ip_adapter_uncond": "zero-pixels"},
        {"fit": "pad"},
        {"seed": 5, "negative_prompt": "blurry"},
        {"guidance_scale": 3.0},
        {"guidance_rescale": 0.7},
    ]
    for change in changes:
        with compilations() as count:
            found = handed(recorded, "a dog", **call | change)
        assert count() == 0, change
        assert jax.tree.map(jax.typeof, found) == shapes, change


def test_controls_reach_the_image_without_compiling_again(pipe):
    run = functools.partial(pipe, "a dog", **SMALL)
    plain = run(ip_adapter_image=CAT)
    changes = [
        {"ip_adapter_image": DOG},
        {"ip_adapter_scale": 0.3},
        {"ip_adapter_scale": Scale(layers=[1, 0, 1, 1])},
        {"ip_adapter_scale": Scale(steps=(1, 0))},
        {"ip_adapter_scale": Scale(steps=(0, 1))},
        {"ip_adapter_masks": [half()]},
        {"negative_ip_adapter_image": DOG},
        {"negative_prompt": "blurry"},
        {"seed": 5},
        {"guidance_scale": 3.0},
        {"guidance_rescale": 0.7},
    ]
    images = [plain]
    for change in changes:
        with compilations() as count:
            images.append(run(**{"ip_adapter_image": CAT} | change))
        assert count() == 0, change
        assert min(np.abs(images[-1] - other).max() for other in images[:-1]) > 1e-3, change


def test_no_control_of_several_images_compiles_again(pipe):
    call = {"ip_adapter_image": [CAT, DOG]}
    shapes = jax.tree.map(jax.typeof, handed(pipe, "a cat", **call))
    for change in (
        {"ip_adapter_scale": [[0.3, 0.9]]},
        {"ip_adapter_scale": "ease out"},
        {"ip_adapter_image": [DOG] * 2},
    ):
        with compilations() as count:
            found = handed(pipe, "a dog", **call | change)
        assert count() == 0, change
        assert jax.tree.map(jax.typeof, found) == shapes, change
