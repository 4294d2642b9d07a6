"""The paper's evaluation (arXiv 2308.06721, section 4.2.1 and Table 1), and how an evaluation deviates from it."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

CaptionChoice = Literal["first", "all", "best"]  # of several captions
SCORER = "openai/clip-vit-large-patch14"
PROMPTS, IMAGES = 5000, 4  # image prompts, and images of each
DATA = "captions_val2017.json"
PAPER_SETTINGS = {"scheduler": "ddim", "steps": 50, "guidance_scale": 7.5, "scale": 1.0}
# Settings that the paper does not mention, which readers expect to be at their defaults.
DEFAULT_SETTINGS = {
    "negative_prompt": "",
    "negative_image": None,
    "uncond": "default",
    "reference_resize": "crop",
    "layer_scales": "linear",
    "scale_start": 0.0,
    "scale_end": 1.0,
    "scale_steps": [1.0],
    "guidance_rescale": 0.0,
    "clip_skip": 0,
    "eta": 0.0,
}


class PublishedMethod(NamedTuple):
    """A method of the paper's Table 1, with its scores."""

    method: str
    kind: str
    clip_t: float
    clip_i: float


PUBLISHED = (
    PublishedMethod("Open unCLIP", "trained from scratch", 0.608, 0.858),
    PublishedMethod("Kandinsky-2-1", "trained from scratch", 0.599, 0.855),
    PublishedMethod("Versatile Diffusion", "trained from scratch", 0.587, 0.830),
    PublishedMethod("SD Image Variations", "fine-tuned", 0.548, 0.760),
    PublishedMethod("SD unCLIP", "fine-tuned", 0.584, 0.810),
    PublishedMethod("Uni-ControlNet (Global)", "adapter", 0.506, 0.736),
    PublishedMethod("T2I-Adapter (Style)", "adapter", 0.485, 0.648),
    PublishedMethod("ControlNet Shuffle", "adapter", 0.421, 0.616),
    PublishedMethod("IP-Adapter", "adapter", 0.588, 0.828),
)


def protocol_deviations(
    *, data: Mapping[str, object], images: int, is_reference: bool, prefix: str, made: Mapping[str, object] | None
) -> list[str]:
    """One line for each deviation from the paper's protocol.

    data: `References.identity`. images: per image prompt. is_reference: whether the scoring CLIP is the paper's.
    prefix: of the scored captions. made: the recorded settings of the sampler, and whether the text prompt was the
    caption ("with_caption"); None if they are not known.
    """
    found = []
    if not is_reference:
        found.append("the scoring CLIP is not OpenAI's ViT-L/14")
    if data.get("file") != DATA or data["prompts"] != PROMPTS:
        found.append(f"{data['prompts']:,} image prompts of another data set or of a part of it, not COCO 2017 val")
    if images != IMAGES:
        found.append(f"images of each image prompt: {images}, not {IMAGES}")
    if prefix:
        found.append(f"captions were scored with the prefix {prefix!r}")
    if made is None:
        return [*found, "how the images were made is not known here"]
    for name, value in (PAPER_SETTINGS | DEFAULT_SETTINGS).items():
        if made.get(name) != value:
            found.append(f"{name.replace('_', ' ')}: {made.get(name)}, not {value if value != '' else 'empty'}")
    if made.get("with_caption"):
        found.append("the text prompt was the caption, not empty")
    elif "with_caption" not in made:
        found.append("whether the text prompts were empty is not known here")
    return found
