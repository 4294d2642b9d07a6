"""Standard output and error that can print every name: a path is bytes, and need not be text in the encoding of the
terminal, or in any."""

import codecs
import io
import sys

_ERRORS = "ipadapter_jax.names"


def print_every_name() -> None:
    """From here on what a stream cannot encode is written as the bytes that it was read from, where it was read as
    bytes, else escaped. A job is not to fail because its last line names a file."""
    codecs.register_error(_ERRORS, _bytes_or_escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _bytes_or_escape(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)
