"""Rows of the tables in docs/results.md: the model, prompts, scale and guidance of each, and its images.

All rows have the same image prompts. Image i has the same initial noise in all rows.
"""

import dataclasses
import functools
import io
import itertools
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tqdm

from experiments.mini.joint_training import with_image
from experiments.mini.run_settings import check_same
from experiments.mini.test_scenes import Photograph, Prompt, photograph, prompt
from experiments.mini.trainings import ENCODER, TRAININGS, Workshop
from ipadapter_jax import StableDiffusion
from ipadapter_jax.images.preprocess import to_uint8
from ipadapter_jax.runtime.mesh import replicated
from ipadapter_jax.storage.atomic_files import sha256, write_atomically
from ipadapter_jax.weights.bundled import GUIDANCE_SCALE
from ipadapter_jax.weights.components import UNET
from ipadapter_jax.weights.open_component import load_component

COUNT = 4  # images of each prompt
_CHUNK = 25  # prompts per file of images
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
GUIDANCES = (1.0, GUIDANCE_SCALE, 7.5)
DROPS = ("decoupled", "no image dropped", "little text dropped")

Text = Literal["", "caption", "other_caption"]


@dataclasses.dataclass(frozen=True)
class Row:
    """The settings of a row.

    adapter: a training run, or an adapter of the base model; None: no image prompt.
    unet: a training run; None: the base model's UNet.
    """

    adapter: str | None = None
    text: Text = ""  # the field of `Prompt` that is the text prompt; "": no text
    scale: float = 1.0
    guidance: float = GUIDANCE_SCALE
    unet: str | None = None
    prompts: Literal["scenes", "photographs"] = "scenes"

    @property
    def folder(self) -> str:
        words = (self.unet, self.adapter, self.text, f"scale {self.scale:g}", f"guidance {self.guidance:g}")
        words += ("photographs",) * (self.prompts == "photographs")
        return "-".join(word.replace(" ", "-") for word in words if word)


CHANCE, TEXT = Row(), Row(text="caption")
SIMPLE, DECOUPLED, PLUS, FULL = Row("simple"), Row("decoupled"), Row("plus"), Row("full", unet="full")
MINI, MINI_PLUS = Row("mini"), Row("mini-plus")
MAIN = (CHANCE, TEXT, SIMPLE, DECOUPLED, PLUS, FULL, MINI, MINI_PLUS)
BY_SCALE = tuple(dataclasses.replace(MINI, scale=scale) for scale in SCALES)
OTHER_SHAPE = tuple(dataclasses.replace(row, text="other_caption") for row in BY_SCALE)
INKED_TEXT, INKED = Row(text="caption", unet="inked"), Row("mini", unet="inked")
BY_DROP = {name: tuple(Row(name, guidance=guidance) for guidance in GUIDANCES) for name in DROPS}
PHOTOGRAPHS = dataclasses.replace(MINI, prompts="photographs")
ROWS = tuple(dict.fromkeys((*MAIN, *BY_SCALE, *OTHER_SHAPE, INKED_TEXT, INKED, *itertools.chain(*BY_DROP.values()))))


class Painter:
    """Generates the images of rows and saves them. A run that was stopped loses at most the images of one file."""

    def __init__(self, workshop: Workshop, steps: int):
        self.steps = steps
        self.base = StableDiffusion.from_pretrained(workshop.base)
        self._workshop = workshop

    def paint(self, row: Row, prompts: int) -> np.ndarray:
        """The images of the first `prompts` prompts, (prompts, COUNT, 64, 64, 3) uint8."""
        folder = self._workshop.out / "rows" / row.folder
        given = photograph if row.prompts == "photographs" else prompt
        check_same(folder / "settings.json", self._settings(row))
        parts = [range(start, min(start + _CHUNK, prompts)) for start in range(0, prompts, _CHUNK)]
        files = [folder / f"{part.start:05d}-{part.stop:05d}.npz" for part in parts]
        missing = [i for i, file in enumerate(files) if not file.exists()]
        pipe = self.pipeline(row) if missing else self.base
        for i in tqdm.tqdm(missing, desc=row.folder, unit=f" x {_CHUNK} prompts", disable=None):
            images = np.stack([self._one(pipe, row, given(index)) for index in parts[i]])
            with io.BytesIO() as file:
                np.savez_compressed(file, pixels=images)
                write_atomically(files[i], file.getvalue())
        return np.concatenate([np.load(file)["pixels"] for file in files])

    def pipeline(self, row: Row) -> StableDiffusion:
        pipe = self.base
        if row.unet is not None:
            put = functools.partial(jax.device_put, device=replicated(pipe.mesh))
            loaded = load_component(UNET, self._unet(row.unet).parent, np.dtype(np.float32), put=put)
            pipe = dataclasses.replace(pipe, params={**pipe.params, "unet": loaded.params})
        if row.adapter is None:
            return pipe
        return pipe.with_ip_adapter(self._workshop.adapter(row.adapter), image_encoder=self._workshop.base / ENCODER)

    def _one(self, pipe: StableDiffusion, row: Row, given: Prompt | Photograph) -> np.ndarray:
        """The images (COUNT, 64, 64, 3) uint8 of one prompt, with the same seeds in every row."""
        told: dict[str, Any] = {}
        joined = TRAININGS[row.adapter].joined if row.adapter in TRAININGS else None
        if joined is not None:
            pipe = with_image(pipe, joined, given.pixels, guided=row.guidance > 1)
        elif row.adapter is not None:
            told = {"ip_adapter_image": given.pixels, "ip_adapter_scale": row.scale}
        painted = pipe(
            getattr(given, row.text) if row.text else "",
            num_inference_steps=self.steps,
            guidance_scale=row.guidance,
            num_images_per_prompt=COUNT,
            seed=COUNT * given.index,
            output_type="np",
            progress_bar=False,
            **told,
        )
        return to_uint8(painted)

    def _settings(self, row: Row) -> dict[str, Any]:
        """Everything that the images of a row depend on, for settings.json."""
        weights = {"base": self._workshop.base_digest}
        if row.unet is not None:
            weights["unet"] = sha256(self._unet(row.unet))
        if row.adapter is not None:
            weights["adapter"] = sha256(self._workshop.adapter(row.adapter))
        return dataclasses.asdict(row) | {"steps": self.steps, "weights": weights}

    def _unet(self, name: str) -> Path:
        return self._workshop.trained(name) / "unet" / f"{UNET.files.torch_stem}.safetensors"
