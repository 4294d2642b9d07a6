"""Names and shapes of every parameter at the published sizes, in both directions."""

import collections
import functools
import lzma

import jax
import numpy as np
import pytest

from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.image_projections import example_features, image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.models.vae import VAE, VAEConfig
from ipadapter_jax.weights.components import IMAGE_ENCODER, TEXT_ENCODER, UNET, VAE_COMPONENT, abstract_params
from ipadapter_jax.weights.key_mapping import VAE_RENAMES, from_torch, to_torch, torch_key, torch_shape
from ipadapter_jax.weights.load_tree import leaves

PROJECTIONS = {
    "base": ImageProjConfig("base", 1024, 768, 4),
    "plus": ImageProjConfig("plus", 1280, 768, 16, hidden_dim=768, heads=12, depth=4),
    "full": ImageProjConfig("full", 1280, 768, 257),
}


@functools.cache
def shapes(part: str) -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path: shape} of our tree."""
    if part in PROJECTIONS:
        config = PROJECTIONS[part]
        tree = jax.eval_shape(image_projection(config).init, jax.random.key(0), example_features(config))["params"]
    elif part == "ip_adapter":
        widths = tuple(site.width for site in cross_attention_layers(UNetConfig()))
        tokens = jax.ShapeDtypeStruct((1, 4, 768), np.float32)
        tree = jax.eval_shape(IPAdapter(widths).init, jax.random.key(0), tokens)["params"]
    else:
        tree = {
            "unet": lambda: abstract_params(UNET, UNet(UNetConfig())),
            "vae": lambda: abstract_params(VAE_COMPONENT, VAE(VAEConfig())),
            "text": lambda: abstract_params(TEXT_ENCODER, CLIPText(CLIPTextConfig())),
            "vision": lambda: abstract_params(IMAGE_ENCODER, CLIPVision(CLIPVisionConfig())),
        }[part]()
    return {path: leaf.shape for path, leaf in leaves(tree).items()}


@pytest.fixture(scope="module")
def published(data) -> dict[tuple[str, str], dict[str, tuple[int, ...]]]:
    """{(format, part): {key: shape}}.

    The file holds lines "format part key 320x4x3x3", sorted by key within a part: the state dicts of diffusers 0.42.1
    and transformers 5.23.0 at the published configurations, the authors' adapter files (their sizes in bytes confirm
    names, shapes and dtype), and the trees of the last releases with Flax classes (diffusers 0.30.3).
    """
    found: dict = collections.defaultdict(dict)
    for line in lzma.decompress((data / "published_keys.txt.xz").read_bytes()).decode().splitlines():
        kind, part, key, shape = line.split()
        found[kind, part][key] = tuple(map(int, shape.split("x")))
    return found


@pytest.mark.parametrize("part", ["unet", "vae", "text", "vision", "base", "plus", "full", "ip_adapter"])
def test_every_parameter_has_its_pytorch_key_and_shape(published, part):
    ours, renames = shapes(part), VAE_RENAMES if part == "vae" else {}
    keys = {torch_key(path, renames): torch_shape(path, shape) for path, shape in ours.items()}
    assert len(keys) == len(ours)
    expected = published["torch", part]
    if part == "text":  # transformers 5 leaves the prefix out; the published files have it
        expected = {f"text_model.{key}": shape for key, shape in expected.items()}
    assert keys == expected


@pytest.mark.parametrize("part", ["unet", "vae", "text", "vision"])
def test_our_trees_are_the_published_flax_trees(published, part):
    ours = {".".join(path): shape for path, shape in shapes(part).items()}
    expected = published["flax", part]
    if part == "vision":  # recorded from the class without the projection
        expected = expected | {"visual_projection.kernel": (1280, 1024)}
    assert ours == expected


@pytest.mark.parametrize(
    ("path", "shape", "in_torch"),
    [
        (("conv_in", "kernel"), (3, 5, 4, 7), (7, 4, 3, 5)),
        (("fc1", "kernel"), (4, 7), (7, 4)),
        (("token_embedding", "embedding"), (4, 7), (4, 7)),
        (("norm", "scale"), (4,), (4,)),
        (("norm", "bias"), (4,), (4,)),
        (("latents",), (1, 4, 7), (1, 4, 7)),
    ],
)
def test_there_and_back(path, shape, in_torch):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    there = to_torch(path, array)
    assert there.shape == in_torch == torch_shape(path, shape)
    assert there.flags.c_contiguous  # safetensors writes the memory as it lies
    np.testing.assert_array_equal(from_torch(path, there), array)


def test_what_a_transposed_kernel_holds():
    kernel = np.arange(3 * 5 * 4 * 7).reshape(3, 5, 4, 7)  # row, column, input channel, output channel
    assert to_torch(("kernel",), kernel)[6, 3, 2, 1] == kernel[2, 1, 3, 6]
    assert to_torch(("kernel",), kernel[0, 0])[6, 3] == kernel[0, 0, 3, 6]
