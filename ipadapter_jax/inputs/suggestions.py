"""Suggests a known name for one that is not known, and sorts names by similarity."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

# Names from other programs and papers, without separators, and their names here: the first one that is known where the
# word stands is meant.
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    # options
    "numinferencesteps": ("steps",),
    "maxtrainsteps": ("steps",),
    "numimagesperprompt": ("num-images",),
    "n": ("num-images",),
    "ipadapter": ("adapter",),
    "ipadapterimage": ("image",),
    "ipadapterimageembeds": ("image-embeds",),
    "ipadaptermasks": ("masks",),
    "ipadapterscale": ("scale",),
    "negativeipadapterimage": ("negative-image",),
    "weight": ("scale",),
    "reference": ("image",),
    "ref": ("image",),
    "i": ("image",),
    "p": ("prompt",),
    "cfg": ("guidance-scale",),
    "cfgscale": ("guidance-scale",),
    "guidance": ("guidance-scale",),
    "sampler": ("scheduler",),
    "denoise": ("strength",),
    "output": ("out",),
    "outputdir": ("out",),
    "outdir": ("out",),
    "o": ("out",),
    "model": ("base",),
    "ckpt": ("model", "base"),
    "pretrainedmodelnameorpath": ("model", "base"),
    "w": ("width",),
    "precision": ("dtype",),
    "mixedprecision": ("dtype",),
    "lr": ("learning-rate",),
    "bs": ("batch-size",),
    "trainbatchsize": ("batch-size",),
    "dataset": ("path", "data"),
    "data": ("path",),
    # data types
    "fp16": ("float16",),
    "f16": ("float16",),
    "half": ("float16",),
    "fp32": ("float32",),
    "f32": ("float32",),
    "single": ("float32",),
    "float": ("float32",),
    "bf16": ("bfloat16",),
    # samplers
    "eulerancestral": ("euler_a",),
    "eulerancestraldiscrete": ("euler_a",),
    "keulera": ("euler_a",),
    "keulerancestral": ("euler_a",),
    "eulerdiscrete": ("euler",),
    "keuler": ("euler",),
    "dpm": ("dpmsolver++",),
    "dpm++": ("dpmsolver++",),
    "dpm++2m": ("dpmsolver++",),
    "dpm++2mkarras": ("dpmsolver++",),
    "dpmpp": ("dpmsolver++",),
    "dpmpp2m": ("dpmsolver++",),
    "dpmsolver": ("dpmsolver++",),
    "dpmsolvermultistep": ("dpmsolver++",),
    "unipcmultistep": ("unipc",),
    "plms": ("pndm",),
}

_MIN_SIMILARITY = 0.6  # from which on a name may be a misspelling of another; 1 is equal


def find_synonym(word: str, known: Iterable[str]) -> str | None:
    """The known name that equals `word` but for case and separators, or that is our name for another program's `word`;
    else None."""
    given = _compact(word)
    for did_you_mean_or_choose in ({given}, {_compact(name) for name in _SYNONYMS.get(given, ())}):
        for name in known:
            if given and _compact(name) in did_you_mean_or_choose:
                return name
    return None


def closest_match(word: str, known: Iterable[str]) -> str | None:
    """The known name that was most likely meant: the same in another spelling, one that begins with `word`, or the one
    with the fewest typing errors; of equally close names the first. None if no name is close."""
    names = list(known)
    if found := find_synonym(word, names):
        return found
    given = _compact(word)
    if len(given) > 2 and (longer := [name for name in names if _compact(name).startswith(given)]):
        return longer[0]
    near = [name for name in names if is_slip(word, name)]
    return min(near, key=lambda name: _slips(given, _compact(name)), default=None)


def is_slip(word: str, name: str) -> bool:
    """Whether a word may be a name with typing errors: few for its length."""
    given, known = _compact(word), _compact(name)
    most = min(max(1, len(given) // 3), len(given) - 1)
    return abs(len(given) - len(known)) <= most and _slips(given, known) <= most


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """'; did you mean NAME?', or '' when no known name is close."""
    name = closest_match(str(word), known)
    return f"; did you mean {name}?" if name else ""


def did_you_mean_or_choose(word: object, known: Collection[str]) -> str:
    """The same, or when no name is close '; choose A, B, ...' with all of the few known names."""
    return did_you_mean(word, known) or f"; choose {', '.join(known)}"


def sort_by_similarity(word: str, names: Iterable[str]) -> list[str]:
    """The names, such as those of files, the most similar to `word` first; equally similar ones alphabetically."""
    return sorted(sorted(names), key=lambda name: -_similarity(word, name))


def close_matches(word: str, names: Iterable[str]) -> list[str]:
    """The names that `word` may be a misspelling of, the most similar first."""
    return [name for name in sort_by_similarity(word, names) if _similarity(word, name) >= _MIN_SIMILARITY]


def _similarity(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, word.lower()[:200], name.lower()[:200]).ratio()


def _compact(word: str) -> str:
    """'Euler_A' and 'euler-a' -> 'eulera', 'DDIMScheduler' -> 'ddim'."""
    letters = re.sub(r"[-_. ]", "", word.lower())
    return letters.removesuffix("scheduler") or letters


def _slips(one: str, other: str) -> int:
    """The edit distance: letters that were left out, added, replaced or swapped with their neighbor."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        last, before, row = before, row, [i]
        for j, wanted in enumerate(other, 1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                least = min(least, last[j - 2] + 1)
            row.append(least)
    return row[-1]
