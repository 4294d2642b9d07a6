"""Whatever a file of text or JSON holds, its reader gets a value or one line that names it."""

import os

import pytest

from ipadapter_jax.data.file_listing import read_file
from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.text_files import MAX_DEPTH, decode_text, parse_json, read_bytes, read_json, read_json_object


def refused(read, *parts: str) -> None:
    with pytest.raises(InputError) as error:
        read()
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message and len(message) < 400, message


def nested(depth: int, inner: str = "1") -> str:
    return '{"a": [' * (depth // 2) + inner + "]}" * (depth // 2)


def test_values(tmp_path) -> None:
    path = tmp_path / "a.json"
    for content in (b'{"a": [1, NaN]}', b'\xef\xbb\xbf{"a": [1, NaN]}'):
        path.write_bytes(content)
        assert str(read_json_object(path)) == "{'a': [1, nan]}"
    assert parse_json(nested(MAX_DEPTH), "a") is not None
    assert decode_text("\ufefffüchse\r\n".encode(), "a") == "füchse\r\n"


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, nested(MAX_DEPTH + 2), nested(600)])
@pytest.mark.parametrize("read", [lambda path, text: read_json(path, "mend it"), lambda _, text: parse_json(text, "a")])
def test_deep_nesting_is_one_clear_error(tmp_path, text, read) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    refused(lambda: read(path, text), "a", "not JSON (")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{]", "not JSON (Expecting"),
        (b"", "not JSON (Expecting"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON (Exceeds the limit"),
        (b'{"a": "\xff"}', "is not UTF-8 (invalid start byte at byte 7): save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ('{"a": 1}'.encode("utf-32"), "is UTF-32: save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "is UTF-16 without a byte order mark, or not text"),
        (b"[1]", "does not hold a JSON object; mend it"),
        (b" " * (16 << 20) + b"{}", "is longer than 16 MiB"),
    ],
)
def test_invalid_json(tmp_path, content, reason) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    refused(lambda: read_json_object(path, "mend it"), "settings.json", reason)


def test_unreadable_files(tmp_path) -> None:
    refused(lambda: read_bytes(tmp_path / "gone"), "gone cannot be read (No such file or directory)")
    refused(lambda: read_bytes(f"{tmp_path}/a\0"), "cannot be read (embedded null byte)")
    refused(lambda: read_bytes(tmp_path, remedy="name a file"), "cannot be read (Is a directory); name a file")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: read_bytes(tmp_path / "pipe"), "pipe cannot be read (it is not a regular file)")
    refused(
        lambda: read_file(str(tmp_path / "pipe"), "a.jpg"), "a.jpg: ", "pipe cannot be read (it is not a regular file"
    )
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    refused(lambda: read_bytes(tmp_path / "large"), "large is longer than 16 MiB")


class Growing:
    """A file that says it has `size` bytes and holds all of `content`."""

    def __init__(self, path, size: int):
        self._size, self._fstat = size, os.fstat
        self.inode = os.stat(path).st_ino

    def __call__(self, descriptor: int) -> os.stat_result:
        found = self._fstat(descriptor)
        return os.stat_result((*found[:6], self._size, *found[7:10])) if found.st_ino == self.inode else found


@pytest.mark.parametrize("size", [0, 1, 4, 99_999])
def test_a_file_is_read_to_its_end_whatever_its_size_was(tmp_path, monkeypatch, size) -> None:
    """One that grows, and those of FUSE and /proc, which have no size."""
    path, content = tmp_path / "a", os.urandom(200_000)
    path.write_bytes(content)
    monkeypatch.setattr(os, "fstat", Growing(path, size))
    assert read_bytes(path) == content
    assert read_bytes(path, most=len(content)) == content
    refused(lambda: read_bytes(path, most=len(content) - 1), "a is longer than 0 MiB")
    monkeypatch.setattr("ipadapter_jax.data.file_listing.MAX_BYTES", len(content))
    assert read_file(str(path), "a.jpg") == content
    monkeypatch.setattr("ipadapter_jax.data.file_listing.MAX_BYTES", len(content) - 1)
    refused(lambda: read_file(str(path), "a.jpg"), "a.jpg: ")


def test_a_file_without_a_size() -> None:
    assert read_bytes("/proc/self/status").endswith(b"\n") and len(read_bytes("/proc/self/status")) > 100


def test_a_pipe_is_read_if_allowed() -> None:
    for content in (b"", b"x" * 60_000):
        end, begin = os.pipe()
        os.write(begin, content)
        os.close(begin)
        assert read_bytes(f"/dev/fd/{end}", pipes=True) == content
        os.close(end)
    end, begin = os.pipe()
    os.write(begin, b"x" * 100)
    refused(lambda: read_bytes(f"/dev/fd/{end}", 99, pipes=True), "is longer than")
    os.close(begin)
    os.close(end)
    refused(lambda: read_bytes("/dev/zero", pipes=True), "/dev/zero cannot be read (it is not a regular file)")
