"""Strings that are not UTF-8, not printable or too long, as error messages show them."""

import os

import pytest

from ipadapter_jax.inputs.strings import is_utf8, one_line, replace_surrogates, short_repr

UNDECODED = os.fsdecode(b"caf\xe9.png")  # Latin-1, as a file may be named


def test_utf8() -> None:
    assert is_utf8("") and is_utf8("café \U0001f98a") and not is_utf8(UNDECODED) and not is_utf8("\ud83e")
    assert replace_surrogates(UNDECODED) == "caf?.png" and replace_surrogates("café") == "café"


def test_one_line() -> None:
    assert one_line("café.png") == "café.png"
    assert one_line("a\nb\x1b[31m") == "a\\nb\\x1b[31m" and one_line(UNDECODED) == "caf\\udce9.png"
    assert one_line("x" * 200) == "x" * 200 and one_line("x" * 201) == "x" * 200 + " ..."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, "7"),
        (True, "True"),
        (10**29, str(10**29)),
        (10**30, "(over 30 digits)"),
        (-(10**4000), "-(over 30 digits)"),
        ("x" * 58, f"'{'x' * 58}'"),
        ("x" * 59, f"'{'x' * 56}..."),
    ],
)
def test_short_repr(value: object, expected: str) -> None:
    assert short_repr(value) == expected
