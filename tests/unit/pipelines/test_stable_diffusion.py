"""What `StableDiffusion` promises: nothing recompiles, images depend on their own seed, scale 0 is the base model."""

import functools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from helpers import (
    ADAPTERS,
    IMAGE_ENCODER,
    ORACLES,
    TORCH_MODEL,
    assert_same,
    compilations,
    flax_folder,
    forbid_sampling,
    handed_to_sampler,
    legacy_msgpack,
    on_one_device,
    recorded_pipe,
)
from PIL import Image
from small_model import small_adapter, small_model

from ipadapter_jax import InputError, PerPrompt, Scale, StableDiffusion, WeightFileError
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.pipelines.ip_adapter import Adapter, encoders_of
from ipadapter_jax.pipelines.outputs import images_of
from ipadapter_jax.pipelines.sample_batch import draw_noise
from ipadapter_jax.runtime.mesh import batch_sharding

CAT, DOG = (ORACLES / "assets" / f"img_{name}.png" for name in "ab")
SMALL = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
LATENT = SMALL | {"output_type": "latent"}


@pytest.fixture(scope="module")
def recorded() -> StableDiffusion:
    """Nothing is compiled for it here."""
    return recorded_pipe()


def test_threads_share_a_pipeline(pipe):
    """Prompts of different lengths, each alone and at once: nothing in a pipeline changes."""
    prompts = ["a", "a cat", "a dog on a beach at night", "", "one two three four five six seven eight nine ten"]
    call = functools.partial(pipe, ip_adapter_image=CAT, **SMALL)
    alone = {prompt: call(prompt) for prompt in prompts}
    states = {prompt: np.asarray(pipe.text.encode(pipe.params, [prompt]).states) for prompt in prompts}
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(
            lambda prompt: (prompt, np.asarray(pipe.text.encode(pipe.params, [prompt]).states)), prompts * 40
        )
        images = pool.map(lambda prompt: (prompt, call(prompt)), prompts * 2)
        for wanted, pairs in ((states, texts), (alone, images)):
            for prompt, found in pairs:
                np.testing.assert_array_equal(found, wanted[prompt])


def test_nothing_that_a_person_changes_compiles_again(pipe):
    pipe("a cat", ip_adapter_image=CAT, **SMALL)
    with compilations() as count:
        pipe("a dog on a beach", ip_adapter_image=DOG, negative_prompt="blurry", **SMALL)
        pipe("a cat", ip_adapter_image=CAT, ip_adapter_scale=0.3, guidance_scale=4.0, seed=7, **SMALL)
        pipe(ip_adapter_image=np.zeros((30, 50, 3), np.uint8), fit="pad", ip_adapter_scale=0.0, **SMALL)
    assert count() == 0
    with compilations() as count:  # the counter sees a program that is really new
        pipe.text.encode(pipe.params, ["a", "b", "c", "d", "e"])
    assert count() > 0


def test_another_sampler_is_the_same_program(pipe):
    """Among those without fresh noise; and with a callback every step is the same program as the first."""
    pipe("a cat", ip_adapter_image=CAT, **SMALL)
    with compilations() as count:
        for sampler in ("dpmsolver++", "euler", "unipc"):
            pipe("a cat", ip_adapter_image=CAT, scheduler=sampler, **SMALL)
        pipe("a cat", ip_adapter_image=CAT, scheduler="unipc", scheduler_config={"use_karras_sigmas": True}, **SMALL)
    assert count() == 0
    with compilations() as count:
        seen = []
        pipe(
            "a cat",
            ip_adapter_image=CAT,
            callback=lambda *_: seen.append(count()),
            **SMALL | {"num_inference_steps": 4},
        )
    assert len(seen) == 4 and len(set(seen)) == 1, seen


def test_scale_zero_is_the_base_model_bit_for_bit(base, pipe):
    plain = base("a cat", **SMALL)
    np.testing.assert_array_equal(pipe("a cat", ip_adapter_image=CAT, ip_adapter_scale=0.0, **SMALL), plain)
    assert np.abs(pipe("a cat", ip_adapter_image=CAT, ip_adapter_scale=1.0, **SMALL) - plain).max() > 0.01


def test_a_image_depends_on_its_own_seed_only(pipe):
    """Not on the size of the batch nor on its place there: within one level of 255."""
    batch = pipe("a cat", ip_adapter_image=CAT, num_images_per_prompt=5, seed=10, **SMALL)
    alone = pipe("a cat", ip_adapter_image=CAT, seed=13, **SMALL)
    shuffled = pipe("a cat", ip_adapter_image=CAT, num_images_per_prompt=2, seed=[13, 10], **SMALL)
    assert levels(batch[3], alone[0]) <= 1
    assert levels(shuffled, batch[[3, 0]]) <= 1
    assert levels(batch[3], batch[0]) > 5


def levels(a, b) -> int:
    """The largest difference of 8-bit pixels."""
    return int(np.abs(np.rint(a * 255) - np.rint(b * 255)).max())


def test_a_image_does_not_depend_on_the_number_of_devices(pipe):
    """Its noise bit for bit, its image within one level."""
    with on_one_device():
        alone = StableDiffusion.from_pretrained(small_model())
    alone = alone.with_ip_adapter(small_adapter("ip-adapter_tiny"), image_encoder=IMAGE_ENCODER)
    assert (alone.mesh.size, pipe.mesh.size) == (1, 4)
    seeds = np.repeat(np.uint32(13), 4)
    noise = [
        draw_noise((8, 8, 4), jax.device_put(seeds, batch_sharding(mesh)), np.uint32(0), mesh)
        for mesh in (alone.mesh, pipe.mesh)
    ]
    np.testing.assert_array_equal(*noise)
    images = [own("a cat", ip_adapter_image=CAT, num_images_per_prompt=3, seed=12, **SMALL) for own in (alone, pipe)]
    assert levels(*images) <= 1


def test_prompts_are_independent_and_prompt_major(pipe):
    """Each with an image of its own: as calls for each."""
    prompts, call = ["a cat", "a dog"], {"negative_prompt": ["dark", ""], "num_images_per_prompt": 2, "seed": 5}
    both = pipe(prompts, ip_adapter_image=PerPrompt([CAT, DOG]), **call, **LATENT)
    assert both.shape == (4, 8, 8, 4)
    for i, (prompt, negative, image) in enumerate(zip(prompts, ("dark", ""), (CAT, DOG), strict=True)):
        own = {"negative_prompt": negative, "num_images_per_prompt": 2, "seed": 5 + 2 * i}
        alone = pipe(prompt, ip_adapter_image=image, **own, **LATENT)
        # Other shapes, other order of sums: measured 8e-5, of latents up to 6 after guidance of 7.5.
        np.testing.assert_allclose(both[2 * i : 2 * i + 2], alone, atol=3e-4)
    swapped = pipe(prompts, ip_adapter_image=PerPrompt([DOG, CAT]), **call, **LATENT)
    assert np.abs(swapped - both).max(axis=(1, 2, 3)).min() > 0.01


def test_the_same_image_twice_is_that_image_once(pipe):
    """Tokens of several images share one softmax, and doubled tokens leave a softmax attention as it is. One of weight
    zero keeps its share of attention."""
    once = pipe("a cat", ip_adapter_image=CAT, **SMALL)
    np.testing.assert_allclose(pipe("a cat", ip_adapter_image=[CAT, CAT], **SMALL), once, atol=2e-4)
    both = pipe("a cat", ip_adapter_image=[CAT, DOG], **SMALL)
    assert np.abs(both - once).max() > 1e-3
    first = pipe("a cat", ip_adapter_image=[CAT, DOG], ip_adapter_scale=[[1.0, 0.0]], **SMALL)
    assert min(np.abs(first - both).max(), np.abs(first - once).max()) > 1e-3


def test_two_adapters_at_weight_zero_and_one(pipe):
    """tests/parity compares images of two adapters with diffusers'."""
    two = pipe.with_ip_adapter(small_adapter("ip-adapter-plus_tiny"), image_encoder=IMAGE_ENCODER)
    first, second = encoders_of([pipe.adapters[0], two.adapters[1]])
    assert first is second  # the same weights are not loaded twice
    found = handed_to_sampler(two, "a cat", ip_adapter_image=[CAT, [DOG, CAT]], ip_adapter_scale=[1.0, 0.0], **SMALL)
    none = found.image_branches.pop()
    assert not none.weight.any() and none.kv[0][0].shape[2] == 32
    assert_same(found, handed_to_sampler(pipe, "a cat", ip_adapter_image=CAT, **SMALL))


def test_given_embeddings_replace_the_image(pipe):
    adapter = pipe.adapters[0]
    features = np.asarray(adapter.encode(adapter.inputs.from_images([[CAT]], "crop", guided=True)))[0]
    expected = handed_to_sampler(pipe, "a cat", ip_adapter_image=CAT, **SMALL)
    assert_same(handed_to_sampler(pipe, "a cat", ip_adapter_image_embeds=[features], **SMALL), expected)


def test_given_latents_replace_the_seed(pipe):
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    first = pipe("a cat", ip_adapter_image=CAT, latents=latents, seed=1, **SMALL)
    np.testing.assert_array_equal(pipe("a cat", ip_adapter_image=CAT, latents=latents, seed=2, **SMALL), first)


def test_step_by_step_gives_the_same_latents(pipe):
    """The scale of each step reaches that step, in either way."""
    call = {"ip_adapter_image": CAT, "ip_adapter_scale": Scale(steps=(1, 0))} | LATENT
    seen, constant = [], []
    stepped = pipe("a cat", callback=lambda *step: seen.append(step), **call)
    np.testing.assert_allclose(stepped, pipe("a cat", **call), atol=1e-4)
    assert [(number, timestep) for number, timestep, _ in seen] == [(0, 501), (1, 1)]
    pipe("a cat", callback=lambda *step: constant.append(step), **call | {"ip_adapter_scale": 1.0})
    np.testing.assert_array_equal(seen[0][2], constant[0][2])
    assert np.abs(seen[1][2] - constant[1][2]).max() > 1e-3


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.06), ("float16", 0.02)])
def test_half_precision_stays_near_float32(pipe, dtype, error):
    """Mean difference of images in [0, 1]; 8 and 11 bits of mantissa through two steps with guidance 7.5."""
    with on_one_device():  # which compiles sooner
        half = StableDiffusion.from_pretrained(small_model(), dtype=dtype)
    half = half.with_ip_adapter(small_adapter("ip-adapter_tiny"), image_encoder=IMAGE_ENCODER)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {dtype}
    found = half("a cat", ip_adapter_image=CAT, **SMALL)
    assert found.dtype == np.float32
    assert np.abs(found - pipe("a cat", ip_adapter_image=CAT, **SMALL)).mean() < error


def test_a_flax_repository_gives_the_same_images(base, tmp_path):
    folder, unet = flax_folder(tmp_path), small_model() / "unet"
    shutil.copy(unet / "config.json", folder / "unet")
    weights = legacy_msgpack(unet / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_flax_model.msgpack").write_bytes(weights)
    flax = StableDiffusion.from_pretrained(folder)
    np.testing.assert_array_equal(flax("a cat", **SMALL), base("a cat", **SMALL))


def test_pil_output(pipe):
    [image] = pipe("a cat", ip_adapter_image=Image.open(CAT), **SMALL | {"output_type": "pil"})
    assert (image.size, image.mode) == ((64, 64), "RGB")
    expected = pipe("a cat", ip_adapter_image=CAT, **SMALL)[0]
    np.testing.assert_array_equal(np.asarray(image), np.rint(expected * 255))


def test_a_long_prompt_works_and_says_what_is_lost(pipe):
    with pytest.warns(UserWarning, match="longer than 77 tokens; ignored: .*sunglasses"):
        pipe("a photo of a cat " * 40 + "wearing sunglasses", ip_adapter_image=CAT, **SMALL)


EMBEDS = {"ip_adapter_image": None, "ip_adapter_image_embeds": [np.zeros((2, 1, 40))]}
WRONG = [
    ({"height": 65}, r"height=65 is not a multiple of 8; the nearest size is 64"),
    ({"width": 0}, "width=0"),
    ({"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number between 1 and 1000"),
    ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 must be a whole number"),
    ({"num_inference_steps": None}, "num_inference_steps=None"),
    ({"height": float("nan")}, "height=nan"),
    ({"guidance_scale": 1e300}, "guidance_scale=1e"),
    ({"guidance_scale": "7"}, "guidance_scale=7"),
    ({"ip_adapter_scale": "0.5"}, "no preset '0.5'; choose linear"),
    ({"prompt": None}, "prompt must be a text"),
    ({"prompt": "\udcff"}, "not text in UTF-8"),
    ({"seed": [None]}, r"seed \[None\] must be a whole number"),
    ({"guidance_scale": 10**400}, "guidance_scale=1000"),
    ({"ip_adapter_scale": 10**400}, "ip_adapter_scale=1000"),
    ({"seed": 1.5}, "seed 1.5 must be a whole number"),
    ({"seed": 2**32 - 1, "num_images_per_prompt": 2}, "too large for 2 images"),
    ({"latents": "abc"}, "latents must be an array of numbers"),
    ({"callback": 5}, "callback must be a function"),
    ({"ip_adapter_image": None, "ip_adapter_image_embeds": 5}, "ip_adapter_image_embeds of shape"),
    ({"ip_adapter_image": None, "ip_adapter_image_embeds": [["a"]]}, "ip_adapter_image_embeds must be an array"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"ip_adapter_scale": float("nan")}, "ip_adapter_scale=nan is not a finite number"),
    ({"ip_adapter_scale": [1.0, 1.0]}, "2 values for 1 adapters"),
    ({"eta": 2.0}, "eta=2.0"),
    ({"scheduler": "heun"}, "scheduler 'heun' is not known; choose ddim"),
    ({"output_type": "jpg"}, "output_type 'jpg'"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [3]}, "prompt"),
    ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ({"seed": [1, 2]}, "2 seeds for 1 images"),
    ({"seed": -1}, "seed -1 must be a whole number between 0"),
    ({"fit": "zoom"}, "zoom"),
    ({"latents": np.zeros((1, 4, 8, 8))}, r"latents have shape \(1, 4, 8, 8\), these settings need \(1, 8, 8, 4\)"),
    ({"latents": np.full((1, 8, 8, 4), np.inf)}, "latents holds numbers that are not finite"),
    ({"ip_adapter_image": None}, "image prompt"),
    ({"ip_adapter_image": []}, "empty"),
    ({"ip_adapter_image": "nowhere.png"}, "nowhere.png"),
    ({"ip_adapter_image_embeds": [np.zeros((2, 1, 40))]}, "both given"),
    ({"ip_adapter_scale": "stile"}, "no preset 'stile'; did you mean 'style'?"),
    ({"ip_adapter_scale": {"down": {"block_7": 1}}}, "down.block_7 has no cross-attention here; down has block_0"),
    ({"ip_adapter_scale": {"up": {"block_1": [1, 1]}}}, "up.block_1 has 2 factors for"),
    ({"ip_adapter_scale": Scale(layers=[1.0])}, "1 factors for"),
    ({"ip_adapter_scale": Scale(start=0.5, end=0.5)}, "0 <= start < end <= 1"),
    ({"ip_adapter_scale": Scale(steps=())}, "steps is empty"),
    ({"ip_adapter_scale": Scale(steps="linear")}, "not a list of numbers"),
    ({"ip_adapter_scale": [[1.0, 1.0]]}, "2 scales for 1 images"),
    ({"ip_adapter_scale": [["linear"]]}, "take one number each"),
    ({"ip_adapter_masks": CAT}, "is a list with one mask for each image"),
    ({"ip_adapter_masks": [CAT, CAT]}, "2 masks for 1 images"),
    ({"ip_adapter_masks": [np.zeros((64, 128))]}, "mask 1 is 128 x 64 pixels, the image 64 x 64"),
    ({"negative_ip_adapter_image": [CAT, CAT]}, "2 images for 1; give one"),
    ({"ip_adapter_uncond": "none"}, "ip_adapter_uncond 'none' is not known; choose default"),
    ({"ip_adapter_image": PerPrompt([CAT, CAT])}, "2 image prompts for 1 prompts"),
    ({"fit": "tile", "ip_adapter_image": np.zeros((9, 90, 3))}, "would be 10 tiles, at most 8"),
    ({"strength": 0.5}, "strength is for image-to-image and inpainting: give image"),
    ({"image": CAT, "strength": 0.1}, "leaves no step to make"),
    ({"image": CAT, "strength": 1.5}, "leaves no step to make: give at most 1"),
    ({"mask_image": CAT}, "give both"),
    ({"image": CAT, "exact_outside_mask": True}, "exact_outside_mask needs mask_image"),
    (
        {"prompt": ["a", "b"], "ip_adapter_image": [CAT, CAT]},
        r"2 images for 2 prompts: give PerPrompt\(\[...\]\) for one",
    ),
    ({"fit": "pad"} | EMBEDS, "fit=pad is for images; ip_adapter_image_embeds are encoded already"),
    ({"ip_adapter_uncond": "black", "negative_ip_adapter_image": CAT}, "say the same; give one of them"),
    (
        {"negative_prompt": "dark", "guidance_scale": 1},
        "negative_prompt has no effect without guidance, guidance_scale=1",
    ),
    ({"guidance_rescale": 0.5, "guidance_scale": 0.5}, "guidance_rescale has no effect without guidance"),
    ({"strength": 0.0}, "strength is for image-to-image and inpainting: give image"),
    ({"width": 10**8}, r"an image of 100000000 x 64 pixels would need at least .* GB of memory \([\d,]+ bytes\)"),
    (
        {"num_images_per_prompt": 10**9},
        "1,000,000,000 images of 64 x 64 pixels would need .* or make fewer images at once",
    ),
    ({"guidance_rescale": 2.0}, "guidance_rescale=2.0 must lie between 0"),
    ({"clip_skip": 9}, "clip_skip=9 must be a whole number of layers to leave out, 0 to"),
    ({"ip_adapter_image": None, "ip_adapter_image_embeds": [np.zeros((3, 1, 40))]}, r"needs \(2, images, 40\)"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_arguments_end_before_anything_is_computed(recorded, wrong, message, monkeypatch):
    forbid_sampling(monkeypatch)
    arguments = {"prompt": "a cat", "ip_adapter_image": CAT} | SMALL | wrong
    with pytest.raises(InputError, match=message) as caught:
        recorded(**arguments)
    assert "\n" not in str(caught.value)


def test_an_image_without_adapter_is_refused(base):
    with pytest.raises(InputError, match="needs an adapter: call with_ip_adapter first"):
        base("a cat", ip_adapter_image=CAT, **SMALL)


def test_wrong_models_are_refused_by_name(base, tmp_path):
    with pytest.raises(InputError, match="nothing-here"):
        StableDiffusion.from_pretrained(tmp_path / "nothing-here")
    with pytest.raises(InputError, match="diffusers' layout"):
        StableDiffusion.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="float8.*float32, bfloat16, float16"):
        StableDiffusion.from_pretrained(TORCH_MODEL, dtype="float8")
    with pytest.raises(WeightFileError, match="this is a CLIP image encoder"):
        base.with_ip_adapter(IMAGE_ENCODER / "model.safetensors")
    with pytest.raises(InputError, match=r"name one of its files \(.*ip-adapter_tiny.safetensors"):
        base.with_ip_adapter(ADAPTERS)


def test_a_image_that_is_not_finite_is_an_error():
    with pytest.raises(InputError, match="not finite: .* try bfloat16 or float32"):
        images_of(np.full((1, 8, 8, 3), np.nan, np.float32), "np", None)


def test_numbers_may_come_from_numpy_and_jax(pipe):
    expected = pipe("a cat", ip_adapter_image=CAT, ip_adapter_scale=0.5, seed=3, **SMALL)
    found = pipe(
        "a cat",
        negative_prompt=None,
        ip_adapter_image=CAT,
        ip_adapter_scale=jax.numpy.float32(0.5),
        seed=np.array([3]),
        **SMALL | {"num_inference_steps": np.int64(2)},
    )
    np.testing.assert_array_equal(found, expected)


def copy_with(root, part: str, **changes):
    """The small model with other settings in one of its JSON files."""
    shutil.copytree(small_model(), root / "model")
    path = root / "model" / part
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return root / "model"


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, "inpainting|conv_in"),
        ("unet/config.json", {"layers_per_block": "2"}, "layers_per_block='2'"),
        ("unet/config.json", {"attention_type": "gated"}, "attention_type"),
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor=None"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor=0 must be positive"),
        ("text_encoder/config.json", {"hidden_act": ["g"]}, r"hidden_act=\('g',\)"),
        ("text_encoder/config.json", {"num_attention_heads": 0}, "0 heads"),
        ("scheduler/scheduler_config.json", {"beta_start": None}, "beta_start=None"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}, "num_train_timesteps='1000'"),
        ("scheduler/scheduler_config.json", {"steps_offset": -1}, "steps_offset=-1"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "1 trained_betas for 1000 timesteps"),
    ],
)
def test_unusable_settings_are_refused_by_name(tmp_path, part, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        StableDiffusion.from_pretrained(copy_with(tmp_path, part, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vision", [None, [], {"hidden_size": "x"}, {"num_attention_heads": 0}, {"hidden_act": ["g"]}])
def test_unusable_encoder_settings_are_refused(base, tmp_path, vision):
    shutil.copytree(IMAGE_ENCODER, tmp_path / "encoder")
    config = tmp_path / "encoder" / "config.json"
    given = {"vision_config": vision} if isinstance(vision, dict) else {"hidden_size": 7, "vision_config": vision}
    config.write_text(json.dumps(json.loads(config.read_text()) | given))
    with pytest.raises(InputError) as caught:
        base.with_ip_adapter(ADAPTERS / "ip-adapter_tiny.safetensors", image_encoder=tmp_path / "encoder")
    assert "\n" not in str(caught.value)


def test_a_model_without_a_size_asks_for_one(tmp_path):
    pipe = StableDiffusion.from_pretrained(copy_with(tmp_path, "unet/config.json", sample_size=None))
    with pytest.raises(InputError, match="give height and width"):
        pipe("a cat")
    assert pipe.configs.latent_shape(64, 64) == (8, 8, 4)
    assert handed_to_sampler(pipe, "a cat", **SMALL).guidance_branches == 2


def test_prompts_have_the_tokenizers_length(tmp_path):
    """As in diffusers: model_max_length of the tokenizer, not the positions that the text encoder has."""
    pipe = StableDiffusion.from_pretrained(copy_with(tmp_path, "tokenizer/tokenizer_config.json", model_max_length=20))
    assert pipe.text.encode(pipe.params, ["a cat"]).states.shape[:2] == (1, 20)


def test_repr_is_one_line(pipe):
    assert "ip-adapter_tiny.safetensors" in repr(pipe) and len(repr(pipe)) < 200


def test_the_adapter_says_what_it_is(pipe):
    [adapter] = pipe.adapters
    assert isinstance(adapter, Adapter)
    assert adapter.projection.config == ImageProjConfig("base", feature_dim=40, cross_attention_dim=32, num_tokens=4)
