"""Contact sheets (labeled images in rows), and heat maps over an image."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

LINE, GAP = 24, 8  # pixels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

LabeledImages = Sequence[tuple[str, Image.Image]]
"""Images of one size, each with its label."""


def contact_sheet(rows: Mapping[str, LabeledImages], note: str = "", side: int = 256) -> Image.Image:
    """An image of all rows, each under its title, with a note below.

    Every image is fitted into cells that are `side` wide and have the aspect ratio of the last image. Text that is
    wider than its cell is truncated.
    """
    *_, (_, last) = (cell for row in rows.values() for cell in row)
    width, height = side, round(side * last.height / last.width)
    columns, block = max(map(len, rows.values())), 2 * LINE + height + GAP
    canvas = Image.new("RGB", (GAP + columns * (width + GAP), len(rows) * block + (LINE + GAP if note else 0)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for number, (title, row) in enumerate(rows.items()):
        top = number * block
        title = _truncated(title, font, canvas.width - 2 * GAP)
        draw.text((GAP, top + LINE / 2), title, "black", font, anchor="lm")
        for column, (label, cell) in enumerate(row):
            left = GAP + column * (width + GAP)
            draw.text((left, top + 1.5 * LINE), _truncated(label, font, width), "black", font, anchor="lm")
            canvas.paste(ImageOps.contain(cell, (width, height), Image.Resampling.BICUBIC), (left, top + 2 * LINE))
    note = _truncated(note, font, canvas.width - 2 * GAP)
    draw.text((GAP, len(rows) * block + LINE / 2), note, "black", font, anchor="lm")
    return canvas


def _truncated(text: str, font: Font, width: float) -> str:
    """A text on one line, truncated to a width in pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text} ...") > width:
        text = text[:-1]
    return f"{text.rstrip()} ..."


def overlay_heatmap(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image in gray under its heat map (H, W): from blue, the minimum, over white to red, the maximum."""
    low, high = float(heat.min()), float(heat.max())
    fraction = (heat - low) / (high - low) if high > low else np.full_like(heat, 0.5)
    cold, warm = np.clip(1 - 2 * fraction, 0, 1), np.clip(2 * fraction - 1, 0, 1)
    color = np.stack([1 - cold, 1 - np.maximum(cold, warm), 1 - warm], axis=-1)
    gray = np.asarray(image.convert("L"), np.float32)[:, :, None] / 255
    return Image.fromarray(np.uint8(np.rint(255 * (0.35 + 0.65 * gray) * color)))
