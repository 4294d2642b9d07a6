"""The claims of the paper (arXiv 2308.06721), each against what was measured; and the bars that this project set."""

import itertools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from lab_measures import Interval, Values, interval
from lab_rows import (
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

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]

COMPARABLE = 0.02  # of CLIP-I: less than this below is comparable
BARS = {"colour": 0.90, "shape": 0.80, "background": 0.80}  # agreement of mini's adapter at scale 1, without text
BOTH = 0.60  # of the pictures at some scale: the reference's colour and the asked-for shape


class Claim(NamedTuple):
    claim: str
    verdict: Verdict
    numbers: str


class Measured(NamedTuple):
    rows: Mapping[Row, Values]
    pixels_unlike_base: int  # values of pixels at scale 0 that are not those of the base model
    adapter_parameters: int
    unet_parameters: int


def percent(found: Interval) -> str:
    return f"{100 * found.mean:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def number(found: Interval) -> str:
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def signed(found: Interval) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def difference(rows: Mapping[Row, Values], name: str, first: Row, second: Row) -> Interval:
    """first - second, over the prompts that both have."""
    a, b = rows[first][name], rows[second][name]
    count = min(len(a), len(b))
    return interval(a[:count] - b[:count])


def above(found: Interval, bound: float = 0.0) -> Verdict:
    """Whether a mean lies above the bound."""
    return "holds" if found.low > bound else "does not hold" if found.high < bound else "undecided"


def together(*verdicts: Verdict) -> Verdict:
    order: tuple[Verdict, ...] = ("does not hold", "undecided", "holds")
    return min(verdicts, key=order.index)


def claims(measured: Measured) -> list[Claim]:
    """One line for each claim."""
    rows = measured.rows
    share = measured.adapter_parameters / measured.unet_parameters
    to_full = difference(rows, "CLIP-I", DECOUPLED, FULL)
    all_to_full = difference(rows, "all three", DECOUPLED, FULL)
    to_simple = difference(rows, "CLIP-I", DECOUPLED, SIMPLE)
    to_text = difference(rows, "CLIP-I", MINI, TEXT)
    return [
        Claim(
            "An adapter of 22 million parameters is enough for Stable Diffusion 1.5",
            "not measured",
            f"mini is another size: its adapter has {measured.adapter_parameters:,} parameters, {100 * share:.1f} % of "
            f"its UNet's {measured.unet_parameters:,}",
        ),
        Claim(
            "A picture as prompt says more than words: its images follow it better than those of its caption",
            above(to_text),
            f"CLIP-I, image prompt less caption: {signed(to_text)}",
        ),
        Claim(
            "The adapter is comparable with full fine-tuning of the UNet on image embeddings, or better",
            above(to_full, -COMPARABLE),
            f"CLIP-I, decoupled less full: {signed(to_full)}, comparable being above -{COMPARABLE}; "
            f"colour, shape and background all right: {signed(all_to_full)}",
        ),
        Claim(
            "Decoupled cross-attention is better than image tokens appended to the text's",
            above(to_simple),
            f"CLIP-I, decoupled less simple: {signed(to_simple)}",
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
    opposite = Interval(-less.mean, -less.high, -less.low)
    return Claim(
        "Features of the grid (plus) follow the image more closely, and their pictures are less diverse",
        together(above(nearer), above(opposite)),
        f"plus less base: CLIP-I {signed(nearer)}, diversity (RMSE) {signed(less)}",
    )


def _both_prompts(rows: Mapping[Row, Values]) -> Claim:
    best = max(OTHER_SHAPE, key=lambda row: rows[row]["asked shape and colour"].mean())
    both = interval(rows[best]["asked shape and colour"])
    return Claim(
        "Image and text prompt work together",
        above(both, BOTH),
        f"the image's colour and the text's shape at scale {best.scale:g}: {percent(both)}, the bar being "
        f"{100 * BOTH:.0f} %",
    )


def _other_model(rows: Mapping[Row, Values]) -> Claim:
    style = difference(rows, "ink", INKED, MINI)
    kept = difference(rows, "colour", INKED, INKED_TEXT)
    found = {name: interval(rows[INKED][name]) for name in ("ink", "colour", "shape", "background")}
    own = interval(rows[INKED_TEXT]["ink"])
    chance = difference(rows, "all three", INKED, CHANCE)
    return Claim(
        "An adapter works unchanged with another model that was fine-tuned from the same base",
        together(above(style), above(chance)),
        f"ink on {percent(found['ink'])} of the pixels (the model's own, from captions: {percent(own)}), and agreement "
        f"with the image prompt in colour {percent(found['colour'])}, shape {percent(found['shape'])}, background "
        f"{percent(found['background'])}; colour less that of the model told the caption: {signed(kept)}",
    )


def _scale(measured: Measured) -> Claim:
    steps = [difference(measured.rows, "all three", more, less) for less, more in itertools.pairwise(BY_SCALE)]
    whole = difference(measured.rows, "all three", BY_SCALE[-1], BY_SCALE[0])
    falls: Verdict = "does not hold" if any(step.high < 0 for step in steps) else "holds"
    same: Verdict = "holds" if measured.pixels_unlike_base == 0 else "does not hold"
    return Claim(
        "The scale weighs the image: 0 is the base model, and the more, the closer",
        together(same, falls, above(whole)),
        f"at scale 0 {measured.pixels_unlike_base} values of pixels differ from the base model's; colour, shape and "
        f"background all right, scale 1 less scale 0: {signed(whole)}",
    )


def _guidance(rows: Mapping[Row, Values]) -> Claim:
    def gain(name: str) -> np.ndarray:
        least, usual = (rows[row]["all three"] for row in BY_DROP[name][:2])
        count = min(len(least), len(usual))
        return usual[:count] - least[:count]

    dropped, never = gain("decoupled"), gain("no image dropped")
    more = interval(dropped - never[: len(dropped)])
    usual = f"guidance {GUIDANCES[1]:g} less guidance {GUIDANCES[0]:g}"
    return Claim(
        "Leaving the image out of some training samples makes classifier-free guidance work",
        together(above(interval(dropped)), above(more)),
        f"colour, shape and background all right, {usual}: {signed(interval(dropped))} with image dropped, "
        f"{signed(interval(never))} without",
    )


def bars(rows: Mapping[Row, Values]) -> list[Claim]:
    """What this project wants of the adapter that it ships."""
    found = []
    for name, bar in BARS.items():
        share = interval(rows[MINI][name])
        met: Verdict = "holds" if share.mean >= bar else "does not hold"
        found.append(Claim(f"mini's base adapter: {name} in at least {100 * bar:.0f} %", met, percent(share)))
    return found
