"""Stable Diffusion 1.5 at its real size: counts at no cost, and (slow) the numbers of PyTorch.

The scripts that compare and measure at full size are run here at a tiny size, too.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import load_case, nchw, nhwc

from benchmarks.compare_with_diffusers import compare, photograph
from benchmarks.count_flops import unet_flops
from benchmarks.sample import check_parity
from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.image_projections import example_features, image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.models.vae import VAE, VAEConfig
from ipadapter_jax.testing.random_weights import write_model
from ipadapter_jax.testing.sizes import FULL, TINY
from ipadapter_jax.weights.components import IMAGE_ENCODER, TEXT_ENCODER, UNET, VAE_COMPONENT, abstract_params
from ipadapter_jax.weights.ip_adapter_file import load_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.open_component import load_component

ROOT = Path(__file__).resolve().parents[2]


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameter_counts_are_those_of_the_published_models():
    assert count(abstract_params(UNET, UNet(UNetConfig()))) == 859_520_964
    assert count(abstract_params(VAE_COMPONENT, VAE(VAEConfig()))) == 83_653_863
    assert count(abstract_params(TEXT_ENCODER, CLIPText(CLIPTextConfig()))) == 123_060_480
    assert count(abstract_params(IMAGE_ENCODER, CLIPVision(CLIPVisionConfig()))) == 632_076_800


SD21 = UNetConfig(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors", "layers"),
    [(SD21, 865_910_724, 686, 16), (SDXL, 2_567_463_684, 1680, 70)],
    ids=["SD 2.1", "SDXL"],
)
def test_parameter_counts_of_other_families(config, parameters, tensors, layers):
    tree = abstract_params(UNET, UNet(config))
    assert (count(tree), len(jax.tree.leaves(tree))) == (parameters, tensors)
    assert len(cross_attention_layers(config)) == layers


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ImageProjConfig("base", 1024, 768, 4), 3_150_336),
        (ImageProjConfig("plus", 1280, 768, 16, hidden_dim=768, heads=12, depth=4), 29_918_208),
        (ImageProjConfig("full", 1280, 768, 257), 2_625_024),
    ],
)
def test_adapter_counts(config, parameters):
    """base: 3,150,336 + 19,169,280 = 22,319,616, the 22M of the paper."""
    sites = cross_attention_layers(UNetConfig())
    assert len(sites) == 16
    tokens = jax.ShapeDtypeStruct((1, 4, 768), np.float32)
    adapter = jax.eval_shape(IPAdapter(tuple(site.width for site in sites)).init, jax.random.key(0), tokens)
    assert count(adapter) == 19_169_280
    assert (
        count(jax.eval_shape(image_projection(config).init, jax.random.key(0), example_features(config))) == parameters
    )


def test_flops_are_those_of_a_count_in_pytorch():
    """torch's FlopCounter on diffusers' UNet: 803.27 GFLOP; with an adapter of 4 tokens and its projection 803.62. Ours
    doubles its last image, of 32x32 positions and 640 channels, with 4 products in place of 9."""
    saved = 2 * 640**2 * (9 * 64**2 - 4 * 4 * 33**2)
    assert unet_flops(UNetConfig(), 64, 64, image_tokens=0).total() == pytest.approx(803.273e9 - saved, rel=1e-6)
    assert unet_flops(UNetConfig(), 64, 64).total() == pytest.approx(803.62e9 - saved, rel=1e-4)


@pytest.fixture(scope="session")
def full_size() -> Path:
    """The folder in IPADAPTER_JAX_FULL_SIZE, or weights/full, made on the spot (3.3 GB)."""
    folder = Path(os.environ.get("IPADAPTER_JAX_FULL_SIZE", ROOT / "weights" / "full"))
    if not (folder / "model_index.json").exists():
        write_model(folder, FULL)
    return folder


@pytest.mark.slow
def test_full_size_networks_equal_pytorch(full_size):
    """One call of every network of the sampler with the same random weights, float32."""
    case = load_case("fullsize_sd15")

    def apply(module, params, *args, **kwargs):
        return jax.jit(lambda params, *args: module.apply({"params": params}, *args, **kwargs))(params, *args)

    text = load_component(TEXT_ENCODER, full_size / "text_encoder", np.dtype("float32"))
    states = np.asarray(apply(text.module, text.params, case.inputs["input_ids"]).last_hidden_state)
    vision = load_component(IMAGE_ENCODER, full_size / "ip_adapter" / "models" / "image_encoder", np.dtype("float32"))
    pixels = nhwc(case.inputs["pixel_values_56"].repeat(4, axis=2).repeat(4, axis=3))
    output = apply(vision.module, vision.params, pixels)
    embeds, patches = np.asarray(output.image_embeds), np.asarray(output.hidden_states[-2][:, :8])
    case.check(text_last_hidden_state=states, image_embeds=embeds, image_hidden_m2_first8=patches)
    del text, vision, output

    unet = load_component(UNET, full_size / "unet", np.dtype("float32"))
    sample, time = nhwc(case.inputs["sample"]), case.inputs["timesteps"]
    plain = apply(unet.module, unet.params, sample, time, states, method=UNet.from_text)
    case.check(unet_out=nchw(plain))

    widths = tuple(site.width for site in cross_attention_layers(unet.module.config))
    file = open_ip_adapter(full_size / "ip_adapter" / "models" / "ip-adapter_sd15.safetensors")
    params = load_ip_adapter(file, widths, np.dtype("float32"))
    tokens = apply(image_projection(file.config), params["image_proj"], embeds)
    image_kv = apply(IPAdapter(widths), params["ip_adapter"], tokens)
    text_kv = apply(unet.module, unet.params, states, method=UNet.text_kv)
    weight = np.full((1, len(widths)), 0.7, np.float32)
    guided = apply(unet.module, unet.params, sample, time, text_kv, [image_kv], weight)
    case.check(**{"unet_ip_out_scale_0.7": nchw(guided)})


@pytest.fixture(scope="session")
def tiny_size(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, TINY)
    return folder


@pytest.mark.torch
@pytest.mark.usefixtures("one_device")
def test_a_photograph_gives_the_image_of_diffusers(tiny_size):
    """The noise in the last digits is 2e-5 of the latents; a scale of 0.7001 in place of 0.7 is 3e-4 away."""
    result = compare(tiny_size, photograph(), height=128, width=96)
    assert result.good
    assert result.latents_error < 1e-4 and result.pixel_differences.max() <= 1


@pytest.mark.slow
@pytest.mark.torch
def test_a_photograph_gives_the_image_of_diffusers_at_full_size(full_size, tmp_path):
    """In a process of its own with one device: the four virtual ones of the tests would hold the weights four times."""
    out = tmp_path / "compare.png"
    command = [
        sys.executable,
        "-m",
        "benchmarks.compare_with_diffusers",
        "--weights",
        full_size,
        "--steps",
        "3",
        "--out",
        out,
    ]
    done = subprocess.run(command, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.torch
@pytest.mark.slow  # half a minute of compiling what other tests check
def test_the_benchmark_prints_its_table(tiny_size, tmp_path):
    out = tmp_path / "table.md"
    options = ["--cpu", "--height", "64", "--width", "64", "--steps", "2", "--rounds", "1", "--peak-tflops", "1"]
    command = [sys.executable, "-m", "benchmarks.sample", "--weights", tiny_size, "--out", out, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.read_text(encoding="utf-8") == done.stdout
    table = {}
    for line in done.stdout.splitlines():
        if line.startswith("|"):
            title, *values = (cell.strip() for cell in line.strip("|").split("|"))
            table[title] = values
    start = {f"start to first image, {caches}" for caches in ("cold", "warm caches")}
    image = {f"image of 2 steps, {statistic}" for statistic in ("median", "minimum")}
    step = {"step with guidance, median", "step with guidance, minimum", "- TFLOP/s, median", "- of 1 TFLOP/s"}
    assert start | image | step | {"warm start / cold start", "peak memory"} <= table.keys()
    assert all(ours and theirs for title, (ours, theirs, _) in table.items() if title), table


@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-3), ("bfloat16", 0.05)])
def test_the_benchmark_has_no_numbers_for_sides_that_disagree(dtype, error):
    theirs = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    assert "latents" in check_parity(dtype, theirs * (1 + 1e-5), theirs)
    noise = np.random.default_rng(1).standard_normal(theirs.shape, np.float32)
    with pytest.raises(SystemExit, match="disagree"):
        check_parity(dtype, theirs + error * noise, theirs)
