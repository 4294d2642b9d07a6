"""Parses the words of a command line into the dataclass of a command. Errors are one line, with the likeliest
correction."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ipadapter_jax.cli.commands import COMMANDS
from ipadapter_jax.cli.option_types import Option, OptionsOfCommand, OptionValue, options_of
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.former_names import warn_of_former_name
from ipadapter_jax.inputs.suggestions import closest_match, did_you_mean_or_choose, find_synonym
from ipadapter_jax.storage.paths import expand_home

_OPTION = re.compile(r"--?[^\W\d][\w.+-]*(=.*)?", re.DOTALL)  # -1 and "- a cat" are values


Options = TypeVar("Options", bound=OptionsOfCommand)
Given = dict[tuple[str, ...], OptionValue]
"""All values that are given, by the path of their field."""


def parse_words(command: str, kind: type[Options], words: Sequence[str], default: Options | None = None) -> Options:
    """Parses the words of `command` into an instance of the dataclass `kind`. Options that are not given keep the
    values of `default`, an instance, or else the defaults of `kind`. Raises InputError."""
    given = _Line(command, options_of(kind), words).read()
    missing = [option for option in options_of(kind) if option.required and option.path not in given]
    if missing and default is None:
        options = ", ".join(option.name for option in missing)
        raise InputError(f"{command} needs {options}; see ipadapter-jax {command} --help")
    return _build(kind, given, default)


def _build(kind: type[Options], given: Given, default: Options | None, path: tuple[str, ...] = ()) -> Options:
    values = {}
    for field in dataclasses.fields(kind):
        here = (*path, field.name)
        if here in given:
            values[field.name] = given[here]
        elif inner := {place for place in given if place[: len(here)] == here}:
            old = field.default_factory() if default is None else getattr(default, field.name)  # type: ignore[misc]
            values[field.name] = _build(type(old), {place: given[place] for place in inner}, old, here)
    return kind(**values) if default is None else dataclasses.replace(default, **values)


class _Line:
    """Reads the words of one command once, from left to right."""

    def __init__(self, command: str, options: Sequence[Option], words: Sequence[str]) -> None:
        self.command, self.options, self.words = command, options, list(words)
        self.named = _named(options)
        self.former = _former(options)
        self.written: dict[tuple[str, ...], str] = {}  # the name that an option was given under
        self.positionals = [option for option in options if option.positional]
        self.given: Given = {}
        self.last: Option | None = None

    def read(self) -> Given:
        while self.words:
            word = self.words.pop(0)
            if word == "--":
                for rest in self.words:
                    self._positional(rest)
                break
            if _is_option(word):
                self._option(word)
            else:
                self._positional(word)
        return self.given

    def _option(self, word: str) -> None:
        name, equals, value = word.partition("=")
        hyphens = name.replace("_", "-")
        present = self.former.get(hyphens, hyphens)
        if present not in self.named:
            raise InputError(unknown_option(self.command, name, self.options))
        option, is_on = self.named[present]
        if option.path in self.given:
            raise InputError(self._repeated(option, hyphens))
        self.written[option.path] = hyphens
        if present != hyphens:
            warn_of_former_name(hyphens, present)
        if option.kind is bool:
            if equals:
                raise InputError(f"{name} takes no value; {option.name} turns it on, {option.opposite} off")
            self.given[option.path] = is_on
        else:
            self.given[option.path] = _values(option, [value] if equals else list(self._following(option)))
        self.last = option

    def _repeated(self, option: Option, name: str) -> str:
        """The error for an option that is given again, under this name."""
        names = {name, self.written[option.path]}
        if names & {*self.former}:
            names -= {option.name, option.opposite}
            return f"{option.name} and {names.pop()} are the same option; give {option.name} alone"
        several = ", several values after it" if option.count is None else ""
        return f"{option.name} is given more than once; give it once{several}"

    def _following(self, option: Option) -> Iterator[str]:
        """Takes the words that are the option's values."""
        count = len(self.words) if option.count is None else option.count
        if option.optional and self.words[:1] == ["None"]:
            count = 1
        for _ in range(count):
            if not self.words or _is_option(self.words[0]) or self.words[0] == "--":
                return
            yield self.words.pop(0)

    def _positional(self, word: str) -> None:
        """Assigns a word that belongs to no option to the next positional argument."""
        for option in self.positionals:
            if option.path not in self.given:
                self.given[option.path] = _values(option, [word])
                self.last = option
                return
        what = f"{self.command}: {_shown(word)} belongs to no option"
        if self.last is not None and self.last.kind is bool:
            raise InputError(f"{what}; {self.last.name} takes no value, {self.last.opposite} turns it off")
        if self.last is not None and not self.last.positional:
            values = "one value" if self.last.count == 1 else f"{self.last.count} values"
            raise InputError(f"{what}; {self.last.name} takes {values}, put one of several words into quotes")
        raise InputError(f"{what}; ipadapter-jax {self.command} --help lists them")


class _NamedOption(NamedTuple):
    """An option under one of its names; `is_on` is False for the name that turns it off."""

    option: Option
    is_on: bool


def _named(options: Sequence[Option]) -> dict[str, _NamedOption]:
    """Options by their names, and by the names that turn them off."""
    named = {option.name: _NamedOption(option, True) for option in options if not option.positional}
    return named | {option.opposite: _NamedOption(option, False) for option in options if option.kind is bool}


def _former(options: Iterable[Option]) -> dict[str, str]:
    """{former name: name} of options and their opposites."""
    return {names.former: names.name for option in options for names in option.former_names()}


def _is_option(word: str) -> bool:
    return bool(_OPTION.fullmatch(word)) and not _is_number(word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _values(option: Option, words: Sequence[str]) -> OptionValue:
    """Converts the words after an option to its value. Raises InputError naming the option."""
    if option.optional and list(words) == ["None"]:
        return None
    if len(words) < (option.count or 1):
        needed = "a value" if (option.count or 1) == 1 else f"{option.count} values"
        hint = f"; one that begins with - is written {option.name}=-..." if option.kind is str else ""
        hint = f", one of {', '.join(option.choices)}" if option.choices else hint
        raise InputError(f"{option.name} needs {needed}{hint}")
    values = tuple(_value(option, word) for word in words)
    return values[0] if option.count == 1 else values


def _value(option: Option, word: str) -> int | float | str | Path:
    if word in option.former_values:
        warn_of_former_name(f"{option.name} {word!r}", option.former_values[word])
        return option.former_values[word]
    if option.choices:
        if word not in option.choices:
            raise InputError(f"{option.name} {_shown(word)} is not known{did_you_mean_or_choose(word, option.choices)}")
        return word
    if option.is_place:
        if not word:
            raise InputError(f"{option.name} is empty; give a name, or leave it out")
        word = expand_home(word)
    try:
        value = option.kind(word)
    except ValueError:
        kind = {int: "whole number", float: "number"}[option.kind]
        raise InputError(f"{option.name} {_shown(word)} is not a {kind}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{option.name} {_shown(word)} is not a finite number")
    return value


def _shown(word: str) -> str:
    return word if len(word) <= 100 else f"{word[:100]}..."


def unknown_command(word: str) -> str:
    """The error for a first word that is not a command."""
    if word.startswith("-") and (option := closest_match(word.lstrip("-"), ("help", "version", "debug"))):
        return f"there is no option {_shown(word)}; did you mean --{option}?"
    if word == "help":
        return "there is no command help; ipadapter-jax --help shows all, ipadapter-jax COMMAND --help one"
    if word.startswith("-"):
        return f"{_shown(word)} stands before the command; name one first: {', '.join(COMMANDS)}"
    return f"there is no command {_shown(word)}{did_you_mean_or_choose(word, COMMANDS)}"


def unknown_option(command: str, name: str, options: Sequence[Option]) -> str:
    """The error for an option that the command does not have: it may have another name, belong to another command, or
    be misspelled."""
    what = f"{command} has no option {_shown(name)}"
    word = name.lstrip("-").lower().replace("_", "-")
    words = (word, word.rpartition(".")[2])  # --optim.lr is called otherwise in its last part alone
    owners = _owners(command)
    for find in (find_synonym, closest_match):
        for known, of_others in ((_by_word(options), False), (_by_word(_options_of_others(command)), True)):
            if found := next(filter(None, (find(one, known) for one in words)), None):
                option = known[found]
                if not of_others:
                    return f"{what}; did you mean {option}?"
                if option == f"--{word}":
                    return f"{option} is an option of {', '.join(owners[option])}, not of {command}"
                return f"{what}; {option} is an option of {', '.join(owners[option])}"
    return f"{what}; ipadapter-jax {command} --help lists them"


def _by_word(options: Sequence[Option]) -> dict[str, str]:
    """Names of options by what is written after the hyphens, today or formerly, and by the last part of that."""
    present = {name: name for name in _named(options)}
    known = {written.removeprefix("--"): name for written, name in (present | _former(options) | present).items()}
    for word, name in list(known.items()):
        known.setdefault(word.rpartition(".")[2], name)
    return known


def _options_of_others(command: str) -> list[Option]:
    return [option for other in COMMANDS if other != command for option in options_of(COMMANDS[other].kind())]


def _owners(command: str) -> dict[str, list[str]]:
    """The options of all other commands, and which have them."""
    owners: dict[str, list[str]] = {}
    for other in COMMANDS:
        for name in _named(options_of(COMMANDS[other].kind())) if other != command else ():
            owners.setdefault(name, []).append(other)
    return owners
