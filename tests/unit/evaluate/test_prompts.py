"""Image prompts with captions: COCO's layout, any data of the trainer, and what is wrong with either."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.prompts import open_references

IMAGES = [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 3, "file_name": "000000000003.jpg"}]
ANNOTATIONS = [
    {"id": 1, "image_id": 3, "caption": "a dog"},
    {"id": 2, "image_id": 7, "caption": " a cat\n"},
    {"id": 3, "image_id": 3, "caption": "an animal"},
]


def coco(folder: Path, **changes) -> Path:
    """Annotations, and an image for each of IMAGES."""
    for image in IMAGES:
        Image.new("RGB", (8, 8)).save(folder / image["file_name"])
    path = folder / "captions_val2017.json"
    path.write_text(json.dumps({"info": {}, "images": IMAGES, "annotations": ANNOTATIONS} | changes))
    return path


def test_coco_in_the_order_of_the_file(tmp_path):
    path = coco(tmp_path)
    found, identity = open_references(path)
    assert [reference.name for reference in found] == ["000000000007", "000000000003"]
    assert [reference.captions for reference in found] == [("a cat",), ("a dog", "an animal")]
    assert found[1].image().size == (8, 8)
    assert identity["prompts"] == 2 and identity["kind"] == "COCO captions"
    again = open_references(path).found[0]
    (tmp_path / again.key).unlink()
    os.mkfifo(tmp_path / again.key)
    with pytest.raises(InputError, match=r"cannot be read \(it is not a regular file\)"):
        again.digest()
    (tmp_path / again.key).unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / again.key)
    assert len(open_references(path, limit=1).found) == 1
    (tmp_path / "annotations").mkdir()
    moved = path.rename(tmp_path / "annotations" / path.name)
    assert open_references(moved, image_root=tmp_path).identity == identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "images": [*IMAGES, {"id": 9, "file_name": "gone.jpg"}],
                "annotations": [*ANNOTATIONS, {"image_id": 9, "caption": "x"}],
            },
            "1 of 3 images, gone.jpg the first, are not in",
        ),
        ({"images": IMAGES[1:]}, "caption 1 is of image 7, which is not among its images"),
        ({"annotations": ANNOTATIONS[1:2]}, "1 images, 000000000003.jpg the first, have no captions"),
        ({"annotations": [{"image_id": 3, "bbox": [0, 0, 1, 1]}]}, "annotation 0 is not a caption"),
        ({"images": [IMAGES[0], IMAGES[0]]}, "image 1 has no file_name or no id of its own"),
        ({"images": [{"id": 3}]}, "image 0 has no file_name"),
        ({"images": []}, "its images are not a list, or an empty one"),
        ({"annotations": {"3": "a dog"}}, "its annotations are not a list"),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        open_references(coco(tmp_path, **changes))


def test_what_is_no_json_or_has_no_columns(tmp_path):
    path = coco(tmp_path)
    with pytest.raises(InputError, match="--image-column x: .* no columns"):
        open_references(path, image_column="x")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match="not JSON"):
        open_references(path)
    with pytest.raises(InputError, match="no such file or folder"):
        open_references(tmp_path / "nowhere.json")


def test_data_of_the_trainer(tmp_path):
    """A folder is named by its files, a list whose names are not unique by numbers; each caption is one."""
    coco(tmp_path).unlink()
    for name in ("000000000003", "000000000007"):
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}")
    found, identity = open_references(tmp_path)
    assert [(one.name, one.captions) for one in found] == [
        (name, (f"caption of {name}",)) for name in ("000000000003", "000000000007")
    ]
    assert identity["kind"] == "folder" and identity["prompts"] == 2 and found[0].image().size == (8, 8)
    lines = [{"image_file": "000000000003.jpg", "text": text} for text in ("one", "two")]
    (tmp_path / "list.json").write_text("\n".join(map(json.dumps, lines)))
    found, _ = open_references(tmp_path / "list.json")
    assert [(one.name, one.captions) for one in found] == [("000000", ("one",)), ("000001", ("two",))]
    (tmp_path / "list.json").write_text(json.dumps([lines[0], {"image_file": "000000000007.jpg", "text": " "}]))
    with pytest.raises(InputError, match=r"000000000007.jpg has no caption"):
        open_references(tmp_path / "list.json")
