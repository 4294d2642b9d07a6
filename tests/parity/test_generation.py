"""Whole generations against PyTorch diffusers on the same tiny random weights, latents, images and noise."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest
from helpers import (
    ADAPTERS,
    IMAGE_ENCODER,
    TORCH_MODEL,
    flax_folder,
    load_case,
    nchw,
    nhwc,
    noise_in_every_step,
    slow,
)
from recorded_calls import SAMPLERS, generate, image, recorded_noise

from ipadapter_jax import StableDiffusion
from ipadapter_jax.diffusion.schedule import NoiseSchedule

CASES = [
    *(
        f"gen_{s}_{p}_{g}"
        for s in ("ddim", "pndm", "dpmpp2m", "euler", "unipc", "lcm")
        for p in ("eps", "v")
        for g in ("g1p0", "g7p5")
    ),
    *(f"gen_{s}_{p}_g7p5" for s in ("dpmpp2m_karras", "euler_a") for p in ("eps", "v")),
    *("gen_plus", "gen_ddim_eta", "gen_two_adapters", "gen_masks", "gen_ip_embeds"),
    *slow("gen_full", "gen_no_adapter", "gen_multi_per_prompt", "gen_two_images"),
    *("gen_clip_skip", "gen_rescale_trailing", "gen_instantstyle"),
    *("gen_img2img", "gen_img2img_euler", "gen_inpaint", "gen_inpaint_08"),
]


@pytest.fixture(scope="module", autouse=True)
def one_program() -> Iterator[None]:
    with noise_in_every_step():
        yield


@pytest.fixture(scope="module")
def base(one_device) -> StableDiffusion:
    return StableDiffusion.from_pretrained(TORCH_MODEL)


def ignored(*_) -> None:
    """With a callback every step is a call of one program, whatever their number."""


@pytest.mark.parametrize("name", CASES)
def test_generation_equals_diffusers(base, name, tmp_path):
    """The recordings of PNDM, which calls the network once more than it has steps, begin with the second call."""
    case = load_case(name)
    with recorded_noise(case):
        timesteps, steps, final, decoded = generate(base, case, tmp_path)
    if "PNDM" in case.meta["scheduler"]["class"]:
        timesteps, steps = timesteps[1:], steps[1:]
    case.check(timesteps=timesteps, latents_steps=nchw(steps), latents=nchw(final))
    if decoded is not None:
        case.check(image=nchw(decoded))


@pytest.mark.parametrize("variant", ["base_defaults", "plus", *slow("base", "full")])
def test_generation_equals_the_authors_code(base, variant):
    """All samples and steps by one call of the program; of "plus" each by a call of its own, of gen_plus' program."""
    case = load_case(f"tencent_generate_{variant}")
    kwargs = {
        "prompt": "best quality, high quality",
        "negative_prompt": "monochrome, lowres, bad anatomy, worst quality, low quality",
        "guidance_scale": 7.5,
        "scale": 1.0,
        "num_samples": 1,
        **case.meta["call"]["kwargs"],
    }
    schedule = NoiseSchedule.from_json(case.meta["scheduler"]["config"])
    pipe = dataclasses.replace(base, schedule=schedule).with_ip_adapter(
        ADAPTERS / case.meta["ip_adapter"][0].rsplit("/", 1)[-1], image_encoder=IMAGE_ENCODER
    )
    samples, latents = kwargs.pop("num_samples"), nhwc(case.inputs["latents"])
    generate = functools.partial(
        pipe,
        ip_adapter_image=image(case.meta["images"]["pil_image"]),
        ip_adapter_scale=kwargs.pop("scale"),
        **kwargs,
        scheduler=SAMPLERS[case.meta["scheduler"]["class"]],
        output_type="latent",
    )
    if variant == "plus":
        final = np.concatenate([generate(latents=one[None], callback=ignored) for one in latents])
    else:
        final = generate(num_images_per_prompt=samples, latents=latents)
    assert len(final) == samples
    case.check(latents=nchw(final))


@pytest.fixture(scope="module")
def from_flax_files(one_device, tmp_path_factory) -> StableDiffusion:
    return StableDiffusion.from_pretrained(flax_folder(tmp_path_factory.mktemp("flax")))


@pytest.mark.parametrize("sampler", ["pndm", "ddim", *slow("dpmpp2m")])
def test_generation_from_flax_files(from_flax_files, sampler):
    """PyTorch diffusers' image; that of the genuine legacy Flax pipeline is 3e-4 away from it."""
    case = load_case(f"flax_pipeline_{sampler}")
    call = {name: case.meta["call"][name] for name in CALL}
    found = from_flax_files(
        **call,
        scheduler=SAMPLERS[case.meta["scheduler"]["torch"]],
        latents=nhwc(case.inputs["latents"]),
        output_type="np",
        callback=ignored,
    )
    stored = 1 if case.meta["call"]["stored"] == "full image" else 2
    case.check(image__torch=found[:, ::stored, ::stored])


CALL = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width")
