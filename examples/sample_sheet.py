"""A contact sheet that shows the effect of an image prompt, with the bundled model mini: `make sample`.

    python -m examples.sample_sheet
    python -m examples.sample_sheet --image mine.jpg --prompt "a red circle" --out out/mine.png

Top: the reference image as the image encoder sees it, and four images with it as prompt. Bottom: one seed while the
scale of the image prompt goes from 0 (the model without an adapter) to 1.
"""

import io
import sys
from pathlib import Path
from typing import Annotated

import tqdm
import tyro
from PIL import Image

from ipadapter_jax import InputError, StableDiffusion
from ipadapter_jax.images.contact_sheet import LabeledImages, contact_sheet
from ipadapter_jax.images.preprocess import clip_pixels, load_image
from ipadapter_jax.pipelines.ip_adapter import encoders_of
from ipadapter_jax.storage.atomic_files import check_writable, write_atomically
from ipadapter_jax.weights.bundled import REFERENCE

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
RESULTS = 4
STEPS = 30
WHAT_TO_SEE = (
    "What to look for: above, the reference's colors, shape, texture and background in every image; "
    "below, whether they come as the scale rises."
)


def main(
    image: Annotated[Path, tyro.conf.arg(help="the image prompt; its center is used")] = REFERENCE,
    prompt: Annotated[str, tyro.conf.arg(help="text prompt; empty for the image prompt alone")] = "",
    seed: Annotated[int, tyro.conf.arg(help="of the first image; the others count on")] = 0,
    out: Annotated[Path, tyro.conf.arg(help="the PNG to write")] = Path("out/sample.png"),
) -> int:
    """Writes the sheet and returns the exit code: 2, with one line on standard error, for what cannot be used."""
    try:
        if out.suffix.lower() != ".png":
            raise InputError(f"--out {out}: give a name that ends in .png")
        check_writable(out)
        above, below = sample(load_image(image), prompt, seed)
        description = f'the image and the words "{prompt}"' if prompt else "the image alone, no words"
        titles = (
            f"The prompt: {description}; scale 1",
            f"The same prompt, seed {seed}, the scale of the image from 0 to 1",
        )
        buffer = io.BytesIO()
        contact_sheet(dict(zip(titles, (above, below), strict=True)), WHAT_TO_SEE).save(buffer, "PNG")
        write_atomically(out, buffer.getvalue())
    except InputError as error:
        print(f"sample_sheet: {error}", file=sys.stderr)
        return 2
    print(f"{out}\n{WHAT_TO_SEE}")
    return 0


def sample(reference: Image.Image, prompt: str, seed: int) -> tuple[LabeledImages, LabeledImages]:
    """The row of results and that of scales. One image a call: scales and seeds are data, so that the first call
    compiles and the others run."""
    pipe = StableDiffusion.from_pretrained("mini").with_ip_adapter("mini")

    def generate(scale: float, number: int) -> Image.Image:
        return pipe(
            prompt,
            ip_adapter_image=reference,
            ip_adapter_scale=scale,
            num_inference_steps=STEPS,
            seed=seed + number,
            progress_bar=False,
        )[0]

    wanted = [(1.0, number) for number in range(RESULTS)] + [(scale, 0) for scale in SCALES if scale != 1]
    bar = tqdm.tqdm(wanted, desc="compiling, then sampling", unit="image", disable=None)
    images = {which: generate(*which) for which in bar}
    seen = Image.fromarray(clip_pixels(reference, encoders_of(pipe.adapters)[0].module.config.image_size))
    results = [(f"seed {seed + number}", images[1.0, number]) for number in range(RESULTS)]
    return [("reference", seen), *results], [(f"scale {scale:g}", images[scale, 0]) for scale in SCALES]


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
