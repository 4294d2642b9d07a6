"""Nothing in a data set vanishes: every file is in a record, or is counted with a name and a reason."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_formats import add, images, jpeg, write_json, write_tar
from helpers import TORCH_MODEL
from PIL import Image

from ipadapter_jax.batch.runner import BatchProgress
from ipadapter_jax.cli import main
from ipadapter_jax.data.dataset import LiveSamples
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.data.unused_files import UnusedFiles, summarize, write_report
from ipadapter_jax.errors import InputError, errors_name_options
from ipadapter_jax.evaluate.prompts import open_references
from ipadapter_jax.images.formats import SUFFIXES
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.dataset import log_record_count, write_unused_report


def texts(path: Path, **options) -> dict[str, str]:
    source = open_dataset(str(path), **options)
    return {record.key: record.text for record in (source[i] for i in range(len(source)))}


def said(path: Path, **options) -> str:
    source = open_dataset(str(path), **options)
    return summarize(len(source), source.unused)


def write(folder: Path, **files: str | bytes) -> Path:
    """Files by name, with `__` for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_every_ending_of_an_image_makes_a_record(tmp_path) -> None:
    for number, suffix in enumerate(sorted(SUFFIXES)):
        ending = suffix.upper() if number % 2 else suffix
        with io.BytesIO() as file:
            Image.new("RGB", (8, 8)).save(file, "PNG")  # the content decides
            (tmp_path / f"{number}{ending}").write_bytes(file.getvalue())
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    assert len(texts(tmp_path)) == len(SUFFIXES)
    assert said(tmp_path) == f"{len(SUFFIXES)} records, 0 files not used"


def test_unused_files_are_counted_and_named(tmp_path) -> None:
    data = write(
        tmp_path / "data", a__jpg=jpeg(1), a__txt="a", b__jpg=jpeg(2), c__HEIC=b"\0\0\0\x18ftypheic", c__txt="c"
    )
    write(data, d__txt="d", e__cond__jpg=jpeg(3), notes__md="x", a__caption="a again", f__jxl=b"\xff\x0a", a__json="{}")
    source = open_dataset(str(data))
    assert len(source) == 2
    assert summarize(len(source), source.unused) == (
        "1 records, 8 files not used: HEIC images, which are not read: convert them to JPEG or PNG (1: c.HEIC); "
        "JPEG XL images, which are not read: convert them to JPEG or PNG (1: f.jxl); second captions of one image "
        "(1: a.caption); captions without an image that is read (2: c.txt, d.txt); image prompts without an image "
        "(1: e.cond.jpg); images without a caption (1: b.jpg); other files (1: notes.md)"
    )
    write_report(LocalStore(tmp_path), source.unused)
    lines = (tmp_path / "unused_files.txt").read_text().splitlines()
    assert len(lines) == 8 and lines[-1] == "notes.md: other files" and "b.jpg: images without a caption" in lines
    write_report(LocalStore(tmp_path), UnusedFiles())
    assert not (tmp_path / "unused_files.txt").exists()


def test_many_names_are_counted_and_bounded() -> None:
    unused = UnusedFiles()
    for number in range(5000):
        unused.add("captions", f"{number}.txt")
    assert len(unused) == 5000 and summarize(7, unused).endswith("captions (5000: 0.txt, 1.txt, 2.txt, ...)")
    assert unused.report().splitlines()[-1] == "and 4000 more: captions"
    odd = UnusedFiles()
    odd.add("captions", "two\nlines\x1b[31m\udce9.txt")
    assert odd.report() == "two?lines?[31m?.txt: captions\n"
    twice = UnusedFiles()
    twice.extend(unused, "a:")
    twice.extend(unused, "b:")
    assert len(twice) == 10_000


def test_images_of_one_stem_have_one_caption(tmp_path) -> None:
    data = write(tmp_path / "data", a__jpg=jpeg(1), a__png=jpeg(2), a__txt="a cat", b__png=jpeg(3), b__txt="b")
    write(data, a__cond__jpg=jpeg(4))
    assert texts(data) == {"a.jpg": "a cat", "a.png": "a cat", "b.png": "b"}
    source = open_dataset(str(data))
    assert source[0].cond_image == source[1].cond_image == jpeg(4) and source[2].cond_image is None
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "a.png", "a.txt", "b.txt", "b.jpg", "a.jpg", "a.txt"):  # joined: a comes again
            add(tar, name, jpeg(1) if name.endswith(("g",)) else name.encode())
    source = open_dataset(str(tmp_path / "0.tar"))
    assert [source[i].text for i in range(len(source))] == ["a.txt", "a.txt", "b.txt", "a.txt"]


def test_the_key_of_a_tar_member_ends_at_the_first_dot(tmp_path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in (
            "x.y/1.JPG",
            "x.y/1.seg.png",
            "x.y/1.cond.webp",
            "x.y/1.txt",
            "x.y/1.cls",
            "x.y/2.heic",
            "x.y/2.txt",
        ):
            add(tar, name, jpeg(1) if "txt" not in name else b"a fox")
    source = open_dataset(str(tmp_path / "0.tar"))
    assert len(source) == 1 and source.key(0) == "0.tar:x.y/1" and source[0].cond_image == jpeg(1)
    assert summarize(len(source), source.unused) == (
        "1 records, 4 files not used: names with a second dot, where a WebDataset key ends at the first: rename "
        "them to have them read (1: 0.tar:x.y/1.seg.png); HEIC images, which are not read: convert them to JPEG or "
        "PNG (1: 0.tar:x.y/2.heic); captions without an image that is read (1: 0.tar:x.y/2.txt); other files (1: "
        "0.tar:x.y/1.cls)"
    )
    assert texts(write(tmp_path / "folder", photo__v2__jpg=jpeg(1), photo__v2__txt="dots")) == {"photo.v2.jpg": "dots"}


def test_a_shard_whose_keys_all_have_dots_says_so(tmp_path) -> None:
    for shard, names in (("0.tar", ("img.v2.txt", "img.v2.jpg")), ("1.tar", ("1.txt", "1.jpg", "b.c.PNG", "b.c.json"))):
        with tarfile.open(tmp_path / shard, "w") as tar:
            for name in names:
                add(tar, name, jpeg(1) if name.lower().endswith("g") else b"a fox")
    with pytest.raises(InputError, match="a WebDataset key ends at the first dot, and 0.tar:img.v2.jpg has another"):
        open_dataset(str(tmp_path / "0.tar"))
    assert texts(tmp_path) == {"1.tar:1": "a fox"}
    [reason] = open_dataset(str(tmp_path)).unused
    assert reason.reason.startswith("names with a second dot") and reason.count == 4
    assert reason.names == ("0.tar:img.v2.txt", "0.tar:img.v2.jpg", "1.tar:b.c.PNG", "1.tar:b.c.json")


def test_files_next_to_shards_and_missing_images_of_a_list(tmp_path) -> None:
    records = images()
    assert said(write_tar(tmp_path / "tars", records)).startswith(
        "6 records, 4 files not used: other files (4: 00000.par"
    )
    path = write_json(tmp_path / "list", records)
    (tmp_path / "list/images/000000002.jpg").unlink()
    assert said(path) == ("5 records, 1 files not used: entries whose image does not exist (1: images/000000002.jpg)")


def test_rows_without_an_image_and_image_prompts_that_are_not_there(tmp_path) -> None:
    column = [{"bytes": jpeg(i) if i % 3 else None, "path": "a"} for i in range(7)]
    pq.write_table(pa.table({"image": column, "text": ["a"] * 7}), tmp_path / "a.parquet", row_group_size=2)
    groups = ", ".join(f"a.parquet: row group {group}" for group in (0, 1, 3))
    assert said(tmp_path) == f"4 records, 3 files not used: rows without the bytes of an image (3: {groups})"
    path = write_json(tmp_path / "list", images())
    (tmp_path / "list/images/000000004_prompt.jpg").unlink()
    assert said(path).startswith("5 records, 1 files not used: entries whose image does not exist (1: images/0000000")


def test_an_image_that_is_not_read_names_its_kind_when_it_is_all_there_is(tmp_path) -> None:
    write(tmp_path, a__heic=b"\0\0\0\x18ftypheic", a__txt="a")
    with pytest.raises(InputError, match="HEIC images are not read: convert them to JPEG or PNG"):
        open_dataset(str(tmp_path))


# --- Captions


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.caption"])
def test_captions_in_utf_16_are_refused(tmp_path, encoding, name) -> None:
    write(tmp_path, a__jpg=jpeg(1), b__jpg=jpeg(2), b__txt="\ufefffine")
    (tmp_path / name).write_bytes("a red fox".encode(encoding))
    source = open_dataset(str(tmp_path))
    with pytest.raises(InputError, match=rf"a.jpg: its {name[1:]} is UTF-(16|32).*: save it as UTF-8"):
        source[0]
    assert source[1].text == "fine"


def test_caption_files_by_preference(tmp_path) -> None:
    write(
        tmp_path, a__jpg=jpeg(1), a__caption="caption\n", a__json='{"caption": "json"}', b__jpg=jpeg(1), b__CAPTION="b"
    )
    assert texts(tmp_path) == {"a.jpg": "caption", "b.jpg": "b"}
    write(tmp_path, a__txt="txt")
    assert texts(tmp_path)["a.jpg"] == "txt"
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "1.jpg", jpeg(1))
        add(tar, "1.caption", b"in a tar")
    assert list(texts(tmp_path / "0.tar").values()) == ["in a tar"]


LISTS = {
    "metadata.jsonl": '{"file_name": "a.jpg", "text": "a fox"}\n\n{"file_name": "deep/b.png", "text": null, "id": 3}\n',
    "metadata.csv": '\ufefffile_name,text\r\na.jpg,"a fox"\r\ndeep/b.png,\r\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_captions_in_a_list_of_hugging_face(tmp_path, name) -> None:
    write(write(tmp_path, a__jpg=jpeg(1), c__jpg=jpeg(3), c__txt="c") / "deep", b__png=jpeg(2))
    assert said(tmp_path).startswith("1 records, 2 files not used: images without a caption (2: a.jpg, deep/b.png)")
    before = open_dataset(str(tmp_path)).identity()
    (tmp_path / name).write_bytes(LISTS[name].encode())
    assert texts(tmp_path) == {"a.jpg": "a fox", "c.jpg": "c", "deep/b.png": ""}
    assert said(tmp_path) == "3 records, 0 files not used"
    identity = open_dataset(str(tmp_path)).identity()
    assert identity["records"] == before["records"] and identity["digest"] != before["digest"]


def test_lists_in_folders_other_columns_and_captions_without_an_image(tmp_path) -> None:
    (tmp_path / "train").mkdir()
    write(write(tmp_path, a__jpg=jpeg(1)) / "train", b__jpg=jpeg(2), c__jpg=jpeg(3), c__txt="own")
    outer = [{"file_name": "train/b.jpg", "text": "outer"}, {"file_name": "a.jpg", "text": "a", "alt": "A"}]
    write(tmp_path, metadata__jsonl="\n".join(map(json.dumps, outer)))
    rows = [
        {"file_name": "b.jpg", "alt": "inner"},
        {"file_name": "./c.jpg", "alt": "c"},
        {"file_name": "gone.jpg", "alt": ""},
    ]
    write(tmp_path / "train", metadata__jsonl="\n".join(map(json.dumps, rows)))
    assert texts(tmp_path)["train/b.jpg"] == "outer"
    found = texts(tmp_path, text_column="alt")
    assert found == {"a.jpg": "A", "train/b.jpg": "inner", "train/c.jpg": "own"}
    assert said(tmp_path, text_column="alt").endswith(
        "second captions of one image (1: train/metadata.jsonl: train/c.jpg); entries whose image does not exist (1: "
        "train/metadata.jsonl: train/gone.jpg)"
    )


def test_a_list_that_is_not_needed_changes_no_identity(tmp_path) -> None:
    write(tmp_path, a__jpg=jpeg(1), a__txt="a")
    before = open_dataset(str(tmp_path)).identity()
    write(tmp_path, metadata__jsonl='{"file_name": "a.jpg", "label": 3}')
    assert open_dataset(str(tmp_path)).identity() == before
    assert said(tmp_path) == "1 records, 1 files not used: lists without captions (1: metadata.jsonl)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.jsonl",
            '{"file": "a.jpg", "text": "a"}',
            "metadata.jsonl, line 1: no file_name; a line should look",
        ),
        ("metadata.jsonl", '{"file_name": 3, "text": "a"}', "line 1: no file_name"),
        ("metadata.jsonl", '\n["a.jpg", "a"]', "line 2: no file_name"),
        ("metadata.jsonl", '{"file_name": "../a.jpg", "text": "a"}', "'../a.jpg' is not below the data set's folder"),
        ("metadata.jsonl", '{"file_name": "/a.jpg", "text": "a"}', "'/a.jpg' is not below the data set's folder"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": 3}', "line 1: text is not a text"),
        ("metadata.jsonl", "{", "line 1: not JSON (Expecting"),
        ("metadata.jsonl", "[" * 100_000, "line 1: not JSON (nested"),
        ("metadata.csv", "name,text\na.jpg,a", "metadata.csv, line 2: no file_name"),
        ("metadata.csv", 'file_name,text\na.jpg,"a', "line 2: not CSV (unexpected end of data)"),
        (
            "metadata.csv",
            "file_name,text\na.jpg,a red fox, in snow",
            "metadata.csv, line 2: 3 values for 2 columns; put text that has commas into quotes",
        ),
        ("metadata.csv", 'file_name,text\n\na.jpg,"a\nfox"\nb.jpg', "metadata.csv, line 5: 1 values for 2 columns"),
        ("metadata.csv", "file_name,text,text\na.jpg,a,b", "line 1: two columns are named 'text'; remove one of them"),
        ("metadata.csv", "file_name,text\na.jpg,a".encode("utf-16"), "metadata.csv is UTF-16: save it as UTF-8"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, name, content, message) -> None:
    """They are an error where an image has no caption but theirs, and not used elsewhere."""
    write(tmp_path, a__jpg=jpeg(1))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        open_dataset(str(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)
    before = open_dataset(str(write(tmp_path, a__txt="a"))).identity()
    assert texts(tmp_path) == {"a.jpg": "a"}
    assert said(tmp_path) == (
        "1 records, 1 files not used: lists that cannot be used, such as those without file_name, and are not needed "
        f"(1: {name})"
    )
    (tmp_path / name).unlink()
    assert open_dataset(str(tmp_path)).identity() == before


def test_a_column_that_no_list_has(tmp_path) -> None:
    """Named, whether an image needs the list or not: an option that does nothing would not be noticed."""
    write(tmp_path, a__jpg=jpeg(1), metadata__csv="file_name,text\na.jpg,a red fox\n")
    message = r"text_column=nope: .*metadata.csv has no column nope; it has file_name, text$"
    with pytest.raises(InputError, match=message):
        open_dataset(str(tmp_path), text_column="nope")
    write(tmp_path, a__txt="a")
    with pytest.raises(InputError, match=message):
        open_dataset(str(tmp_path), text_column="nope")
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(InputError, match=r"metadata.csv is an empty list; a line should look like"):
        open_dataset(str(tmp_path), text_column="text")
    (tmp_path / "metadata.csv").write_text("name,text\na.jpg,b\n")
    with pytest.raises(InputError, match=r"metadata.csv, line 2: no file_name"):
        open_dataset(str(tmp_path), text_column="text")
    write(tmp_path / "train", b__jpg=jpeg(2), metadata__jsonl='{"file_name": "b.jpg", "nope": "b"}')
    assert texts(tmp_path, text_column="nope") == {"a.jpg": "a", "train/b.jpg": "b"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,description,label\na.jpg,a red fox,3\n"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "description": "a red fox"}\n{"file_name": "b.jpg", "label": 3}'),
    ],
)
def test_a_list_whose_captions_have_an_unknown_name(tmp_path, name, content) -> None:
    write(tmp_path, a__jpg=jpeg(1), b__jpg=jpeg(2))
    (tmp_path / name).write_text(content)
    with errors_name_options({"text_column": "--data.text-column"}), pytest.raises(InputError) as error:
        open_dataset(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path / name} has no column of captions (text, caption, txt, prompt); it has file_name, description, "
        "label; name the one that is meant by --data.text-column"
    )
    assert open_dataset(str(tmp_path), text_column="description")[0].text == "a red fox"
    write(tmp_path, b__txt="b")
    assert said(tmp_path) == (
        f"1 records, 2 files not used: images without a caption (1: a.jpg); lists without captions (1: {name})"
    )


@pytest.mark.parametrize(
    "content", ["id,url\n1,https://a/b\n", '"id";"text"\n"1";"a, b"\n', "file_name;text\na.jpg;a\n"]
)
def test_a_list_of_a_scraper_does_not_stand_in_the_way(tmp_path, content) -> None:
    write(write(tmp_path, a__jpg=jpeg(1), a__txt="a") / "train", b__jpg=jpeg(2))
    (tmp_path / "metadata.csv").write_text(content)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\nb.jpg,b\n")
    assert texts(tmp_path) == {"a.jpg": "a", "train/b.jpg": "b"}  # all have captions
    write(tmp_path / "other", c__jpg=jpeg(3))
    (tmp_path / "train" / "metadata.csv").write_text(content)
    with pytest.raises(InputError, match=r"train.metadata.csv, line|[^n].metadata.csv, line"):
        open_dataset(str(tmp_path))


# --- Said by the commands


def some(folder: Path) -> Path:
    return write(folder, a__jpg=jpeg(1), a__txt="a", b__HEIC=b"\0\0\0\x18ftypheic", c__txt="c")


SAID = (
    "1 records, 2 files not used: HEIC images, which are not read: convert them to JPEG or PNG (1: b.HEIC); captions "
    "without an image that is read (1: c.txt)"
)


def test_a_run_reports_unused_files(tmp_path, caplog) -> None:
    data = some(tmp_path / "data")
    samples = LiveSamples(open_dataset(str(data)), TORCH_MODEL / "tokenizer", 64, None)
    with caplog.at_level("INFO", "ipadapter_jax"):
        log_record_count("photos", samples)
    assert caplog.messages == [f"photos: {SAID}"]
    write_unused_report(LocalStore(tmp_path), samples)
    assert (tmp_path / "unused_files.txt").read_text().splitlines()[
        1
    ] == "c.txt: captions without an image that is read"


def test_batch_reports_unused_files(tmp_path, monkeypatch, capsys) -> None:
    data, out = some(tmp_path / "data"), tmp_path / "out"
    job = SimpleNamespace(pipe=None)
    for name, stand_in in {"load_for_job": job, "settings": {}, "make_images": BatchProgress(1, 0, [])}.items():
        monkeypatch.setattr(f"ipadapter_jax.cli.run.batch.{name}", lambda *_, found=stand_in, **__: found)
    assert main(["batch", str(data), "--out", str(out)]) == 0
    assert f"{data}: {SAID}\n" in capsys.readouterr().err
    assert len((out / "unused_files.txt").read_text().splitlines()) == 2


def test_evaluate_reports_unused_files(tmp_path) -> None:
    said: list[str] = []
    references = open_references(some(tmp_path), report=said.append)
    assert [reference.key for reference in references.found] == ["a.jpg"] and said == [f"{tmp_path}: {SAID}"]
