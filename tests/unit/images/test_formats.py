"""Which image files are read, and that none takes more memory than an image within the limits, whatever it declares."""

import io
import os
import struct

import pytest
from memory import peak_growth
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.images.formats import FORMATS, SUFFIXES, is_image_name, unread_format
from ipadapter_jax.images.preprocess import decode_image, load_image


def test_every_ending_of_a_format_that_is_read_is_known() -> None:
    Image.init()
    assert {suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")} == SUFFIXES


@pytest.mark.parametrize("suffix", sorted(SUFFIXES - {".pfm"}))
def test_every_ending_can_be_read(tmp_path, suffix) -> None:
    path = tmp_path / f"image{suffix.upper()}"
    image = Image.new("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB", (40, 30), "white")
    image.save(path)
    assert load_image(path).size == (40, 30) and is_image_name(path.name) and unread_format(path.name) is None


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.HEIC", b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
        ("a.heif", b"\0\0\0\x18ftypmif1" + bytes(100), "HEIC"),
        ("a.jxl", b"\xff\x0a" + bytes(100), "JPEG XL"),
        ("a.psd", b"8BPS\0\1" + bytes(100), "Photoshop"),
        ("a.dds", b"DDS |" + bytes(100), "DDS"),
    ],
)
def test_images_that_are_not_read_are_named(tmp_path, name, content, kind) -> None:
    assert unread_format(name) == kind and not is_image_name(name)
    with pytest.raises(InputError, match=rf"'x.jpg' is an image .* not read \({kind}\): convert it to JPEG or PNG"):
        decode_image(content, "x.jpg")


def declared(side: int) -> dict[str, bytes]:
    """WebP files of few bytes that declare squares of `side` pixels."""
    image, canvas = Image.new("RGB", (1, 1)), struct.pack("<I", side - 1)[:3]
    files = {}
    for kind in ("animated", "lossless", "lossy"):
        with io.BytesIO() as file:
            frames = {"save_all": True, "append_images": [Image.new("RGB", (1, 1), "white")]}
            image.save(file, "WEBP", lossless=kind != "lossy", **(frames if kind == "animated" else {}))
            content = bytearray(file.getvalue())
        if kind == "animated":
            content[24:30] = canvas + canvas
        elif kind == "lossless":
            content[21:24] = struct.pack("<I", (side - 1) | (side - 1) << 14)[:3]
            content[24] |= (side - 1) >> 10
        else:
            content[26:30] = struct.pack("<HH", side, side)
        files[kind] = bytes(content)
    return files


@pytest.mark.parametrize("kind", declared(1))
def test_a_webp_that_declares_too_much_is_refused_before_it_is_opened(tmp_path, kind) -> None:
    path = tmp_path / "image.webp"
    path.write_bytes(declared(13000)[kind])
    assert path.stat().st_size < 150
    with pytest.raises(InputError, match="is 13000 x 13000 pixels: give one of at least"):
        load_image(path)
    assert growth(path) < 100


def jpeg2000(tile: int, suffix: str) -> bytes:
    """An image of 4096 x 4096 that declares tiles of this side."""
    with io.BytesIO() as file:
        Image.new("RGB", (64, 64)).save(file, "JPEG2000", no_jp2=suffix == "j2k")
        content = bytearray(file.getvalue())
    siz = content.index(b"\xff\x4f\xff\x51") + 8
    content[siz : siz + 8] = struct.pack(">II", 4096, 4096)
    content[siz + 16 : siz + 24] = struct.pack(">II", tile, tile)
    if suffix == "jp2":
        ihdr = content.index(b"ihdr") + 4
        content[ihdr : ihdr + 8] = struct.pack(">II", 4096, 4096)
    return bytes(content)


@pytest.mark.parametrize("suffix", ["jp2", "j2k"])
def test_jpeg_2000_of_countless_tiles(tmp_path, suffix) -> None:
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(jpeg2000(17, suffix))
    with pytest.raises(InputError, match=r"is divided into 232,324 tiles: save it again with fewer"):
        load_image(path)
    assert growth(path) < 100


def test_tiff_of_a_huge_tile(tmp_path) -> None:
    path = tmp_path / "image.tif"
    Image.new("RGB", (64, 64)).save(path, tile=(64, 64), compression="tiff_deflate")
    content = path.read_bytes()
    tags = [(254, 4, 0), (256, 3, 64), (257, 3, 64), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    tags += [(322, 4, 40_000), (323, 4, 40_000), (324, 4, 8), (325, 4, 100)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    content = b"II*\0" + struct.pack("<I", 8 + 100) + bytes(100) + struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(content)
    with pytest.raises(InputError, match="is 64 x 64 pixels in tiles of 1,600,000,000: save it again"):
        load_image(path)
    assert growth(path) < 100


def growth(path: os.PathLike[str]) -> int:
    """MiB that it takes to find out that a file cannot be read."""
    setup = (
        "from ipadapter_jax.images.preprocess import decode_image, load_image\n"
        "from PIL import Image; Image.init(); content = open(sys.argv[1], 'rb').read()"
    )
    code = (
        "for read in (lambda: load_image(sys.argv[1]), lambda: decode_image(content, 'x')):\n"
        "    try: read(); assert False\n    except ValueError: pass"
    )
    return peak_growth(setup, code, path)
