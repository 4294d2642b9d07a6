"""Rows from folders, CSV and JSONL: what is read, and what each bad row is told."""

import json
import os
from pathlib import Path

import pytest

from ipadapter_jax.batch.rows import BatchRow, BatchRows, read_rows
from ipadapter_jax.data.unused_files import summarize
from ipadapter_jax.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With images; rows only look whether they are there."""
    for name in ("fox.png", "owl.jpg", "deep/hen.webp"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    return tmp_path / "images"


def read(folder: Path, content: str | bytes, name: str = "rows") -> BatchRows:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(folder / name)


def test_a_pipe_as_a_source(folder, monkeypatch):
    """As `batch <(jq ...)` and `batch /dev/stdin` have it; image names are relative to where one is."""
    monkeypatch.chdir(folder)
    end, begin = os.pipe()
    os.write(begin, b'{"image": "fox.png", "prompt": "a fox"}\n')
    os.close(begin)
    [row], invalid, _ = read_rows(Path(f"/dev/fd/{end}"))
    os.close(end)
    assert (row.prompt, row.images, invalid) == ("a fox", (folder / "fox.png",), [])


def test_csv(folder):
    content = (
        "\ufeffname,prompt,image,seed,scale,negative_prompt\r\n"
        'one,"a fox, red","fox.png; deep/hen.webp",7,0.5,blurry\r\n'
        ",,,,,\r\n"
        "\r\n"
        ',"two\nlines",,3.0,,\r\n'
        f",,{folder}/owl.jpg,,,\r\n"
    )
    rows, invalid, _ = read(folder, content)
    images = (folder / "fox.png", folder / "deep/hen.webp")
    assert invalid == []
    assert rows == [
        BatchRow(0, 2, "one", "a fox, red", "blurry", images, 7, 0.5),
        BatchRow(1, 5, "000001", "two\nlines", "", (), 3, None),
        BatchRow(2, 7, "000002", "", "", (folder / "owl.jpg",), None, None),
    ]


def test_jsonl(folder):
    lines = [
        {"name": "one", "prompt": "a fox", "image": ["fox.png", "deep/hen.webp"], "seed": 0, "scale": 1},
        {"image": "owl.jpg", "prompt": None, "seed": None, "scale": None, "negative_prompt": "Füße"},
    ]
    rows, invalid, _ = read(folder, "\n\n".join(json.dumps(line) for line in lines))
    assert invalid == []
    assert rows == [
        BatchRow(0, 1, "one", "a fox", "", (folder / "fox.png", folder / "deep/hen.webp"), 0, 1.0),
        BatchRow(1, 3, "000001", "", "Füße", (folder / "owl.jpg",), None, None),
    ]


def test_a_folder(folder):
    (folder / "owl.txt").write_bytes("\ufeffan owl\n".encode())
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.md").write_bytes(b"")
    (folder / " x.png").write_bytes(b"")
    assert read_rows(folder)[:2] == (
        [
            BatchRow(0, 1, "x", "", "", (folder / " x.png",), None, None),
            BatchRow(1, 2, "fox", "", "", (folder / "fox.png",), None, None),
            BatchRow(2, 3, "owl", "an owl", "", (folder / "owl.jpg",), None, None),
        ],
        [],
    )


def test_prompts_of_a_folder_in_other_files(folder):
    """.caption where there is no .txt, and Hugging Face's list where there is neither."""
    (folder / "hen.JFIF").write_bytes(b"")
    (folder / "owl.caption").write_text("an owl")
    (folder / "fox.txt").write_text("a fox")
    (folder / "fox.caption").write_text("not this")
    (folder / "metadata.jsonl").write_text('{"file_name": "hen.JFIF", "text": "a hen"}\n{"file_name": "fox.png"}\n')
    rows, invalid, unused = read_rows(folder)
    assert invalid == [] and {row.name: row.prompt for row in rows} == {"fox": "a fox", "hen": "a hen", "owl": "an owl"}
    assert summarize(3, unused) == (
        "3 records, 2 files not used: second captions of one image (1: fox.caption); folders, whose images are not "
        "read (1: deep)"
    )
    (folder / "metadata.jsonl").write_text('{"file": "hen.JFIF"}')
    with pytest.raises(InputError, match="metadata.jsonl, line 1: no file_name"):
        read_rows(folder)


def test_what_is_in_no_row_is_counted(folder):
    (folder / "1.heic").write_bytes(b"")
    (folder / "1.txt").write_text("a newt")
    (folder / "notes.md").write_text("")
    (folder / "metadata.csv").write_text("file_name,text\nowl.jpg,an owl\ngone.jpg,gone\n")
    (folder / "what?.png").write_bytes(b"")
    assert summarize(2, read_rows(folder).unused) == (
        "2 records, 6 files not used: HEIC images, which are not read: convert them to JPEG or PNG (1: 1.heic); "
        "captions without an image that is read (1: 1.txt); folders, whose images are not read (1: deep); entries "
        "whose image does not exist (1: metadata.csv: gone.jpg); rows that cannot be used, see bad_rows.jsonl (1: "
        "what?.png); other files (1: notes.md)"
    )
    assert len(read(folder, "prompt\na fox\n").unused) == 0


def test_files_of_a_folder_belong_together_as_in_a_data_set(folder):
    """An image prompt of its own, and the captions of img2dataset."""
    (folder / "fox.cond.jpg").write_bytes(b"")
    (folder / "fox.json").write_text('{"caption": "a fox", "url": "x"}')
    (folder / "owl.txt").write_text("an owl")
    (folder / "owl.json").write_text("{}")
    (folder / "hen.cond.png").write_bytes(b"")
    (folder / "more.png").mkdir()
    rows, invalid, unused = read_rows(folder)
    assert invalid == [] and [(row.name, row.prompt, row.images) for row in rows] == [
        ("fox", "a fox", (folder / "fox.cond.jpg",)),
        ("owl", "an owl", (folder / "owl.jpg",)),
    ]
    assert [(reason.count, reason.names) for reason in unused] == [(1, ("hen.cond.png",)), (2, ("deep", "more.png"))]


def test_a_list_that_no_image_needs_is_not_used(folder):
    (folder / "metadata.csv").write_text("id;url\n1;https://a/b\n")
    with pytest.raises(InputError, match="metadata.csv, line 2: no file_name"):
        read_rows(folder)
    (folder / "fox.txt").write_text("a fox")
    (folder / "owl.txt").write_text("an owl")
    rows, invalid, unused = read_rows(folder)
    assert (
        len(rows) == 2
        and invalid == []
        and unused.report().splitlines()[-1].startswith("metadata.csv: lists that cannot")
    )


@pytest.mark.parametrize("content", ["F\u00fcchse".encode("utf-16-le"), b"a\0b"])
def test_prompts_in_utf_16_are_refused(folder, content):
    (folder / "owl.txt").write_bytes(content)
    rows, invalid, _ = read_rows(folder)
    assert [row.name for row in rows] == ["fox"] and "UTF-8" in invalid[0].reason and len(invalid) == 1
    rows, invalid, _ = read(folder, '{"prompt": "a\\u0000b"}\n{"prompt": "fine"}')
    assert [row.prompt for row in rows] == ["fine"] and "holds NUL characters, as UTF-16 does" in invalid[0].reason


def test_bad_images_of_a_folder(folder):
    (folder / "owl.txt").write_bytes(b"F\xfc\xdfe")
    (folder / "what?.png").write_bytes(b"")
    rows, invalid, _ = read_rows(folder)
    assert [row.name for row in rows] == ["fox"]
    assert [(row.line, row.reason.split(";")[0]) for row in invalid] == [
        (2, "owl.jpg: its .txt is not UTF-8 (invalid start byte at byte 1): save it as UTF-8"),
        (3, "name 'what?' is not a safe file name"),
    ]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ("a.jpg a.png a.webp b.JPG b.jpg", "a a-png a-webp b b-jpg"),
        ("A.png a.jpg", "A a-jpg"),
        ("a-png.jpg a.jpg a.png", "a-png a a-png-2"),
        ("a-png-2.jpg a-png.jpg a.jpg a.png", "a-png-2 a-png a a-png-3"),
        ("a.JPEG a.Jpeg a.jpeg", "a a-jpeg a-jpeg-2"),
        ("a\u0308.png \u00e4.jpg", "a\u0308 \u00e4-jpg"),
        ("a.jpg a.png a-jpg.txt", "a a-png"),
    ],
)
def test_images_of_one_stem_are_rows_of_their_own(tmp_path, files, names):
    """The first of them, by name, is called by the stem, as in jobs that were begun when it was the only one."""
    for file in files.split():
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "a.txt").write_text("a fox")
    rows, invalid, _ = read_rows(tmp_path)
    assert invalid == [] and [row.name for row in rows] == names.split()
    images = [file for file in files.split() if not file.endswith(".txt")]
    assert [row.images[0].name for row in rows] == images and [row.index for row in rows] == [*range(len(images))]
    assert all(row.prompt == ("a fox" if row.images[0].stem == "a" else "") for row in rows)


def test_a_folder_of_bad_images_alone(tmp_path):
    (tmp_path / "what?.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"no row that can be used; name 'what\?' is not a safe file name"):
        read_rows(tmp_path)
    (tmp_path / "what?.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"no row that can be used; what\?.png: its .txt is not UTF-8"):
        read_rows(tmp_path)


def test_rows_are_in_the_order_of_their_images(tmp_path):
    """Not of their captions: another order would give a job that was begun other seeds."""
    for file in ("a.k.jpg", "a.png", "a.caption"):
        (tmp_path / file).write_text("")
    assert [row.name for row in read_rows(tmp_path).rows] == ["a.k", "a"]


def test_images_in_deeper_folders_alone(tmp_path):
    """As img2dataset leaves them."""
    for number in range(4):
        (tmp_path / f"0000{number}").mkdir()
        (tmp_path / f"0000{number}" / "1.jpg").write_bytes(b"")
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"its images lie in 00000/, 00001/, 00002/, \.\.\.; give one of these folders, or a \.csv"
    ):
        read_rows(tmp_path)
    assert [row.name for row in read_rows(tmp_path / "00000").rows] == ["1"]


BAD_CSV = [
    ("a,,,,,\nb,,,,,,", "7 values for 6 columns; put text that has commas into quotes"),
    ("a,,,,,\nb", "1 values for 6 columns"),
    (",,blurry,1,1,x", "neither prompt nor image; give one of them or both"),
    ("a,gone.png,,,,", "image 'gone.png' does not exist; paths are relative to "),
    ("a,deep,,,,", "image 'deep' is a folder, not an image"),
    ("a,fox.png;gone.png,,,,", "image 'gone.png' does not exist"),
    ("a,,,-1,,", "seed '-1' must be a whole number between 0 and 2^32 - 1"),
    ("a,,,4294967296,,", "seed '4294967296' must be"),
    ("a,,,1.5,,", "seed '1.5' must be"),
    ("a,,,one,,", "seed 'one' must be"),
    ("a,,,inf,,", "seed 'inf' must be"),
    ("a,,,,much,", "scale 'much' is not a finite number; 0 is the base model"),
    ("a,,,,nan,", "scale 'nan' is not a finite number"),
    ("a,,,,,../a", "name '../a' is not a safe file name; leave out "),
    ("a,,,,,.a", "name '.a' is not a safe file name"),
    ("a,,,,," + "ü" * 76, "is too long; at most 150 bytes"),
    ("a,,,,,Ä\nb,,,,,ä", "name 'ä' is that of line 3 too, but for case; rename one"),
    ("a,,,,,000001", None),
    ("a,,,,,000002\nb,,,,,", "name '000002' is that of line 3 too; rename one"),
    ("a,,,,,a\u0308\nb,,,,,\u00e4", "is that of line 3 too, but for how accents are written; rename one"),
    ('"a" b,,,,,', "not CSV (',' expected after '\"'); close every quote"),
    ('"a,,,,,\nb,,,,,\nc,,,,,', "lines 3 to 5: not CSV (unexpected end of data)"),
    (b"F\xfc\xdfe,,,,,", "prompt 'F\\udcfc\\udcdfe' is not UTF-8; save the text as UTF-8"),
]


@pytest.mark.parametrize(("lines", "message"), BAD_CSV)
def test_bad_rows_of_a_csv_file(folder, lines, message):
    """Each costs that row alone: the one before it is read."""
    lines = lines if isinstance(lines, bytes) else lines.encode()
    rows, invalid, _ = read(folder, b"prompt,image,negative_prompt,seed,scale,name\nfine,,,,,\n" + lines)
    assert rows[0].prompt == "fine"
    assert len(invalid) == (message is not None)
    if message is not None:
        assert message in invalid[0].reason
        several = lines.count(b"\n") and not invalid[0].reason.startswith("lines")
        assert invalid[0].line == (4 if several else 3)


BAD_JSON = [
    ('{"prompt": "a"', "not JSON (Expecting ',' delimiter"),
    ("[" * 100_000, "not JSON ("),
    ('["a"]', "not an object; a line should look like {"),
    ('{"prompt": 3}', "prompt 3 is not a text; put it into quotes"),
    ('{"prompt": "a", "image": 3}', "image 3 is not a text"),
    ('{"image": ["fox.png", null]}', "image None is not a text"),
    ('{"image": "fox.png;owl.jpg"}', "image 'fox.png;owl.jpg' does not exist"),
    ('{"image": "fox\\u0000.png"}', "image 'fox\\x00.png' does not exist"),
    ('{"image": "https://example.com/fox.png"}', "does not exist"),
    ('{"image": []}', "neither prompt nor image"),
    ('{"prompt": "\\ud800"}', "prompt '\\ud800' is not UTF-8"),
    (b'{"prompt": "\xff"}', "prompt '\\udcff' is not UTF-8"),
    ('{"prompt": "a", "seed": true}', "seed True must be a whole number"),
    ('{"prompt": "a", "seed": [1]}', "seed [1] must be"),
    ('{"prompt": "a", "scale": NaN}', "scale nan is not a finite number"),
    ('{"prompt": "a", "scale": 1' + "0" * 400 + "}", "is not a finite number"),
    ('{"prompt": "a", "name": "a\\nb"}', "name 'a\\nb' is not a safe file name"),
    ('{"promt": "a"}', "unknown column 'promt' (did you mean 'prompt'?)"),
    ('{"Negative Prompt": "a"}', "unknown column 'Negative Prompt' (did you mean 'negative_prompt'?)"),
    ('{"reference": "a"}', "unknown column 'reference' (did you mean 'image'?)"),
    ('{"caption": "a"}', "unknown column 'caption'; the columns"),
]


@pytest.mark.parametrize(("line", "message"), BAD_JSON)
def test_bad_lines_of_a_jsonl_file(folder, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    rows, invalid, _ = read(folder, b'{"prompt": "fine"}\n' + line + b'\n{"prompt": "fine, too"}')
    assert [(row.name, row.line) for row in rows] == [("000000", 1), ("000002", 3)]
    (bad_row,) = invalid
    assert bad_row.line == 2 and message in bad_row.reason and len(bad_row.reason) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no row that can be used; it is empty"),
        (b"prompt,image\n", "holds no row that can be used; it is empty"),
        (b"prompt\n\na,b\n", "holds no row that can be used; line 3: 2 values for 1 columns"),
        (
            b"promt\na\n",
            "line 1: unknown column 'promt' (did you mean 'prompt'?); the columns, separated by commas, are ",
        ),
        (b"Image\na\n", "(did you mean 'image'?)"),
        (b"prompt;image\na;b\n", "unknown column 'prompt;image'"),
        (b"prompt,prompt\na,b\n", "two columns are named 'prompt'; remove one of them"),
        (b"a red fox\n", "unknown column 'a red fox'; the columns"),
        (b'{"promt": "a"}\n{"promt": "b"}', "line 1: unknown column 'promt' (did you mean 'prompt'?)"),
        (b'"prompt\na', "line 2: unexpected end of data"),
        ("prompt\na".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not a text; give a folder of images, a CSV or a JSONL file"),
    ],
)
def test_what_cannot_be_used_as_a_whole(folder, content, message):
    with pytest.raises(InputError) as caught:
        read(folder, content)
    assert message in str(caught.value) and str(folder / "rows") in str(caught.value)


def test_no_source(tmp_path):
    with pytest.raises(InputError, match="gone.csv cannot be read .No such file or directory.; give a folder"):
        read_rows(tmp_path / "gone.csv")
    with pytest.raises(InputError, match="holds no row that can be used; it is empty; give images"):
        read_rows(tmp_path)


def test_a_relative_source_means_the_same_from_elsewhere(folder, monkeypatch):
    read(folder, "image\nfox.png\n", "rows.csv")
    monkeypatch.chdir(folder.parent)
    assert read_rows(Path("images/rows.csv"))[:2] == read_rows(folder / "rows.csv")[:2]
    assert read_rows(Path("images"))[:2] == read_rows(folder)[:2]
