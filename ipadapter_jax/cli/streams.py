"""Standard output and error that can print every file name: a path is bytes, which need not be text in the encoding of
the terminal, or in any encoding."""

import codecs
import io
import sys

_ERRORS = "ipadapter_jax.names"


def print_every_name() -> None:
    """Makes the streams write what they cannot encode as the byte that it was decoded from, or else escaped: a job must
    not fail because its last line names a file. Streams that replace the process's own, and may be read as text, get
    escapes only."""
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
