"""Images that other programs have made find their image prompts, or it is said which do not."""

import json
from pathlib import Path

import pytest

from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.image_sets import find_images, recorded_settings
from ipadapter_jax.evaluate.prompts import Reference


def references(*names: str) -> list[Reference]:
    return [Reference(i, name, f"{name}.jpg", ("a caption",), "", bytes) for i, name in enumerate(names)]


def files(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def named(found: list[list[Path]]) -> list[list[str]]:
    return [[path.name for path in paths] for paths in found]


def test_a_folder(tmp_path):
    one = files(tmp_path / "one", "fox.png", "cat.JPG", "notes.txt", ".hidden.png")
    assert named(find_images(one, references("fox", "cat"))) == [["fox.png"], ["cat.JPG"]]
    several = files(tmp_path / "several", *(f"fox-{i}.png" for i in range(11)), *(f"cat-{i}.png" for i in range(11)))
    assert named(find_images(several, references("fox", "cat")))[0] == [f"fox-{i}.png" for i in range(11)]
    dashed = files(tmp_path / "dashed", "fox-1-0.png", "fox-1-1.png", "fox-2.png", "fox-2-1.png")
    assert named(find_images(dashed, references("fox-1", "fox-2"))) == [
        ["fox-1-0.png", "fox-1-1.png"],
        ["fox-2.png", "fox-2-1.png"],
    ]


def test_images_of_nobody_are_left_out(tmp_path):
    folder = files(tmp_path, "fox.png", "dog.png", "dog-1.png")
    with pytest.warns(UserWarning, match=r"2 images, dog-1.png the first, belong to no image prompt"):
        assert named(find_images(folder, references("fox"))) == [["fox.png"]]


def test_images_of_any_ending_and_those_that_are_not_read(tmp_path):
    folder = files(tmp_path, "fox.JFIF", "cat.apng", "owl.heic")
    with pytest.warns(UserWarning, match=r"1 images, owl.heic the first, are of a kind that is not read; convert them"):
        assert named(find_images(folder, references("fox", "cat"))) == [["fox.JFIF"], ["cat.apng"]]


def test_a_list(tmp_path):
    files(tmp_path / "made", "a.png", "b.png")
    (tmp_path / "list.csv").write_text("image,name\nmade/b.png,fox.jpg\nmade/a.png,fox\n")
    assert named(find_images(tmp_path / "list.csv", references("fox"))) == [["b.png", "a.png"]]
    (tmp_path / "list.csv").write_text("name,picture\nfox,made/a.png\n")  # as the column was called once
    assert named(find_images(tmp_path / "list.csv", references("fox"))) == [["a.png"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("fox,made/a.png\n", "have no image there"),
        ("name\nfox\n", "line 2: no name or image"),
        ("name,image\nfox\n", "line 2: 1 values for 2 columns"),
        ("name,image\nfox,made/a.png,with a hat\n", "line 2: 3 values for 2 columns; put text that has commas"),
        ("name,image\nfox,made/c.png\n", "line 2: there is no image"),
        ('name,image\n"fox,made/a.png\n', r"line 2: not CSV \(unexpected end of data\)"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path, content, message):
    files(tmp_path / "made", "a.png")
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        find_images(tmp_path / "list.csv", references("fox"))


def test_prompts_without_images_or_with_another_number(tmp_path):
    folder = files(tmp_path, "fox-0.png", "fox-1.png", "cat-0.png")
    with pytest.raises(InputError, match=r"1 of 3 image prompts, dog the first, have no image .* call theirs dog.png"):
        find_images(folder, references("fox", "cat", "dog"))
    with pytest.raises(InputError, match="1 images of cat and 2 of fox; all image prompts need equally many"):
        find_images(folder, references("fox", "cat"))
    with pytest.raises(InputError, match="no such folder or CSV file"):
        find_images(tmp_path / "nowhere", references("fox"))


def test_settings_of_our_own_jobs(tmp_path):
    assert recorded_settings(tmp_path) is None
    (tmp_path / "job.json").write_text(json.dumps({"steps": 50}))
    assert recorded_settings(tmp_path) == {"steps": 50}
    (tmp_path / "job.json").write_text("[")
    assert recorded_settings(tmp_path) is None
