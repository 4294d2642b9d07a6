"""The claims of the paper (arXiv 2308.06721) and the thresholds of this project, each with a verdict and numbers."""

import itertools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from experiments.mini.attribute_classifier import ATTRIBUTES
from experiments.mini.metrics import Interval, Values, interval, share
from experiments.mini.rows import (
    BY_DROP,
    BY_SCALE,
    CHANCE,
    DECOUPLED,
    FULL,
    GUIDANCES,
    INKED,
    INKED_TEXT,
    MINI,
    OTHER_SHAPE,
    PLUS,
    SIMPLE,
    TEXT,
    Row,
)
from experiments.mini.scenes.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]

COMPARABLE = 0.02  # a CLIP-I or a fraction that is lower by less than this is comparable
BARS = {"colour": 0.90, "shape": 0.80, "background": 0.80}  # least agreement of mini's adapter at scale 1, without text
BOTH = 0.60  # least fraction of images with the reference's color and the text's shape, at some scale
JUDGE = 0.98  # least accuracy of the attribute classifier on clean renders
NEAR_CHANCE = 0.10  # how far agreement without a prompt may exceed that of a guess
KEPT = 0.75  # least agreement of an adapter on another model, as a fraction of that on mini
STYLE = 0.50  # least ink with the adapter, as a fraction of the other model's own
GUESS = {
    name: 1 / len(names)
    for name, names in zip(ATTRIBUTES, (BACKGROUNDS, COLOURS, SHAPES, TEXTURES, SIZES, PLACES), strict=True)
}


class Claim(NamedTuple):
    claim: str
    verdict: Verdict
    numbers: str


class Measured(NamedTuple):
    rows: Mapping[Row, Values]
    judged: Mapping[str, Values]  # by the kind of image: measures of images that show the prompts exactly
    pixels_unlike_base: int  # number of pixel values at scale 0 that differ from the base model's
    adapter_parameters: int
    unet_parameters: int


def percent(found: Interval) -> str:
    return f"{100 * found.mean:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def number(found: Interval) -> str:
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def signed(found: Interval) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def points(found: Interval) -> str:
    """A difference of fractions in percentage points."""
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}] points"


def difference(rows: Mapping[Row, Values], name: str, first: Row, second: Row) -> Interval:
    """The paired interval of first - second."""
    return interval(rows[first][name] - rows[second][name])


def above(found: Interval, bound: float = 0.0) -> Verdict:
    """Whether a mean is above the bound; undecided if the bound lies within the interval."""
    return "holds" if found.low > bound else "does not hold" if found.high < bound else "undecided"


def _negative(found: Interval) -> Interval:
    return Interval(-found.mean, -found.high, -found.low)


def together(*verdicts: Verdict) -> Verdict:
    order: tuple[Verdict, ...] = ("does not hold", "undecided", "holds")
    return min(verdicts, key=order.index)


def claims(measured: Measured) -> list[Claim]:
    """The verdicts on the paper's claims."""
    rows = measured.rows
    part = measured.adapter_parameters / measured.unet_parameters
    to_full = difference(rows, "CLIP-I", DECOUPLED, FULL)
    all_to_full = difference(rows, "all three", DECOUPLED, FULL)
    to_simple = difference(rows, "CLIP-I", DECOUPLED, SIMPLE)
    all_to_simple = difference(rows, "all three", DECOUPLED, SIMPLE)
    to_text = difference(rows, "CLIP-I", MINI, TEXT)
    all_to_text = difference(rows, "all three", MINI, TEXT)
    return [
        Claim(
            "An adapter of 22 million parameters is enough for Stable Diffusion 1.5",
            "not measured",
            f"mini has another size: its adapter has {measured.adapter_parameters:,} parameters, {100 * part:.1f} % of "
            f"its UNet's {measured.unet_parameters:,}",
        ),
        Claim(
            "An image prompt says more than words: its images follow it better than those of its caption",
            together(above(to_text), above(all_to_text)),
            f"mini's adapter minus caption: CLIP-I {signed(to_text)}, all three {points(all_to_text)}",
        ),
        Claim(
            "The adapter is comparable with full fine-tuning of the UNet on image embeddings, or better",
            together(above(to_full, -COMPARABLE), above(all_to_full, -COMPARABLE)),
            f"decoupled minus full: CLIP-I {signed(to_full)}, all three {points(all_to_full)}; comparable is above "
            f"-{COMPARABLE} and -{100 * COMPARABLE:g} points",
        ),
        Claim(
            "Decoupled cross-attention is better than image tokens appended to the text's",
            above(to_simple),
            f"decoupled minus simple: CLIP-I {signed(to_simple)}, which decides; all three {points(all_to_simple)}",
        ),
        _finer(rows),
        _both_prompts(rows),
        _other_model(rows),
        _scale(measured),
        _guidance(rows),
        Claim("It works together with ControlNet and other structural control", "not measured", "mini has none"),
    ]


def _finer(rows: Mapping[Row, Values]) -> Claim:
    nearer, less = (difference(rows, name, PLUS, DECOUPLED) for name in ("CLIP-I", "diversity, RMSE"))
    return Claim(
        "Patch features (plus) follow the image more closely, and their images are less diverse",
        together(above(nearer), above(_negative(less))),
        f"plus minus base: CLIP-I {signed(nearer)}, diversity (RMSE) {signed(less)}",
    )


def _both_prompts(rows: Mapping[Row, Values]) -> Claim:
    """The scale is chosen on the prompts of even index and evaluated on the others."""
    name = "asked shape and colour"
    best = max(OTHER_SHAPE, key=lambda row: rows[row][name][::2].mean())
    both = share(rows[best][name][1::2])
    return Claim(
        "Image and text prompt work together",
        above(both, BOTH),
        f"the image's color and the text's shape at scale {best.scale:g}, which is the best for the other half of the "
        f"prompts: {percent(both)}; the threshold is {100 * BOTH:.0f} %",
    )


def _other_model(rows: Mapping[Row, Values]) -> Claim:
    style = interval(rows[INKED]["ink"] - STYLE * rows[INKED_TEXT]["ink"])
    kept = interval(rows[INKED]["all three"] - KEPT * rows[MINI]["all three"])
    ink = [percent(share(rows[row]["ink"])) for row in (INKED, INKED_TEXT, MINI)]
    agreement = [percent(share(rows[row]["all three"])) for row in (INKED, MINI)]
    return Claim(
        "An adapter works unchanged with another model that was fine-tuned from the same base",
        together(above(style), above(kept)),
        f"ink on {ink[0]} of the pixels; with the other model's own images of captions {ink[1]}, with mini {ink[2]}. "
        f"All three {agreement[0]}, on mini {agreement[1]}. Thresholds: {100 * STYLE:g} % of the model's own ink, "
        f"{100 * KEPT:g} % of mini's agreement",
    )


def _scale(measured: Measured) -> Claim:
    steps = [difference(measured.rows, "all three", more, less) for less, more in itertools.pairwise(BY_SCALE)]
    whole = difference(measured.rows, "all three", BY_SCALE[-1], BY_SCALE[0])
    same: Verdict = "holds" if measured.pixels_unlike_base == 0 else "does not hold"
    rising: list[Verdict] = [above(step, -COMPARABLE) for step in steps]
    least = min(steps, key=lambda step: step.mean)
    return Claim(
        "The scale weighs the image prompt: 0 is the base model, and a higher scale follows the image more closely",
        together(same, above(whole), *rising),
        f"at scale 0 {measured.pixels_unlike_base} pixel values differ from the base model's; all three, scale 1 "
        f"minus scale 0: {points(whole)}; no step of the scale may lose {100 * COMPARABLE:g} points, the worst is "
        f"{points(least)}",
    )


def _guidance(rows: Mapping[Row, Values]) -> Claim:
    def gain(name: str) -> np.ndarray:
        least, usual = (rows[row]["all three"] for row in BY_DROP[name][:2])
        return usual - least

    dropped, never = gain("decoupled"), gain("no image dropped")
    return Claim(
        "Dropping the image of some training samples makes classifier-free guidance work",
        together(above(interval(dropped)), above(interval(dropped - never))),
        f"all three, guidance {GUIDANCES[1]:g} minus guidance {GUIDANCES[0]:g}: {points(interval(dropped))} with image "
        f"dropped, {points(interval(never))} without",
    )


def bars(measured: Measured) -> list[Claim]:
    """The thresholds of this project for its own adapter and for the attribute classifier."""
    rows, renders = measured.rows, measured.judged["renders"]
    worst = min(ATTRIBUTES, key=lambda name: renders[name].mean())
    clean = share(renders[worst])
    title = f"The attribute classifier reads each attribute of clean renders in at least {100 * JUDGE:g} %"
    found = [Claim(title, above(clean, JUDGE), f"{worst}, the worst: {percent(clean)}")]
    for name, bar in BARS.items():
        agreement = share(rows[MINI][name])
        title = f"mini's base adapter, scale 1, no text: {name} in at least {100 * bar:.0f} %"
        found.append(Claim(title, above(agreement, bar), percent(agreement)))
    over = {name: share(rows[CHANCE][name]) for name in BARS}
    near: list[Verdict] = [above(_negative(one), -GUESS[name] - NEAR_CHANCE) for name, one in over.items()]
    numbers = ", ".join(f"{name} {percent(one)}" for name, one in over.items())
    return [*found, Claim("Without image and text the model agrees only by chance", together(*near), numbers)]
