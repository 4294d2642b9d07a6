"""Exported adapters: the authors' names, shapes and sizes in bytes; our own reader; the same image in diffusers."""

import collections
import functools
import hashlib
import json
import lzma
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, ORACLES, TORCH_MODEL, noise_in_every_step, slow
from safetensors.numpy import load_file
from weight_files import assert_same_tree, refused

from benchmarks import compare_with_diffusers
from ipadapter_jax import StableDiffusion
from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.images.preprocess import load_image, to_uint8
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.train.init import init_adapter
from ipadapter_jax.weights import verified_write
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.ip_adapter_export import adapter_metadata, save_ip_adapter
from ipadapter_jax.weights.ip_adapter_file import load_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.load_tree import leaves, nest
from ipadapter_jax.weights.open_component import read_json

FILES = {
    variant: ADAPTERS / f"ip-adapter{mark}_tiny.safetensors"
    for variant, mark in (("base", ""), ("plus", "-plus"), ("full", "-full-face"))
}
UNET_CONFIG = UNetConfig.from_json(read_json(TORCH_MODEL / "unet" / "config.json"))
WIDTHS = tuple(site.width for site in cross_attention_layers(UNET_CONFIG))
METADATA = {"variant": "base", "step": "3"}


def stored(variant: str, dtype: str = "float32") -> dict:
    return load_ip_adapter(open_ip_adapter(FILES[variant]), WIDTHS, np.dtype(dtype))


def header(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def changed(tree: dict, key: tuple[str, ...], value: np.ndarray) -> dict:
    return nest(leaves(tree) | {key: value})


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FILES)
def test_a_released_file_comes_out_as_it_went_in(tmp_path, variant):
    """Names, shapes and every bit, as another library reads them."""
    expected = load_file(FILES[variant])
    [dtype] = {array.dtype.name for array in expected.values()}
    digest = save_ip_adapter(tmp_path / "a.safetensors", stored(variant, dtype), dtype=dtype, metadata=METADATA)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", FILES)
def test_our_reader_gets_the_rounded_weights(tmp_path, variant, dtype):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), stored(variant))
    save_ip_adapter(tmp_path / "a.safetensors", params, dtype=dtype, metadata={})
    file = open_ip_adapter(tmp_path / "a.safetensors")
    assert file.config == open_ip_adapter(FILES[variant]).config
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
    assert_same_tree(load_ip_adapter(file, WIDTHS, np.dtype(dtype)), rounded)


SIZES = {  # bytes of the published files, which hold no metadata
    "base": (44_642_768, ImageProjConfig("base", 1024, 768, 4)),
    "plus": (98_183_288, ImageProjConfig("plus", 1280, 768, 16, hidden_dim=768, heads=12, depth=4)),
    "full": (43_592_352, ImageProjConfig("full", 1280, 768, 257)),
}


@pytest.mark.parametrize("variant", SIZES)
def test_names_shapes_and_bytes_are_those_of_the_published_files(data, tmp_path, monkeypatch, variant):
    size, config = SIZES[variant]
    unet = UNetConfig()
    shapes = jax.eval_shape(lambda seed: init_adapter(text_projections(unet), unet, config, seed), 0)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float16), shapes)
    monkeypatch.setattr(verified_write, "_verify", lambda *_: None)  # at this size it reads and compares for seconds
    save_ip_adapter(tmp_path / "a.safetensors", params, metadata=METADATA)
    published = collections.defaultdict(dict)
    for line in lzma.decompress((data / "published_keys.txt.xz").read_bytes()).decode().splitlines():
        kind, part, key, shape = line.split()
        published[kind, part][key] = [int(n) for n in shape.split("x")]
    found = header(tmp_path / "a.safetensors")
    del found["__metadata__"]
    expected = {f"image_proj.{key}": shape for key, shape in published["torch", variant].items()}
    expected |= {f"ip_adapter.{key}": shape for key, shape in published["torch", "ip_adapter"].items()}
    assert {name: entry["shape"] for name, entry in found.items()} == expected
    assert list(found) == sorted(found)
    text, offsets = len(json.dumps(found, separators=(",", ":"))), [entry["data_offsets"] for entry in found.values()]
    assert 8 + text + -text % 8 + offsets[-1][1] == size


def text_projections(config: UNetConfig) -> dict:
    """The part of a UNet's tree that the adapter copies, zeros."""
    tree: dict = {}
    for site in cross_attention_layers(config):
        kernel = {"kernel": jnp.zeros((config.cross_attention_dim, site.width))}
        blocks = tree.setdefault(site.block, {})
        blocks[f"attentions_{site.attention}"] = {"transformer_blocks_0": {"attn2": {"to_k": kernel, "to_v": kernel}}}
    return tree


def test_arrays_that_lie_in_memory_in_another_order(tmp_path):
    params = stored("plus")
    views = jax.tree.map(lambda x: np.asfortranarray(x), params)
    views["image_proj"]["norm_out"]["scale"] = np.repeat(views["image_proj"]["norm_out"]["scale"], 2)[::2]
    assert not views["image_proj"]["proj_in"]["kernel"].flags.c_contiguous
    expected = save_ip_adapter(tmp_path / "a.safetensors", params, metadata=METADATA)
    assert save_ip_adapter(tmp_path / "b.safetensors", views, metadata=METADATA) == expected


def test_bytes_depend_on_content_alone(tmp_path):
    params = stored("base")
    turned = {part: dict(reversed(list(params[part].items()))) for part in ("ip_adapter", "image_proj")}
    expected = save_ip_adapter(tmp_path / "a.safetensors", params, metadata={"a": "1", "b": "2"})
    assert save_ip_adapter(tmp_path / "b.safetensors", turned, metadata={"b": "2", "a": "1"}) == expected
    assert save_ip_adapter(tmp_path / "b.safetensors", turned, metadata={"b": "3", "a": "1"}) != expected


def tensors_digest(tensors: dict[str, np.ndarray]) -> str:
    """Of a file's content, as its documentation says."""
    found = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        found.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode() + array.tobytes())
    return found.hexdigest()


def test_one_changed_bit_of_our_file_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    save_ip_adapter(path, stored("base"), metadata=METADATA)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(
        lambda: open_ip_adapter(path),
        f"{path}: its weights are not those that were written",
        "copy the file again",
        error=WeightFileError,
    )


def test_metadata(tmp_path):
    metadata = adapter_metadata(ImageProjConfig("base", 1024, 768, 4), step=70)
    save_ip_adapter(tmp_path / "a.safetensors", stored("base"), metadata=metadata)
    found = header(tmp_path / "a.safetensors")["__metadata__"]
    assert found.pop("ipadapter_jax")
    assert found.pop("tensors_sha256") == tensors_digest(load_file(tmp_path / "a.safetensors"))
    assert found == {
        "format": "pt",
        "variant": "base",
        "image_encoder": "ViT-H/14",
        "features": "image_embeds 1024",
        "num_tokens": "4",
        "base": "SD 1.x",
        "step": "70",
    }
    plus = adapter_metadata(ImageProjConfig("plus", 1280, 768, 16, 768, 12, 4), step=0)
    assert (plus["image_encoder"], plus["features"]) == ("ViT-H/14", "penultimate_states 1280")
    tiny = adapter_metadata(ImageProjConfig("full", 48, 32, 50), step=0)
    assert (tiny["image_encoder"], tiny["base"]) == ("custom", "custom, text width 32")


# --- what is refused ---------------------------------------------------------------------------------------------

KEY = ("image_proj", "norm", "scale")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, bad):
    params = changed(stored("base"), KEY, np.full(32, bad, np.float32))
    words = ["image_proj.norm.weight holds NaN or infinity", "an earlier checkpoint"]
    refused(lambda: save_ip_adapter(tmp_path / "a.safetensors", params, metadata={}), *words)
    assert not list(tmp_path.iterdir())


def test_weights_beyond_float16(tmp_path):
    params = changed(stored("base"), KEY, np.full(32, -7e4, np.float32))
    words = ["image_proj.norm.weight reaches 7e+04, too large for float16; use float32"]
    refused(lambda: save_ip_adapter(tmp_path / "a.safetensors", params, metadata={}), *words)
    assert not list(tmp_path.iterdir())
    save_ip_adapter(tmp_path / "a.safetensors", params, dtype="float32", metadata={})


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [("a.pt", "float16", ["a.pt", ".safetensors or .bin"]), ("a.safetensors", "float8", ["'float8'", "bfloat16"])],
)
def test_other_names_and_dtypes(tmp_path, name, dtype, words):
    refused(lambda: save_ip_adapter(tmp_path / name, stored("base"), dtype=dtype, metadata={}), *words)
    assert not list(tmp_path.iterdir())


def test_failed_verification_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    before = save_ip_adapter(path, stored("base"), metadata=METADATA)

    def damaged(target: Path) -> dict:
        content = target.read_bytes()
        target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return open_tensors(target)

    monkeypatch.setattr(verified_write, "open_tensors", damaged)
    words = ["bytes on disk differ for ip_adapter.9.to_v_ip.weight", "save to another disk"]
    refused(lambda: save_ip_adapter(path, stored("base"), metadata={}), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "file").touch()
    for name in ("a.safetensors", "file/b.safetensors"):
        refused(
            lambda name=name: save_ip_adapter(tmp_path / name, stored("base"), metadata={}), "not written", name[-13:]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "file"]


# --- the peer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(one_device) -> StableDiffusion:
    return StableDiffusion.from_pretrained(TORCH_MODEL)


@pytest.mark.torch
@pytest.mark.parametrize("variant", ["base", *slow("plus", "full")])
def test_diffusers_makes_our_image_from_the_exported_file(base, tmp_path, variant):
    """1 level of 255 on 99.9 % of the pixels, from the same latents, in float32, of weights rounded to float16."""
    import torch

    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), stored(variant))
    path = tmp_path / "adapter.safetensors"
    save_ip_adapter(path, params, metadata=METADATA)
    latents = rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    call = {"ip_adapter_image": load_image(ORACLES / "assets" / "img_a.png"), "num_inference_steps": 3}
    call |= {"guidance_scale": 7.5, "height": 128, "width": 128, "output_type": "np"}

    pipe = base.with_ip_adapter(path, image_encoder=IMAGE_ENCODER)
    ours = functools.partial(pipe, "a photo", latents=latents, callback=lambda *_: None, **call)
    with noise_in_every_step():  # as in parity/test_generation.py: the same compiled program
        image, plain = ours(), ours(ip_adapter_scale=0.0)

    diffusers, transformers = compare_with_diffusers.peers()
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(IMAGE_ENCODER, dtype=torch.float32)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        TORCH_MODEL, image_encoder=encoder, safety_checker=None, dtype=torch.float32
    )
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.feature_extractor = transformers.CLIPImageProcessorPil(size=224, crop_size=224)
    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name)
    theirs.set_progress_bar_config(disable=True)
    reference = theirs("a photo", latents=torch.from_numpy(np.moveaxis(latents, -1, 1).copy()), **call).images

    levels = np.abs(to_uint8(image).astype(int) - to_uint8(reference)).max(axis=-1)
    assert (levels <= 1).mean() >= 0.999, f"{(levels <= 1).mean():.4%} of the pixels, the worst by {levels.max()}"
    assert np.abs(plain - image).max() > 0.05  # the adapter takes part in it
