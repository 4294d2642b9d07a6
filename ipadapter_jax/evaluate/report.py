"""The report of an evaluation as one self-contained HTML file: a table with the paper's scores, histograms, best and
worst examples, and everything that the numbers depend on."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from ipadapter_jax.evaluate.frechet import Distance
from ipadapter_jax.evaluate.metrics import RESAMPLES, SEED
from ipadapter_jax.evaluate.protocol import PUBLISHED
from ipadapter_jax.evaluate.results import METRIC_TITLES, Results
from ipadapter_jax.images.preprocess import load_image

_EXAMPLES, _SHOWN, _SIDE = (
    4,
    4,
    112,
)  # numbers of best and worst prompts and of images of each, side of an image in pixels
_BINS, _WIDTH, _HEIGHT = 40, 360, 140  # of a histogram: bars, pixels
_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd }
.number { text-align: right } .warning { background: #fdd; padding: .6em } img { margin: 2px } figure { margin: .5em 0 }
figcaption { font-size: 13px } pre { background: #f6f6f6; padding: .8em; overflow-x: auto } svg { margin-right: 1em }
"""


def html_report(
    results: Results, about: Mapping[str, object], protocol_deviations: Sequence[str], is_reference: bool
) -> str:
    """The report. about: settings, versions and digests, as JSON. protocol_deviations: a line each. is_reference:
    whether the scoring CLIP is the paper's."""
    prompts, each = results.scores.clip_i.shape
    parts = [
        "" if is_reference else _warning(),
        "<h1>Evaluation of image prompts</h1>",
        f"<p>{prompts:,} image prompts, {each} images for each.</p>",
        _table(results),
        f"<p>Brackets give 95 % confidence intervals over image prompts (bootstrap with {RESAMPLES:,} resamples, seed "
        f"{SEED}). The other rows are from Table 1 of the paper (arXiv 2308.06721), which has no intervals.</p>",
        _deviations(protocol_deviations),
        "<h2>Distribution of scores over image prompts</h2>",
        *(_histogram(METRIC_TITLES[name], values) for name, values in results.scores.prompt_means().items()),
        *_examples(results),
        f"<h2>What the numbers depend on</h2><pre>{escape(json.dumps(about, indent=2, ensure_ascii=False))}</pre>",
    ]
    body = "\n".join(filter(None, parts))
    head = f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><style>{_STYLE}</style>'
    return f"{head}\n<body>\n{body}\n</body></html>\n"


def _warning() -> str:
    return (
        '<p class="warning">Warning: the scoring CLIP is not ViT-L/14. These scores cannot be compared with those of '
        "the paper, or with scores of another CLIP.</p>"
    )


def _table(results: Results) -> str:
    head = ["method", "", "CLIP-T", "CLIP-I", "diversity", "CLIP-FID", *(["FID"] if "fid" in results.distances else [])]
    own = [_shown(results, name) for name in ("clip_t", "clip_i", "diversity")]
    own += [_distance(found) for found in results.distances.values()]
    rows = [["<b>this evaluation</b>", "", *own]]
    rows += [[row.method, row.kind, f"{row.clip_t:.3f}", f"{row.clip_i:.3f}"] for row in PUBLISHED]
    cells = (_table_row(row + [""] * (len(head) - len(row)), "td") for row in rows)
    return "<table>" + _table_row(head, "th") + "".join(cells) + "</table>"


def _table_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}{'' if i < 2 else _NUMBER}>{c}</{tag}>" for i, c in enumerate(cells)) + "</tr>"


_NUMBER = ' class="number"'


def _distance(found: Distance) -> str:
    return f"{found:.4g}" + (f"<br><small>{escape(found.caveat)}</small>" if found.caveat else "")


def _shown(results: Results, name: str) -> str:
    if name not in results.intervals:
        return ""
    found = results.intervals[name]
    return f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"


def _deviations(lines: Sequence[str]) -> str:
    if not lines:
        return "<p>The images were made and scored by the paper's protocol, as far as the paper describes it.</p>"
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>Deviations from the paper's protocol</h2><ul>{items}</ul>"


def _histogram(title: str, values: np.ndarray) -> str:
    """A histogram over the range of the values, as SVG."""
    counts, edges = np.histogram(values, bins=_BINS)
    width, tallest = _WIDTH / _BINS, counts.max()
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{_HEIGHT * (1 - count / tallest):.1f}" width="{width - 1:.1f}" '
        f'height="{_HEIGHT * count / tallest:.1f}" fill="#47a"/>'
        for i, count in enumerate(counts)
    )
    label = f'<text y="{_HEIGHT + 32}">{title}</text><text y="{_HEIGHT + 15}" font-size="11">{edges[0]:.3f}</text>'
    label += f'<text x="{_WIDTH}" y="{_HEIGHT + 15}" font-size="11" text-anchor="end">{edges[-1]:.3f}</text>'
    return f'<svg width="{_WIDTH}" height="{_HEIGHT + 40}">{bars}{label}</svg>'


def _examples(results: Results) -> Iterator[str]:
    """The prompts whose images have the highest and the lowest CLIP-I."""
    order = np.argsort(-results.scores.clip_i.mean(axis=1), kind="stable")
    best = order[: min(_EXAMPLES, (len(order) + 1) // 2)]
    worst = order[len(best) :][::-1][:_EXAMPLES]  # no prompt is both
    yield "<h2>Best image prompts by CLIP-I</h2><p>Each line shows the image prompt, then its images.</p>"
    yield from (_example(results, int(index)) for index in best)
    if len(worst):
        yield "<h2>Worst image prompts by CLIP-I</h2>"
        yield from (_example(results, int(index)) for index in worst)


def _example(results: Results, index: int) -> str:
    reference, paths = results.references[index], results.images[index][:_SHOWN]
    scores = ", ".join(
        f"{METRIC_TITLES[name]} {values[index]:.3f}" for name, values in results.scores.prompt_means().items()
    )
    caption = escape(f"{reference.name}: {reference.captions[0]} ({scores})")
    images = "".join(_inline(load_image(path)) for path in paths)
    return f"<figure>{_inline(reference.image())} &nbsp; {images}<figcaption>{caption}</figcaption></figure>"


def _inline(image: Image.Image) -> str:
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    with io.BytesIO() as file:
        image.save(file, "JPEG", quality=80)
        content = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{content}" alt="">'
