"""A model's folder: every layout and spelling gives the same tree bit for bit; what does not fit is said in a line."""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
from helpers import IMAGE_ENCODER as ENCODER_FOLDER
from helpers import ORACLES, TORCH_MODEL, legacy_msgpack
from safetensors.numpy import load_file, save_file
from weight_files import assert_same_tree, refused, write_bin

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.components import IMAGE_ENCODER, TEXT_ENCODER, UNET, VAE_COMPONENT
from ipadapter_jax.weights.load_tree import leaves, nest
from ipadapter_jax.weights.open_component import load_component
from ipadapter_jax.weights.weight_files import choose_files, choose_weights

FLOAT32 = np.dtype("float32")
PARTS = {"unet": UNET, "vae": VAE_COMPONENT, "text_encoder": TEXT_ENCODER}
STEM = "diffusion_pytorch_model"


@functools.cache
def torch_tensors(part: str) -> dict[str, np.ndarray]:
    return load_file(TORCH_MODEL / part / f"{PARTS[part].files.torch_stem}.safetensors")


@functools.cache
def flax_bytes(part: str) -> bytes:
    if part == "text_encoder":
        return (ORACLES / "models/sd15_flax/text_encoder/flax_model.msgpack").read_bytes()
    return legacy_msgpack(TORCH_MODEL / part / f"{STEM}.safetensors", vae=part == "vae")


def expected(part: str, dtype=FLOAT32):
    """The tree as flax.serialization restores the published kind of file, without any rule of the package."""
    flat = leaves(flax.serialization.msgpack_restore(flax_bytes(part)))
    return nest({path: array.astype(dtype) for path, array in flat.items()})


def folder_with(tmp_path: Path, part: str, config: Path = TORCH_MODEL) -> Path:
    folder = tmp_path / part
    folder.mkdir()
    shutil.copy(config / part / "config.json", folder)
    return folder


# --- every layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "sha256"),
    [
        ("unet", "711375a125bbe9d4b93d838625ed48e01e18636535d2d59336e2c81cce5232ee"),
        ("vae", "99c99bf0b445a1cc13d3f4ed2344248639c93ba959fb26a7ab2d3ba1d2d949d0"),
    ],
)
def test_the_rebuilt_flax_files_are_the_genuine_ones(part, sha256):
    """Digests of what the removed classes of diffusers wrote for these weights, serialised again with sorted names."""
    assert hashlib.sha256(flax_bytes(part)).hexdigest() == sha256


def as_is(folder: Path, part: str) -> None:
    shutil.copy(TORCH_MODEL / part / f"{PARTS[part].files.torch_stem}.safetensors", folder)


def as_msgpack(folder: Path, part: str) -> None:
    (folder / f"{PARTS[part].files.flax_stem}.msgpack").write_bytes(flax_bytes(part))
    if (flax_config := ORACLES / "models/sd15_flax" / part / "config.json").exists():
        shutil.copy(flax_config, folder)


def as_bin(folder: Path, part: str) -> None:
    write_bin(folder / ("pytorch_model.bin" if part == "text_encoder" else f"{STEM}.bin"), torch_tensors(part))


def as_half_named(folder: Path, part: str) -> None:
    save_file(torch_tensors(part), folder / f"{PARTS[part].files.torch_stem}.fp16.safetensors")


def as_shards(folder: Path, part: str, mark: str = "") -> None:
    stem, tensors = PARTS[part].files.torch_stem, [*torch_tensors(part).items()]
    weight_map = {}
    for i in range(3):
        shard = f"{stem}{mark}-{i + 1:05d}-of-00003.safetensors"
        save_file(dict(tensors[i::3]), folder / shard)
        weight_map |= {name: shard for name, _ in tensors[i::3]}
    (folder / f"{stem}.safetensors.index{mark}.json").write_text(json.dumps({"weight_map": weight_map}))


def as_half_named_shards(folder: Path, part: str) -> None:
    as_shards(folder, part, ".fp16")


def as_torch_saves(folder: Path, part: str) -> None:
    torch = pytest.importorskip("torch")
    name = "pytorch_model.bin" if part == "text_encoder" else f"{STEM}.bin"
    tensors = {key: torch.from_numpy(array.copy()) for key, array in torch_tensors(part).items()}
    torch.save(tensors, folder / name, _use_new_zipfile_serialization=part == "vae")


LAYOUTS = [as_is, as_msgpack, as_bin, as_half_named, as_shards, as_half_named_shards]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("write", [*LAYOUTS, pytest.param(as_torch_saves, marks=pytest.mark.torch)])
def test_every_layout_gives_the_same_tree(tmp_path, part, write):
    folder = folder_with(tmp_path, part)
    write(folder, part)
    loaded = load_component(PARTS[part], folder, FLOAT32)
    assert_same_tree(loaded.params, expected(part))
    assert loaded.source.parent == folder and loaded.source.is_file()


def test_the_variant_picks_its_files(tmp_path):
    folder = folder_with(tmp_path, "vae")
    as_is(folder, "vae")
    doubled = {key: 2 * array for key, array in torch_tensors("vae").items()}
    save_file(doubled, folder / f"{STEM}.fp16.safetensors")
    assert_same_tree(load_component(VAE_COMPONENT, folder, FLOAT32).params, expected("vae"))
    found = load_component(VAE_COMPONENT, folder, FLOAT32, variant="fp16")
    assert found.source.name == f"{STEM}.fp16.safetensors"
    bias = found.params["decoder"]["conv_in"]["bias"]
    np.testing.assert_array_equal(bias, 2 * expected("vae")["decoder"]["conv_in"]["bias"])


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_every_dtype_of_file_and_target(tmp_path, stored, target):
    folder = folder_with(tmp_path, "text_encoder")
    save_file({k: a.astype(stored) for k, a in torch_tensors("text_encoder").items()}, folder / "model.safetensors")
    flat = leaves(expected("text_encoder"))
    wanted = nest({path: array.astype(stored).astype(target) for path, array in flat.items()})
    assert_same_tree(load_component(TEXT_ENCODER, folder, np.dtype(target)).params, wanted)


# --- old spellings, and what is ignored --------------------------------------------------------------------------


def respelled(tmp_path: Path, part: str, rename: Callable[[str], str], **more: np.ndarray) -> Path:
    folder = folder_with(tmp_path, part)
    tensors = {rename(key): array for key, array in torch_tensors(part).items()} | more
    save_file(tensors, folder / f"{PARTS[part].files.torch_stem}.safetensors")
    return folder


def old_vae(key: str) -> str:
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


def test_old_spelling_of_the_vae(tmp_path):
    assert sum(old_vae(key) != key for key in torch_tensors("vae")) == 16  # encoder and decoder, weights and biases
    folder = respelled(tmp_path, "vae", old_vae)
    assert_same_tree(load_component(VAE_COMPONENT, folder, FLOAT32).params, expected("vae"))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_with_and_without_prefix_and_buffers(tmp_path, caplog, prefix):
    ids = {f"{prefix}embeddings.position_ids": np.arange(77)[None]}
    folder = respelled(tmp_path, "text_encoder", lambda key: prefix + key.removeprefix("text_model."), **ids)
    with caplog.at_level(logging.INFO, "ipadapter_jax"):
        loaded = load_component(TEXT_ENCODER, folder, FLOAT32)
    assert_same_tree(loaded.params, expected("text_encoder"))
    assert caplog.messages == [f"{folder / 'model.safetensors'}: ignored {prefix}embeddings.position_ids"]


def test_vision_half_of_a_whole_clip(tmp_path, caplog):
    own = load_file(ENCODER_FOLDER / "model.safetensors")
    text = {f"text_model.{i}": np.zeros(1, np.float32) for i in range(5)}
    ids = {"vision_model.embeddings.position_ids": np.arange(50)[None]}
    other = {"logit_scale": np.float32([2]), "text_projection.weight": np.zeros((1, 1), np.float32)}
    save_file(own | text | ids | other, tmp_path / "model.safetensors")
    shutil.copy(ENCODER_FOLDER / "config.json", tmp_path)
    with caplog.at_level(logging.INFO, "ipadapter_jax"):
        loaded = load_component(IMAGE_ENCODER, tmp_path, FLOAT32)
    assert_same_tree(loaded.params, load_component(IMAGE_ENCODER, ENCODER_FOLDER, FLOAT32).params)
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("and 5 more")


def test_both_spellings_of_one_tensor(tmp_path):
    old = {
        "encoder.mid_block.attentions.0.query.bias": torch_tensors("vae")["encoder.mid_block.attentions.0.to_q.bias"]
    }
    folder = respelled(tmp_path, "vae", str, **old)
    words = [
        f"{STEM}.safetensors: ",
        "encoder.mid_block.attentions.0.",
        "is present under both its old and its new key",
    ]
    refused(lambda: load_component(VAE_COMPONENT, folder, FLOAT32), *words, error=WeightFileError)


# --- faults ------------------------------------------------------------------------------------------------------


def without(name: str):
    return lambda tensors: tensors.pop(name)


def with_tensor(name: str, array: np.ndarray):
    return lambda tensors: tensors.update({name: array})


BIAS = "text_model.final_layer_norm.bias"
FAULTS = [
    (without(BIAS), "lacks", BIAS),
    (with_tensor("text_model.extra.bias", np.zeros(3, np.float32)), "without a place", "text_model.extra.bias"),
    (with_tensor(BIAS, np.zeros(3, np.float32)), "has shape (3,), not (32,)", BIAS),
    (with_tensor(BIAS, np.zeros(32, np.int32)), "holds int32 numbers", BIAS),
    (with_tensor(BIAS, np.full(32, np.nan, np.float32)), "NaN or infinity", BIAS),
    (with_tensor(BIAS, np.full(32, 1e6, ml_dtypes.bfloat16)), "too large for float16", BIAS),
]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(("change", "fault", "name"), FAULTS)
def test_a_tensor_that_does_not_fit(tmp_path, change, fault, name, suffix):
    folder, tensors = folder_with(tmp_path, "text_encoder"), dict(torch_tensors("text_encoder"))
    change(tensors)
    path = folder / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    save_file(tensors, path) if suffix == ".safetensors" else write_bin(path, tensors)
    load = functools.partial(load_component, TEXT_ENCODER, folder, np.dtype("float16"))
    assert refused(load, fault, name, error=WeightFileError).startswith(f"{path}: ")


def test_weights_of_another_network(tmp_path):
    folder = folder_with(tmp_path, "unet")
    shutil.copy(TORCH_MODEL / "vae" / f"{STEM}.safetensors", folder)
    load = functools.partial(load_component, UNET, folder, FLOAT32)
    refused(load, f"{STEM}.safetensors: lacks", "is this file for another model?", error=WeightFileError)


# --- which file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        ([f"{STEM}.bin", f"{STEM}.safetensors", "diffusion_flax_model.msgpack"], None, f"{STEM}.safetensors"),
        ([f"{STEM}.bin", "diffusion_flax_model.msgpack"], None, "diffusion_flax_model.msgpack"),
        ([f"{STEM}.bin", f"{STEM}.fp16.safetensors"], None, f"{STEM}.bin"),
        ([f"{STEM}.fp16.bin", f"{STEM}.fp16.safetensors"], None, f"{STEM}.fp16.safetensors"),
        ([f"{STEM}.safetensors.index.json", f"{STEM}.bin"], None, f"{STEM}.safetensors.index.json"),
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], "fp16", f"{STEM}.fp16.safetensors"),
        ([f"{STEM}.safetensors", f"{STEM}.non_ema.safetensors"], "non_ema", f"{STEM}.non_ema.safetensors"),
        ([f"{STEM}.safetensors.index.fp16.json"], "fp16", f"{STEM}.safetensors.index.fp16.json"),
        ([f"{STEM}.bin", f"{STEM}.fp16.bin"], "fp16", f"{STEM}.fp16.bin"),
    ],
)
def test_choose_weights(names, variant, chosen):
    assert choose_weights(UNET.files, names, "unet", variant) == chosen


def test_no_weights():
    def choose(names, variant=None):
        return lambda: choose_weights(UNET.files, names, "unet", variant)

    refused(choose(["config.json"]), "unet: no UNet weights (it holds no files)", f"{STEM}.safetensors")
    refused(
        choose(["config.json", "model.safetensors"]), "it holds model.safetensors", "expected", error=WeightFileError
    )
    refused(choose([f"{STEM}.safetensors"], "fp16"), "of the variant 'fp16'", f"{STEM}.fp16.safetensors")


def test_choose_files_takes_the_shards_of_one_index():
    shards = [f"vae/{STEM}{mark}-0000{i}-of-00002.safetensors" for mark in ("", ".fp16") for i in (1, 2)]
    names = ["vae/config.json", *shards, *(f"vae/{STEM}.safetensors.index{mark}.json" for mark in ("", ".fp16"))]
    for variant, mark, own in ((None, "", shards[:2]), ("fp16", ".fp16", shards[2:])):
        chosen = choose_files([*names, "unet/config.json"], {"vae": VAE_COMPONENT.files}, (), variant)
        assert sorted(chosen) == sorted(["vae/config.json", f"vae/{STEM}.safetensors.index{mark}.json", *own])


# --- configs -----------------------------------------------------------------------------------------------------

UNSUPPORTED = {
    "unet": {
        "attention_type": "gated",
        "class_embed_type": "timestep",
        "num_class_embeds": 1000,
        "addition_embed_type": "image",
        "encoder_hid_dim_type": "text_image_proj",
        "encoder_hid_dim": 1024,
        "dual_cross_attention": True,
        "only_cross_attention": True,
        "time_cond_proj_dim": 256,
        "time_embedding_type": "fourier",
        "timestep_post_act": "silu",
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "resnet_skip_time_act": True,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "act_fn": "gelu",
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "reverse_transformer_layers_per_block": [1, 2],
        "down_block_types": ["DownBlock2D"] * 5,
        "up_block_types": ["UpBlock2D"] * 3,
        "a_setting_of_the_future": "x",
    },
    "vae": {
        "act_fn": "relu",
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "shift_factor": 0.1,
        "latents_mean": [0.0],
    },
    "text_encoder": {"hidden_act": "relu", "num_attention_heads": 5},
}


def load_with_config(tmp_path: Path, part: str, **changes) -> Callable:
    folder = folder_with(tmp_path, part)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return functools.partial(load_component, PARTS[part], folder, FLOAT32)


@pytest.mark.parametrize(("part", "name"), [(part, name) for part in UNSUPPORTED for name in UNSUPPORTED[part]])
def test_a_setting_that_is_not_supported(tmp_path, part, name):
    """The network built without it would run, and be another one."""
    load = load_with_config(tmp_path, part, **{name: UNSUPPORTED[part][name]})
    word = {"num_attention_heads": "5 heads"}.get(name, name)
    assert refused(load, word).startswith(str(tmp_path / part / "config.json"))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"block_out_channels": "abc"}),
        ("unet", {"block_out_channels": 32}),
        ("unet", {"block_out_channels": [32, 32, 64, 33]}),
        ("unet", {"block_out_channels": [0, 0, 0, 0]}),
        ("unet", {"block_out_channels": []}),
        ("unet", {"block_out_channels": [32.5] * 4}),
        ("unet", {"layers_per_block": "2"}),
        ("unet", {"layers_per_block": [2, 2, 2, 2]}),
        ("unet", {"norm_num_groups": 0}),
        ("unet", {"norm_num_groups": 7}),
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"attention_head_dim": [8]}),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 4}),
        ("unet", {"attention_head_dim": None}),
        ("unet", {"cross_attention_dim": -1}),
        ("unet", {"cross_attention_dim": [32, 32]}),
        ("unet", {"in_channels": None}),
        ("vae", {"block_out_channels": 3}),
        ("vae", {"norm_num_groups": 7}),
        ("vae", {"latent_channels": "4"}),
        ("text_encoder", {"num_hidden_layers": "12"}),
        ("text_encoder", {"num_attention_heads": 0}),
        ("text_encoder", {"hidden_size": None}),
        ("text_encoder", {"vocab_size": -1}),
    ],
)
def test_a_config_that_makes_no_network(tmp_path, part, changes):
    message = refused(load_with_config(tmp_path, part, **changes))
    assert message.startswith(str(tmp_path / part / "config.json"))


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", "<html>", "\ufeff{}", '{"a":' * 100_000])
def test_no_config(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    message = refused(functools.partial(load_component, UNET, tmp_path, FLOAT32))
    assert message.startswith(str(tmp_path / "config.json"))
    assert content is not None or "diffusers' layout" in message
    assert content != "\ufeff{}" or "begins with a byte order mark" in message
