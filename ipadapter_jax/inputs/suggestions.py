"""What a person may have meant by a word that is not known: the likeliest of few names, or names by likeness."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

# What other programs, papers and habit call things, without signs between the words, and the names here, of which the
# first that is known where the word stands is meant.
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

_LIKE = 0.6  # of 1: a likeness from which on a name may be a slip of another


def find_synonym(word: str, known: Iterable[str]) -> str | None:
    """The known name that is this one in another spelling (case, signs between words), or what this program calls what
    another calls `word`; or None."""
    given = _compact(word)
    for did_you_mean_or_choose in ({given}, {_compact(name) for name in _SYNONYMS.get(given, ())}):
        for name in known:
            if given and _compact(name) in did_you_mean_or_choose:
                return name
    return None


def closest_match(word: str, known: Iterable[str]) -> str | None:
    """The one of the known names that was most likely meant, or None where none is near: the same in another spelling,
    one that begins so, or the one with the fewest slips of the keyboard; of equals the first known one."""
    names = list(known)
    if found := find_synonym(word, names):
        return found
    given = _compact(word)
    if len(given) > 2 and (longer := [name for name in names if _compact(name).startswith(given)]):
        return longer[0]
    near = [name for name in names if is_slip(word, name)]
    return min(near, key=lambda name: _slips(given, _compact(name)), default=None)


def is_slip(word: str, name: str) -> bool:
    """Whether few slips of the keyboard, for its length, lie between a word and a name."""
    given, known = _compact(word), _compact(name)
    most = min(max(1, len(given) // 3), len(given) - 1)
    return abs(len(given) - len(known)) <= most and _slips(given, known) <= most


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """'; did you mean NAME?', or nothing where no known name is near."""
    name = closest_match(str(word), known)
    return f"; did you mean {name}?" if name else ""


def did_you_mean_or_choose(word: object, known: Collection[str]) -> str:
    """The same, or where none is near all names, which are few."""
    return did_you_mean(word, known) or f"; choose {', '.join(known)}"


def sort_by_similarity(word: str, names: Iterable[str]) -> list[str]:
    """The names, of files say, the likest to `word` first; equally like ones in their alphabetical order."""
    return sorted(sorted(names), key=lambda name: -_likeness(word, name))


def close_matches(word: str, names: Iterable[str]) -> list[str]:
    """Those of the names that `word` may be a slip of, the likest first."""
    return [name for name in sort_by_similarity(word, names) if _likeness(word, name) >= _LIKE]


def _likeness(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, word.lower()[:200], name.lower()[:200]).ratio()


def _compact(word: str) -> str:
    """'Euler_A' and 'euler-a' -> 'eulera', 'DDIMScheduler' -> 'ddim'."""
    letters = re.sub(r"[-_. ]", "", word.lower())
    return letters.removesuffix("scheduler") or letters


def _slips(one: str, other: str) -> int:
    """How many letters were left out, added, exchanged with another or with their neighbor."""
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
