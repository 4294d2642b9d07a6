"""Masks of image prompts and of inpainting against PyTorch's interpolations, and what a person may give as one."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ORACLES
from PIL import Image

from ipadapter_jax import InputError
from ipadapter_jax.errors import errors_name_options
from ipadapter_jax.images.preprocess import load_upright
from ipadapter_jax.models.unet_config import UNetConfig, attention_grids
from ipadapter_jax.pipelines.inpainting import InitImage
from ipadapter_jax.pipelines.masks import check_inside, check_latent_mask, latent_mask, layer_mask, load_mask

RANDOM = np.random.default_rng(7).random((96, 120)).astype(np.float32)  # not symmetric in any way
CIRCLE = (np.hypot(*np.mgrid[-1:1:96j, -1:1:120j]) < 0.7).astype(np.float32)
GRIDS = [(12, 15), (6, 8), (3, 4), (1, 1), (13, 7), (96, 120), (100, 131)]


@pytest.mark.torch
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("mask", [RANDOM, CIRCLE], ids=["random", "circle"])
def test_masks_shrink_as_pytorchs_bicubic_interpolation_does(mask, grid):
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.interpolate(
        torch.tensor(mask, dtype=torch.float64)[None, None], grid, mode="bicubic"
    )
    [found] = layer_mask(mask, [grid])
    assert found.shape == (grid[0] * grid[1],) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy().ravel(), atol=1e-6)  # float32's rounding of numbers up to 1.3


def test_overshoot_is_kept():
    [found] = layer_mask(CIRCLE, [(31, 33)])
    assert found.min() < -0.01 and found.max() > 1.01


# Pixels of an image, and so of its masks: sides that are, and are not, divisible by all levels of SD 1.5.
@pytest.mark.torch
@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 64), (64, 96), (192, 320), (128, 256)])
def test_masks_at_every_layer_equal_diffusers(height, width):
    torch = pytest.importorskip("torch")
    image_processor = pytest.importorskip("diffusers.image_processor")
    masks = np.random.default_rng(height).random((2, height, width)).astype(np.float32)
    grids = attention_grids(UNetConfig(), height // 8, width // 8)
    for mask in masks:
        for found, (h, w) in zip(layer_mask(mask, grids), grids, strict=True):
            given = torch.from_numpy(mask)[None]
            expected = image_processor.IPAdapterMaskProcessor.downsample(given, 1, h * w, 1)
            np.testing.assert_allclose(found, expected[0, :, 0], atol=2e-6)  # it computes in float32


def test_odd_latents_have_masks_of_the_grids_that_the_network_has():
    """Where halves are rounded up, diffusers guesses the grid from the number of queries and can miss it."""
    grids = attention_grids(UNetConfig(), 9, 13)
    assert sorted(set(grids)) == [(2, 2), (3, 4), (5, 7), (9, 13)]
    mask = np.zeros((72, 104))
    mask[:, 52:] = 1
    for found, (h, w) in zip(layer_mask(mask, grids), grids, strict=True):
        rows = found.reshape(h, w)
        np.testing.assert_array_equal(rows, np.repeat(rows[:1], h, 0))  # nothing differs from top to bottom
        assert rows[0, 0] < 0.1 and rows[0, -1] > 0.9


def test_no_mask_is_everywhere():
    grids = [(4, 6), (2, 3)]
    for none, ones, (h, w) in zip(layer_mask(None, grids), layer_mask(np.ones((32, 48)), grids), grids, strict=True):
        np.testing.assert_array_equal(none, np.ones(h * w))
        np.testing.assert_allclose(ones, none, rtol=1e-7)  # the four weights sum to 1 but for rounding


HALVES = np.zeros((48, 64), np.float32)
HALVES[:, 32:] = 1


def palette(colors: list[int], inside: int = 1) -> Image.Image:
    """Two colors by index."""
    image = Image.fromarray(np.where(HALVES, inside, 1 - inside).astype(np.uint8), "P")
    image.putpalette(colors)
    return image


def painted(color: tuple[int, int, int]) -> Image.Image:
    """A layer with paint of one color on a transparent ground."""
    return Image.fromarray(np.dstack([np.full((48, 64, 3), color), 255 * HALVES]).astype(np.uint8))


def colored() -> Image.Image:
    return Image.fromarray((HALVES[:, :, None] * (220, 30, 20)).astype(np.uint8))


@pytest.mark.parametrize(
    "given",
    [
        HALVES,
        HALVES.astype(np.float64),
        HALVES.astype(bool),
        HALVES.astype(np.uint8),  # 0 and 1, as diffusers' processor writes them
        HALVES.astype(np.int64),
        (HALVES * 255).astype(np.uint8),
        HALVES * 255,
        HALVES.astype(np.float16),
        (HALVES * 255).astype(np.uint16),  # levels of 8 bits, whatever holds them
        (HALVES * 65535).astype(np.uint16),
        (HALVES * 255).astype(np.int64),
        HALVES.astype(np.uint16),
        jnp.asarray(HALVES, jnp.bfloat16),
        HALVES[None],
        HALVES[None, None],
        HALVES[:, :, None],
        np.repeat(HALVES[:, :, None], 3, 2).astype(bool),
        Image.fromarray((HALVES * 255).astype(np.uint8)),
        Image.fromarray((HALVES * 255).astype(np.uint8)).convert("RGB"),
        Image.fromarray(HALVES.astype(bool)),
        Image.fromarray(HALVES.astype(np.uint8)),  # a label image
        Image.fromarray(HALVES.astype(np.uint8)).convert("LA"),
        Image.fromarray(HALVES.astype(np.uint16)),
        Image.fromarray((HALVES * 65535).astype(np.uint16)),
        Image.fromarray(HALVES.astype(np.int32)),
        Image.fromarray(HALVES),
        Image.fromarray(HALVES * 255),
        palette([0, 0, 0, 1, 1, 1]),
        palette([0, 0, 0, 128, 0, 0]),  # as label tools write them
        palette([30, 60, 200, 200, 40, 20]),
        palette([9, 9, 9, 9, 9, 9]),
        palette([0, 0, 0, 255, 255, 255]),
        palette([255, 255, 255, 0, 0, 0], inside=0),  # of black and white the color says which is which
        palette([255, 0, 0, 0, 0, 0], inside=0),
        painted((0, 0, 0)),
        painted((255, 255, 255)),
        painted((200, 30, 90)),
        painted((0, 0, 0)).convert("LA"),
        colored(),
    ],
    ids=["float", "double", "bool", "01", "int", "uint8", "float 0..255", "float16", "uint16 0..255", "uint16"]
    + [
        "int64 0..255",
        "uint16 labels",
        "bfloat16",
        "(1, H, W)",
        "(1, 1, H, W)",
        "(H, W, 1)",
        "RGB array of truth values",
    ]
    + ["L", "RGB", "1", "L labels", "LA labels", "I;16 labels", "I;16", "I labels", "F", "F 0..255"]
    + ["P near black", "P black and red", "P blue and red", "P one color", "P black and white", "P white and black"]
    + ["P red and black", "black paint", "white paint", "red paint", "LA", "red on black"],
)
def test_what_a_mask_may_be(given):
    found = load_mask(given, 48, 64)
    np.testing.assert_array_equal(found, HALVES)
    assert found.dtype == np.float32


def test_files_are_read_as_what_was_saved(tmp_path):
    for number, image in enumerate([Image.fromarray(HALVES.astype(np.uint8)), palette([0, 0, 0, 128, 0, 0])]):
        image.save(tmp_path / f"{number}.png")
        np.testing.assert_array_equal(load_mask(tmp_path / f"{number}.png", 48, 64), HALVES)
    painted((0, 0, 0)).save(tmp_path / "layer.png")
    np.testing.assert_array_equal(load_mask(str(tmp_path / "layer.png"), 48, 64), HALVES)


def black_with_noise(channels: int) -> np.ndarray:
    """What a JPEG may make of black."""
    return np.random.default_rng(3).integers(0, 2, (48, 64, channels), dtype=np.uint8)


@pytest.mark.parametrize(
    "given",
    [
        black_with_noise(3),
        black_with_noise(3).astype(np.int64),
        black_with_noise(3).astype(np.uint16),
        np.dstack([black_with_noise(3), np.full((48, 64), 255, np.uint8)]),
        np.repeat(black_with_noise(1), 3, 2),
        Image.fromarray(black_with_noise(3)),
        Image.fromarray(black_with_noise(3)).convert("CMYK"),
    ],
    ids=["uint8", "int64", "uint16", "RGBA", "grey", "PIL", "CMYK"],
)
def test_a_color_image_has_no_labels(given):
    assert load_mask(given, 48, 64).max() <= 1 / 255


@pytest.mark.parametrize("ending", ["jpg", "tif", "jp2", "webp"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_lossy_image_has_no_labels(tmp_path, ending, mode):
    path = tmp_path / f"black.{ending}"
    options = {"jpg": {"quality": 100}, "tif": {"compression": "jpeg", "quality": 100}}.get(ending, {})
    Image.fromarray(HALVES.astype(np.uint8)).convert(mode).save(path, **options)
    assert np.asarray(Image.open(path)).max() == 1 or ending == "webp"
    assert load_mask(path, 48, 64).max() <= 1 / 255
    with Image.open(path) as image:
        assert load_mask(image, 48, 64).max() <= 1 / 255
    with pytest.raises(InputError, match="is black"):
        check_inside(load_mask(path, 48, 64), "mask 1", 8)


def test_a_lossy_image_that_is_turned_has_no_labels(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 3
    Image.fromarray(HALVES.astype(np.uint8)).save(tmp_path / "black.jpg", quality=100, exif=tags)
    assert load_mask(load_upright(tmp_path / "black.jpg"), 48, 64).max() == 1 / 255


def test_soft_paint_is_as_soft_as_it_is_opaque():
    soft = np.zeros((48, 64, 4), np.uint8)
    soft[:, :, 3] = np.arange(0, 256, 4)
    np.testing.assert_array_equal(
        load_mask(soft, 48, 64), np.tile(np.arange(0, 256, 4, dtype=np.float32) / 255, (48, 1))
    )


def test_of_several_colors_on_a_transparent_ground_white_is_inside():
    layer = np.zeros((48, 64, 4), np.uint8)
    layer[:, 16:] = (0, 0, 0, 255)  # black paint, which is outside here
    layer[:, 32:, :3] = 255
    np.testing.assert_array_equal(load_mask(layer, 48, 64), HALVES)


def test_an_inpainting_mask_of_everything_is_a_warning():
    for sees_mask, words in ((False, ["the mask_image is white everywhere, so that it keeps nothing"]), (True, [])):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            check_latent_mask(np.ones((64, 64)), 8, sees_mask=sees_mask)
        assert [str(warning.message).split(" of the image")[0] for warning in found] == words


def test_an_inpainting_mask_of_nearly_nothing_is_a_warning():
    dot = np.zeros((64, 64), np.float32)
    dot[24:28, 24:28] = 1  # with the pixel that stands for a point of the latents
    with pytest.warns(UserWarning, match="the mask_image has about 16 pixels inside, fewer than one point"):
        check_latent_mask(dot, 8, sees_mask=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_latent_mask(dot, 4, sees_mask=False)  # a whole point, where one has 4 x 4 pixels
        check_inside(dot, "mask 1", 4)
    with pytest.warns(UserWarning, match="the mask 1 has about 16 pixels"):
        check_inside(dot, "mask 1", 8)


def test_an_inpainting_mask_is_called_as_whoever_gives_it_calls_it():
    init_image = np.zeros((64, 64, 3), np.uint8)
    dot = np.zeros((64, 64), np.float32)
    dot[24:28, 24:28] = 1
    with errors_name_options({"mask_image": "--mask-image"}):
        with pytest.warns(UserWarning, match="the --mask-image has about 16 pixels"):
            check_latent_mask(dot, 8, sees_mask=False)
        with pytest.raises(InputError, match="the --mask-image is 20 x 64 pixels"):
            InitImage.load(init_image, dot[:, :20], 64, 64, 8)


@pytest.mark.torch
def test_tensors_are_masks_too():
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(HALVES)
    for given in (tensor, tensor[None], tensor[None, None], tensor.bool(), tensor.bfloat16(), tensor.requires_grad_()):
        np.testing.assert_array_equal(load_mask(given, 48, 64), HALVES)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_a_mask_of_one_value_stays_that_value(value, dtype):
    np.testing.assert_array_equal(load_mask(np.full((8, 8), value, dtype), 8, 8), np.full((8, 8), value))


def test_grey_is_kept():
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))
    for given in (ramp, Image.fromarray(ramp), ramp / 255):
        np.testing.assert_array_equal(load_mask(given, 48, 64), ramp.astype(np.float32) / 255)


def test_a_mask_of_another_size_is_resized_smoothly():
    large = np.kron(HALVES, np.ones((3, 3)))
    found = load_mask(large, 48, 64)
    assert found.shape == (48, 64) and np.abs(found - HALVES)[:, [*range(29), *range(35, 64)]].max() == 0
    expected = Image.fromarray((large * 255).astype(np.uint8)).resize((64, 48), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32) / 255)
    assert load_mask(HALVES, 200, 264).shape == (200, 264)  # 1.32 and 1.33 wide: within 2 percent


def test_a_mask_may_be_a_file():
    found = load_mask(ORACLES / "assets" / "ipmask_1.png", 128, 128)
    assert found.shape == (128, 128) and {*np.unique(found)} == {0, 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((48, 48)), "the mask 3 is 48 x 48 pixels, the image 64 x 48: give a mask of the same shape"),
        (np.zeros((64, 48)), "48 x 64 pixels, the image 64 x 48"),
        (np.full((48, 64), 1.5), "the mask 3, an image array, has values from 1.5 to 1.5: scale them"),
        (np.full((48, 64), -1), "mask 3, an image array, has values from -1 to -1"),
        (np.full((48, 64), 70000), "has values from 70000 to 70000: scale them to 0..255"),
        (np.full((48, 64), 1j), "has dtype complex128: make it integers, booleans or floats"),
        (np.full((48, 64), np.nan), "image array"),
        (np.zeros((2, 48, 64)), "image array"),
        (np.zeros((0, 4)), "image array"),
        ("nowhere.png", "nowhere.png"),
    ],
)
def test_what_is_no_mask_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        load_mask(given, 48, 64, "mask 3")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("height", "width", "h", "w"), [(64, 64, 8, 8), (72, 104, 9, 13), (70, 99, 8, 12), (5, 7, 9, 11)]
)
def test_latent_masks_are_pytorchs_nearest_pixels_of_a_binary_mask(height, width, h, w):
    torch = pytest.importorskip("torch")
    grey = np.random.default_rng(height).integers(0, 256, (height, width)).astype(np.float32) / 255
    binary = torch.from_numpy((grey >= 0.5).astype(np.float32))[None, None]
    expected = torch.nn.functional.interpolate(binary, (h, w))[0, 0].numpy()
    found = latent_mask(grey, h, w)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_one_half_is_inside():
    np.testing.assert_array_equal(latent_mask(np.float32([[0.5, 0.499]]), 1, 2), [[1, 0]])
