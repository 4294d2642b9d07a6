"""docs/results.md: the laboratory's numbers as tables, plots and pictures. Nobody writes there by hand."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from judge import ATTRIBUTES
from lab_claims import BOTH, Measured, bars, claims, number
from lab_measures import DRAWS, SEED, Values, interval
from lab_rows import (
    BY_DROP,
    BY_SCALE,
    CHANCE,
    COUNT,
    DECOUPLED,
    FULL,
    GUIDANCES,
    INKED,
    INKED_TEXT,
    MINI,
    MINI_PLUS,
    OTHER_SHAPE,
    PLUS,
    SCALES,
    SIMPLE,
    TEXT,
    Row,
)
from lab_scenes import prompt
from lab_trainings import drops
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ipadapter_jax.files import write_whole

NAMES = {
    CHANCE: "no image, no text (chance)",
    TEXT: "text only: the image's caption",
    SIMPLE: "simple adapter (tokens appended)",
    DECOUPLED: "decoupled, base (4 tokens)",
    PLUS: "decoupled, plus (16 tokens)",
    FULL: "full fine-tuning",
    MINI: "mini's own base adapter",
    MINI_PLUS: "mini's own plus adapter",
}
SHOWN = 6  # prompts of the sheets of pictures
_SCORES = ("CLIP-I", "CLIP-T", "diversity, RMSE", "diversity, CLIP")


class Setting(NamedTuple):
    """What the numbers depend on."""

    command: str
    base_digest: str
    prompts: int
    sweep_prompts: int
    sampling_steps: int
    compared_steps: int  # of training, of all that is compared
    shipped_steps: Mapping[str, int]  # of the adapters that come with the model
    batch_size: int
    scenes: int
    versions: str


class Report:
    """Writes `path` and the folder of pictures beside it."""

    def __init__(self, path: Path, setting: Setting, measured: Measured, pictures: Mapping[Row, np.ndarray]):
        self._path, self._setting, self._pictures = path, setting, pictures
        self._measured, self._rows = measured, measured.rows

    def write(self, judged: Mapping[str, Values]) -> None:
        """`judged`: what the judge says of pictures that show the prompts exactly, by how these were made."""
        parts = [
            self._head(),
            self._table_of_claims(),
            self._judge(judged),
            self._main(),
            self._scale(),
            self._other_shape(),
            self._inked(),
            self._drops(),
        ]
        write_whole(self._path, ("\n\n".join(parts) + "\n").encode())

    def _head(self) -> str:
        s = self._setting
        shipped = ", ".join(f"{name} {count:,}" for name, count in s.shipped_steps.items())
        return f"""# Results on mini

Written by `{s.command}`, which goes on where it was stopped; nothing here is typed by hand.

The paper's experiments, on the model inside this package. Image prompts are scenes 0 to {s.prompts - 1} of the split
`held_out`, drawn with one object: combinations of shape, colour and texture that no network has learnt from. Each is
painted {COUNT} times, in every row with the seeds {COUNT} i to {COUNT} i + {COUNT - 1} for prompt i, by
{s.sampling_steps} steps of DDIM at guidance {MINI.guidance:g} where nothing else is said. Sweeps use prompts 0 to
{s.sweep_prompts - 1}. In brackets: 95 % bootstrap intervals over prompts ({DRAWS:,} draws, seed {SEED}); those of
differences are paired.

- CLIP-I, CLIP-T: cosine of a picture's embedding with that of the image prompt, and of its caption, by mini's CLIP
- agreement: the share of pictures, in %, whose attribute, as `scripts/judge.py` reads it, is that of the image prompt
- diversity among the {COUNT} pictures of a prompt: mean RMSE of pixels in [0, 1], and mean 1 - cosine of embeddings
- training: seed 0, {s.compared_steps:,} steps of {s.batch_size} samples out of {s.scenes:,} of the split `train`; the
  adapters that come with mini: {shipped} steps
- weights of the base model: sha256 `{s.base_digest[:16]}`; {s.versions}"""

    def _table_of_claims(self) -> str:
        parts = {
            "## The paper's claims": claims(self._measured),
            "## What this project wants of its own adapter": bars(self._rows),
        }
        head = "| claim | | numbers |\n|---|---|---|"
        lines = {title: [f"| {' | '.join(claim)} |" for claim in found] for title, found in parts.items()}
        return "\n\n".join("\n".join([title, "", head, *found]) for title, found in lines.items())

    def _judge(self, judged: Mapping[str, Values]) -> str:
        table = _table([(name, values) for name, values in judged.items()], ATTRIBUTES)
        return f"## The judge\n\nIts agreement on pictures that show the image prompts:\n\n{table}"

    def _main(self) -> str:
        rows = [(name, self._rows[row]) for row, name in NAMES.items()]
        self._sheet("rows", NAMES)
        return "\n\n".join(
            [
                "## Image prompts",
                "Every row but the text's has an empty text prompt. Simple adapter, decoupled and full fine-tuning "
                f"were trained alike, for {self._setting.compared_steps:,} steps: the same samples in the same order, "
                "the same noise, optimiser and drop rates. Simple: image tokens appended to the text's, attention "
                "frozen. Full: image tokens in place of the text's, and the whole UNet learns.",
                _table(rows, _SCORES),
                _table(rows, (*ATTRIBUTES, "all three", "one object")),
                "All three: colour, shape and background. The first picture of each of some prompts:",
                self._image("rows"),
            ]
        )

    def _scale(self) -> str:
        names = ("background", "colour", "shape", "texture", "all three")
        self._curves("scale", BY_SCALE, names, "agreement with the image prompt")
        rows = [(f"scale {row.scale:g}", self._rows[row]) for row in BY_SCALE]
        self._sheet("scale-pictures", {row: f"scale {row.scale:g}" for row in BY_SCALE})
        return "\n\n".join(
            [
                "## The scale of the image prompt",
                "mini's base adapter, empty text.",
                _table(self._first(rows), (*names, "CLIP-I")),
                self._image("scale"),
                self._image("scale-pictures"),
            ]
        )

    def _other_shape(self) -> str:
        names = ("colour", "texture", "background", "shape", "asked shape", "asked shape and colour")
        self._curves("other-shape", OTHER_SHAPE, names, "share of the pictures", bar=BOTH)
        rows = [(f"scale {row.scale:g}", self._rows[row]) for row in OTHER_SHAPE]
        self._sheet("other-shape-pictures", {row: f"scale {row.scale:g}" for row in OTHER_SHAPE}, with_text=True)
        return "\n\n".join(
            [
                "## An image and a text that asks for another shape",
                'mini\'s base adapter; the text is "a" and the name of a shape that the image does not have.',
                _table(rows, names),
                self._image("other-shape"),
                self._image("other-shape-pictures"),
            ]
        )

    def _inked(self) -> str:
        names = {INKED_TEXT: "inked model, caption", INKED: "inked model, mini's adapter", MINI: "mini, its adapter"}
        self._sheet("inked", names)
        rows = self._first([(name, self._rows[row]) for row, name in names.items()])
        return "\n\n".join(
            [
                "## Another model, the adapter unchanged",
                f"The UNet was fine-tuned by `ipadapter-jax train`, for {self._setting.compared_steps:,} steps, on "
                "scenes whose objects have an outline of black ink, on black of white chalk. Ink: the share of nearly "
                "black pixels, where the image prompt's background is black that of nearly white ones.",
                _table(rows, ("ink", *ATTRIBUTES)),
                self._image("inked"),
            ]
        )

    def _drops(self) -> str:
        figure, axes = _figure(len(BY_DROP), "guidance", "agreement with the image prompt")
        lines = []
        for ax, (name, rows) in zip(axes, BY_DROP.items(), strict=True):
            values = self._first([(f"{name}, guidance {row.guidance:g}", self._rows[row]) for row in rows])
            lines += values
            for measure in ("colour", "shape", "all three"):
                _curve(ax, GUIDANCES, [found[measure] for _, found in values], measure)
            ax.set_title(name, fontsize=9)
        axes[0].legend(fontsize=8)
        self._save("drops", figure)
        table = _table(lines, ("colour", "shape", "background", "all three", "diversity, RMSE"))
        return "\n\n".join(
            [
                "## What is dropped in training, and guidance",
                "The share of training samples that lose the image, the text and both:",
                "\n".join(f"- {name}: " + ", ".join(f"{100 * share:g} %" for share in drops(name)) for name in BY_DROP),
                table,
                self._image("drops"),
            ]
        )

    def _first(self, rows: Sequence[tuple[str, Values]]) -> list[tuple[str, Values]]:
        """The rows for the prompts of the sweeps."""
        count = self._setting.sweep_prompts
        return [(name, {key: array[:count] for key, array in values.items()}) for name, values in rows]

    def _curves(self, name: str, rows: Sequence[Row], measures: Sequence[str], label: str, bar: float | None = None):
        figure, (ax,) = _figure(1, "scale of the image prompt", label)
        for measure in measures:
            _curve(ax, SCALES, [self._rows[row][measure][: self._setting.sweep_prompts] for row in rows], measure)
        if bar is not None:
            ax.axhline(bar, color="grey", linestyle=":", linewidth=1)
        ax.legend(fontsize=8)
        self._save(name, figure)

    def _sheet(self, name: str, rows: Mapping[Row, str], *, with_text: bool = False) -> None:
        """The reference and the first picture of each row, a line for each of the first prompts."""
        count = min(SHOWN, self._setting.sweep_prompts)
        given = [prompt(index) for index in range(count)]
        columns = [np.stack([one.pixels for one in given])] + [self._pictures[row][:count, 0] for row in rows]
        sheet = np.concatenate([np.concatenate(list(column)) for column in columns], axis=1)
        side = columns[0].shape[2]
        figure = Figure(figsize=(1.25 * len(columns) + 0.9 * with_text, 1.25 * count + 0.5), layout="constrained")
        ax = figure.add_subplot()
        ax.imshow(sheet, interpolation="nearest")
        labels = ["image prompt", *(textwrap.fill(label.split(" (")[0], 14) for label in rows.values())]
        ax.set_xticks([side * (i + 0.5) for i in range(len(columns))], labels, fontsize=7)
        ax.xaxis.tick_top()
        words = [one.other_caption if with_text else "" for one in given]
        ax.set_yticks([side * (i + 0.5) for i in range(count)], words, fontsize=8)
        ax.tick_params(length=0)
        self._save(name, figure)

    def _save(self, name: str, figure: Figure) -> None:
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
            write_whole(self._path.with_suffix("") / f"{name}.png", file.getvalue())

    def _image(self, name: str) -> str:
        return f"![{name.replace('-', ' ')}]({self._path.stem}/{name}.png)"


def _table(rows: Sequence[tuple[str, Values]], names: Sequence[str]) -> str:
    """A line for each row; shares in %, scores and distances (_SCORES) as they are."""

    def shown(key: str, values: np.ndarray) -> str:
        found = interval(values)
        if key in _SCORES:
            return number(found)
        return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"

    lines = [" | ".join([f"| {name}", *(shown(key, values[key]) for key in names)]) + " |" for name, values in rows]
    return "\n".join(["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|", *lines])


def _figure(count: int, x: str, y: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 if count == 1 else 2.6 * count, 3.4), layout="constrained")
    axes = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for ax in axes:
        ax.set(xlabel=x, ylim=(-0.02, 1.02))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(y)
    return figure, axes


def _curve(ax: Axes, x: Sequence[float], values: Sequence[np.ndarray], label: str) -> None:
    found = [interval(array) for array in values]
    means, low, high = (np.array([getattr(one, part) for one in found]) for part in ("mean", "low", "high"))
    (line,) = ax.plot(x, means, marker="o", markersize=3, label=label)
    ax.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
