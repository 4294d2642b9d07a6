"""Strings from outside, which may hold anything: whether they are text, and how an error message shows them."""


def is_utf8(text: str) -> bool:
    """Whether a string can be written as UTF-8. Bytes of a file name that are not UTF-8 arrive in Python as lone
    surrogates, which cannot."""
    return replace_surrogates(text) == text


def replace_surrogates(text: str) -> str:
    """The string with a question mark for every lone surrogate, so that any UTF-8 stream accepts it."""
    return text.encode("utf-8", "replace").decode()


def one_line(text: str) -> str:
    """The string for a message of one line: if anything in it is not printable, all but ASCII is escaped. Cut after
    200 characters."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 200 else f"{shown[:200]} ..."


def short_repr(value: object) -> str:
    """`repr(value)` for a message: at most 60 characters, and no digits of an integer with more than 30."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"{'-' * (value < 0)}(over 30 digits)"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
