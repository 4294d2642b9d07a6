"""Captions of scenes in plain English, in varied wording. mini's text encoder was trained on these words."""

import numpy as np

from experiments.mini.scenes.scene import Scene, Thing

_BEGINNINGS = ("", "", "a picture of ", "a drawing of ", "an image of ")
_WORDS = {  # the first is the most frequent
    "circle": ("circle", "disc", "round shape"),
    "square": ("square", "square", "box"),
    "cross": ("cross", "cross", "plus sign"),
    "large": ("large", "big"),
    "small": ("small", "little"),
    "grey": ("grey", "gray"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}
_PATTERNS = {
    "striped": ("with stripes", "with a striped pattern"),
    "dotted": ("with dots", "with spots"),
    "checkered": ("with checks", "with a checkered pattern"),
    "plain": ("in one colour",),
}
_PLACES = {
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the middle"),
}
_NUMBERS = {2: "two", 3: "three"}


def caption(scene: Scene, rng: np.random.Generator, *, whole: bool = False) -> str:
    """A random caption. It names the shape of every object and some other attributes, with `whole` all of them.

    The size is named only if there is one object.
    """
    many = len(scene.things) > 1
    if not whole and not many and rng.random() < 0.15:
        return _terse(scene.things[0], rng)
    things = [_describe(thing, rng, whole, many) for thing in scene.things]
    text = f"{', '.join(things[:-1])} and {things[-1]}" if many else things[0]
    if many and rng.random() < 0.2:
        text = f"{_NUMBERS[len(things)]} shapes: {text}"
    if whole or rng.random() < 0.85:
        word = _word(scene.background, rng)
        text += f" on {_article(word)} background" if rng.random() < 0.8 else f", the background is {word}"
    return str(rng.choice(_BEGINNINGS)) + text


def _terse(thing: Thing, rng: np.random.Generator) -> str:
    """A short caption, as people type: "a star", "a red star", "a striped star"."""
    words = {0: (), 1: (thing.colour,), 2: (_word(thing.texture, rng),)}[int(rng.integers(3))]
    return _article(" ".join((*words, _word(thing.shape, rng))))


def _describe(thing: Thing, rng: np.random.Generator, whole: bool, many: bool) -> str:
    said = {name: whole or rng.random() < share for name, share in (("size", 0.6), ("texture", 0.85), ("place", 0.7))}
    plain_is_said = thing.texture != "plain" or whole or rng.random() < 0.4
    pattern = said["texture"] and plain_is_said
    after = pattern and rng.random() < 0.3
    words = [_word(thing.size, rng)] if said["size"] and not many else []
    words += [thing.colour] if whole or rng.random() < 0.93 else []
    words += [_word(thing.texture, rng)] if pattern and not after else []
    text = _article(" ".join((*words, _word(thing.shape, rng))))
    if after:
        text += f" {rng.choice(_PATTERNS[thing.texture])}"
    return f"{text} {rng.choice(_PLACES[thing.place])}" if said["place"] else text


def _word(name: str, rng: np.random.Generator) -> str:
    choices = _WORDS.get(name, (name,))
    return choices[0] if rng.random() < 0.6 else str(rng.choice(choices))


def _article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
