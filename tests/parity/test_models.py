"""Every network against PyTorch on the same tiny random weights, float32, within the recorded tolerances."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, ORACLES, TORCH_MODEL, flax_folder, load_case, nchw, nhwc, slow

from ipadapter_jax.images.preprocess import clip_pixel_values, load_image
from ipadapter_jax.models import transformer
from ipadapter_jax.models import vae as vae_module
from ipadapter_jax.models.image_projections import image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.layers import ResnetBlock
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import attention_grids, cross_attention_layers
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.ops.attention import AttentionBranch
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.conditioning import ImageBranch
from ipadapter_jax.pipelines.denoiser import branch_weights
from ipadapter_jax.pipelines.masks import layer_mask, load_mask
from ipadapter_jax.pipelines.scales import scale_table
from ipadapter_jax.weights.components import IMAGE_ENCODER as IMAGE_ENCODER_COMPONENT
from ipadapter_jax.weights.components import TEXT_ENCODER, UNET, VAE_COMPONENT
from ipadapter_jax.weights.ip_adapter_file import load_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.open_component import LoadedComponent, load_component
from ipadapter_jax.weights.tokenizer import load_tokenizer, tokenize

FLOAT32 = np.dtype("float32")


@functools.cache
def component(name: str) -> LoadedComponent:
    kinds = {"unet": UNET, "vae": VAE_COMPONENT, "text_encoder": TEXT_ENCODER}
    if name == "image_encoder":
        return load_component(IMAGE_ENCODER_COMPONENT, IMAGE_ENCODER, FLOAT32)
    return load_component(kinds[name], TORCH_MODEL / name, FLOAT32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def applied(module, method, params, *args):
    return module.apply({"params": params}, *args, method=method)


def apply(loaded: LoadedComponent, *args, method=None):
    return applied(loaded.module, method, loaded.params, *args)


@functools.partial(jax.jit, static_argnums=0)
def unet_output(module: UNet, params, x, times, text_kv, image_kv, weights):
    """Everything is an argument: cases of the same shapes are one program."""
    return module.apply({"params": params}, x, times, text_kv, image_kv, weights)


def test_tokenizer():
    case = load_case("tokenizer_sd15")
    ids = tokenize(load_tokenizer(TORCH_MODEL / "tokenizer"), case.meta["strings"], 77)
    variants = [case.outputs[f"input_ids_{name}"] for name in ("slow_ftfy", "fast", "v5")]
    agreed = case.meta["rows_where_all_three_agree"]
    assert len(agreed) > 20
    np.testing.assert_array_equal(ids[agreed], variants[0][agreed])
    for row, found in enumerate(ids):
        assert any((found == variant[row]).all() for variant in variants), case.meta["strings"][row]


def check_text(case, output, suffix=""):
    case.check(**{f"last_hidden_state{suffix}": output.last_hidden_state, f"pooler_output{suffix}": output.pooled})


def test_text_encoder():
    case = load_case("text_encoder")
    loaded = component("text_encoder")
    output = apply(loaded, case.inputs["input_ids"])
    check_text(case, output)
    case.check(**{f"hidden_states_{i}": state for i, state in enumerate(output.hidden_states)})


def test_image_encoder():
    case = load_case("vision_encoder")
    images = [load_image(ORACLES / "assets" / name) for name in ("img_a.png", "img_b.png")]
    output = apply(component("image_encoder"), clip_pixel_values(images))
    zeros = apply(component("image_encoder"), jnp.zeros((1, 224, 224, 3)))
    case.check(
        image_embeds=output.image_embeds,
        hidden_states_m2=output.hidden_states[-2],
        last_hidden_state=output.hidden_states[-1],
        zeros_hidden_states_m2=zeros.hidden_states[-2],
        zeros_image_embeds=zeros.image_embeds,
    )


def test_vae():
    case = load_case("vae")
    images = nhwc(case.inputs["image_64x64"]).astype(np.float32) / 127.5 - 1
    mean, log_variance = apply(component("vae"), images, method=VAE.posterior)
    scale = component("vae").module.config.scaling_factor
    decoded = apply(component("vae"), scale * nhwc(case.inputs["latents_64x64"]), method=VAE.decode)
    case.check(mean_64x64=nchw(mean), logvar_64x64=nchw(log_variance), decoded_64x64=nchw(decoded))


def unet_with_images(case, image_kv, scale: float):
    """The recorded call with keys and values of images, in a batch of 5 samples: all cases are one program."""
    unet, samples = component("unet"), len(case.inputs["sample"])

    def repeated(array):
        return np.resize(array, (5, *np.shape(array)[1:]))

    text_kv = apply(unet, repeated(case.inputs["encoder_hidden_states"]), method=UNet.text_kv)
    x, times = repeated(nhwc(case.inputs["sample"])), repeated(case.inputs["timesteps"])
    weights = np.full((1, len(text_kv)), scale, np.float32)
    kv = jax.tree.map(repeated, image_kv)
    return nchw(unet_output(unet.module, unet.params, x, times, text_kv, [kv], weights))[:samples]


@pytest.mark.parametrize("name", ["unet", *slow("unet_small_input")])
def test_unet(name):
    """With images of weight zero, which leave it as it is; the test of odd sizes does without them."""
    widths = [site.width for site in cross_attention_layers(component("unet").module.config)]
    images = [(np.ones((5, 4, width), np.float32),) * 2 for width in widths]
    case = load_case(name)
    case.check(out=unet_with_images(case, images, 0.0))


def test_unet_of_odd_sizes_and_fractional_timesteps():
    case = load_case("unet_nonsquare")
    x, times, text = nhwc(case.inputs["sample"]), case.inputs["timesteps"], case.inputs["encoder_hidden_states"]
    times = times.astype(np.float32)  # the same program as the fractional ones; test_unet gives whole numbers
    run = functools.partial(apply, component("unet"), method=UNet.from_text)
    case.check(
        out=nchw(run(x, times, text)),
        out_fractional_t=nchw(run(x, np.array([749.25, 0.5], np.float32), text)),
        out_odd=nchw(run(nhwc(case.inputs["sample_odd"]), times[:1], text[:1])),
    )


def test_blocks_on_small_inputs_show_their_epsilons():
    case = load_case("blocks_small_input")
    unet, vae = component("unet"), component("vae")
    hidden, hidden_vae = nhwc(case.inputs["hidden"]), nhwc(case.inputs["hidden_vae"])
    text = case.inputs["encoder_hidden_states"]
    down, mid = unet.params["down_blocks_0"], vae.params["decoder"]["mid_block"]

    def with_text(module, x, text):
        return module(x, [[AttentionBranch(*module.text_kv(text, 0))]])

    def with_time(module, x, time):
        return module(x, module.time_shift(time))

    config = unet.module.config
    attention = transformer.Transformer(hidden.shape[-1], config.heads(0), 1, config.norm_num_groups, jnp.float32)
    resnet = ResnetBlock(config.block_out_channels[0], config.norm_num_groups, config.norm_eps, jnp.float32)
    vae_attention = vae_module.Attention(vae.module.config, jnp.float32)
    vae_resnet = ResnetBlock(hidden_vae.shape[-1], vae.module.config.norm_num_groups, 1e-6, jnp.float32)
    results = {
        "unet.down_blocks.0.attentions.0": attention.apply(
            {"params": down["attentions_0"]}, hidden, text, method=with_text
        ),
        "unet.down_blocks.0.resnets.0": resnet.apply(
            {"params": down["resnets_0"]}, hidden, case.inputs["temb"], method=with_time
        ),
        "vae.decoder.mid_block.attentions.0": vae_attention.apply({"params": mid["attentions_0"]}, hidden_vae),
        "vae.decoder.mid_block.resnets.0": vae_resnet.apply({"params": mid["resnets_0"]}, hidden_vae),
    }
    case.check(**{name: nchw(value) for name, value in results.items()})


def test_decoupled_attention_layer():
    case = load_case("attn_layer")
    weights = {key.removeprefix("w."): value for key, value in case.inputs.items() if key.startswith("w.")}
    kernels = {name: {"kernel": weights[f"{name}.weight"].T} for name in ("to_q", "to_k", "to_v")}
    kernels["to_out_0"] = {"kernel": weights["to_out.0.weight"].T, "bias": weights["to_out.0.bias"]}
    layer = transformer.Attention(64, case.meta["call"]["heads"], jnp.float32)
    adapter = {name: {"kernel": weights[f"{name}.weight"].T} for name in ("to_k_ip", "to_v_ip")}
    context = case.inputs["encoder_hidden_states"]
    [image_kv] = IPAdapter((64,)).apply({"params": {"1": adapter}}, context[:, 77:])

    def decoupled(module, x, text, scale):
        return module(x, [AttentionBranch(*module.key_value(text)), AttentionBranch(*image_kv, scale)])

    for scale in (0.0, 0.5, 1.0):
        out = layer.apply({"params": kernels}, case.inputs["hidden_states"], context[:, :77], scale, method=decoupled)
        case.check(**{f"out_scale_{scale}": out})


@functools.cache
def adapter(path: str, rounded: str = "float32"):
    """(projection as Loaded, adapter as Loaded) of a file, keys and values rounded to another dtype."""
    widths = tuple(site.width for site in cross_attention_layers(component("unet").module.config))
    file = open_ip_adapter(ADAPTERS / Path(path).name)
    params = load_ip_adapter(file, widths, FLOAT32)
    keys = jax.tree.map(lambda x: np.asarray(x).astype(rounded).astype(np.float32), params["ip_adapter"])
    source = file.path
    return (
        LoadedComponent(image_projection(file.config), params["image_proj"], source),
        LoadedComponent(IPAdapter(widths), keys, source),
    )


@pytest.mark.parametrize("variant", ["base", "light", "plus", "full"])
def test_image_projection(variant):
    case = load_case(f"ip_proj_{variant}")
    projection, _ = adapter(case.meta["ip_adapter"][0])
    features = case.inputs["image_features"]
    case.check(tokens=apply(projection, features), tokens_zeros=apply(projection, np.zeros_like(features[:1])))


@pytest.mark.parametrize("variant", ["base", "light", *slow("plus", "full")])
def test_unet_with_adapter(variant):
    case = load_case(f"unet_ip_{variant}")
    projection, keys = adapter(case.meta["ip_adapter"][0])
    image_kv = apply(keys, apply(projection, case.inputs["image_features_0"][:, 0]))
    for name, scale in case.meta["scales"].items():
        case.check(**{name: unet_with_images(case, image_kv, scale)})


def entries_of(case, masks):
    """Keys and values, scales (a function of the recorded ones) and masks of every entry of a recorded call."""
    first, *others = case.meta["ip_adapter"]
    # diffusers rounds the keys and values of all adapters to the dtype of the first one's (docs/weights.md)
    dtype = open_ip_adapter(ADAPTERS / Path(first).name).ip_adapter["1.to_k_ip.weight"].dtype.name
    image_kv, scales, of_entries = [], [], []
    for number, path in enumerate([first, *others]):
        projection, keys = adapter(path, dtype if number else "float32")
        features = case.inputs[f"image_features_{number}"][:, None]  # (B, G, n, ...): rows as prompts of one branch
        params = {"image_proj": projection.params, "ip_adapter": keys.params}
        count = features.shape[2]
        for images in [slice(i, i + 1) for i in range(count)] if masks is not None else [slice(None)]:
            chosen = features[:, :, images]
            weight = np.ones((1, chosen.shape[2]), np.float32)
            rows = programs.image_keys_values(projection.module, keys.module, params, chosen, weight)
            image_kv.append(jax.tree.map(lambda x: x[:, 0], rows))
            scales.append(lambda scale, n=number, i=images.start: nested(scale, n, i))
            of_entries.append(None if masks is None else masks[len(of_entries)])
    return image_kv, scales, of_entries


def nested(scale, adapter: int, image: int | None):
    """One scale of a number for all, a list with one for each adapter, or a list of these with one for each image."""
    scale = scale[adapter] if isinstance(scale, list) else scale
    return scale[image] if isinstance(scale, list) else scale


@pytest.mark.parametrize("name", slow("masks_two_adapters", "instantstyle", "masks", "two_adapters", "two_images"))
def test_unet_with_controls(name):
    """Dictionaries of scales, masks, several images, several adapters: as tables, through the product's functions."""
    case = load_case(f"unet_ip_{name}")
    unet = component("unet")
    masks = case.inputs.get("ip_adapter_masks")
    masks = None if masks is None else [load_mask(mask, *mask.shape[-2:]) for mask in masks]
    image_kv, scales, of_entries = entries_of(case, masks)
    text_kv = apply(unet, case.inputs["encoder_hidden_states"], method=UNet.text_kv)
    x, times = nhwc(case.inputs["sample"]), case.inputs["timesteps"]
    config = unet.module.config
    sites = cross_attention_layers(config)
    grids = attention_grids(config, *x.shape[1:3])
    at_layers = [layer_mask(mask, grids) for mask in of_entries]
    for output, scale in case.meta["scales"].items():
        weights = []
        for one, kv, mask in zip(scales, image_kv, at_layers, strict=True):
            branch = ImageBranch(kv=kv, weight=scale_table(one(scale), sites, 1).weight, mask=mask)
            weights.append(branch_weights(branch, len(x)))
        case.check(**{output: nchw(unet_output(unet.module, unet.params, x, times, text_kv, image_kv, weights))})


@pytest.fixture(scope="module")
def flax_model(tmp_path_factory) -> Path:
    return flax_folder(tmp_path_factory.mktemp("sd15_flax"))


@pytest.mark.slow
def test_flax_unet(flax_model):
    case = load_case("flax_unet")
    loaded = load_component(UNET, flax_model / "unet", FLOAT32)
    x, times, text = nhwc(case.inputs["sample"]), case.inputs["timesteps"], case.inputs["encoder_hidden_states"]
    case.check(out__torch=nchw(apply(loaded, x, times, text, method=UNet.from_text)))


def test_flax_vae(flax_model):
    case = load_case("flax_vae")
    loaded = load_component(VAE_COMPONENT, flax_model / "vae", FLOAT32)
    mean, log_variance = apply(loaded, nhwc(case.inputs["image"]), method=VAE.posterior)
    scale = loaded.module.config.scaling_factor
    decoded = apply(loaded, scale * nhwc(case.inputs["latents"]), method=VAE.decode)
    case.check(mean__torch=nchw(mean), logvar__torch=nchw(log_variance), decoded__torch=nchw(decoded))


def test_flax_text_encoder():
    case = load_case("flax_text_encoder")
    loaded = load_component(TEXT_ENCODER, ORACLES / "models/sd15_flax/text_encoder", FLOAT32)
    check_text(case, apply(loaded, case.inputs["input_ids"]), "__torch")
