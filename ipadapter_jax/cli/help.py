"""The texts of --help: all commands, or the options of one command in groups, the most used first."""

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping

from ipadapter_jax.cli.commands import COMMANDS
from ipadapter_jax.cli.option_types import Option, options_of

_INDENT = 26  # of the texts


def overview() -> str:
    """The help of the program: all commands."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ipadapter-jax COMMAND ...",
            "",
            "Image prompts for Stable Diffusion in JAX.",
            "",
            "commands:",
            *rows,
            "",
            "ipadapter-jax COMMAND --help shows the options of a command.",
            "ipadapter-jax --version (-V) shows the version. --debug shows where an error arises.",
        ]
    )


def help_of(command: str, kind: type, about: str = "", defaults: object = None, before: str = "") -> str:
    """The help of a command.

    kind: the dataclass of its options. about: what the command does, by default the docstring of `kind`. defaults: an
    instance of `kind` whose values are shown as defaults. before: the first word of the command's arguments.
    """
    options = options_of(kind)
    words = [command, before, *(option.name for option in options if option.positional)]
    words += [f"{option.name} {option.metavar}" for option in options if option.required and not option.positional]
    lines = [f"usage: ipadapter-jax {' '.join(filter(None, words))} [options]", ""]
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for paragraph in inspect.cleandoc(about or kind.__doc__ or "").split("\n\n"):
        is_code = all(line.startswith("    ") for line in paragraph.splitlines())  # commands to copy
        lines += [*(paragraph.splitlines() if is_code else _wrapped(paragraph, width)), ""]
    for title, group in _groups(kind, options).items():
        lines.append(f"{title}:")
        for option in group:
            lines += _option_lines(option, _default(option, defaults), width)
        lines.append("")
    return "\n".join([*lines, *_line("-h, --help", "Show this help and exit.", width)])


def _groups(kind: type, options: tuple[Option, ...]) -> Mapping[str, list[Option]]:
    """{title: options}: the groups that the dataclass declares, or one group for each inner dataclass."""
    found: dict[str, list[Option]] = {}
    if titles := getattr(kind, "help_groups", None):
        by_name = {option.path: option for option in options}
        return {title: [by_name[(name,)] for name in names] for title, names in titles.items()}
    for option in options:
        title = option.path[0] if len(option.path) > 1 else "options"
        found.setdefault(title, []).append(option)
    return found


def _option_lines(option: Option, default: str, width: int) -> Iterator[str]:
    name = option.opposite if option.kind is bool and option.default else option.name
    shown = name if option.positional else f"{name} {option.metavar}".rstrip()
    note = "(required)" if option.required and not option.positional else default
    return _line(shown, f"{option.about} {note}".strip(), width)


def _line(name: str, text: str, width: int) -> Iterator[str]:
    lines = _wrapped(text, max(width - _INDENT, 30)) or [""]
    if len(name) > _INDENT - 4:
        yield f"  {name}"
    else:
        yield f"  {name:<{_INDENT - 2}}{lines.pop(0)}".rstrip()
    for line in lines:
        yield " " * _INDENT + line


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def _default(option: Option, defaults: object) -> str:
    value = option.default
    if defaults is not None:
        value = defaults
        for name in option.path:
            value = getattr(value, name)
    if value is None or value is False or value is True or value in ("", ()):
        return ""
    return f"(default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"
