"""Options of `ipadapter-jax evaluate`."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from ipadapter_jax.cli.batch_options import JOB_OPTIONS, BatchOptions
from ipadapter_jax.cli.option_types import Positional
from ipadapter_jax.cli.options import IMAGE_PROMPT_OPTIONS, MODEL_OPTIONS, SAMPLING_OPTIONS, refuse
from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.protocol import SCORER, CaptionChoice
from ipadapter_jax.storage.paths import PathOrHubId
from ipadapter_jax.weights import bundled


@dataclasses.dataclass(kw_only=True)
class Evaluate(BatchOptions):
    """Generates images from image prompts by the paper's protocol (empty text prompt, 4 images per image prompt, 50
    DDIM steps, guidance scale 7.5) and computes CLIP-I, CLIP-T, diversity and CLIP-FID. With --images-from it scores
    images that other programs have made.

    Rerun the same command to resume after any interruption, kill -9 included: it ends with the same numbers.
    """

    data: Positional[Path]
    """Image prompts with captions: captions_val2017.json of COCO, or data as for training (a folder, a JSON list,
    Parquet, tar or ArrayRecord)."""
    out: Path
    """Folder to write: images/, scores/ (embeddings), report.html, evaluation.json, and the tables prompts and
    pictures, each as .csv and .parquet."""
    image_root: Path | None = None
    """Folder that the file names of a JSON file are relative to; by default the file's own. For COCO: val2017."""
    image_column: str | None = None
    """Column of the images in Parquet and TensorFlow Datasets, if its name is not a usual one."""
    text_column: str | None = None
    """Column of the captions, as --image-column."""
    limit: int | None = None
    """Number of image prompts to use, the first ones; by default all."""
    num_images: int = 4
    """Number of images for each image prompt."""
    with_caption: bool = False
    """Use the first caption as text prompt; the paper's text prompt is empty."""
    images_from: Path | None = None
    """Score these images instead of generating any: a folder (name.png, or name-0.png and so on, for the image prompt
    name.jpg), or a CSV file with the columns name and image."""
    clip: PathOrHubId = SCORER
    """CLIP model that scores: a folder or Hub id of a complete CLIPModel of transformers."""
    caption: CaptionChoice = "first"
    """How CLIP-T uses several captions: the first, the mean score of all, or the best score."""
    caption_prefix: str = ""
    """Text to put before each caption when it is scored; the authors of CLIPScore use "A photo depicts "."""
    fid_features: tuple[Path, Path] | None = None
    """Two .npy or .safetensors files with Inception features (N, F) of real and of generated images: adds their
    FID."""

    help_groups: ClassVar = {
        "evaluation": ("data", "out", "adapter", "images_from", "limit", "num_images", "with_caption"),
        "data": ("image_root", "image_column", "text_column"),
        "scores": ("clip", "caption", "caption_prefix", "fid_features"),
        "image prompt": tuple(name for name in IMAGE_PROMPT_OPTIONS if name != "adapter"),
        "sampling": ("seed", "height", "width", "negative_prompt", *SAMPLING_OPTIONS),
        "model": MODEL_OPTIONS,
        "the job": JOB_OPTIONS,
    }

    def __post_init__(self) -> None:
        if self.model == bundled.NAME and self.images_from is None and self.adapter is None:
            self.adapter = bundled.NAME

    def check(self) -> None:
        """Raises InputError for options that are wrong on their own or together. Opens no file."""
        super().check()
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit} must be at least 1")
        source, out = self.data.absolute(), self.out.absolute()
        if source == out or source in out.parents:
            raise InputError(f"--out {self.out} is inside {self.data}, whose images are prompts; give another folder")
        if self.images_from is not None:
            generating = [
                field.name for field in dataclasses.fields(BatchOptions) if field.name not in ("process", "processes")
            ]
            refuse(self, (*generating, "with_caption"), "on the images of --images-from", "leave --images-from out")
        elif self.adapter is None:
            raise InputError(
                "name the IP-Adapter to evaluate with --adapter, or images of another program with --images-from"
            )
