"""Figures: images in rows with labels, and heat over an image."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

LINE, GAP = 24, 8  # pixels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

LabeledImages = Sequence[tuple[str, Image.Image]]
"""Images of one size, each with its label."""


def contact_sheet(rows: Mapping[str, LabeledImages], note: str = "", side: int = 256) -> Image.Image:
    """The rows, each under its title, with a note below; every image fitted into `side` by what the last one then has
    in height. Text that is wider than its place is cut."""
    *_, (_, last) = (cell for row in rows.values() for cell in row)
    width, height = side, round(side * last.height / last.width)
    columns, block = max(map(len, rows.values())), 2 * LINE + height + GAP
    canvas = Image.new("RGB", (GAP + columns * (width + GAP), len(rows) * block + (LINE + GAP if note else 0)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for number, (title, row) in enumerate(rows.items()):
        top = number * block
        title = _cut(title, font, canvas.width - 2 * GAP)
        draw.text((GAP, top + LINE / 2), title, "black", font, anchor="lm")
        for column, (label, cell) in enumerate(row):
            left = GAP + column * (width + GAP)
            draw.text((left, top + 1.5 * LINE), _cut(label, font, width), "black", font, anchor="lm")
            canvas.paste(ImageOps.contain(cell, (width, height), Image.Resampling.BICUBIC), (left, top + 2 * LINE))
    note = _cut(note, font, canvas.width - 2 * GAP)
    draw.text((GAP, len(rows) * block + LINE / 2), note, "black", font, anchor="lm")
    return canvas


def _cut(text: str, font: Font, width: float) -> str:
    """The beginning of a text, on one line, that is not wider."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text} ...") > width:
        text = text[:-1]
    return f"{text.rstrip()} ..."


def overlay_heatmap(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image in grey under its heat (H, W): from blue, the least of the map, over white to red, the most."""
    low, high = float(heat.min()), float(heat.max())
    share = (heat - low) / (high - low) if high > low else np.full_like(heat, 0.5)
    cold, warm = np.clip(1 - 2 * share, 0, 1), np.clip(2 * share - 1, 0, 1)
    colour = np.stack([1 - cold, 1 - np.maximum(cold, warm), 1 - warm], axis=-1)
    grey = np.asarray(image.convert("L"), np.float32)[:, :, None] / 255
    return Image.fromarray(np.uint8(np.rint(255 * (0.35 + 0.65 * grey) * colour)))
