"""Reads COCO's captions (arXiv 1504.00325) from files such as captions_val2017.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.text_files import LIST_BYTES, read_json_object

_EXAMPLE = "captions_val2017.json of COCO's annotations_trainval2017.zip"


class CocoImage(NamedTuple):
    """The file of an image, relative to the folder of images, and its captions, in the order of the annotations."""

    file: str
    captions: tuple[str, ...]


def read_coco(path: Path) -> list[CocoImage] | None:
    """All images of the annotations at `path`; None if the file is not a JSON object with images or annotations, so
    that other readers may try.

    Raises InputError naming an image without captions, or a caption without its image.
    """
    found = _object(path)
    if found is None:
        return None
    images, annotations = _list(path, found, "images"), _list(path, found, "annotations")
    captions: dict[int | str, list[str]] = {}
    files: dict[int | str, str] = {}
    for number, image in enumerate(images):
        file, key = (_get(image, name) for name in ("file_name", "id"))
        if not isinstance(file, str) or not isinstance(key, int | str) or key in captions:
            raise InputError(f"{path}: image {number} has no file_name or no id of its own; give {_EXAMPLE}")
        files[key], captions[key] = file, []
    for number, annotation in enumerate(annotations):
        caption, key = (_get(annotation, name) for name in ("caption", "image_id"))
        if not isinstance(caption, str):
            raise InputError(
                f"{path}: annotation {number} is not a caption; give {_EXAMPLE}, rather than instances or key points"
            )
        if not isinstance(key, int | str) or key not in captions:
            raise InputError(f"{path}: caption {number} is of image {key!r}, which is not among its images")
        captions[key].append(caption.strip())
    without = [files[key] for key in captions if not any(captions[key])]
    if without:
        raise InputError(
            f"{path}: {len(without)} images, {without[0]} the first, have no captions, which CLIP-T needs; leave "
            "them out of its images, or caption them"
        )
    return [CocoImage(files[key], tuple(filter(None, captions[key]))) for key in captions]


def _object(path: Path) -> Mapping[str, object] | None:
    """The JSON object of a file if it has images or annotations, else None."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        if not file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            return None
    try:
        found = read_json_object(path, f"download it again, or give {_EXAMPLE}", LIST_BYTES)
    except InputError as error:
        if "Extra data" in str(error):  # an object on each line
            return None
        raise
    return found if {"images", "annotations"} & found.keys() else None


def _list(path: Path, found: Mapping[str, object], name: str) -> Sequence[object]:
    value = found.get(name)
    if not isinstance(value, list) or not value:
        raise InputError(f"{path}: its {name} are not a list, or an empty one; give {_EXAMPLE}")
    return value


def _get(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None
