"""The model card of an exported adapter: what it is, what it was trained on, how to use it elsewhere."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.weights import bundled
from ipadapter_jax.weights.hub import hub_place

_VARIANTS = {
    "base": "It reads the global image embedding.",
    "plus": "It reads all patches of the image through a Resampler, and so follows it more closely than base.",
    "full": "It reads all patches of the image, one token for each.",
}
_A1111 = {
    "ViT-H/14": "ip-adapter_clip_h",
    "ViT-bigG/14": "ip-adapter_clip_g",
}  # preprocessors of the ControlNet extension

_MINI_IMPORT = f"""\
from ipadapter_jax.weights.bundled import FOLDER  # where {bundled.NAME} lies

"""

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
{base_model}tags:
- ip-adapter
- image-prompt
- stable-diffusion
- jax
---
# {title}

An [IP-Adapter](https://arxiv.org/abs/2308.06721): it lets an image be the prompt, alone or together with text, and
leaves the base model as it is. {variant} Trained with ipadapter_jax.

| | |
|---|---|
| file | `{file}` |
| variant | {variant_name} |
| image tokens | {num_tokens} |
| base model | {base} ({family}) |
| image encoder | {encoder} ({encoder_kind}, {features}) |
| training steps | {step} |

## Use

diffusers (`path/to` is the folder of this file):

```python
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import load_image
from transformers import CLIPVisionModelWithProjection

{mini_import}encoder = CLIPVisionModelWithProjection.from_pretrained({encoder_call}, torch_dtype=torch.float16)
pipe = StableDiffusionPipeline.from_pretrained(
    {base_call}, image_encoder=encoder, torch_dtype=torch.float16
).to("cuda")
pipe.load_ip_adapter("path/to", subfolder="", weight_name="{file}")
pipe.set_ip_adapter_scale(0.6)
image = pipe("a photo", ip_adapter_image=load_image("reference.jpg")).images[0]
```

ipadapter_jax:

```
ipadapter-jax generate --model {base_word}{variant_word} --adapter path/to/{file} \\
  --image-encoder {encoder_word} --image reference.jpg --prompt "a photo" --scale 0.6 --out out.png
```

```python
from ipadapter_jax import StableDiffusion

pipe = StableDiffusion.from_pretrained({base_string}{variant_argument})
pipe = pipe.with_ip_adapter("path/to/{file}", image_encoder={encoder_string})
image = pipe("a photo", ip_adapter_image="reference.jpg", ip_adapter_scale=0.6)[0]
```

ComfyUI with ComfyUI_IPAdapter_plus: put the file into `ComfyUI/models/ipadapter` and the image encoder into
`ComfyUI/models/clip_vision`; load them with the nodes *IPAdapter Model Loader* and *Load CLIP Vision*.

Stable Diffusion web UI (A1111) with sd-webui-controlnet: put the file into `models/ControlNet` under a name that begins
with `ip-adapter` and choose {preprocessor}; the automatic one knows only the published names.

## Training data

{data}

## Training settings

{settings}

## Limits

It inherits what the base model, the image encoder and the training data are biased to, and their licenses. An image
prompt can show a person: use images of people only with their consent.
"""


def model_card(
    file: str,
    metadata: Mapping[str, str],
    *,
    base: str,
    image_encoder: str,
    variant: str | None = None,
    data: Mapping[str, object],
    settings: Mapping[str, object],
) -> str:
    """The card, Markdown with the Hugging Face Hub's front matter, for the file of this name.

    metadata: of the file (`adapter_metadata`). base, image_encoder: Hub places, paths or names of the model inside the
    package. variant: which weight files of the base were read, None for the plain ones. data: the identity of the
    training data (kind, records, digest ...). settings: the run's, nested or flat. Of every path on this machine only
    the last part is shown.
    """
    model, encoder = _place(base, "base model"), _place(image_encoder, "image encoder")
    inside_package = model.call.startswith("FOLDER") or encoder.call.startswith("FOLDER")
    variant_argument = f", variant={_quoted(variant)}" if variant else ""
    kind = metadata["image_encoder"]
    preprocessor = f"the preprocessor `{_A1111[kind]}`" if kind in _A1111 else "a preprocessor for this image encoder"
    return _CARD.format(
        base_model=f"base_model: {model.repository}\nbase_model_relation: adapter\n" if model.repository else "",
        title=_text(Path(file).stem),
        file=file,
        variant=_VARIANTS[metadata["variant"]],
        variant_name=metadata["variant"],
        num_tokens=metadata["num_tokens"],
        base=model.name,
        base_word=shlex.quote(model.name),
        base_string=_quoted(model.name),
        base_call=model.call + variant_argument,
        variant_word=f" --variant {shlex.quote(variant)}" if variant else "",
        variant_argument=variant_argument,
        family=metadata["base"],
        encoder=encoder.name,
        encoder_word=shlex.quote(encoder.name),
        encoder_string=_quoted(encoder.name),
        encoder_kind=kind,
        encoder_call=encoder.call,
        mini_import=_MINI_IMPORT if inside_package else "",
        features=metadata["features"],
        step=metadata["step"],
        preprocessor=preprocessor,
        data=_table(data),
        settings=_table(settings),
    )


class _Place(NamedTuple):
    """A model as this package knows it, as arguments of from_pretrained in diffusers and transformers, and as a
    repository on the Hub, or ""."""

    name: str
    call: str
    repository: str


def _place(reference: str, what: str) -> _Place:
    """One inside the package or on the Hub as it is, any path on this machine as path/to/name."""
    if (inside := bundled.bundled_path(reference, what)) is not None:
        return _Place(reference, " / ".join(["FOLDER", *map(_quoted, inside.relative_to(bundled.FOLDER).parts)]), "")
    name = _without_folders(reference)
    found = hub_place(reference)
    if name != reference or not found.repository:
        return _Place(f"path/to/{name}", _quoted(f"path/to/{name}"), "")
    more = {"subfolder": found.inside, "revision": found.revision}
    arguments = [_quoted(found.repository), *(f"{key}={_quoted(value)}" for key, value in more.items() if value)]
    return _Place(reference, ", ".join(arguments), found.repository)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _without_folders(text: str) -> str:
    """The last part of what is a path on this machine; any other text as it is."""
    path = os.path.expanduser(text)
    local = os.path.isabs(path) or text.startswith(("./", "../")) or os.path.exists(path)
    return Path(path).name if local else text


def _table(values: Mapping[str, object]) -> str:
    rows = "\n".join(f"| {_text(name)} | {_text(value)} |" for name, value in _flat(values).items())
    return f"| | |\n|---|---|\n{rows}"


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """{"optim": {"beta1": 0.9}} -> {"optim.beta1": "0.9"}, without what is not set."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None and value != "":
            items = value if isinstance(value, list | tuple) else [value]
            flat[f"{prefix}{name}"] = ", ".join(_without_folders(str(item)) for item in items)
    return flat


def _text(value: str) -> str:
    """For a cell or a title: one line in which Markdown and HTML do nothing."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(value.split()))
