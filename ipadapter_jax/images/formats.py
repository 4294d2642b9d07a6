"""Image files before they are decoded: their file extensions, formats and declared sizes.

A file may declare a far larger image than it holds, and some readers allocate memory for it when they open the file. So
the declared size is compared with the limits first.
"""

import io
import os
from collections.abc import Mapping
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from ipadapter_jax.errors import InputError

MAX_PIXELS = 64_000_000  # below PIL's own limit (89 million), so that sizes that PIL only warns about are refused
MAX_SIDE = 16_384
LIMITS = f"give one of at least 1 x 1, at most {MAX_PIXELS // 1_000_000} megapixels and {MAX_SIDE} pixels a side"
_MAX_TILES = 1 << 14  # of JPEG 2000, times its channels: OpenJPEG allocates some kilobytes for each
_MIN_TILE = 1 << 22  # pixels; a tile of TIFF may be larger only when the image is

# PIL's names, one by one so that no file reaches its exotic readers: the one for EPS, for instance, runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
# The extensions of these formats; MPO is the name of a camera's JPEG file with several images.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff")
    + (".pbm", ".pfm", ".pgm", ".pnm", ".ppm", ".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx", ".avif", ".avifs")
)
# Formats that are not read, so that errors can name them.
_RAW = (".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw")
_UNSUPPORTED_SUFFIXES: Mapping[str, str] = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "HEIC"),
    **dict.fromkeys(_RAW, "camera raw"),
    **dict.fromkeys((".svg", ".svgz"), "SVG"),
    **dict.fromkeys((".jxr", ".wdp"), "JPEG XR"),
    **dict.fromkeys((".psd", ".psb"), "Photoshop"),
    **dict.fromkeys((".eps", ".ps", ".ai"), "PostScript"),
    **{".jxl": "JPEG XL", ".xcf": "GIMP", ".ico": "icon", ".tga": "TGA", ".exr": "OpenEXR", ".hdr": "Radiance"},
    **{".dds": "DDS", ".qoi": "QOI", ".pcx": "PCX", ".icns": "icon", ".bpg": "BPG"},
}
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_UNSUPPORTED_MAGIC: Mapping[bytes, str] = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "Photoshop",
    b"\0\0\1\0": "icon",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"DDS ": "DDS",
    b"qoif": "QOI",
    b"II\xbc": "JPEG XR",
}


class _Box(NamedTuple):
    """A box of JPEG 2000: its kind, and where its content starts and ends (None: at the end of the file)."""

    kind: bytes
    begin: int
    end: int | None


def unread_format(name: str) -> str | None:
    """The format of an image file that is not read, by its extension; None for other files."""
    return _UNSUPPORTED_SUFFIXES.get(os.path.splitext(name)[1].lower())


def is_image_name(name: str) -> bool:
    """Whether a file is an image that is read, by its extension."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def open_image(file: str | io.BytesIO, name: str) -> Image.Image:
    """Opens the image file of a path, or with a content, without decoding it.

    Raises InputError with `name` in the message if it is not an image, or if its declared size is above the limits and
    would cost memory before PIL reports it.
    """
    head = _head(file)
    if (size := _webp_size(head)) is not None:
        check_size(*size, name)
    Image.init()  # registers all readers; pillow < 11.3 has none for AVIF
    try:
        image = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    except UnidentifiedImageError:
        raise InputError(f"{name} {_describe_unreadable(head)}") from None
    _check_tiles(image, name)
    return image


def check_size(width: int, height: int, name: str) -> None:
    """Raises InputError above the limits."""
    most = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)  # PIL's own limit applies if it was lowered
    if min(width, height) < 1 or max(width, height) > MAX_SIDE or width * height > most:
        raise InputError(f"{name} is {width} x {height} pixels: {LIMITS}")


def _head(file: str | io.BytesIO) -> bytes:
    if isinstance(file, str):
        with open(file, "rb") as content:
            return content.read(512)
    return file.getvalue()[:512]


def _describe_unreadable(head: bytes) -> str:
    """What a file that PIL cannot identify is, by its first bytes, with the remedy."""
    if not head.strip(b"\0"):
        return "is empty or all zeros: download or export it again"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!", b"<html", b"<head", b"<?xml", b"<svg")):
        return "is a web page or an SVG drawing (HTML/XML), not an image: download the image itself or export a PNG"
    found = "HEIC" if head[4:8] == b"ftyp" and head[8:12] in _BRANDS else None
    found = found or next((kind for magic, kind in _UNSUPPORTED_MAGIC.items() if head.startswith(magic)), None)
    if found is not None:
        return f"is an image of a kind that is not read ({found}): convert it to JPEG or PNG"
    if head.isascii() and b"\0" not in head:
        return "is a text file, not an image: check the path or download it again"
    return "is not an image, or damaged at its beginning: convert it to PNG or JPEG, or download it again"


class _Size(NamedTuple):
    width: int
    height: int


def _webp_size(head: bytes) -> _Size | None:
    """The declared (width, height) of a WebP file; None for other files. libwebp allocates two canvases of this size
    when PIL opens it."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    kind, content = head[12:16], head[20:30]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(content[i : i + 3], "little") for i in (4, 7))
    elif kind == b"VP8L":
        bits = int.from_bytes(content[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (int.from_bytes(content[i : i + 2], "little") & 0x3FFF for i in (6, 8))
    else:
        return None
    return _Size(width, height)


def _check_tiles(image: Image.Image, name: str) -> None:
    """Raises InputError for tiles that need more memory than the image: decoders allocate whole tiles."""
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        area = 1
        for tag in (322, 323):  # width and length of a tile
            value = tags.get(tag, 1)
            area *= value if isinstance(value, int) else 1
        if area > max(_MIN_TILE, 4 * image.width * image.height):
            raise InputError(f"{name} is {image.width} x {image.height} pixels in tiles of {area:,}: save it again")
    if image.format == "JPEG2000":
        count = _jpeg2000_tiles(getattr(image, "fp"))  # noqa: B009 as PIL's files have it
        if count > _MAX_TILES:
            raise InputError(f"{name} is divided into {count:,} tiles: save it again with fewer")


def _jpeg2000_tiles(file: io.IOBase) -> int:
    """Tiles times channels that a JPEG 2000 file declares; 0 if its header cannot be read."""
    here = file.tell()
    try:
        file.seek(0)
        start = 0
        if file.read(4) != b"\xff\x4f\xff\x51":
            while (box := _box(file, start)) is not None and box.kind != b"jp2c":
                if box.end is None:
                    return 0
                start = box.end
            if box is None:
                return 0
            start = box.begin
        file.seek(start + 8)  # the markers SOC and SIZ, a length and capabilities
        fields = [int.from_bytes(file.read(4)) for _ in range(8)]
        channels = int.from_bytes(file.read(2))
    finally:
        file.seek(here)
    right, bottom, _, _, tile_width, tile_height, left, top = fields
    if not tile_width or not tile_height:
        return 0
    return -(-(right - left) // tile_width) * -(-(bottom - top) // tile_height) * (1 + channels)


def _box(file: io.IOBase, start: int) -> _Box | None:
    file.seek(start)
    head = file.read(16)
    if len(head) < 8:
        return None
    length, kind = int.from_bytes(head[:4]), head[4:8]
    size = 16 if length == 1 else 8
    length = int.from_bytes(head[8:16]) if length == 1 else length
    if length and length < size:
        return None
    return _Box(kind, start + size, start + length if length else None)
