"""The paper's evaluation (arXiv 2308.06721, section 4.2.1 and Table 1), and where a run departs from it."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Choice = Literal["first", "all", "best"]  # of several captions
SCORER = "openai/clip-vit-large-patch14"
PROMPTS, IMAGES = 5000, 4  # image prompts, and images of each
DATA = "captions_val2017.json"
SETTINGS = {"scheduler": "ddim", "steps": 50, "guidance_scale": 7.5, "scale": 1.0}
# What the paper says nothing of, and a reader would expect to be left alone.
PLAIN = {
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


class Row(NamedTuple):
    """A method of Table 1."""

    method: str
    kind: str
    clip_t: float
    clip_i: float


TABLE = (
    Row("Open unCLIP", "trained from scratch", 0.608, 0.858),
    Row("Kandinsky-2-1", "trained from scratch", 0.599, 0.855),
    Row("Versatile Diffusion", "trained from scratch", 0.587, 0.830),
    Row("SD Image Variations", "fine-tuned", 0.548, 0.760),
    Row("SD unCLIP", "fine-tuned", 0.584, 0.810),
    Row("Uni-ControlNet (Global)", "adapter", 0.506, 0.736),
    Row("T2I-Adapter (Style)", "adapter", 0.485, 0.648),
    Row("ControlNet Shuffle", "adapter", 0.421, 0.616),
    Row("IP-Adapter", "adapter", 0.588, 0.828),
)


def protocol_deviations(
    *, data: Mapping[str, Any], images: int, is_reference: bool, prefix: str, made: Mapping[str, Any] | None
) -> list[str]:
    """Each thing that was done otherwise than in the paper, in a line. data: `References.identity`; made: settings of
    the sampler and whether the text prompt was the caption ("with_caption"), None where nobody knows them."""
    found = []
    if not is_reference:
        found.append("the scoring CLIP is not OpenAI's ViT-L/14")
    if data.get("file") != DATA or data["prompts"] != PROMPTS:
        found.append(f"{data['prompts']:,} image prompts of another data set or of a part of it, not COCO 2017 val")
    if images != IMAGES:
        found.append(f"images of each image prompt: {images}, not {IMAGES}")
    if prefix:
        found.append(f"captions were scored with {prefix!r} before them")
    if made is None:
        return [*found, "how the images were made is not known here"]
    for name, value in (SETTINGS | PLAIN).items():
        if made.get(name) != value:
            found.append(f"{name.replace('_', ' ')}: {made.get(name)}, not {value if value != '' else 'empty'}")
    if made.get("with_caption"):
        found.append("the text prompt was the caption, not empty")
    elif "with_caption" not in made:
        found.append("whether the text prompts were empty is not known here")
    return found
