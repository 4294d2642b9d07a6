"""Memory is bounded by what a file holds, not by what it claims to hold."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_formats import images, jpeg, write_parquet, write_tar
from memory import peak_growth

from ipadapter_jax.data.formats.parquet_pages import DamagedPage, unpacked_bytes
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.errors import InputError

OPEN = "from ipadapter_jax.data.open_dataset import open_dataset; open_dataset(sys.argv[2])[0]"  # it reserves memory
READ = "source = open_dataset(sys.argv[1]); [source[i] for i in (0, len(source) // 2, len(source) - 1)]"
REFUSED = "try: open_dataset(sys.argv[1]); assert False\nexcept ValueError: pass"


def growth(code: str, path: Path) -> int:
    """MiB that the code takes beyond what reading good data does."""
    write_parquet(path.parent / "good", images())
    return peak_growth(OPEN, code, path, path.parent / "good")


def repeated(value: bytes | str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))


def test_a_repeated_image_stays_one_image(tmp_path) -> None:
    """Some hundred bytes that stand for 2.2 GB, and a caption that stands for as many."""
    path, image = tmp_path / "a.parquet", jpeg(1) + bytes(22_000)
    table = pa.table({"image": repeated(image, 100_000), "text": repeated("a fox" * 4000, 100_000)})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 4000
    source = open_dataset(str(path))
    assert len(source) == 100_000 and source[99_999].image == image and source[5].text == "a fox" * 4000
    assert growth(READ, path) < 300


def test_a_repeated_image_in_a_struct(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    struct = pa.StructArray.from_arrays([repeated(jpeg(1) + bytes(22_000), 100_000)], ["bytes"])
    pq.write_table(pa.table({"image": struct, "text": repeated("a", 100_000)}), path, compression="zstd")
    assert len(open_dataset(str(path))[7].image) > 22_000
    assert growth(READ, path) < 300


def test_compressed_zeros_are_refused_before_they_are_read(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [bytes(100 << 20)] * 5, "text": ["a"] * 5})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    with pytest.raises(InputError, match=r"a.parquet: row group 0 of 1\d KiB declares 5 rows of 500 MiB .*size=100"):
        open_dataset(str(path))
    assert growth(REFUSED, path) < 200


def test_rows_without_number_are_refused_before_they_are_read(tmp_path) -> None:
    path, rows = tmp_path / "a.parquet", 3_000_000
    table = pa.table({"image": pa.nulls(rows, pa.binary()), "text": pa.nulls(rows, pa.string())})
    pq.write_table(table, path, row_group_size=rows)
    with pytest.raises(InputError, match="row group 0 of .* declares 3,000,000 rows"):
        open_dataset(str(path))


TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_every_type_of_column_is_read(tmp_path, binary, text, use_dictionary) -> None:
    images, texts = [jpeg(i) for i in range(5)], ["a", "b", "a", "c", "füchse"]
    column = pa.array(texts).dictionary_encode().cast(text) if pa.types.is_dictionary(text) else pa.array(texts, text)
    table = pa.table({"image": pa.array(images, binary), "text": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2, use_dictionary=use_dictionary)
    source = pickle.loads(pickle.dumps(open_dataset(str(tmp_path / "a.parquet"))))
    assert [(source[i].image, source[i].text) for i in range(5)] == list(zip(images, texts, strict=True))


# --- Tar


def header(kind: bytes, size: int) -> bytes:
    entry = tarfile.TarInfo("header")
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_long_header_of_a_tar_is_not_read(tmp_path, kind) -> None:
    """The file takes no room on disk behind its first record."""
    path = write_tar(tmp_path / "tars", images()) / "00000.tar"
    with tarfile.open(path) as tar:
        end = tar.getmember("000000000.txt")
    with open(path, "r+b") as file:
        file.truncate(end.offset_data + 512)
        file.seek(end.offset_data + 512)
        file.write(header(kind, 4 << 30))
        file.truncate(5 << 30)
    with pytest.warns(UserWarning, match="only the whole records of this tar are used .a header of 4294967296 bytes"):
        source = open_dataset(str(path))
    assert len(source) == 1 and source[0].image == images()[0].image
    assert growth(READ, path) < 200


def test_headers_of_a_tar_that_follow_one_another_without_end(tmp_path) -> None:
    path = write_tar(tmp_path / "tars", images()) / "00000.tar"
    chained = header(tarfile.XHDTYPE, 0) * 5000
    path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(-len(path.read_bytes().rstrip(b"\0")) % 512) + chained)
    with pytest.warns(UserWarning, match="00000.tar: only the whole records of this tar are used"):
        assert len(open_dataset(str(path))) == 3


# --- Pages of Parquet


def compact(value: int) -> bytes:
    """A whole number, not negative, in Thrift's compact protocol."""
    value, out = value << 1, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def test_pages_that_say_more_than_the_list_of_columns(tmp_path) -> None:
    """The end of the file declares 70 MiB, its one page 127, which the reader would allocate."""
    path, size = tmp_path / "a.parquet", 70 << 20
    image = np.random.default_rng(0).bytes(1 << 20) * 70
    pq.write_table(pa.table({"image": [image], "text": ["a"]}), path, compression="gzip", use_dictionary=False)
    content, before, after = path.read_bytes(), compact(size + 10), compact(127 << 20)
    assert content.find(before, 0, 100) > 0 and len(before) == len(after)
    path.write_bytes(content.replace(before, after, 1))
    with pytest.raises(InputError, match="a.parquet:0: the file is damaged .image unpacks to 133,169,152 bytes"):
        open_dataset(str(path))
    assert growth(REFUSED, path) < 100


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("statistics", [True, False])
def test_page_headers_agree_with_the_metadata(tmp_path, version, statistics) -> None:
    images = [jpeg(i) * 200 for i in range(30)]
    table = pa.table({"image": images, "text": ["a fox" * 1000] * 30})
    path = tmp_path / "a.parquet"
    options = {"data_page_version": version, "write_statistics": statistics, "data_page_size": 4096}
    pq.write_table(table, path, row_group_size=10, write_page_checksum=True, compression="zstd", **options)
    metadata = pq.read_metadata(path)
    with open(path, "rb") as file:
        for column in (metadata.row_group(g).column(c) for g in range(3) for c in range(2)):
            start = column.dictionary_page_offset or column.data_page_offset
            found = unpacked_bytes(file.fileno(), start, column.total_compressed_size)
            headers = column.total_uncompressed_size - found
            assert 0 < headers < 0.1 * column.total_uncompressed_size + 3000


@pytest.mark.parametrize("content", [b"", bytes(100), b"\x15" * 100, b"\xff" * 100, b"\x1c" * 100, b"\x19\xff" * 50])
def test_invalid_page_headers(tmp_path, content) -> None:
    path = tmp_path / "pages"
    path.write_bytes(content)
    with open(path, "rb") as file, pytest.raises(DamagedPage, match="a page"):
        unpacked_bytes(file.fileno(), 0, 100)


def test_a_caption_file_that_is_no_caption(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    (tmp_path / "b.txt").write_text("b")
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(200 << 20)
    source = open_dataset(str(tmp_path))
    with pytest.raises(InputError, match="a.jpg: 200 MiB are far too many for a caption; at most 16"):
        source[0]
    assert source[1].text == "b"
