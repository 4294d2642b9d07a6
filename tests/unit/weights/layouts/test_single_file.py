"""Checkpoints of one file: the parts are those of the folder bit for bit, others are refused by name."""

import collections
import dataclasses
import hashlib
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import ADAPTERS, ORACLES, TORCH_MODEL, flax_folder, ldm_file
from safetensors.numpy import load_file, save_file
from weight_files import assert_same_tree, refused, write_bin

from ipadapter_jax import StableDiffusion
from ipadapter_jax.diffusion.samplers import SAMPLERS
from ipadapter_jax.errors import WeightFileError, errors_name_options
from ipadapter_jax.models.families import SD1
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.models.vae import VAE, VAEConfig
from ipadapter_jax.weights.base_model import components_of
from ipadapter_jax.weights.components import UNET, VAE_COMPONENT, abstract_params
from ipadapter_jax.weights.layouts.single_file import prefixes, unet_layout, vae_layout
from ipadapter_jax.weights.load_tree import leaves
from ipadapter_jax.weights.model_source import ModelSource
from ipadapter_jax.weights.open_base_model import open_base
from ipadapter_jax.weights.open_component import load_component

FLOAT16 = np.dtype("float16")
PARTIAL = ORACLES / "models" / "sd15_ldm_partial.ckpt"  # a genuine pickle: text encoder and some of the VAE

PREFIXES = prefixes(SD1)


@pytest.fixture(scope="module")
def ldm(tmp_path_factory) -> Path:
    return ldm_file(tmp_path_factory.mktemp("ldm") / "model.safetensors")


@pytest.fixture(scope="module")
def tensors(ldm) -> dict[str, np.ndarray]:
    return load_file(ldm)


@pytest.fixture(scope="module")
def expected() -> dict:
    return {
        name: load_component(component, TORCH_MODEL / name, FLOAT16).params
        for name, component in components_of(SD1).items()
    }


def loaded(path: Path, **options) -> dict:
    base = open_base(ModelSource(path, config=TORCH_MODEL, **options))
    base.check()
    return {name: base.part(name).load(FLOAT16).params for name in base.components}


def written(path: Path, content: dict[str, np.ndarray]) -> Path:
    save_file(content, path)
    return path


# --- what is read ------------------------------------------------------------------------------------------------


def test_the_rebuilt_file_is_the_genuine_one(ldm):
    sha256 = "4429580186ec4ffbb524c7d22d076ebfe0bbe418172361530148615ca6c42c7d"
    assert hashlib.sha256(ldm.read_bytes()).hexdigest() == sha256


def test_the_parts_are_those_of_the_folder(ldm, expected):
    assert_same_tree(loaded(ldm), expected)


def test_a_pickle_of_a_trainer(tmp_path, tensors, expected):
    """.ckpt: below state_dict, with the schedule, a loss and other things beside."""
    more = {"betas": np.zeros(3, np.float32), "first_stage_model.loss.logvar": np.zeros((), np.float32)}
    path = write_bin(tmp_path / "a.ckpt", {"state_dict": tensors | more, "x": {"y": np.zeros(1, np.float32)}})
    assert_same_tree(loaded(path), expected)


def test_the_moving_average(tmp_path, tensors, expected):
    prefix = PREFIXES["unet"]
    averages = {
        f"model_ema.diffusion_model{name.removeprefix(prefix).replace('.', '')}": -array
        for name, array in tensors.items()
        if name.startswith(prefix)
    }
    path = written(tmp_path / "a.safetensors", tensors | averages | {"model_ema.decay": np.zeros(1, np.float32)})
    assert_same_tree(loaded(path), expected)
    found, zeros = loaded(path, extract_ema=True), {"vae": expected["vae"], "text_encoder": expected["text_encoder"]}
    for place, leaf in leaves(found.pop("unet")).items():
        assert np.array_equal(np.asarray(leaf), -np.asarray(leaves(expected["unet"])[place]))
    assert_same_tree(found, zeros)


@pytest.mark.parametrize(
    ("old", "new"),
    [("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."), ("first_stage_model.", "vae.")],
)
def test_other_spellings(tmp_path, tensors, expected, old, new):
    path = written(tmp_path / "a.safetensors", {name.replace(old, new): array for name, array in tensors.items()})
    assert_same_tree(loaded(path), expected)


def test_pipelines_of_one_file_and_of_flax_files_are_that_of_the_folder(ldm, tmp_path):
    """Bit for bit, so that their images are, too; tests/parity compares an image from Flax files with diffusers'."""
    folder = StableDiffusion.from_pretrained(TORCH_MODEL)
    for source in ({"path": ldm, "config": TORCH_MODEL}, {"path": flax_folder(tmp_path)}):
        found = StableDiffusion.from_pretrained(**source)
        assert_same_tree(found.params, folder.params)
        for part in ("unet", "vae", "text_encoder", "mesh", "guidance_scale"):
            assert getattr(found, part) == getattr(folder, part), part
        for sampler in SAMPLERS:  # the files may spell out other defaults
            ours, its = (dataclasses.asdict(one.schedule.for_sampler(sampler)) for one in (found, folder))
            assert ours | {"given": ()} == its | {"given": ()}, sampler
        assert found.tokenizer("a cat").input_ids == folder.tokenizer("a cat").input_ids


def test_names_and_shapes_at_full_size(data):
    """diffusers brings our names for a file of Stable Diffusion 1.5 to the published ones; nothing is allocated."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders import single_file_utils

    published: dict = collections.defaultdict(dict)
    for line in lzma.decompress((data / "published_keys.txt.xz").read_bytes()).decode().splitlines():
        kind, part, key, shape = line.split()
        published[kind, part][key] = tuple(int(n) for n in shape.split("x"))
    for part, component, module, spelling, theirs in (
        ("unet", UNET, UNet(UNetConfig()), unet_layout(UNetConfig()), single_file_utils.convert_ldm_unet_checkpoint),
        (
            "vae",
            VAE_COMPONENT,
            VAE(VAEConfig()),
            vae_layout(VAEConfig()),
            single_file_utils.convert_ldm_vae_checkpoint,
        ),
    ):
        config = json.loads((TORCH_MODEL / part / "config.json").read_text())  # of which the numbers of blocks count
        places = leaves(abstract_params(component, module))
        found = {
            PREFIXES[part] + spelling.key(place): torch.empty(spelling.shape(place, leaf.shape), device="meta")
            for place, leaf in places.items()
        }
        assert len(found) == {"unet": 686, "vae": 248}[part]
        named = {name: tuple(tensor.shape) for name, tensor in theirs(found, config).items()}
        assert named == published["torch", part]


# --- parts from elsewhere ----------------------------------------------------------------------------------------


def without(tensors: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in tensors.items() if not name.startswith(PREFIXES[part])}


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_that_is_missing_is_named_and_replaced(tmp_path, tensors, expected, part, ldm):
    path = written(tmp_path / "a.safetensors", without(tensors, part))
    refused(lambda: loaded(path), f"{path}: holds no ", f"name one with {part}", error=WeightFileError)
    with errors_name_options({"vae": "--vae", "text_encoder": "--text-encoder"}):
        option = "--vae" if part == "vae" else "--text-encoder"
        refused(lambda: loaded(path), f"name one with {option}", error=WeightFileError)
    bare = {
        name.removeprefix(PREFIXES[part]): array for name, array in tensors.items() if name.startswith(PREFIXES[part])
    }
    weights = next((TORCH_MODEL / part).glob("*.safetensors"))
    for place in (TORCH_MODEL, TORCH_MODEL / part, weights, ldm, written(tmp_path / "part.safetensors", bare)):
        assert_same_tree(loaded(path, **{part: place}), expected)


def test_the_text_encoder_of_a_genuine_pickle(tmp_path, tensors, expected):
    path = written(tmp_path / "a.safetensors", without(tensors, "text_encoder"))
    assert_same_tree(loaded(path, text_encoder=PARTIAL), expected)
    words = [f"{PARTIAL}: lacks ", "decoder.conv_in.bias"]
    refused(lambda: loaded(path, vae=PARTIAL, text_encoder=PARTIAL), *words, error=WeightFileError)


def test_a_folder_with_another_vae(tmp_path, expected):
    assert_same_tree(
        {
            name: open_base(ModelSource(TORCH_MODEL, vae=TORCH_MODEL / "vae")).part(name).load(FLOAT16).params
            for name in expected
        },
        expected,
    )
    for name in ("unet", "text_encoder", "tokenizer", "scheduler"):  # the replaced part need not be there
        shutil.copytree(TORCH_MODEL / name, tmp_path / name)
    open_base(ModelSource(tmp_path, vae=TORCH_MODEL)).check()


# --- what is refused ---------------------------------------------------------------------------------------------

UNET_PREFIX = PREFIXES["unet"]
WIDTH = f"{UNET_PREFIX}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"


def with_channels(tensors: dict[str, np.ndarray], channels: int) -> dict[str, np.ndarray]:
    key = f"{UNET_PREFIX}input_blocks.0.0.weight"
    return tensors | {key: np.zeros((32, channels, 3, 3), np.float16)}


def test_nine_channels_are_read_and_need_a_mask(tmp_path, tensors):
    path = written(tmp_path / "a.safetensors", with_channels(tensors, 9))
    assert loaded(path)["unet"]["conv_in"]["kernel"].shape == (3, 3, 9, 32)
    pipe = StableDiffusion.from_pretrained(path, config=TORCH_MODEL)
    refused(lambda: pipe("a cat"), "an inpainting model (9 channels)", "mask")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: with_channels(t, 8), ["a whole instruct-pix2pix checkpoint", "4 or 9 input channels"]),
        (
            lambda t: t | {WIDTH.replace("2.1", "1.1"): np.zeros((32, 1024), np.float16)},
            ["of SD 2.x", "as a single file"],
        ),
        (
            lambda t: t | {"conditioner.embedders.0.x": np.zeros(1, np.float16)},
            ["of SDXL", "as a single file"],
        ),
        (lambda t: without(t, "unet"), ["holds no UNet; take another file"]),
        (lambda t: t | {f"{UNET_PREFIX}more.weight": np.zeros(1, np.float16)}, ["without a place", "more.weight"]),
        (lambda t: {k: v for k, v in t.items() if "middle_block.1.norm" not in k}, ["lacks middle_block.1.norm"]),
        (
            lambda t: t | {"first_stage_model.decoder.conv_in.bias": np.zeros(9, np.float16)},
            ["shape (9,)", "can be named with vae"],
        ),
    ],
    ids=["instruct", "SD 2", "SDXL", "no UNet", "more", "less", "odd VAE"],
)
def test_other_checkpoints(tmp_path, tensors, change, words):
    path = written(tmp_path / "a.safetensors", change(tensors))
    refused(lambda: loaded(path), str(path), *words, error=WeightFileError)


def test_options_that_do_not_fit(ldm):
    refused(lambda: loaded(ldm, extract_ema=True), "no moving average", "leave extract_ema out", error=WeightFileError)
    refused(lambda: open_base(ModelSource(TORCH_MODEL, extract_ema=True)), "extract_ema", "is a folder")
    refused(lambda: open_base(ModelSource(TORCH_MODEL, config=TORCH_MODEL)), "config", "is a folder")
    refused(lambda: open_base(ModelSource(ldm, config=ADAPTERS)), "config", "unet/config.json")
    adapter = ADAPTERS / "ip-adapter_tiny.safetensors"
    refused(
        lambda: open_base(adapter),
        "this is an IP-Adapter",
        "not a base model",
        "give it as the adapter",
        error=WeightFileError,
    )


def test_without_settings_offline(ldm, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refused(lambda: open_base(ldm), f"base model {ldm}", "has no tokenizer", "config")


# --- the peer ----------------------------------------------------------------------------------------------------


def test_diffusers_reads_the_file_that_we_write(ldm, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    from ipadapter_jax.weights.convert import convert

    convert(TORCH_MODEL, tmp_path / "ours.safetensors")
    theirs = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "ours.safetensors"),
        config=str(TORCH_MODEL),
        local_files_only=True,
        safety_checker=None,
        torch_dtype=torch.float16,
    )
    for part in ("unet", "vae"):
        recorded = load_file(next((TORCH_MODEL / part).glob("*.safetensors")))
        found = getattr(theirs, part).state_dict()
        assert found.keys() == recorded.keys()
        for name, array in recorded.items():
            assert found[name].numpy().tobytes() == array.tobytes(), name
