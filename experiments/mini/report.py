"""Writes docs/results.md: the measurements on mini as tables, plots and images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.mini.attribute_classifier import ATTRIBUTES
from experiments.mini.claims import BOTH, GUESS, Claim, Measured, bars, claims, number, percent
from experiments.mini.figures import curves, sheet
from experiments.mini.metrics import DRAWS, SEED, Values, interval, share
from experiments.mini.network_report import PROBES, Distances
from experiments.mini.rows import (
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
    PHOTOGRAPHS,
    PLUS,
    SCALES,
    SIMPLE,
    TEXT,
    Row,
)
from experiments.mini.test_scenes import photograph, prompt
from experiments.mini.trainings import drops
from ipadapter_jax.storage.atomic_files import write_atomically

NAMES = {
    CHANCE: "no image, no text",
    TEXT: "text only: the image's caption",
    SIMPLE: "simple adapter (tokens appended)",
    DECOUPLED: "decoupled, base (4 tokens)",
    PLUS: "decoupled, plus (16 tokens)",
    FULL: "full fine-tuning",
    MINI: "mini's own base adapter",
    MINI_PLUS: "mini's own plus adapter",
}
SHOWN = 6  # number of prompts in the contact sheets
_SCORES = ("CLIP-I", "CLIP-T", "diversity, RMSE", "diversity, CLIP")


class Setting(NamedTuple):
    """The settings that the numbers depend on."""

    base_digest: str
    prompts: int
    sampling_steps: int
    compared_steps: int  # training steps of the models that are compared
    shipped_steps: Mapping[str, int]  # training steps of the adapters in the package
    batch_size: int
    scenes: int
    seed: int  # of all training runs
    versions: str


class Networks(NamedTuple):
    """The measures of network_report.py."""

    psnr: Mapping[str, np.ndarray]  # of the VAE, by the kind of image
    probes: Values
    photographs: Mapping[str, Distances]  # by the prompt that generated images are compared with


class Report:
    """Writes the report to `path`, and its images to a folder of the same name next to it."""

    def __init__(self, path: Path, setting: Setting, measured: Measured, images: Mapping[Row, np.ndarray]):
        """images: by row, PHOTOGRAPHS included, those of the first SHOWN prompts, (SHOWN, COUNT, 64, 64, 3)."""
        self._path, self._setting, self._images = path, setting, images
        self._measured, self._rows = measured, measured.rows

    def write(self, networks: Networks) -> None:
        parts = [
            self._head(),
            _claims("## The paper's claims", claims(self._measured)),
            _claims("## Thresholds of this project for its own adapter", bars(self._measured)),
            self._main(),
            self._scale(),
            self._other_shape(),
            self._inked(),
            self._drops(),
            self._photographs(networks.photographs),
            self._networks(networks),
        ]
        write_atomically(self._path, ("\n\n".join(parts) + "\n").encode())

    def _head(self) -> str:
        s = self._setting
        shipped = ", ".join(f"{name} {count:,}" for name, count in s.shipped_steps.items())
        return f"""# Results on mini

`python -m experiments.mini.reproduce --out OUT --prompts {s.prompts} --sampling-steps {s.sampling_steps}
--steps {s.compared_steps} --scenes {s.scenes} --batch-size {s.batch_size}` writes this file; no
number is typed by hand.

The paper's experiments, on the bundled model mini. The image prompts are scenes 0 to {s.prompts - 1} of the split
`held_out`, each with one object: combinations of shape, color and texture that no network was trained on. For prompt i,
every row of the tables has {COUNT} images with the seeds {COUNT} i to {COUNT} i + {COUNT - 1}. They are generated with
{s.sampling_steps} steps of DDIM at guidance {MINI.guidance:g} unless stated otherwise.

Brackets give 95 % intervals over prompts: a bootstrap with {DRAWS:,} resamples and seed {SEED}, and Clopper and
Pearson's interval for fractions that are all 0 or 100 %. Intervals of differences are paired. They describe
these weights: each training was done once, and they do not include the effect of another seed or learning rate. Columns
have the attribute names of the data set (`colour`).

- CLIP-I, CLIP-T: cosine similarity of an image's embedding with that of the image prompt, and of its caption, by mini's
  CLIP. The adapters use the same image encoder
- agreement: the percentage of images whose attribute is that of the image prompt, as
  `experiments/mini/attribute_classifier.py` reads it without any network; all three: color, shape and background
- diversity of the {COUNT} images of a prompt: mean RMSE of pixels in [0, 1], and mean 1 - cosine of embeddings
- training: seed {s.seed}, {s.compared_steps:,} steps of {s.batch_size} samples out of {s.scenes:,} of the split
  `train`; the adapters in the package: {shipped} steps
- weights of the base model: sha256 `{s.base_digest[:16]}`; {s.versions}"""

    def _main(self) -> str:
        rows = [(name, self._rows[row]) for row, name in NAMES.items()]
        guess = " | ".join(f"{100 * GUESS[name]:.1f}" for name in ATTRIBUTES)
        agreement = _table(rows, (*ATTRIBUTES, "all three", "one object"))
        self._sheet("rows", NAMES)
        return "\n\n".join(
            [
                "## Image prompts",
                "Every row except the text's has an empty text prompt. The simple adapter, the decoupled adapter and "
                f"full fine-tuning were trained in the same way, for {self._setting.compared_steps:,} steps: the same "
                "samples in the same order, the same noise, optimizer and drop rates. Simple: image tokens are "
                "appended to the text tokens, with frozen attention layers. Full: image tokens replace the text "
                "tokens, and the whole UNet is trained.",
                _table(rows, _SCORES),
                f"{agreement}\n| random guess | {guess} | | |",
                "The first image of some of the prompts:",
                self._image("rows"),
            ]
        )

    def _scale(self) -> str:
        names = ("background", "colour", "shape", "texture", "all three")
        self._by_scale("scale", BY_SCALE, names, "agreement with the image prompt, %")
        rows = [(f"scale {row.scale:g}", self._rows[row]) for row in BY_SCALE]
        self._sheet("scale-images", {row: f"scale {row.scale:g}" for row in BY_SCALE})
        return "\n\n".join(
            [
                "## The scale of the image prompt",
                "mini's base adapter, empty text.",
                _table(rows, (*names, "CLIP-I")),
                self._image("scale"),
                self._image("scale-images"),
            ]
        )

    def _other_shape(self) -> str:
        names = ("colour", "texture", "background", "shape", "asked shape", "asked shape and colour")
        self._by_scale("other-shape", OTHER_SHAPE, names, "percentage of the images", bar=BOTH)
        rows = [(f"scale {row.scale:g}", self._rows[row]) for row in OTHER_SHAPE]
        words = [prompt(index).other_caption for index in range(self._shown)]
        self._sheet("other-shape-images", {row: f"scale {row.scale:g}" for row in OTHER_SHAPE}, words)
        return "\n\n".join(
            [
                "## Image prompts with a text that asks for another shape",
                'mini\'s base adapter; the text is "a" and the name of a shape that the image does not have.',
                _table(rows, names),
                self._image("other-shape"),
                self._image("other-shape-images"),
            ]
        )

    def _inked(self) -> str:
        names = {INKED_TEXT: "inked model, caption", INKED: "inked model, mini's adapter", MINI: "mini, its adapter"}
        self._sheet("inked", names)
        rows = [(name, self._rows[row]) for row, name in names.items()]
        rows.append(("the scenes themselves, in ink", self._measured.judged["renders in ink"]))
        return "\n\n".join(
            [
                "## The same adapter with another base model",
                f"The UNet was fine-tuned by `ipadapter-jax train`, for {self._setting.compared_steps:,} steps, on "
                "scenes whose objects have an outline of black ink, or of white chalk on a black background. Ink: the "
                "percentage of nearly black pixels, or of nearly white ones if the image prompt's background is "
                "black; 0 for an image with another background than its prompt.",
                _table(rows, ("ink", *ATTRIBUTES, "all three")),
                self._image("inked"),
            ]
        )

    def _drops(self) -> str:
        lines, plots = [], {}
        for name, rows in BY_DROP.items():
            lines += [(f"{name}, guidance {row.guidance:g}", self._rows[row]) for row in rows]
            measures = ("colour", "shape", "all three")
            plots[name] = {measure: [self._rows[row][measure] for row in rows] for measure in measures}
        self._save("drops", curves(GUIDANCES, plots, "guidance", "agreement with the image prompt, %"))
        return "\n\n".join(
            [
                "## Drop rates in training, and guidance",
                "The percentage of training samples without the image, without the text, and without both:",
                "\n".join(f"- {name}: " + ", ".join(f"{100 * part:g} %" for part in drops(name)) for name in BY_DROP),
                _table(lines, ("colour", "shape", "background", "all three", "diversity, RMSE")),
                self._image("drops"),
            ]
        )

    def _photographs(self, distances: Mapping[str, Distances]) -> str:
        painted = self._images[PHOTOGRAPHS]
        shown = {"image prompt": np.stack([photograph(index).pixels for index in range(self._shown)])}
        shown |= {f"image {number + 1}": painted[: self._shown, number] for number in range(COUNT)}
        self._save("photographs", sheet(shown))
        lines = [f"| {name} | " + " | ".join(number(interval(x)) for x in found) for name, found in distances.items()]
        head = "| | mean colour (RMSE) | strength of detail (octaves) | 1 - CLIP-I |\n|---|---|---|---|"
        return "\n\n".join(
            [
                "## Photographs as image prompts",
                f"mini's base adapter, empty text, {self._setting.prompts} crops of the photographs that are in the "
                "training data. The distance of the generated images from their own prompt, and from the next one:",
                "\n".join([head, *(f"{line} |" for line in lines)]),
                self._image("photographs"),
            ]
        )

    def _networks(self, networks: Networks) -> str:
        table = _table(list(self._measured.judged.items()), ATTRIBUTES)
        noise = [f"- {name}: {number(interval(values))} dB" for name, values in networks.psnr.items()]
        return "\n\n".join(
            [
                "## The attribute classifier, and mini's networks",
                f"The classifier's agreement on images that show the image prompts:\n\n{table}",
                "PSNR of the VAE's reconstructions:\n\n" + "\n".join(noise),
                f"Linear classifiers of the CLIP image embedding, fitted on {PROBES:,} scenes of the split `train`, "
                "are correct for these percentages of the image prompts: "
                + ", ".join(f"{name} {percent(share(values))}" for name, values in networks.probes.items()),
            ]
        )

    @property
    def _shown(self) -> int:
        return min(SHOWN, self._setting.prompts)

    def _by_scale(self, name: str, rows: Sequence[Row], measures: Sequence[str], y: str, bar: float | None = None):
        lines = {measure: [self._rows[row][measure] for row in rows] for measure in measures}
        self._save(name, curves(SCALES, {"": lines}, "scale of the image prompt", y, bar))

    def _sheet(self, name: str, rows: Mapping[Row, str], words: Sequence[str] | None = None) -> None:
        """A contact sheet with a line for each of the first prompts: the image prompt, then an image of each row."""
        columns = {"image prompt": np.stack([prompt(index).pixels for index in range(self._shown)])}
        columns |= {name.split(" (")[0]: self._images[row][: self._shown, 0] for row, name in rows.items()}
        self._save(name, sheet(columns, words))

    def _save(self, name: str, content: bytes) -> None:
        write_atomically(self._path.with_suffix("") / f"{name}.png", content)

    def _image(self, name: str) -> str:
        return f"![{name.replace('-', ' ')}]({self._path.stem}/{name}.png)"


def _claims(title: str, found: Sequence[Claim]) -> str:
    return "\n".join(
        [title, "", "| claim | verdict | numbers |\n|---|---|---|", *(f"| {' | '.join(c)} |" for c in found)]
    )


def _table(rows: Sequence[tuple[str, Values]], names: Sequence[str]) -> str:
    """A Markdown table with a line for each row. Fractions are in %, the values of _SCORES are not."""

    def shown(key: str, values: np.ndarray) -> str:
        return number(interval(values)) if key in _SCORES else percent(share(values)).replace(" %", "")

    lines = [" | ".join([f"| {name}", *(shown(key, values[key]) for key in names)]) + " |" for name, values in rows]
    return "\n".join(["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|", *lines])
