"""The sizes and the first weights of an adapter, and those taken from a file."""

import functools
import hashlib
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, TORCH_MODEL
from weight_files import assert_same_tree, refused

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.models.clip_config import CLIPVisionConfig
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.train.init import init_adapter, load_adapter_params, projection_config
from ipadapter_jax.weights import components
from ipadapter_jax.weights.components import abstract_params
from ipadapter_jax.weights.ip_adapter_export import save_ip_adapter
from ipadapter_jax.weights.ip_adapter_file import load_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.load_tree import leaves
from ipadapter_jax.weights.open_component import load_component, read_component_config

VISION = read_component_config(components.IMAGE_ENCODER, IMAGE_ENCODER / "config.json").config
TINY_UNET = read_component_config(components.UNET, TORCH_MODEL / "unet" / "config.json").config
CONFIGS = {variant: projection_config(variant, VISION, 32, heads=2) for variant in ("base", "plus", "full")}
FILES = {"base": "ip-adapter_tiny.bin", "plus": "ip-adapter-plus_tiny.bin", "full": "ip-adapter-full-face_tiny.bin"}


@functools.cache
def unet_params() -> dict:
    return load_component(components.UNET, TORCH_MODEL / "unet", np.dtype("float32")).params


@functools.cache
def initial(config: ImageProjConfig, seed: int = 0) -> dict:
    return jitted(unet_params(), TINY_UNET, config, seed)


jitted = jax.jit(init_adapter, static_argnums=(1, 2))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("variant", "config", "parameters"),
    [
        ("base", ImageProjConfig("base", 1024, 768, 4), 3_150_336),
        ("plus", ImageProjConfig("plus", 1280, 768, 16, hidden_dim=768, heads=12, depth=4), 29_918_208),
        ("full", ImageProjConfig("full", 1280, 768, 257), 2_625_024),
    ],
)
def test_sizes_are_the_released_ones(variant, config, parameters):
    """base: 19,169,280 + 3,150,336 = 22,319,616, the 22M of the paper."""
    unet = UNetConfig()
    assert projection_config(variant, CLIPVisionConfig(), 768) == config
    template = abstract_params(components.UNET, UNet(unet))
    shapes = jax.eval_shape(lambda params: init_adapter(params, unet, config, 0), template)
    assert count(shapes["ip_adapter"]) == 19_169_280
    assert count(shapes["image_proj"]) == parameters
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}


@pytest.mark.parametrize("variant", CONFIGS)
def test_the_trees_are_those_of_a_file(variant):
    expected = load_adapter_params(ADAPTERS / FILES[variant], TINY_UNET, CONFIGS[variant])
    found = initial(CONFIGS[variant])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_start_as_copies_of_those_of_the_text(dtype):
    """In file order: down, up, mid. From a bfloat16 UNet they are its weights, exactly."""
    params = jax.tree.map(lambda x: x.astype(dtype), unet_params())
    found = init_adapter(params, TINY_UNET, CONFIGS["base"], 0)["ip_adapter"]
    sites = cross_attention_layers(TINY_UNET)
    assert list(found) == [str(2 * i + 1) for i in range(len(sites))]
    for number, site in zip(found, sites, strict=True):
        attention = params[site.block][f"attentions_{site.attention}"][f"transformer_blocks_{site.layer}"]["attn2"]
        for name in ("to_k", "to_v"):
            kernel = found[number][f"{name}_ip"]["kernel"]
            assert kernel.dtype == jnp.float32
            np.testing.assert_array_equal(kernel, attention[name]["kernel"].astype(jnp.float32))
    np.testing.assert_array_equal(
        found["31"]["to_k_ip"]["kernel"],
        params["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_k"]["kernel"].astype(jnp.float32),
    )


@pytest.mark.parametrize("variant", CONFIGS)
def test_the_projection_is_initialized_as_in_pytorch(variant):
    """Linear: weight and bias uniform within 1/sqrt(inputs). LayerNorm: 1 and 0. Latents: normal, 1/sqrt(width)."""
    tree = leaves(initial(CONFIGS[variant])["image_proj"])
    drawn = 0
    for path, leaf in tree.items():
        x = np.asarray(leaf, np.float64).ravel()
        kernel = tree.get((*path[:-1], "kernel"))
        if path[-1] == "latents":
            bound, deviation = math.inf, 32**-0.5
        elif kernel is None:
            assert (x == (path[-1] == "scale")).all(), path
            continue
        else:
            bound = kernel.shape[0] ** -0.5
            deviation = bound / math.sqrt(3)
        drawn += 1
        assert np.abs(x).max() <= bound, path
        assert x.std() == pytest.approx(deviation, rel=4 / math.sqrt(x.size)), path  # some standard errors
        assert abs(x.mean()) < 4 * deviation / math.sqrt(x.size), path
        assert len(np.unique(x)) > 0.99 * x.size, path
    assert drawn == {"base": 2, "plus": 4 * 5 + 5, "full": 4}[variant]


def test_every_seed_and_every_leaf_has_its_own_random_numbers():
    first, second = (leaves(initial(CONFIGS["plus"], seed)["image_proj"]) for seed in (0, 1))
    queries = [("layers_0_0", "to_q", "kernel"), ("layers_1_0", "to_q", "kernel")]
    assert not np.array_equal(first[queries[0]], first[queries[1]])
    for path in (*queries, ("latents",), ("proj_in", "bias")):
        assert not np.array_equal(first[path], second[path])


def test_neither_jit_nor_the_layout_over_devices_changes_a_bit():
    eager = init_adapter(unet_params(), TINY_UNET, CONFIGS["plus"], 5)
    assert_same_tree(initial(CONFIGS["plus"], 5), eager)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf) -> jax.sharding.NamedSharding:
        split = leaf.ndim > 1 and leaf.shape[-1] % 4 == 0
        spec = jax.sharding.PartitionSpec(*(None,) * (leaf.ndim - 1), "fsdp" if split else None)
        return jax.sharding.NamedSharding(mesh, spec)

    draw = functools.partial(init_adapter, unet_config=TINY_UNET, projection=CONFIGS["plus"], seed=5)
    spread = jax.jit(draw, out_shardings=jax.tree.map(place, eager))(unet_params())
    assert len(spread["image_proj"]["proj_in"]["kernel"].sharding.device_set) == 4
    assert_same_tree(spread, eager)


ONE_DEVICE = """
import hashlib, json, jax, numpy as np
from ipadapter_jax.runtime.random_keys import key
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.train.init import _init_projection
assert jax.device_count() == 1
config = ImageProjConfig("plus", 48, 32, 16, hidden_dim=32, heads=2, depth=4)
tree = jax.jit(lambda: _init_projection(config, key(5)))()
print(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest())
"""


def test_one_device_initializes_as_four_do():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", ONE_DEVICE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    here = jax.tree.leaves(initial(CONFIGS["plus"], 5)["image_proj"])
    assert done.stdout.strip() == hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in here)).hexdigest()


# --- from a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CONFIGS)
def test_training_starts_from_a_released_file(variant):
    path = ADAPTERS / FILES[variant]
    widths = tuple(site.width for site in cross_attention_layers(TINY_UNET))
    found = load_adapter_params(path, TINY_UNET, CONFIGS[variant])
    assert_same_tree(found, load_ip_adapter(open_ip_adapter(path), widths, np.dtype("float32")))


def test_a_float32_export_is_read_back_exactly(tmp_path):
    params = initial(CONFIGS["full"])
    save_ip_adapter(tmp_path / "a.safetensors", params, dtype="float32", metadata={})
    assert_same_tree(load_adapter_params(tmp_path / "a.safetensors", TINY_UNET, CONFIGS["full"]), params)


def test_a_file_that_does_not_fit_the_run():
    def begin(file: str, config: ImageProjConfig, unet: UNetConfig = TINY_UNET) -> None:
        load_adapter_params(ADAPTERS / FILES[file], unet, config)

    refused(lambda: begin("base", CONFIGS["plus"]), FILES["base"], "it has variant=base (this run: plus)")
    other = projection_config("plus", VISION, 32, num_tokens=8, heads=3, depth=2)
    words = ["num_tokens=16 (this run: 8), heads=2 (this run: 3), depth=4 (this run: 2)", "change one of them"]
    refused(lambda: begin("plus", other), *words)
    encoder = projection_config("base", CLIPVisionConfig(), 32)
    words = ["needs image embeddings of width 40", "the image encoder of this run gives 1024"]
    refused(lambda: begin("base", encoder), *words, error=WeightFileError)
    words = ["this base has 768 (SD 1.x)"]
    refused(lambda: begin("base", CONFIGS["base"], UNetConfig()), *words, error=WeightFileError)
