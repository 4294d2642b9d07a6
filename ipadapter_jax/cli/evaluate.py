"""`ipadapter-jax evaluate`: what it is told."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from ipadapter_jax.cli.batch_options import HELP_JOB, BatchOptions
from ipadapter_jax.cli.option_types import Positional
from ipadapter_jax.cli.options import HELP_IMAGE_PROMPT, HELP_MODEL, HELP_SAMPLING, refuse
from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.protocol import SCORER, Choice
from ipadapter_jax.storage.paths import PathOrHubId
from ipadapter_jax.weights import bundled


@dataclasses.dataclass(kw_only=True)
class Evaluate(BatchOptions):
    """Makes images from image prompts as the paper does (empty text, 4 each, 50 steps of DDIM, guidance 7.5) and
    scores them: CLIP-I, CLIP-T, diversity, CLIP-FID. With --images-from it scores what other programs have made.

    The same command goes on after any stop, kill -9 included, and ends with the same numbers.
    """

    data: Positional[Path]
    """captions_val2017.json of COCO, or data as for training: a folder, a JSON list, Parquet, tar or ArrayRecord."""
    out: Path
    """The folder for images/ (always kept), scores/ (embeddings), report.html, evaluation.json and the tables prompts
    and images, each as .csv and .parquet."""
    image_root: Path | None = None
    """The folder of the images that a JSON file names; by default its own. For COCO: val2017."""
    image_column: str | None = None
    """For Parquet and TensorFlow Datasets, where the name is not a usual one."""
    text_column: str | None = None
    """The same for the captions."""
    limit: int | None = None
    """Only the first so many image prompts."""
    num_images: int = 4
    """Images of each image prompt."""
    with_caption: bool = False
    """Give the first caption as text prompt, too; the paper leaves the text empty."""
    images_from: Path | None = None
    """Score these images and make none: a folder (name.png, or name-0.png and so on, where the image prompt is
    name.jpg) or a CSV file with the columns name and image."""
    clip: PathOrHubId = SCORER
    """The CLIP that scores: a folder or a Hub id of a whole CLIPModel of transformers."""
    caption: Choice = "first"
    """Which of several captions CLIP-T takes."""
    caption_prefix: str = ""
    """Put before each caption when it is scored; CLIPScore's authors take "A photo depicts "."""
    fid_features: tuple[Path, Path] | None = None
    """Two .npy or .safetensors files with Inception's features (N, F) of real and of made images: adds their FID."""

    help_groups: ClassVar = {
        "what to score": ("data", "out", "adapter", "images_from", "limit", "num_images", "with_caption"),
        "data": ("image_root", "image_column", "text_column"),
        "scores": ("clip", "caption", "caption_prefix", "fid_features"),
        "image prompt": tuple(name for name in HELP_IMAGE_PROMPT if name != "adapter"),
        "sampling": ("seed", "height", "width", "negative_prompt", *HELP_SAMPLING),
        "model": HELP_MODEL,
        "the job": HELP_JOB,
    }

    def __post_init__(self) -> None:
        if self.model == bundled.NAME and self.images_from is None and self.adapter is None:
            self.adapter = bundled.NAME

    def check(self) -> None:
        """Raises InputError for what can be told from the words alone."""
        super().check()
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit} must be at least 1")
        source, out = self.data.absolute(), self.out.absolute()
        if source == out or source in out.parents:
            raise InputError(f"--out {self.out} lies in {self.data}, whose images are prompts; give another folder")
        if self.images_from is not None:
            painting = [
                field.name for field in dataclasses.fields(BatchOptions) if field.name not in ("process", "processes")
            ]
            refuse(self, (*painting, "with_caption"), "on the images of --images-from", "leave --images-from out")
        elif self.adapter is None:
            raise InputError(
                "name the IP-Adapter to evaluate with --adapter, or images of another program with --images-from"
            )
