"""Every format of training data gives the same records, to threads and processes too; what is wrong is said clearly."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_formats import WRITERS, add, images, jpeg, members, write_folder, write_parquet, write_tar

from ipadapter_jax.data.formats.array_record import unpack
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.errors import InputError

RECORDS = images()
every_format = pytest.mark.parametrize("kind", WRITERS)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """The path to give for each format; the data is alone in the folder of the format's name."""
    folder = tmp_path_factory.mktemp("formats")
    return {kind: write(folder / kind, RECORDS) for kind, write in WRITERS.items()}


def open_quietly(path, **options):
    """No warning may come of data as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="tensorflow_datasets|etils|google")
        return open_dataset(str(path), **options)


def read_all(source) -> list:
    return [source[i] for i in range(len(source))]


def without_keys(records) -> list:
    return sorted((r.text, r.image, r.cond_image) for r in records)


@every_format
def test_all_formats_hold_the_same_records(written, kind) -> None:
    source = open_quietly(written[kind])
    records = read_all(source)
    assert without_keys(records) == without_keys(RECORDS)
    if kind != "tfds":  # which has an order of its own
        assert [r.text for r in records] == [r.text for r in RECORDS]
    keys = [source.key(i) for i in range(len(source))]
    assert [r.key for r in records] == keys and len(set(keys)) == len(RECORDS)
    with pytest.raises(IndexError):
        source[len(source)]


def test_keys_name_the_place(written) -> None:
    keys = {kind: open_quietly(path).key(5) for kind, path in written.items()}
    assert keys == {
        "json": "images/000000005.jpg",
        "json lines": "images/000000005.jpg",
        "folder": "00002/000000005.jpg",
        "tar": "00001.tar:000000005",
        "parquet": "part-1.parquet:1",
        "hugging face": "train.parquet:5",
        "array_record": "train-00001.array_record:1",
        "tfds": "images-train.array_record-00000-of-00001:5",
    }


@every_format
def test_threads_and_processes_read_the_same(written, kind) -> None:
    source = open_quietly(written[kind])
    expected = read_all(source)
    source = pickle.loads(pickle.dumps(source))  # with nothing open in it
    order = [i * 5 % len(source) for i in range(200)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(source.__getitem__, order)) == [expected[i] for i in order]
    assert pickle.loads(pickle.dumps(source))[3] == expected[3]  # with its files open


@every_format
def test_identity_is_of_the_data_and_not_of_the_place(written, kind, tmp_path) -> None:
    identity = open_quietly(written[kind]).identity()
    assert set(identity) == {"kind", "records", "files", "digest"} and identity["records"] == len(RECORDS)
    assert identity == json.loads(json.dumps(identity))
    folder = next(parent for parent in (written[kind], *written[kind].parents) if parent.name == kind)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    path = moved / written[kind].relative_to(folder)
    os.utime(path)
    assert open_quietly(path).identity() == identity
    (moved / "notes.md").write_text("not data")
    assert open_quietly(path).identity() == identity
    beside = ".parquet" if kind in ("folder", "tar") else None  # what img2dataset writes is not data
    data = (p for p in moved.rglob("*") if p.is_file() and p.suffix != beside)
    largest = max(data, key=lambda p: p.stat().st_size)
    source = open_quietly(path)
    with open(largest, "ab") as file:
        file.write(b"\0")
    assert source.identity()["digest"] != identity["digest"]


def test_a_pattern_and_a_single_file(written, monkeypatch) -> None:
    assert open_quietly(written["tar"] / "*.tar")[5].key == "00001.tar:000000005"
    assert [len(open_quietly(written["tar"] / f"0000{i}.tar")) for i in range(2)] == [3, 3]
    assert len(open_quietly(written["parquet"] / "*-1.parquet")) == 2
    assert len(open_quietly(written["array_record"] / "train-00000.array_record")) == 4
    monkeypatch.setenv("HOME", str(written["tar"].parent))
    assert len(open_quietly("~/tar")) == 6


def test_images_in_another_folder_than_their_list(written, tmp_path) -> None:
    shutil.copy(written["json"], tmp_path / "other.json")
    source = open_quietly(tmp_path / "other.json", image_root=str(written["json"].parent))
    assert source[2].image == RECORDS[2].image


def test_columns_by_name(tmp_path) -> None:
    table = {"image": [jpeg(1)], "text": ["a"], "photo": [jpeg(2)], "alt": ["b"], "reference": [jpeg(3)]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert open_quietly(tmp_path)[0].image == jpeg(1) and open_quietly(tmp_path)[0].cond_image is None
    record = open_quietly(tmp_path, image_column="photo", text_column="alt", cond_image_column="reference")[0]
    assert (record.image, record.text, record.cond_image) == (jpeg(2), "b", jpeg(3))


def test_links_and_odd_names(tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_folder(tmp_path / "elsewhere", [replace(RECORDS[0], cond_image=None)])
    (data / "link").symlink_to(tmp_path / "elsewhere" / "00000")
    (data / "loop").symlink_to(data)
    (data / "a.b.JPG").write_bytes(jpeg(7))
    (data / "a.b.txt").write_bytes(b"\xef\xbb\xbf dots \n")
    (data / "._a.b.jpg").write_bytes(b"macOS")
    (data / os.fsdecode(b"caf\xe9.png")).write_bytes(jpeg(8))
    (data / os.fsdecode(b"caf\xe9.json")).write_text('{"caption": null}')
    found = {record.key: record for record in read_all(open_quietly(data))}
    assert {key: record.text for key, record in found.items()} == {
        "a.b.JPG": "dots",
        "caf?.png": "",
        "link/000000000.jpg": RECORDS[0].text,
    }
    assert found["caf?.png"].image == jpeg(8) and found["a.b.JPG"].cond_image is None


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_in_any_order_with_long_names_and_repeated_stems(tmp_path, format) -> None:
    long = "füchse/" * 30
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.addfile(tarfile.TarInfo("notes.md"))
        add(tar, "x.txt", b"first")
        for record in RECORDS[:2]:
            for name, content in sorted(members(record).items(), reverse=True):
                add(tar, long + name, content)
        add(tar, "x.jpg", jpeg(50))
        add(tar, "x.jpg", jpeg(51))
        add(tar, "x.txt", b"second")
    records = read_all(open_quietly(tmp_path))
    assert [r.text for r in records] == ["first", RECORDS[0].text, RECORDS[1].text, "second"]
    assert [r.image for r in records] == [jpeg(50), RECORDS[0].image, RECORDS[1].image, jpeg(51)]
    assert records[1].key == f"a.tar:{long}000000000" and records[1].cond_image == RECORDS[0].cond_image


@pytest.mark.parametrize("keep", ["in an image", "in a header", "after a record", "damaged header", "compressed", ""])
def test_the_complete_records_of_a_damaged_tar_are_used(tmp_path, keep) -> None:
    tars = write_tar(tmp_path / "tars", RECORDS)
    with tarfile.open(tars / "00000.tar") as tar:
        third = tar.getmember("000000002.jpg")
    content = (tars / "00000.tar").read_bytes()
    contents = {
        "in an image": content[: third.offset_data + 100],
        "in a header": content[: third.offset + 100],
        "after a record": content[: third.offset],
        "damaged header": content[: third.offset + 3] + b"!" + content[third.offset + 4 :],
        "compressed": b"\x1f\x8b" + content,
        "": b"",
    }
    (tars / "00000.tar").write_bytes(contents[keep])
    with pytest.warns(UserWarning, match="00000.tar: only the whole records") as caught:
        source = open_dataset(str(tars))
    assert len(caught) == 1
    expected = RECORDS[3:] if keep in ("compressed", "") else RECORDS[:2] + RECORDS[3:]
    assert [r.text for r in read_all(source)] == [r.text for r in expected]
    assert [r.image for r in read_all(source)] == [r.image for r in expected]


def test_one_unreadable_record_is_named_when_it_is_read(tmp_path) -> None:
    folder = write_folder(tmp_path / "folder", RECORDS)
    (folder / "00000" / "000000000.txt").write_bytes(b"caf\xe9")
    (folder / "00000" / "000000001.jpg").unlink()
    (folder / "00000" / "000000001.png").symlink_to("nowhere")
    (folder / "00001" / "000000002.txt").unlink()
    (folder / "00001" / "000000002.json").write_text('{"caption": 7}')
    (folder / "00001" / "000000003.txt").unlink()
    (folder / "00001" / "000000003.json").unlink()
    with open(folder / "00002" / "000000004.jpg", "wb") as file:
        file.truncate(1 << 30)  # takes no room on disk
    source = open_quietly(folder)
    reasons = [
        "txt is not UTF-8",
        "cannot be read",
        'object like {"caption"',
        "no caption; put a .txt",
        "1024 MiB are far",
    ]
    for i, reason in enumerate(reasons):
        with pytest.raises(InputError, match=source.key(i)) as error:
            source[i]
        assert reason in str(error.value)
    assert source[5].text == RECORDS[5].text

    pq.write_table(pa.table({"image": [None, jpeg(1)], "text": ["a", None]}), tmp_path / "a.parquet")
    source = open_quietly(tmp_path / "a.parquet")
    assert source[1].text == ""
    with pytest.raises(InputError, match="a.parquet:0: no bytes under 'image'"):
        source[0]

    for payload in (b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x01", b"\x81\xa5image\xa1x", b"\x91" * 5000):
        with pytest.raises(InputError, match="record 3: not a msgpack map"):
            unpack(payload, "record 3")


@pytest.mark.parametrize("kind", ["tar", "parquet", "array_record", "tfds"])
def test_damage_after_opening_is_an_input_error(written, kind, tmp_path) -> None:
    shutil.copytree(written[kind], tmp_path / "data")
    source = open_quietly(tmp_path / "data")
    fresh = pickle.dumps(source)
    for path in (tmp_path / "data").iterdir():
        if path.suffix != ".json":
            path.write_bytes(bytes(300))
    with pytest.raises(InputError, match=source.key(0)):
        pickle.loads(fresh)[0]
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=source.key(0)):
        pickle.loads(fresh)[0]


def test_unread_files_and_slow_formats_are_reported(tmp_path, monkeypatch) -> None:
    tars = write_tar(tmp_path / "tars", RECORDS)
    (tars / "preview.png").write_bytes(jpeg(1))
    with pytest.warns(UserWarning, match="2 files of tar are read; next to them, not read: 1 of folder"):
        open_dataset(str(tars))
    monkeypatch.setattr("ipadapter_jax.data.formats.parquet.LARGE_GROUP", 100)
    with pytest.warns(UserWarning, match="row_group_size=100"):
        open_dataset(str(write_parquet(tmp_path / "parquet", RECORDS)))


WRONG_LISTS = {
    "{]": 'not JSON .*should look like [{"image_file": "1.png", "text": "A dog"}, ...]',
    "[]": "an empty list",
    '{"image_file": "1.png", "text": "a"}\nnonsense': "line 2: not JSON",
    '[{"file": "1.png", "caption": "a"}]': "entry 0 has the keys 'file', 'caption', and no 'image_file'",
    '[{"image_file": "1.png"}]': "entry 0 holds something else than texts, or no 'text'",
    '[{"image_file": "1.png", "text": 3}]': "entry 0 holds something else than texts",
    "[1]": "entry 0 is '1', and no 'image_file'",
    '[{"image_file": "1.png", "text": "a"}]': "none of 1 records can be used. 1.png: ",
    '[{"image_file": "a\\u0000.png", "text": "a"}]': "null",
    "[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("content", WRONG_LISTS)
def test_wrong_lists(tmp_path, content) -> None:
    (tmp_path / "list.json").write_text(content)
    says(WRONG_LISTS[content], str(tmp_path / "list.json"))


def says(expected: str, path: str, **options) -> None:
    with pytest.raises(InputError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_dataset(path, **options)
    message = str(error.value)
    for part in expected.split(" .*"):
        assert part in message, message
    assert "\n" not in message


def test_wrong_paths(tmp_path, written) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    says("is a URL; download", "https://example.com/a.tar")
    says("is a URL", "gs://bucket/tars")
    says("no such file or folder", str(folder / "none"))
    says("no files here", str(folder))
    says("no files here", str(folder / "*.tar"))
    (folder / "1.jpg").write_bytes(jpeg(1))
    says("1.jpg: no caption; put a .txt .*; or give a JSON list like", str(folder))
    (folder / "2.jpg").write_bytes(jpeg(2))
    says("give the folder of the images", str(folder / "*.jpg"))
    (folder / "2.jpg").unlink()
    says("no training data is known in files of .jpg; give a JSON list", str(folder / "1.jpg"))
    (folder / "1.jpg").rename(folder / "data.arrow")
    says("dataset.to_parquet", str(folder))
    (folder / "data.arrow").rename(folder / "list.json")
    says("give the list itself, not its folder", str(folder))
    (folder / "list.json").rename(folder / "0.tar.gz")
    says("unpack it first", str(folder / "0.tar.gz"))
    (folder / "0.tar.gz").rename(folder / "0.tar")
    says("no images in these tar files", str(folder / "0.tar"))
    says("give the version of the data set: ", str(written["tfds"].parent))


def test_wrong_options(written, tmp_path) -> None:
    says("not a folder; give the one that 'image_file'", str(written["json"]), image_root=str(tmp_path / "none"))
    says("none of 6 records can be used. images/000000000.jpg: ", str(written["json"]), image_root=str(tmp_path))
    says("image_root=x is for JSON lists", str(written["tar"]), image_root="x")
    says("has no columns; leave 'jpg' out", str(written["tar"]), image_column="jpg")
    found = "there are jpg (images as bytes), caption (text), cond_image (images as bytes), width (int64)"
    says(
        f"no column photo that holds images as bytes; {found}; give image_column",
        str(written["parquet"]),
        image_column="photo",
    )
    says(f"no column width that holds text; {found}", str(written["parquet"]), text_column="width")
    says("no column x that holds images", str(written["tfds"]), cond_image_column="x")


def test_wrong_parquet(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"url": ["x"], "caption": ["a"]}), path)
    says("no column image or jpg .*; there are url (text), caption (text); give image_column", str(path))
    pq.write_table(pa.table({"image": [b""], "text": ["a"]}).slice(0, 0), path)
    says("no rows", str(path))
    path.write_bytes(b"PAR1" + bytes(100))
    says("not a whole Parquet file", str(path))
    pq.write_table(pa.table({"image": [b"x"], "text": ["a"]}), path)
    pq.write_table(pa.table({"image": [b"x"], "caption": ["a"]}), tmp_path / "b.parquet")
    says("b.parquet: no column text", str(tmp_path))


def test_wrong_tensorflow_datasets(written, tmp_path, monkeypatch) -> None:
    shutil.copytree(written["tfds"], tmp_path / "set")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # as if it were not installed
    says("pip install 'ipadapter-jax[tfds]'", str(tmp_path / "set"))
    info = tmp_path / "set" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    says('stored as tfrecord, which has no random access; prepare it with file_format="array_record"', str(info.parent))
    monkeypatch.undo()
    info.write_text(info.read_text().replace('"tfrecord"', '"array_record"').replace('"train"', '"test"'))
    for path in info.parent.glob("*-train*"):
        path.rename(info.parent / path.name.replace("-train", "-test"))
    assert len(open_quietly(info.parent)) == len(RECORDS)  # the only split, whatever its name


def test_tensorflow_is_not_needed(written) -> None:
    code = (
        "import sys; from ipadapter_jax.data.open_dataset import open_dataset; r = open_dataset(sys.argv[1])[0]; "
        "assert r.image[:2] == b'\\xff\\xd8', r; print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(written["tfds"])], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
