"""Painting over images: what is kept to the byte, and the same runs in diffusers on the same random weights."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
from helpers import ORACLES, TORCH_MODEL, compilations, nhwc
from PIL import Image
from small_model import CONFIG

from ipadapter_jax import InputError, StableDiffusion
from ipadapter_jax.diffusion.samplers import SAMPLERS, sample_table
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.inpainting import InitImage
from ipadapter_jax.testing import given_noise

CAT, MASK = (ORACLES / "assets" / f"{name}.png" for name in ("init", "mask"))
pytestmark = pytest.mark.usefixtures("one_device")
SMALL = {"num_inference_steps": 5, "strength": 0.6, "height": 64, "width": 64, "output_type": "np"}


def half_mask(size: int = 64) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[:, size // 2 :] = 255
    return mask


@pytest.fixture(scope="module")
def pipe(base) -> StableDiffusion:
    """The small model without an adapter."""
    return base


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original() -> np.ndarray:
    return np.asarray(Image.open(CAT).convert("RGB").resize((64, 64)))


def test_outside_of_the_mask_every_byte_is_kept(pipe, original):
    mask = half_mask()
    run = {"image": original, "mask_image": mask, **SMALL, "output_type": "pil"}
    [exact] = pipe("a cat", exact_outside_mask=True, **run)
    [found] = pipe("a cat", **run)
    outside = mask == 0
    np.testing.assert_array_equal(np.asarray(exact)[outside], original[outside])
    assert (np.asarray(found)[outside] != original[outside]).any()  # else only the latents are: the decoder sees all
    np.testing.assert_array_equal(np.asarray(exact)[~outside], np.asarray(found)[~outside])


def test_grey_parts_of_a_mask_mix(pipe, original):
    """By the mask's share; the network sees it as black or white."""
    mask = np.tile(np.linspace(0, 1, 64), (64, 1))
    run = {"image": original, "mask_image": mask, **SMALL}
    [exact], [found] = pipe("a cat", exact_outside_mask=True, **run), pipe("a cat", **run)
    share = np.rint(mask * 255)[:, :, None] / 255
    np.testing.assert_allclose(exact, share * found + (1 - share) * original / 255, atol=1e-6)


def test_latents_outside_of_the_mask_are_those_of_the_image(pipe, original):
    """The posterior of the image, without the noise of any step."""
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    with given_noise(posterior=noise):
        found = pipe("a cat", image=original, mask_image=half_mask(), **SMALL | {"output_type": "latent"})
    pixels = np.asarray(original, np.float32)[None] / 127.5 - 1
    clean = programs.encode_init_image(pipe.vae, pipe.params["vae"], pixels, noise)
    np.testing.assert_allclose(found[:, :, :4], clean[:, :, :4], atol=1e-5)
    assert np.abs(found - clean)[:, :, 4:].min(axis=-1).max() > 0.01


@pytest.mark.parametrize(("size", "expected"), [((70, 65), (64, 64)), ((64, 64), (64, 64)), ((135, 64), (128, 64))])
def test_the_size_of_a_image_is_rounded_down(size, expected):
    image = Image.open(CAT).convert("RGB").resize(size)
    init_image = InitImage.load(image, None, None, None, 8)
    assert init_image.image.shape == (*expected[::-1], 3) and init_image.mask is None
    resized = image if size == expected else image.resize(expected, Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(init_image.image, resized)
    np.testing.assert_allclose(init_image.pixels, np.asarray(resized, np.float32)[None] / 127.5 - 1)


def test_a_image_is_brought_to_height_and_width(pipe, original):
    odd = Image.fromarray(original).resize((70, 67))
    own = pipe("a cat", image=odd, **{k: v for k, v in SMALL.items() if k not in ("height", "width")})
    assert own.shape == (1, 64, 64, 3)
    np.testing.assert_array_equal(pipe("a cat", image=odd, **SMALL), own)
    mask = np.zeros((67, 70))
    assert InitImage.load(odd, mask, 64, 64, 8).mask.shape == (64, 64)  # held against the image, not the size


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": np.zeros((7, 64, 3), np.uint8), "height": None}, "is 64 x 7 pixels; give a larger one"),
        ({"height": 65}, "height=65 is not a multiple of 8"),
        ({"width": 0}, "width=0 is not a multiple of 8"),
        ({"width": "64"}, "width=64 is not a multiple"),
        ({"height": float("nan")}, "height=nan is not a multiple"),
        ({"height": 64.5}, "height=64.5 is not a multiple"),
        ({"height": -64}, "height=-64 is not a multiple"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": float("inf")}, "strength=inf"),
        ({"strength": "0.5"}, "strength=0.5"),
        ({"strength": -0.5}, "strength=-0.5"),
        ({"strength": 0}, "strength=0 "),
        ({"strength": [0.5]}, "strength="),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"mask_image": "nowhere.png"}, "nowhere.png"),
        ({"mask_image": np.zeros((64, 128))}, "the mask_image is 128 x 64 pixels, the image 64 x 64"),
        ({"image": None}, "give both|give image"),
        ({"mask_image": np.zeros((64, 64))}, "the mask_image has nothing inside .* nothing would be generated"),
        ({"mask_image": np.eye(64) * 0.4}, "the mask_image has nothing inside"),
    ],
)
def test_what_cannot_be_painted_is_refused_by_name(pipe, original, wrong, message):
    with pytest.raises(InputError, match=message) as caught:
        pipe("a cat", **{"image": original} | SMALL | wrong)
    assert "\n" not in str(caught.value)


# --- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_paints_over_a_image(pipe, original, sampler):
    """The same again for the same seed; another seed is another image."""

    strength = 0.4 if sampler == "pndm" else SMALL["strength"]  # it calls the network once more: three times, as all

    def run(seed=0):
        return pipe("a cat", image=original, **SMALL | {"strength": strength}, scheduler=sampler, seed=seed)[0]

    found = run()
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(run(), found)
    assert np.abs(run(seed=1) - found).max() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_less_strength_is_fewer_steps_from_less_noise(pipe, sampler):
    tables = [sample_table(sampler, pipe.schedule, 10, strength=strength) for strength in (1.0, 0.75, 0.3, 0.1)]
    noise = [table.level.sigma / table.level.alpha for table in tables]
    assert noise == sorted(noise, reverse=True) and len(set(noise)) == 4
    timesteps = [sorted(set(table.steps.timestep)) for table in tables]  # pndm has one twice
    assert [len(made) for made in timesteps] == [10, 7, 3, 1]  # rounded down
    assert all(made == timesteps[0][: len(made)] for made in timesteps)


def test_no_change_of_image_mask_or_seed_compiles_again(pipe, original):
    for mask in ({}, {"mask_image": half_mask()}):
        pipe("a cat", image=original, **mask, **SMALL)
        for change in (
            {"image": 255 - original},
            {"image": CAT},
            {"mask_image": 255 - half_mask().T} if mask else {"seed": 9},
            {"strength": 0.7},  # three steps of five again, as 0.6
            {"guidance_scale": 2.0, "guidance_rescale": 0.5},
            {"scheduler": "dpmsolver++"},
        ):
            with compilations() as count:
                pipe("a dog", **{"image": original} | mask | SMALL | change)
            assert count() == 0, change


# --- the same in diffusers -------------------------------------------------------------------------------------------


def folder_with(unet, root):
    """The recorded model with this UNet of diffusers."""
    shutil.copytree(TORCH_MODEL, root, ignore=shutil.ignore_patterns("unet"))
    unet.save_pretrained(root / "unet")
    return root


@pytest.fixture(scope="module", params=[4, 9], ids=["4 channels", "9 channels"])
def peers(request, one_device, tmp_path_factory):
    """Ours and diffusers' parts with a UNet of so many channels in; that of four has the small model's programs."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**dataclasses.asdict(CONFIG) | {"in_channels": request.param})
    root = folder_with(unet, tmp_path_factory.mktemp("model") / "model")
    return request.param, StableDiffusion.from_pretrained(root), root


@functools.cache
def peer_of(root, kind: str):
    """Diffusers' pipeline, and the configuration of the scheduler in its folder."""
    import diffusers

    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline").from_pretrained(
        root, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


def theirs(root, kind: str, sampler: str, **kwargs):
    """Latents (NHWC) of diffusers, its scheduler, and the noise in the order in which it was drawn."""
    import diffusers
    import torch

    pipeline, config = peer_of(root, kind)
    pipeline.scheduler = getattr(diffusers, sampler).from_config(config)
    latents = pipeline(generator=torch.Generator().manual_seed(3), output_type="latent", **kwargs).images
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(latents.shape, generator=generator).numpy() for _ in range(8)]
    return nhwc(latents.detach().numpy()), pipeline.scheduler, drawn


def ours(pipe, peer, drawn, order, **kwargs):
    """Latents from the same noise: `order` names the draws of diffusers, those of the three steps come last."""
    drawn = [nhwc(draw) for draw in drawn]
    noise = dict(zip(order, drawn, strict=False))
    if kwargs["scheduler"] in ("lcm", "euler_a"):
        noise["steps"] = drawn[len(order) : len(order) + 3]
    if pipe.unet.config.in_channels == 4:  # diffusers draws it and does not use it
        noise.pop("masked_posterior", None)
    config = json.loads(json.dumps(dict(peer.config)))
    pipe = dataclasses.replace(pipe, schedule=NoiseSchedule.from_json(config))
    with given_noise(**noise):
        return pipe(output_type="latent", **kwargs)


def check(found, expected) -> None:
    """Measured: 3e-6 of the largest latent at most, over all samplers."""
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


CALL = {"prompt": "a cat", "negative_prompt": "dark", "num_inference_steps": 5, "guidance_scale": 3.0}
PEERS = {
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
}


@pytest.mark.torch
@pytest.mark.parametrize("peers", [4], indirect=True)
@pytest.mark.parametrize("sampler", PEERS)
def test_image_to_image_equals_diffusers(peers, sampler, original):
    """PNDM does not: there diffusers begins with the outputs of steps that were not made."""
    _, pipe, root = peers
    image = Image.fromarray(original)
    expected, peer, drawn = theirs(root, "Img2Img", PEERS[sampler], image=image, strength=0.6, **CALL)
    given = {"image": original, "strength": 0.6, "scheduler": sampler, **CALL}
    found = ours(pipe, peer, drawn, ["posterior", "initial"], **given)
    check(found, expected)


@pytest.mark.torch
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_inpainting_equals_diffusers(peers, sampler, strength, original):
    """With the mask shown to a UNet of nine channels, or what is outside put back after every step of one of four."""
    channels, pipe, root = peers
    mask = np.zeros((64, 64), np.uint8)
    mask[10:45, 20:] = 255
    steps = {0.6: 5, 1.0: 3}[strength]  # three are made: the same program
    call = CALL | {"num_inference_steps": steps, "strength": strength}
    images = {"image": Image.fromarray(original), "mask_image": Image.fromarray(mask)}
    expected, peer, drawn = theirs(root, "Inpaint", PEERS[sampler], height=64, width=64, **images, **call)
    # With nine channels and full strength the image itself is not encoded.
    order = ["initial", "masked_posterior"]
    order = order if (channels, strength) == (9, 1.0) else ["posterior", *order]
    found = ours(pipe, peer, drawn, order, scheduler=sampler, **images, **call)
    check(found, expected)


@pytest.mark.torch
@pytest.mark.parametrize("peers", [9], indirect=True)
def test_an_inpainting_model_needs_image_and_mask(peers, original):
    _, pipe, _ = peers
    for given in ({}, {"image": original}):
        with pytest.raises(InputError, match="inpainting model .* needs an image and a mask: .*mask_image"):
            pipe("a cat", **given)
