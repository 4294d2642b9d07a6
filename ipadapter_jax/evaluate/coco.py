"""COCO's captions (arXiv 1504.00325), as captions_val2017.json has them: which image has which captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.text_files import LIST_BYTES, read_json

_EXAMPLE = "captions_val2017.json of COCO's annotations_trainval2017.zip"


class Entry(NamedTuple):
    """An image's file, relative to the folder of images, and its captions, both in the order of the annotations."""

    file: str
    captions: tuple[str, ...]


def read_coco(path: Path) -> list[Entry] | None:
    """All images of the annotations at `path`; None for what is no JSON object with images or annotations, which
    another reader may know.

    Raises InputError naming the image or caption at fault: an image has captions, and a caption an image.
    """
    found = _object(path)
    if found is None:
        return None
    images, annotations = _lists(path, found)
    captions: dict[Any, list[str]] = {}
    files: dict[Any, str] = {}
    for number, image in enumerate(images):
        file, key = (_get(image, name) for name in ("file_name", "id"))
        if not isinstance(file, str) or not isinstance(key, int | str) or key in captions:
            raise InputError(f"{path}: image {number} has no file_name or no id of its own; give {_EXAMPLE}")
        files[key], captions[key] = file, []
    for number, annotation in enumerate(annotations):
        caption, key = (_get(annotation, name) for name in ("caption", "image_id"))
        if not isinstance(caption, str):
            raise InputError(
                f"{path}: annotation {number} is no caption; give {_EXAMPLE}, rather than instances or key points"
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
    return [Entry(files[key], tuple(filter(None, captions[key]))) for key in captions]


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object with images or annotations, else None."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        if not file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            return None
    try:
        found = read_json(path, f"download it again, or give {_EXAMPLE}", LIST_BYTES)
    except InputError as error:
        if "Extra data" in str(error):  # an object on each line
            return None
        raise
    return found if {"images", "annotations"} & found.keys() else None


def _lists(path: Path, found: dict[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    images, annotations = found.get("images"), found.get("annotations")
    for name, value in (("images", images), ("annotations", annotations)):
        if not isinstance(value, list) or not value:
            raise InputError(f"{path}: its {name} are no list, or an empty one; give {_EXAMPLE}")
    assert isinstance(images, list) and isinstance(annotations, list)
    return images, annotations


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
