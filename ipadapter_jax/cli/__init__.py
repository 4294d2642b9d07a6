"""The command line `ipadapter-jax COMMAND ...`.

Exit codes: 0 for success, 2 for bad input (with one line on standard error), 130 when interrupted, 141 when the reader
of the output has closed it. Long jobs return 75 when they were preempted and should be resumed.
"""

import contextlib
import importlib.metadata
import logging
import logging.handlers
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from ipadapter_jax.cli.commands import COMMANDS
from ipadapter_jax.cli.help import help_of, overview
from ipadapter_jax.cli.option_types import OptionsOfCommand, names_of
from ipadapter_jax.cli.options import ARGUMENTS, Sampling
from ipadapter_jax.cli.parsing import parse_words, unknown_command
from ipadapter_jax.cli.streams import print_every_name
from ipadapter_jax.cli.train import help_of_train
from ipadapter_jax.cli.train import parse as parse_train
from ipadapter_jax.errors import InputError, errors_name_options
from ipadapter_jax.train.config import Train, check
from ipadapter_jax.weights.hub import found_place


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    print_every_name()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's remarks about its own cache
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            return _run(arguments)
    except InputError as error:
        if debug:
            raise
        print(f"ipadapter-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a folder that may not be read, a name that is too long
        if debug:
            raise
        place = f"{error.filename}: {error.strerror}; choose another place" if error.filename else str(error)
        print(f"ipadapter-jax: {' '.join(place.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ipadapter-jax: interrupted", file=sys.stderr)
        return 130


def _run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code. Raises InputError for bad input."""
    if not arguments:
        print(overview())
        return 2
    if arguments[0] in ("-V", "--version"):
        print(f"ipadapter-jax {importlib.metadata.version('ipadapter-jax')}")
        return 0
    if text := _help(arguments):
        print(text)
        return 0
    options = parse(arguments)
    command = COMMANDS[arguments[0]]
    names = names_of(type(options), {} if isinstance(options, Train) else ARGUMENTS)
    with _reports(command.reports_immediately), errors_name_options(names):
        _check(options)
        return command.run()(options)


@contextlib.contextmanager
def _reports(immediately: bool) -> Iterator[None]:
    """Shows reports of the package on standard error: those of long jobs immediately; those of short ones (what was
    ignored in a file) when the job is done, and after an error only the warnings among them."""
    log = logging.getLogger("ipadapter_jax")
    log.setLevel(logging.INFO)
    log.propagate = False  # a root handler of some library would repeat it
    stream = logging.StreamHandler()
    buffer = logging.handlers.MemoryHandler(1000, logging.CRITICAL, stream, flushOnClose=False)
    handler = stream if immediately else buffer
    log.addHandler(handler)
    try:
        yield
    except BaseException:
        stream.addFilter(lambda record: record.levelno >= logging.WARNING)
        raise
    finally:
        handler.flush()
        log.removeHandler(handler)
        log.propagate = True


def parse(arguments: Sequence[str]) -> OptionsOfCommand:
    """Parses the options of the command that the first word names. Raises InputError."""
    name, *words = arguments
    if name not in COMMANDS:
        raise InputError(unknown_command(name))
    return parse_train(words) if name == "train" else parse_words(name, COMMANDS[name].kind(), words)


def _check(options: OptionsOfCommand) -> None:
    """Raises InputError for errors that are found without importing the function of the command."""
    if isinstance(options, Train):
        check(options)
        found_place(options.model.base, "base model")
    elif isinstance(options, Sampling):
        options.check()


def _help(arguments: Sequence[str]) -> str | None:
    """The help that the words request, or None."""
    before_dashes = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if not arguments or not {"-h", "--help"} & set(before_dashes):
        return None
    name, *words = arguments
    if name not in COMMANDS:
        return overview() if name.startswith("-") else None
    return help_of_train(words) if name == "train" else help_of(name, COMMANDS[name].kind())
