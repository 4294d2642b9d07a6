"""Standard output and error that can print every name: a path is bytes, and need not be text in the encoding of the
terminal, or in any."""

import codecs
import io
import sys

_ERRORS = "ipadapter_jax.names"


def print_every_name() -> None:
    """From here on what a stream cannot encode is written as the byte that it was read from, where it was read as one,
    else escaped. A job is not to fail because its last line names a file. Streams that somebody has put in the place of
    the process's own, and may read as text, get no such bytes."""
    codecs.register_error(_ERRORS, _bytes_or_escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            own = stream in (sys.__stdout__, sys.__stderr__)
            stream.reconfigure(errors=_ERRORS if own else "backslashreplace")


def _bytes_or_escape(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return b"".join(map(_byte_or_escape, letters)), error.end


def _byte_or_escape(letter: str) -> bytes:
    is_byte = "\udc80" <= letter <= "\udcff"
    return letter.encode("ascii", "surrogateescape" if is_byte else "backslashreplace")
