"""Images of every kind in, and the pixel values of the CLIP image encoder out."""

import io
import os
import re
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import ORACLES, load_case, nchw
from PIL import Image, ImageFile
from transformers import CLIPImageProcessorPil

from ipadapter_jax.errors import InputError
from ipadapter_jax.images import preprocess
from ipadapter_jax.images.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    CLIP_TABLE,
    clip_pixel_values,
    clip_pixels,
    decode_image,
    image_grid,
    load_image,
    square_pixels,
    to_uint8,
)

LEVEL = 1 / 255 / min(CLIP_STD)  # one gray level after normalization


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


QUARTERS = Image.new("RGB", (64, 32), "white")  # shows every turn and flip; JPEG keeps colors away from the edges
for _color, _box in {"red": (0, 0, 32, 16), "lime": (32, 0, 64, 16), "blue": (0, 16, 32, 32)}.items():
    QUARTERS.paste(_color, _box)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def assert_quarters(image: Image.Image) -> None:
    assert image.size == (64, 32)
    assert np.abs(pixels(image)[8::16, 8::16] - pixels(QUARTERS)[8::16, 8::16]).max() < 16


def png(width: int, height: int, bits: int, color_type: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def refused(source, name: str, *words: str) -> None:
    """`source` is refused in one line with its name, these words, and a remedy after a colon."""
    with pytest.raises(InputError) as error:
        load_image(source)
    message = str(error.value)
    assert (
        name in message
        and "\n" not in message
        and re.search(r": (give|make|scale|check|if damaged|down|conv|save|repair)", message)
    ), message
    for word in words:
        assert word in message, message


# --- CLIP preprocessing


@pytest.mark.parametrize("name", ["img_a", "img_b", "img_c", "img_gray", "img_rgba"])
def test_recorded_pixel_values(name):
    case = load_case("image_processor")
    values = nchw(clip_pixel_values([load_image(ORACLES / "assets" / f"{name}.png")]))
    key = f"pixel_values_{name}"
    case.check(**{key: values} if key in case.outputs else {f"{key}_every4th": values[:, :, ::4, ::4]})


@pytest.mark.parametrize("size", [224, 225])
def test_crop_is_clip_image_processor(size):
    rng = np.random.default_rng(1)
    sizes = [tuple(int(x) for x in rng.integers(1, 701, 2)) for _ in range(40 if size == 224 else 5)]
    sizes += [(1, 1), (1, 2), (1, 300), (300, 1), (2, 651), (700, 3), (223, 225), (225, 224), (268, 636)]
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    for width, height in sizes:
        image = noise(width, height)
        expected = processor(images=image, return_tensors="np")["pixel_values"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one-pixel sides
            values = nchw(clip_pixel_values([image], size))
        np.testing.assert_allclose(values, expected, atol=1e-6, rtol=0, err_msg=f"{width} x {height}")


@pytest.mark.parametrize("width, height", [(30, 11000), (11000, 31), (46, 16384), (16384, 47)])
def test_a_very_thin_image_equals_the_whole_crop(width, height, monkeypatch):
    image = noise(width, height)
    values = clip_pixel_values([image])
    monkeypatch.setattr(preprocess, "_WHOLE_LIMIT", 1 << 27)
    difference = np.abs(values - clip_pixel_values([image]))
    assert difference.max() < 2.1 * LEVEL and (difference > 1e-6).mean() < 2e-3


@pytest.mark.parametrize("fit", preprocess.FITS)
@pytest.mark.parametrize("width, height", [(1, 16384), (16384, 1)])
@pytest.mark.filterwarnings("ignore:.*1 pixel wide or high")
def test_slivers_take_little_memory(width, height, fit, monkeypatch):
    image = noise(width, height)
    resize, areas = Image.Image.resize, []

    def watched(self, size, *args, **kwargs):
        areas.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    tracemalloc.start()  # sees numpy's memory; PIL's is that of the images it makes
    values = clip_pixel_values([image], fit=fit)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert values.shape == (1, 224, 224, 3) and np.isfinite(values).all()
    assert areas and max(areas) <= 1 << 24


def test_sliver_over_the_limit_is_refused():
    refused(Image.new("RGB", (1, 20000)), "the image", "1 x 20000", "16384")


def test_resize_stretches_and_pad_pads():
    image = Image.new("RGB", (100, 50), (255, 0, 0))
    red = (np.array([1, 0, 0]) - CLIP_MEAN) / CLIP_STD
    stretched, padded = clip_pixel_values([image], 64, "resize")[0], clip_pixel_values([image], 64, "pad")[0]
    np.testing.assert_allclose(stretched, np.broadcast_to(red, (64, 64, 3)), atol=1e-6)
    np.testing.assert_allclose(padded[16:48], np.broadcast_to(red, (32, 64, 3)), atol=1e-6)
    assert not padded[:16].any() and not padded[48:].any()  # the mean color, exactly
    tall = clip_pixel_values([image.rotate(90, expand=True)], 64, "pad")[0]
    np.testing.assert_array_equal(tall, padded.swapaxes(0, 1))


def test_square_images_fit_alike_and_batches_are_stacked():
    images = [noise(64, 64, seed) for seed in range(3)]
    batch = clip_pixel_values(images, 32)
    assert batch.shape == (3, 32, 32, 3) and batch.dtype == np.float32
    for fit in preprocess.FITS:
        np.testing.assert_array_equal(clip_pixel_values(images[1:2], 32, fit)[0], batch[1])
    assert clip_pixel_values([], 32).shape == (0, 32, 32, 3)
    plain = clip_pixel_values(images, 64, mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_array_equal((plain * 255).round(), [pixels(image) for image in images])


def test_invalid_arguments_of_clip_pixel_values():
    image = noise(8, 8)
    with pytest.raises(InputError, match=r"fit='squeeze'.*crop, resize, pad"):
        clip_pixel_values([image], fit="squeeze")
    with pytest.raises(InputError, match=r"size=0.*at least 1"):
        clip_pixel_values([image], 0)
    for single in (image, np.asarray(image), "a.png"):
        with pytest.raises(InputError, match="put the images in a list"):
            clip_pixel_values(single)


# --- Image modes


def saved(tmp_path, image: Image.Image, name: str, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "jp2"])
def test_formats(tmp_path, suffix):
    path = saved(tmp_path, QUARTERS, f"image.{suffix}")
    for source in (path, str(path)):
        assert_quarters(load_image(source))


def test_a_image_outlives_its_file_and_stays_equal(tmp_path):
    image = load_image(saved(tmp_path, QUARTERS, "a.png"))
    (tmp_path / "a.png").unlink()
    np.testing.assert_array_equal(pixels(load_image(image)), pixels(QUARTERS))
    source = QUARTERS.copy()
    load_image(source).putpixel((0, 0), (1, 2, 3))
    assert source.getpixel((0, 0)) == (255, 0, 0)  # a new image, not the caller's


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # Image.Transpose that makes the stored image
    stored = QUARTERS if undo is None else QUARTERS.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png", "a.tiff"):
        path = saved(tmp_path, stored, name, exif=exif)
        upright = load_image(path)
        assert_quarters(upright)
        np.testing.assert_array_equal(pixels(load_image(upright)), pixels(upright))  # not turned twice
        with Image.open(path) as image:
            np.testing.assert_array_equal(pixels(load_image(image)), pixels(upright))


def test_unreadable_exif_is_ignored(tmp_path):
    path = saved(tmp_path, QUARTERS, "a.jpg", exif=b"Exif\0\0nonsense that is no TIFF header")
    assert_quarters(load_image(path))


@pytest.mark.parametrize(
    "name, options", [("a.gif", {}), ("a.png", {}), ("a.webp", {"lossless": True}), ("a.tiff", {})]
)
def test_first_frame_of_an_animation(tmp_path, name, options):
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "lime", "blue")]
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert (pixels(load_image(path)) == (255, 0, 0)).all()


def test_transparency_is_composited_on_white(tmp_path):
    rgba = Image.new("RGBA", (8, 4), (200, 0, 0, 0))
    rgba.paste((200, 0, 0, 128), (4, 0, 8, 4))
    expected = pixels(Image.alpha_composite(Image.new("RGBA", (8, 4), "white"), rgba).convert("RGB"))
    assert (expected[:, :4] == 255).all()
    assert (pixels(load_image(saved(tmp_path, rgba, "a.png"))) == expected).all()
    assert (pixels(load_image(np.asarray(rgba))) == expected).all()
    assert np.abs(pixels(load_image(rgba.convert("RGBa"))) - expected).max() <= 1  # premultiplied
    for gray in (rgba.convert("LA"), rgba.convert("LA").convert("La")):
        assert (pixels(load_image(gray))[:, :4] == 255).all() and (pixels(load_image(gray))[:, 4:] < 160).all()

    palette = Image.new("P", (8, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(1, (4, 0, 8, 4))
    for name in ("a.png", "a.gif"):
        shown = pixels(load_image(saved(tmp_path, palette, name, transparency=0)))
        assert (shown[:, :4] == 255).all() and (shown[:, 4:] == (40, 50, 60)).all()
    color_key = saved(tmp_path, Image.new("RGB", (3, 3), (1, 2, 3)), "b.png", transparency=(1, 2, 3))
    assert (pixels(load_image(color_key)) == 255).all()


def test_cmyk(tmp_path):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    jpeg = saved(tmp_path, red, "adobe.jpg", quality=95)  # inverted values, said by the Adobe marker
    data = jpeg.read_bytes()
    marker = data.index(b"\xff\xee")
    bare = tmp_path / "bare.jpg"  # without that marker: inverted all the same, as browsers have it
    bare.write_bytes(data[:marker] + data[marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big") :])
    assert b"Adobe" in data and b"Adobe" not in bare.read_bytes()
    for source in (red, jpeg, bare, saved(tmp_path, red, "a.tiff")):
        assert np.abs(pixels(load_image(source)) - (255, 0, 0)).max() < 8


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.round(ramp / 257).astype(int)
    gray = Image.fromarray(ramp)
    wide = Image.fromarray(ramp.astype(np.int32))
    assert (gray.mode, wide.mode) == ("I;16", "I")
    big_endian = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
    for source in (gray, wide, big_endian, saved(tmp_path, gray, "a.png"), saved(tmp_path, gray, "a.tiff"), ramp):
        np.testing.assert_array_equal(pixels(load_image(source)), np.repeat(expected[..., None], 3, 2))
    keyed = pixels(load_image(saved(tmp_path, gray, "b.png", transparency=int(ramp[0, 9]))))
    assert (keyed[0, 9] == 255).all() and (keyed[0, 8] == expected[0, 8]).all()
    refused(Image.fromarray(ramp.astype(np.int32) * 9), "the image", "16 bits")
    refused(Image.fromarray(ramp.astype(np.int32) - 9), "the image", "16 bits")


def test_sixteen_bit_color_png(tmp_path):
    colors = np.array([[(0, 0x8000, 0xFFFF), (0x1234, 0x5678, 0x9ABC)]] * 2, ">u2")
    (tmp_path / "a.png").write_bytes(png(2, 2, 16, 2, b"".join(b"\0" + row.tobytes() for row in colors)))
    assert np.abs(pixels(load_image(tmp_path / "a.png")) - colors / 257).max() <= 1


def test_floating_point_images(tmp_path):
    unit = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    expected = np.repeat(np.round(unit * 255).astype(int)[..., None], 3, 2)
    for values in (unit, unit * 255):
        image = Image.fromarray(values)
        assert image.mode == "F"
        assert np.abs(pixels(load_image(image)) - expected).max() <= 1
        assert np.abs(pixels(load_image(saved(tmp_path, image, "a.tiff"))) - expected).max() <= 1
    for bad in (np.nan, np.inf, -1, 300):
        values = unit.copy()
        values[2, 3] = bad
        path = saved(tmp_path, Image.fromarray(values), "bad.tiff")
        refused(path, str(path), "scale" if np.isfinite(bad) else "NaN")


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "RGBX", "YCbCr", "HSV", "LAB"])
def test_other_modes(mode):
    image = Image.new("LAB", (6, 5), (255, 128, 128))  # white; PIL makes this mode only with a color profile
    if mode != "LAB":
        image = Image.new("P" if mode == "PA" else "RGB", (6, 5), "white").convert(mode)
    assert image.mode == mode
    assert np.abs(pixels(load_image(image)) - 255).max() <= 2


@pytest.mark.parametrize("width, height", [(1, 1), (1, 50), (50, 1)])
def test_one_pixel_images_work_and_warn(tmp_path, width, height):
    path = saved(tmp_path, Image.new("RGB", (width, height), (9, 99, 199)), "a.png")
    with pytest.warns(UserWarning, match=re.escape(str(path)) + ".*no shape is left.*use a larger"):
        image = load_image(path)
    assert image.size == (width, height)
    with pytest.warns(UserWarning):
        values = clip_pixel_values([image])
    np.testing.assert_allclose(values[0, 0, 0], (np.array([9, 99, 199]) / 255 - CLIP_MEAN) / CLIP_STD, atol=1e-6)


# --- Squares of uint8


@pytest.mark.parametrize("width, height, size", [(301, 451, 224), (640, 512, 224), (64, 64, 64), (7, 300, 32)])
def test_clip_pixels_are_normalised_by_a_table(width, height, size):
    image = noise(width, height)
    found = clip_pixels(image, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert CLIP_TABLE.shape == (256, 3) and CLIP_TABLE.dtype == np.float32
    values = CLIP_TABLE[found, [0, 1, 2]]
    np.testing.assert_array_equal(values.view(np.int32), clip_pixel_values([image], size)[0].view(np.int32))


def test_the_table_is_the_arithmetic_of_transformers():
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    unit = (levels * (1 / 255)).astype(np.float32)
    np.testing.assert_array_equal(CLIP_TABLE, (unit - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD))


@pytest.mark.parametrize(
    "width, height, size, crc",
    [
        (640, 512, 512, 2255014664),
        (512, 640, 512, 2963375718),
        (641, 512, 512, 3689053270),  # 129 to spare, 64.5 before: half to even, 64
        (515, 512, 512, 4011620562),  # 3 to spare, 1.5 before: 2
        (301, 451, 64, 1831522786),
        (451, 300, 64, 3796951291),
        (33, 200, 64, 3538025418),
        (999, 64, 63, 3253104617),
        (5, 8, 7, 1640837330),
        (64, 64, 64, 3414630984),
        (67, 64, 64, 1536252393),
        (71, 64, 64, 1509015345),
    ],
)
def test_squares_are_those_of_torchvision(width, height, size, crc):
    """crc32 of CenterCrop(size)(Resize(size, BILINEAR)(image)) by torchvision 0.29.1 with Pillow 13.0.0."""
    image = noise(width, height)
    found = square_pixels(image, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert zlib.crc32(found.tobytes()) == crc
    if min(width, height) == size:  # nothing but a cut
        left, top = round((width - size) / 2), round((height - size) / 2)
        np.testing.assert_array_equal(found, np.asarray(image)[top : top + size, left : left + size])


def test_a_sliver_becomes_a_square_in_little_memory():
    image = Image.fromarray(np.repeat(np.arange(16384, dtype=np.uint16)[:, None, None] // 64, 3, 2).astype(np.uint8))
    found = square_pixels(image, 512)  # 1 x 16384: whole it would be 512 x 8,388,608
    assert found.shape == (512, 512, 3) and set(np.unique(found)) <= {127, 128}


# --- Bytes


def encoded(image: Image.Image, suffix: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def test_decoding_is_loading(tmp_path):
    orientation = Image.Exif()
    orientation[0x0112] = 6
    for suffix, options in [("PNG", {}), ("JPEG", {"exif": orientation}), ("WEBP", {}), ("GIF", {})]:
        data = encoded(QUARTERS, suffix, **options)
        path = tmp_path / f"image.{suffix}"
        path.write_bytes(data)
        np.testing.assert_array_equal(pixels(decode_image(data, "a")), pixels(load_image(path)))
    transparent = encoded(noise(8, 8).convert("LA").convert("RGBA"))
    assert decode_image(transparent, "a").mode == "RGB"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encoded(noise(1, 3)), "a").size == (1, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "web page"),
        (b"not found", "text file"),
        (b"\xff\xd8\xff", "damaged at its beginning"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text file"),
        (encoded(noise(64, 64), "JPEG")[:2000], "cannot be read"),
        (png(10000, 10000, 1, 0, bytes(99)), "64 megapixels"),
        (png(20000, 1, 1, 0, bytes(99)), "16384"),
    ],
)
def test_damaged_bytes_are_refused_by_name(data, words):
    with pytest.raises(InputError) as error:
        decode_image(data, "00003.tar:00\n17")
    message = str(error.value)
    assert message.startswith(r"'00003.tar:00\n17' ") and words in message and "\n" not in message


def test_decoding_in_threads():
    images = [noise(40 + i, 50, i) for i in range(24)]
    files = [encoded(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, image in zip(pool.map(decode_image, files, map(str, range(24))), images, strict=True):
                np.testing.assert_array_equal(pixels(found), pixels(image))


# --- Arrays


def test_arrays():
    rgb = np.asarray(noise(5, 4))
    gray = rgb[..., 0]
    for source, expected in [
        (rgb, rgb),
        (rgb.astype(np.float32) / 255, rgb),
        (rgb / 255, rgb),
        (rgb.astype(np.uint16) * 257, rgb),
        (rgb.astype(">u2") * 257, rgb),
        (gray, np.repeat(gray[..., None], 3, 2)),
        (gray[..., None], np.repeat(gray[..., None], 3, 2)),
        (rgb[::-1, ::-2], rgb[::-1, ::-2]),
        (np.dstack([rgb, np.full_like(gray, 255)]), rgb),
    ]:
        np.testing.assert_array_equal(pixels(load_image(source)), expected)


def test_invalid_arrays():
    refused(np.zeros((3, 8, 8), np.uint8), "the image array", "(3, 8, 8)", "(H, W, 3)")
    refused(np.zeros((2, 8, 8, 3), np.uint8), "the image array", "(2, 8, 8, 3)")
    refused(np.zeros(8, np.uint8), "the image array", "(8,)")
    refused(np.zeros((), np.uint8), "the image array", "()")
    refused(np.zeros((0, 8, 3), np.uint8), "the image array", "(0, 8, 3)")
    for dtype in (np.int32, np.int64, np.uint32, bool, complex, object):
        refused(np.zeros((8, 8, 3), dtype), "the image array", "dtype", "make it uint8")
    for bad, word in ((np.nan, "NaN"), (-0.1, "-0.1"), (1.5, "1.5"), (np.inf, "infinite")):
        refused(np.full((8, 8, 3), bad), "the image array", word)
    refused(np.zeros((1, 20000), np.uint8), "the image array", "20000 x 1", "16384")


# --- Files that are no images


def test_missing_folder_empty_and_wrong_type(tmp_path):
    refused(tmp_path / "nothing.png", str(tmp_path / "nothing.png"), "does not exist")
    refused(tmp_path, str(tmp_path), "is a folder")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty.png", "is empty")
    (tmp_path / "zeros.png").write_bytes(bytes(4096))
    refused(tmp_path / "zeros.png", "zeros.png", "all zeros")
    refused(tmp_path / "two\nlines.png", r"two\nlines.png", "does not exist")
    refused("nul\0.png", r"nul\x00.png", "does not exist")
    refused("x" * 5000, "xxx", "does not exist")
    for source in (None, 3, b"a.png", [noise(2, 2)], io.BytesIO(), zipfile.ZipInfo("a.png")):
        refused(source, "the image", "give a path")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "pipe", "device")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_no_permission(tmp_path):
    path = saved(tmp_path, noise(4, 4), "a.png")
    path.chmod(0)
    refused(path, str(path), "Permission denied", "check access")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
        (b"\xef\xbb\xbf\n <HTML>", "web page"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"404: not found\n", "text file"),
        (b"\xff\xd8\xff", "damaged at its beginning"),
        (np.random.default_rng(0).bytes(2000), "convert it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text file"),  # never handed to Ghostscript
    ],
)
def test_not_a_image(tmp_path, content, words):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    refused(path, str(path), words)


@pytest.mark.parametrize("url", ["http://a.b/c.png", "HTTPS://a.b/c.png", "s3://a/b.png", "data:image/png;base64,AAAA"])
def test_urls_are_refused(url):
    refused(url, url, "download it first")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_truncated_and_damaged_files(tmp_path, suffix):
    """Cut or changed anywhere: an image or one line of InputError, never another exception."""
    data = saved(tmp_path, noise(64, 64), f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: len(data) * 2 // 3])
    refused(path, str(path), "cannot be read", "download it again")
    rng = np.random.default_rng(0)
    for trial in range(60):
        damaged = bytearray(data[: rng.integers(1, len(data))] if trial % 2 else data)
        for place in rng.integers(0, min(len(damaged), 300), 4 * (1 - trial % 2)):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert load_image(path).mode == "RGB"
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_lazily_opened_damaged_image(tmp_path):
    path = saved(tmp_path, noise(64, 64), "a.jpg")
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as image:
        refused(image, str(path), "cannot be read")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "width, height", [(9000, 9000), (10000, 10000), (14000, 14000), (20000, 1), (1, 20000), (16385, 10)]
)
def test_bombs_are_refused_before_decoding(tmp_path, width, height, strict):
    """Below, between and above PIL's two limits, with PIL's warning shown or raised."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, 1, 0, bytes(99)))  # says that it is large, but holds hardly any pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        tracemalloc.start()
        refused(path, str(path), "64 megapixels", "16384")
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        tracemalloc.stop()


def test_a_lower_limit_of_pil_counts(tmp_path, monkeypatch):
    path = saved(tmp_path, noise(60, 60), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.warns(Image.DecompressionBombWarning):
        refused(path, str(path), "60 x 60")


def test_nothing_global_changes(tmp_path):
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    load_image(saved(tmp_path, noise(4, 4), "a.png"))
    refused(Image.new("RGB", (20000, 1)), "the image")
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


# --- Out


def test_to_uint8_rounds_like_diffusers():
    images = np.random.default_rng(0).random((2, 5, 4, 3), np.float32)
    images.flat[:5] = [0, 1, 0.5, 1 / 255, 2.5 / 255]
    result = to_uint8(images)
    assert result.dtype == np.uint8 and result.shape == images.shape
    np.testing.assert_array_equal(result, (images * 255).round().astype("uint8"))  # numpy_to_pil
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels / 255), levels)
    for bad, words in [
        (images - 1, "scale them"),
        (images * 2, "scale them"),
        (images * np.nan, "NaN"),
        (result, "dtype"),
    ]:
        with pytest.raises(InputError, match=f"the image array.*{words}"):
            to_uint8(bad)


def test_image_grid():
    red, tall = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (2, 6), "blue")
    grid = image_grid([red, tall, red])
    assert grid.size == (8, 12)
    assert [grid.getpixel(at) for at in [(0, 0), (4, 0), (0, 6), (4, 6), (0, 4)]] == [
        (255, 0, 0),
        (0, 0, 255),
        (255, 0, 0),
        (255, 255, 255),
        (255, 255, 255),
    ]
    assert image_grid([red] * 5, columns=5).size == (20, 3)
    assert image_grid([red] * 2, columns=9).size == (8, 3)  # no empty columns
    assert image_grid(np.zeros((4, 8, 8, 3), np.uint8)).size == (16, 16)
    for images, columns in [([], None), ([], 2), ([red], 0)]:
        with pytest.raises(InputError, match=r"image grid.*at least 1"):
            image_grid(images, columns)
