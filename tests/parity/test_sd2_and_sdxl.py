"""SD 2.x and SDXL against PyTorch diffusers on the same tiny random weights: encoders, UNets and whole generations."""

import functools
import json
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from helpers import ORACLES, load_case, nchw, nhwc, noise_in_every_step, slow
from PIL import Image
from recorded_calls import generate, recorded_noise

from ipadapter_jax import InputError, StableDiffusion
from ipadapter_jax.cli import main
from ipadapter_jax.models.families import SD2, SDXL
from ipadapter_jax.models.unet import AddedConditioning, UNet
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.weights.components import UNET, VAE_COMPONENT
from ipadapter_jax.weights.open_base_model import open_base
from ipadapter_jax.weights.open_component import load_component
from ipadapter_jax.weights.tokenizer import load_tokenizer, tokenize

MODELS = ORACLES / "models"
MODEL_OF = {"sdxl": MODELS / "sdxl_torch", "sd21": MODELS / "sd21_torch"}
GENERATIONS = [
    *("sdxl_gen_base", "sdxl_gen_micro", "sdxl_gen_prompt_2", "sdxl_gen_no_negative", "sdxl_gen_no_negative_encoded"),
    *("sdxl_gen_clip_skip", "sdxl_gen_rescale", "sdxl_gen_instantstyle", "sdxl_gen_vith", "sdxl_img2img"),
    *slow("sdxl_gen_plain", "sdxl_gen_plus_vith", "sdxl_gen_two_adapters", "sdxl_gen_g1", "sdxl_img2img_euler"),
    *slow("sdxl_inpaint", "sdxl_inpaint_08"),
    *("sd21_gen", "sd21_gen_euler", "sd21_gen_zero_snr", "sd21_img2img"),
    *slow("sd21_gen_plain", "sd21_gen_plus_dpmpp"),
]


@pytest.fixture(scope="module", autouse=True)
def one_program() -> Iterator[None]:
    with noise_in_every_step():
        yield


@pytest.fixture(scope="module")
def pipeline(one_device) -> Callable[[str], StableDiffusion]:
    """The pipeline of a recorded case, read once for each model."""
    read = functools.cache(StableDiffusion.from_pretrained)
    return lambda name: read(MODEL_OF[name.partition("_")[0]])


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation_equals_diffusers(pipeline, name, tmp_path):
    case, pipe = load_case(name), pipeline(name)
    with recorded_noise(case):
        timesteps, steps, final, decoded = generate(pipe, case, tmp_path)
    case.check(timesteps=timesteps, latents_steps=nchw(steps), latents=nchw(final))
    if decoded is not None:
        case.check(image=nchw(decoded))


@pytest.mark.parametrize("name", ["sdxl_unet", "sdxl_unet_nonsquare", "sd21_unet", "sd21_unet_nonsquare"])
def test_unet(name):
    case = load_case(name)
    unet = load_component(UNET, MODEL_OF[name.partition("_")[0]] / "unet", np.dtype("float32"))
    added = None
    if "text_embeds" in case.inputs:
        added = AddedConditioning(case.inputs["text_embeds"], case.inputs["time_ids"])

    def call(params, *inputs):
        return unet.module.apply({"params": params}, *inputs, method=UNet.from_text)

    inputs = nhwc(case.inputs["sample"]), case.inputs["timesteps"], case.inputs["encoder_hidden_states"], added
    case.check(out=nchw(jax.jit(call)(unet.params, *inputs)))


@pytest.mark.parametrize("name", ["sdxl_text_encoders", "sd21_text_encoder"])
def test_text_encoders(pipeline, name):
    case, pipe = load_case(name), pipeline(name)
    found = {}
    for prefix, call in case.meta["call"]["calls"].items():
        if "negative_prompt" not in call:
            continue  # zeros, which the generation without a negative prompt shows
        positive = pipe.text.encode(pipe.params, call["prompt"], call.get("prompt_2"), call.get("clip_skip", 0))
        negative = pipe.text.encode(pipe.params, call["negative_prompt"], call.get("negative_prompt_2"))
        found |= {f"{prefix}prompt_embeds": positive.states, f"{prefix}negative_prompt_embeds": negative.states}
        if positive.pooled is not None:
            found[f"{prefix}pooled_prompt_embeds"] = positive.pooled
            found[f"{prefix}negative_pooled_prompt_embeds"] = negative.pooled
    assert f"{prefix}prompt_embeds" in found
    case.check(**{name: np.asarray(array) for name, array in found.items()})


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("tokenizer_sdxl", "sdxl_torch/tokenizer"),
        ("tokenizer_sdxl_2", "sdxl_torch/tokenizer_2"),
        ("tokenizer_sd21", "sd21_torch/tokenizer"),
    ],
)
def test_tokenizers(name, folder):
    case = load_case(name)
    with pytest.warns(UserWarning, match="longer than 77 tokens"):
        ids = tokenize(load_tokenizer(MODELS / folder), case.meta["strings"], 77)
    np.testing.assert_array_equal(ids, case.outputs["input_ids_v5"])


@pytest.mark.parametrize("name", ["sdxl_vae", "sd21_vae"])
def test_vae(name):
    case = load_case(name)
    vae = load_component(VAE_COMPONENT, MODEL_OF[name.partition("_")[0]] / "vae", np.dtype("float32"))

    def call(method, x):
        return jax.jit(lambda params, x: vae.module.apply({"params": params}, x, method=method))(vae.params, x)

    found = {}
    for key, array in case.inputs.items():
        kind, _, size = key.partition("_")
        if kind == "image":
            mean, log_variance = call(VAE.posterior, nhwc(array).astype(np.float32) / 127.5 - 1)
            found |= {f"mean_{size}": nchw(mean), f"logvar_{size}": nchw(log_variance)}
        else:
            found[f"decoded_{size}"] = nchw(call(VAE.decode, vae.module.config.scaling_factor * nhwc(array)))
    case.check(**found)


def test_families_are_recognized():
    sd2, sdxl = (open_base(MODEL_OF[name]) for name in ("sd21", "sdxl"))
    assert (sd2.family, sdxl.family) == (SD2, SDXL)
    assert list(sdxl.components) == ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert (sd2.zeros_for_no_negative, sdxl.zeros_for_no_negative) == (False, True)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sd21", {"prompt_2": "a"}, "prompt_2.* is for a second text encoder"),
        ("sd21", {"original_size": (64, 64)}, "original_size.* is for SDXL"),
        ("sdxl", {"original_size": 64}, "original_size=64.* must be two whole numbers"),
        ("sdxl", {"target_size": (64, -1)}, "target_size.* must be two whole numbers"),
        ("sdxl", {"prompt_2": ["a", "b"]}, "2 texts in prompt_2 for 1 prompts"),
        ("sdxl", {"negative_prompt_2": "a"}, "negative_prompt_2 has no effect without negative_prompt"),
        (
            "sdxl",
            {"negative_prompt_2": "a", "negative_prompt": "", "guidance_scale": 1},
            "negative_prompt_2 has no effect",
        ),
        ("sdxl", {"negative_original_size": (8, 8)}, "negative_original_size has no effect without both"),
        (
            "sdxl",
            {"negative_crops_coords_top_left": (8, 8)},
            "negative_crops_coords_top_left has no effect without both",
        ),
        (
            "sdxl",
            {"negative_crops_coords_top_left": (8, 8), "image": ORACLES / "assets" / "init_xl.png"},
            "negative_crops_coords_top_left has no effect where generation starts from an image",
        ),
    ],
)
def test_what_does_not_fit_the_family_is_refused(pipeline, name, arguments, message):
    with pytest.raises(InputError, match=message):
        pipeline(name)("a cat", **arguments)


@pytest.mark.slow  # compiles SDXL for a batch of two
def test_a_batch_job_gives_what_the_pipeline_gives(tmp_path):
    """Both text encoders read the prompt of a row, and zeros stand for a negative prompt that it lacks."""
    table = tmp_path / "rows.csv"
    table.write_text("prompt,negative_prompt,name\na red cat,blurry,a\na blue dog,,b\n")
    words = ["batch", str(table), "--model", str(MODEL_OF["sdxl"]), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert main([*words, "--batch-size", "2", "--height", "64", "--width", "64", "--seed", "5"]) == 0
    [row_a, row_b] = [json.loads(line) for line in (tmp_path / "out" / "job.jsonl").read_text().splitlines()]
    pipe = StableDiffusion.from_pretrained(MODEL_OF["sdxl"])
    expected = pipe(
        ["a red cat", "a blue dog"],
        negative_prompt=["blurry", None],
        num_inference_steps=2,
        height=64,
        width=64,
        seed=[row_a["seed"], row_b["seed"]],
        progress_bar=False,
    )
    for name, image in zip("ab", expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), np.asarray(image))
