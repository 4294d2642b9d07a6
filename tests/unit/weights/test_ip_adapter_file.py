"""Released adapter files: which variant one is, the same trees from every format, and what is said of other files."""

import functools
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, TORCH_MODEL
from safetensors.numpy import load_file, save_file
from weight_files import assert_same_tree, refused, write_bin

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.weights.ip_adapter_file import check_base, check_encoder, load_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.load_tree import leaves
from ipadapter_jax.weights.open_component import read_json

FLOAT32 = np.dtype("float32")
BASE, PLUS, FULL = (f"ip-adapter{kind}_tiny" for kind in ("", "-plus", "-full-face"))
UNET = UNetConfig.from_json(read_json(TORCH_MODEL / "unet" / "config.json"))
WIDTHS = tuple(site.width for site in cross_attention_layers(UNET))


@functools.cache
def tensors(name: str) -> dict[str, np.ndarray]:
    return load_file(ADAPTERS / f"{name}.safetensors")


def write(path: Path, content: dict[str, np.ndarray]) -> Path:
    """As .safetensors, or as .bin with the two parts nested as the authors' training script writes them."""
    if path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(array) for name, array in content.items()}, path)
        return path
    tree: dict = {}
    for name, array in content.items():
        part, key = name.split(".", 1)
        tree.setdefault(part, {})[key] = array
    return write_bin(path, tree)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


# --- variants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        (BASE, ImageProjConfig("base", 40, 32, 4)),
        (PLUS, ImageProjConfig("plus", 48, 32, 16, hidden_dim=32, heads=2, depth=4)),
        (FULL, ImageProjConfig("full", 48, 32, 0)),
    ],
)
def test_variants(name, config, suffix):
    found = open_ip_adapter(ADAPTERS / f"{name}{suffix}").config
    assert found.variant == config.variant
    assert found == config


def test_light_is_a_base_file():
    """Trained with a shorter text, it has the same names and shapes, and holds float32 numbers here."""
    light, base = (open_ip_adapter(ADAPTERS / f"{name}.bin") for name in ("ip-adapter_tiny_light", BASE))
    assert light.config == base.config
    params = load_ip_adapter(light, WIDTHS, FLOAT32)
    assert jax.tree.structure(params) == jax.tree.structure(load_ip_adapter(base, WIDTHS, FLOAT32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [BASE, PLUS, FULL])
def test_every_format_gives_the_same_trees(tmp_path, name, dtype):
    load = functools.partial(load_ip_adapter, widths=WIDTHS, dtype=np.dtype(dtype))
    expected = load(open_ip_adapter(ADAPTERS / f"{name}.safetensors"))
    assert_same_tree(load(open_ip_adapter(ADAPTERS / f"{name}.bin")), expected)
    assert_same_tree(load(open_ip_adapter(write(tmp_path / "a.bin", tensors(name)))), expected)
    assert sum(leaf.size for leaf in jax.tree.leaves(expected)) == sum(array.size for array in tensors(name).values())


def test_where_the_numbers_go():
    params = load_ip_adapter(open_ip_adapter(ADAPTERS / f"{BASE}.safetensors"), WIDTHS, FLOAT32)
    stored = tensors(BASE)
    np.testing.assert_array_equal(params["image_proj"]["proj"]["kernel"], stored["image_proj.proj.weight"].T)
    np.testing.assert_array_equal(params["image_proj"]["norm"]["scale"], stored["image_proj.norm.weight"])
    numbers = sorted({int(path[0]) for path in leaves(params["ip_adapter"])})
    assert numbers == list(range(1, 2 * len(WIDTHS), 2))
    for number, width in zip(numbers, WIDTHS, strict=True):
        kernel = params["ip_adapter"][str(number)]["to_v_ip"]["kernel"]
        assert kernel.shape == (32, width)
        np.testing.assert_array_equal(kernel, stored[f"ip_adapter.{number}.to_v_ip.weight"].T)


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_base_file_of_another_number_of_tokens(tmp_path, tokens):
    changed = {"image_proj.proj.weight": zeros(32 * tokens, 40), "image_proj.proj.bias": zeros(32 * tokens)}
    file = open_ip_adapter(write(tmp_path / "a.safetensors", tensors(BASE) | changed))
    assert file.config == ImageProjConfig("base", 40, 32, tokens)
    assert load_ip_adapter(file, WIDTHS, FLOAT32)["image_proj"]["proj"]["kernel"].shape == (40, 32 * tokens)


def test_a_deeper_and_wider_resampler(tmp_path):
    changed = dict(tensors(PLUS))
    changed |= {key.replace(".layers.3.", ".layers.4."): array for key, array in changed.items()}
    for layer in (f"image_proj.layers.{i}" for i in range(5)):  # 3 heads instead of 2, 8 x wider inside instead of 4 x
        changed |= {f"{layer}.0.to_q.weight": zeros(192, 32), f"{layer}.0.to_kv.weight": zeros(384, 32)}
        changed |= {f"{layer}.0.to_out.weight": zeros(32, 192)}
        changed |= {f"{layer}.1.1.weight": zeros(256, 32), f"{layer}.1.3.weight": zeros(32, 256)}
    file = open_ip_adapter(write(tmp_path / "a.safetensors", changed))
    assert (file.config.depth, file.config.heads, file.config.ff_mult) == (5, 3, 8)
    load_ip_adapter(file, WIDTHS, FLOAT32)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_other_parts_are_ignored_and_reported(tmp_path, caplog, suffix):
    """The authors' .bin files of plus hold a third part."""
    path = write(tmp_path / f"a{suffix}", tensors(PLUS) | {"image_proj_ema.latents": zeros(1), "step.count": zeros(1)})
    with caplog.at_level(logging.INFO, "ipadapter_jax"):
        file = open_ip_adapter(path)
    assert caplog.messages == [f"{path}: ignored image_proj_ema.latents, step.count"]
    expected = load_ip_adapter(open_ip_adapter(ADAPTERS / f"{PLUS}.bin"), WIDTHS, FLOAT32)
    assert_same_tree(load_ip_adapter(file, WIDTHS, FLOAT32), expected)


# --- an adapter that does not fit --------------------------------------------------------------------------------


def test_an_adapter_for_another_base():
    file = open_ip_adapter(ADAPTERS / f"{BASE}.safetensors")
    check_base(file, 32, WIDTHS)
    refused(
        lambda: check_base(file, 768, WIDTHS),
        f"{file.path}: made for tokens of width 32 (no known family), this base has 768 (SD 1.x)",
        "give an adapter of this base",
        error=WeightFileError,
    )
    refused(
        lambda: check_base(file, 32, WIDTHS[:-1]),
        f"{file.path}: made for a UNet with 16 cross-attention layers, this base has 15; give an adapter of this base",
        error=WeightFileError,
    )


def test_an_adapter_of_sdxl(tmp_path):
    xl = {f"ip_adapter.{2 * i + 1}.to_{kv}_ip.weight": zeros(4, 2048) for i in range(70) for kv in "kv"}
    xl |= {"image_proj.proj.weight": zeros(8192, 1280), "image_proj.proj.bias": zeros(8192)}
    xl |= {"image_proj.norm.weight": zeros(2048), "image_proj.norm.bias": zeros(2048)}
    file = open_ip_adapter(write(tmp_path / "ip-adapter_sdxl.safetensors", xl))
    assert file.config == ImageProjConfig("base", 1280, 2048, 4)
    words = ["ip-adapter_sdxl.safetensors: made for tokens of width 2048 (SDXL), this base has 768 (SD 1.x)"]
    refused(lambda: check_base(file, 768, (320,) * 16), *words, "or its base", error=WeightFileError)


def test_sites_of_other_widths(tmp_path):
    changed = {"ip_adapter.1.to_k_ip.weight": zeros(WIDTHS[0] + 8, 32)}
    file = open_ip_adapter(write(tmp_path / "a.safetensors", tensors(BASE) | changed))
    words = [f"{file.path} (ip_adapter): 1.to_k_ip.weight has shape ({WIDTHS[0] + 8}, 32), not ({WIDTHS[0]}, 32)"]
    refused(lambda: load_ip_adapter(file, WIDTHS, FLOAT32), *words, error=WeightFileError)


@pytest.mark.parametrize(
    ("name", "features", "needed"),
    [
        (BASE, "image embeddings of width 40", "another encoder"),
        (PLUS, "hidden states of width 48", "another encoder"),
        (FULL, "hidden states of width 48", "another encoder"),
    ],
)
def test_another_image_encoder(name, features, needed):
    file = open_ip_adapter(ADAPTERS / f"{name}.safetensors")
    check_encoder(file, 40, 48, "encoder")
    words = [f"{file.path}: needs {features} ({needed}), the image encoder models/vit-l gives 1024"]
    words += ["choose the right one with image_encoder"]
    refused(lambda: check_encoder(file, 1024, 1024, "models/vit-l"), *words, error=WeightFileError)


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (ImageProjConfig("base", 1024, 768, 4), "image embeddings of width 1024 (ViT-H/14)"),
        (ImageProjConfig("base", 1280, 768, 4), "image embeddings of width 1280 (ViT-bigG/14)"),
        (ImageProjConfig("plus", 1280, 768, 16), "hidden states of width 1280 (ViT-H/14)"),
        (ImageProjConfig("full", 1664, 768, 0), "hidden states of width 1664 (ViT-bigG/14)"),
        (ImageProjConfig("base", 768, 768, 4), "image embeddings of width 768 (ViT-L/14)"),
    ],
)
def test_the_encoder_that_is_needed_is_named(config, needed):
    file = open_ip_adapter(ADAPTERS / f"{BASE}.safetensors")
    refused(
        lambda: check_encoder(type(file)(file.path, {}, {}, config, {}), 512, 512, "x"), needed, error=WeightFileError
    )


# --- other files -------------------------------------------------------------------------------------------------

OTHERS = {
    "lora-kohya": (["lora_unet_mid_block.lora_down.weight", "lora_unet_mid_block.alpha"], "a LoRA"),
    "lora-diffusers": (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "a LoRA"),
    "checkpoint": (
        ["model.diffusion_model.time_embed.0.weight", "first_stage_model.x"],
        "whole Stable Diffusion checkpoint",
    ),
    "unet": (["time_embedding.linear_1.weight", "down_blocks.0.x", "conv_in.weight"], "a UNet"),
    "controlnet": (["time_embedding.linear_1.weight", "controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
    "vae": (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE"),
    "clip": (
        ["vision_model.embeddings.class_embedding", "text_model.x"],
        "a CLIP image encoder: give it as the image encoder",
    ),
    "embedding": (["emb_params"], "a textual inversion"),
    "stranger": (["layers.0.weight"], "its tensors are layers.0.weight"),
    "nothing": ([], "it has no tensors"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_adapter(tmp_path, name):
    names, guess = OTHERS[name]
    path = tmp_path / f"{name}.safetensors"
    save_file({key: zeros(1) for key in names}, path)
    words = [f"{path}: not an IP-Adapter file, which holds image_proj.* and ip_adapter.*; ", guess]
    refused(lambda: open_ip_adapter(path), *words, error=WeightFileError)


@pytest.mark.parametrize(
    ("folder", "guess"),
    [
        (TORCH_MODEL / "unet", "a UNet"),
        (TORCH_MODEL / "vae", "a VAE"),
        (TORCH_MODEL / "text_encoder", "a text encoder"),
        (IMAGE_ENCODER, "a CLIP image encoder"),
    ],
)
def test_real_files_that_are_no_adapter(folder, guess):
    path = next(folder.glob("*.safetensors"))
    refused(lambda: open_ip_adapter(path), f"{path}: not an IP-Adapter file", guess, error=WeightFileError)


@pytest.mark.parametrize(
    ("kept", "lacking"), [("image_proj.", "without keys and values"), ("ip_adapter.", "without an image projection")]
)
def test_half_an_adapter(tmp_path, kept, lacking):
    path = write(tmp_path / "a.bin", {key: array for key, array in tensors(BASE).items() if key.startswith(kept)})
    refused(lambda: open_ip_adapter(path), f"{path}: half an IP-Adapter, ", lacking, error=WeightFileError)


FACE_ID = {
    "faceid": {"proj.0.weight", "proj.0.bias", "proj.2.weight", "proj.2.bias", "norm.weight", "norm.bias"},
    "faceid-plus": {"proj.0.weight", "norm.weight", "perceiver_resampler.proj_in.weight"},
}


@pytest.mark.parametrize("name", [*FACE_ID, "lora inside"])
def test_face_id(tmp_path, name):
    content = {key: array for key, array in tensors(BASE).items() if key.startswith("ip_adapter.")}
    content |= {f"image_proj.{key}": zeros(1) for key in FACE_ID.get(name, {"proj.weight"})}
    if name == "lora inside":
        content["ip_adapter.0.to_q_lora.down.weight"] = zeros(1)
    path = write(tmp_path / "a.bin", content)
    kind = "FaceID Plus" if name == "faceid-plus" else "FaceID"
    words = [f"{path}: a {kind} adapter: ", "not supported", "use a base, plus or full-face adapter"]
    refused(lambda: open_ip_adapter(path), *words, error=WeightFileError)


DAMAGED = [
    (BASE, {"ip_adapter.1.to_k_ip.weight": None}, "'1.to_k_ip.weight' is missing"),
    (BASE, {"ip_adapter.1.to_k_ip.weight": zeros(32)}, "download it again"),
    (BASE, {"ip_adapter.1.to_k_ip.weight": zeros(32, 0)}, "download it again"),
    (BASE, {"image_proj.proj.weight": zeros(128)}, "download it again"),
    (BASE, {"image_proj.proj.weight": zeros(130, 40)}, "do not fit"),
    (BASE, {"image_proj.proj.weight": zeros(8, 40)}, "do not fit"),
    (BASE, {"image_proj.proj.weight": None}, "unknown image projection"),
    (PLUS, {"image_proj.proj_in.weight": None}, "'proj_in.weight' is missing"),
    (PLUS, {"image_proj.latents": zeros(16, 32)}, "download it again"),
    (PLUS, {"image_proj.latents": zeros(1, 0, 32)}, "do not fit"),
    (PLUS, {"image_proj.latents": zeros(1, 16, 0)}, "do not fit"),
    (PLUS, {"image_proj.layers.0.0.to_q.weight": zeros(0, 32)}, "do not fit"),
    (PLUS, {"image_proj.layers.0.0.to_q.weight": zeros(65, 32)}, "do not fit"),
    (FULL, {"image_proj.proj.0.weight": zeros(48)}, "download it again"),
]


@pytest.mark.parametrize(("name", "changes", "fault"), DAMAGED)
def test_a_damaged_adapter(tmp_path, name, changes, fault):
    content = {key: array for key, array in (tensors(name) | changes).items() if array is not None}
    path = write(tmp_path / "a.safetensors", content)
    assert refused(lambda: open_ip_adapter(path), fault, error=WeightFileError).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        (BASE, {"image_proj.norm.bias": None}, "(image_proj): lacks norm.bias"),
        (BASE, {"image_proj.extra": zeros(1)}, "(image_proj): has tensors without a place in the model: extra"),
        (BASE, {"ip_adapter.31.to_v_ip.weight": None}, "(ip_adapter): lacks 31.to_v_ip.weight"),
        (BASE, {"ip_adapter.0.to_v_ip.weight": zeros(1)}, "(ip_adapter): has tensors without a place"),
        (BASE, {"image_proj.norm.bias": np.full(32, np.inf, np.float16)}, "(image_proj): norm.bias holds NaN or inf"),
        (PLUS, {"image_proj.layers.9.0.norm1.weight": zeros(32)}, "(image_proj): lacks layers.4."),
        (PLUS, {f"image_proj.layers.{i}.x": zeros(1) for i in range(5000)}, "(image_proj): lacks layers.10."),
    ],
)
def test_a_tensor_too_few_or_too_many(tmp_path, name, changes, fault):
    content = {key: array for key, array in (tensors(name) | changes).items() if array is not None}
    file = open_ip_adapter(write(tmp_path / "a.safetensors", content))
    refused(lambda: load_ip_adapter(file, WIDTHS, FLOAT32), f"{file.path} {fault}", error=WeightFileError)


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", "model_state_dict"])
def test_an_adapter_inside_something(tmp_path, wrapper):
    """{"model": {...}} in a pickle, or as a prefix of every name."""
    tensors = load_file(ADAPTERS / "ip-adapter_tiny.safetensors")
    tree: dict = {"image_proj": {}, "ip_adapter": {}}
    for name, array in tensors.items():
        part, _, inner = name.partition(".")
        tree[part][inner] = array
    plain = open_ip_adapter(ADAPTERS / "ip-adapter_tiny.safetensors")
    write_bin(tmp_path / "a.bin", {wrapper: tree})
    save_file({f"{wrapper}.{name}": array for name, array in tensors.items()}, tmp_path / "a.safetensors")
    for name in ("a.bin", "a.safetensors"):
        found = open_ip_adapter(tmp_path / name)
        assert found.config == plain.config and found.tensors.keys() == plain.tensors.keys()
        assert all(np.array_equal(t.read(), plain.tensors[key].read()) for key, t in found.tensors.items())
