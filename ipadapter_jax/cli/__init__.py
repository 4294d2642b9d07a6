"""The command `ipadapter-jax`: one subcommand per job.

Exit code 0 when the job is done, 2 for bad input with one line on standard error, 130 when interrupted, 141 when the
reader of the output went away.
"""

import contextlib
import io
import logging
import logging.handlers
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from ipadapter_jax.cli.commands import COMMANDS
from ipadapter_jax.cli.train import parse as parse_train
from ipadapter_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"] or arguments[-1:] == ["--debug"]
    arguments = [a for i, a in enumerate(arguments) if not (debug and a == "--debug" and i in (0, len(arguments) - 1))]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's remarks about its own cache
    try:
        options = parse(arguments)
        command = COMMANDS[arguments[0]]
        with _reports(command.reports_at_once):
            return command.run()(options)
    except InputError as error:
        if debug:
            raise
        print(f"ipadapter-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
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


@contextlib.contextmanager
def _reports(at_once: bool) -> Iterator[None]:
    """Warnings appear at once, each on a line. So do reports of long jobs; those of short ones (what was ignored in a
    file) when the job is done, so that an error stands alone."""
    log = logging.getLogger("ipadapter_jax")
    log.setLevel(logging.INFO)
    log.propagate = False  # some library's root handler would say it again
    held = logging.handlers.MemoryHandler(1000, logging.CRITICAL, logging.StreamHandler(), flushOnClose=False)
    if at_once:
        held = logging.StreamHandler()
    log.addHandler(held)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            yield
        held.flush()
    finally:
        log.removeHandler(held)
        log.propagate = True


def parse(arguments: Sequence[str]) -> Any:
    """The chosen command's arguments. Raises InputError with tyro's complaint on one line."""
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    for option in options:
        if options.count(option) > 1:
            raise InputError(f"{option} is given more than once; give it once, several values after it")
    kinds: dict[str, Any] = {name: command.kind() for name, command in COMMANDS.items()}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            if arguments[:1] == ["train"]:
                return parse_train(arguments[1:])
            return tyro.extras.subcommand_cli_from_dict(
                kinds,
                prog="ipadapter-jax",
                description="Image prompts for Stable Diffusion in JAX. A last word --debug shows where errors arise.",
                args=arguments,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(complaint.getvalue())) from None


def _one_line(box: str) -> str:
    """tyro's framed message without its frame and its pointer to the help."""
    lines = [line.strip(" │") for line in box.splitlines()]
    text = " ".join(line for line in lines if line and not re.match("[─╭╰]", line))
    return f"{text.split('For full helptext')[0].strip()} (see --help)"
