"""What the training tests share: the recorded tiny model as a run, and the authors' recorded draws."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
from helpers import ADAPTERS, IMAGE_ENCODER, ORACLES, TORCH_MODEL, Case, nhwc
from jax.sharding import Mesh
from PIL import Image

from ipadapter_jax.images.preprocess import clip_pixels, load_image
from ipadapter_jax.runtime.mesh import replicated
from ipadapter_jax.testing.random_weights import write_model
from ipadapter_jax.testing.sizes import NANO
from ipadapter_jax.train.batches import TrainBatch, batch_of
from ipadapter_jax.train.config import Data, Model, Train
from ipadapter_jax.train.networks import LoadedNetworks
from ipadapter_jax.train.optim import make_optimizer, partition, trainable_mask
from ipadapter_jax.train.state import TrainState, init_train_state, state_shardings
from ipadapter_jax.train.step import RandomDraws, StepResult, make_step
from tests.fault_injection.runs import changed, nano_run

TINY = Train(
    model=Model(base=str(TORCH_MODEL), image_encoder=str(IMAGE_ENCODER), dtype="float32"),
    data=Data(path="given", resolution=128, batch_size=8),
)


def tiny(**changes) -> Train:
    """TINY with dotted names changed, `model__adapter="plus"` for instance."""
    return changed(TINY, **changes)


def recorded_batch(case: Case) -> TrainBatch:
    images = [load_image(ORACLES / "assets" / f"{name}.png") for name in case.meta["images"]["clip_images"]]
    return batch_of(
        {
            "pixels": nhwc(case.inputs["images"]),
            "clip_pixels": np.stack([clip_pixels(image, 224) for image in images]),
            "input_ids": case.inputs["text_input_ids"],
        }
    )


def recorded_draws(case: Case, step: int = 0) -> RandomDraws:
    drop = case.inputs["drop_image_embeds"].astype(bool)
    return RandomDraws(
        drop_image=jnp.asarray(drop),
        drop_text=jnp.zeros(len(drop), bool),  # the recorded ids are those after dropping
        timestep=jnp.asarray(case.inputs[f"timesteps_{step}"]),
        noise=jnp.asarray(nhwc(case.inputs[f"noise_{step}"])),
        posterior_noise=jnp.asarray(nhwc(case.inputs[f"vae_noise_{step}"])),
    )


def started(
    config: Train, mesh: Mesh, loaded: LoadedNetworks, params: dict[str, Any] | None = None
) -> tuple[TrainState, Any]:
    """The initial state where it belongs on the mesh, and the jitted step, which keeps it there and so is compiled
    once. `params` in place of those that were loaded."""
    mask = trainable_mask(config.model)
    optimizer = make_optimizer(config.optim, mask)
    init: Any = {"dtype": config.model.dtype, "ema": config.optim.ema is not None}
    state = init_train_state(partition(loaded.frozen.params | (params or loaded.params), mask), optimizer, **init)
    shardings = state_shardings(mesh, state)
    step = jax.jit(
        make_step(loaded.networks, optimizer, config, mesh), out_shardings=StepResult(shardings, replicated(mesh))
    )
    return jax.device_put(state, shardings), step


LIGHT = ADAPTERS / "ip-adapter_tiny_light.bin"
PLUS = ADAPTERS / "ip-adapter-plus_tiny.bin"


@functools.cache
def nano_model() -> Path:
    """A folder with the NANO model of random weights; made once per session."""
    if "IPADAPTER_JAX_NANO_MODEL" in os.environ:  # a process of a test uses the test's
        return Path(os.environ["IPADAPTER_JAX_NANO_MODEL"])
    folder = Path(tempfile.mkdtemp(prefix="nano-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_model(folder, NANO)
    return folder


def nano(**changes) -> Train:
    """A short run of the NANO model that drops conditions often, settings changed as in `tiny`."""
    drops = {"data__drop_image": 0.2, "data__drop_text": 0.2, "data__drop_both": 0.2}
    return changed(nano_run(nano_model()), **drops | changes)


def photographs(folder: Path, count: int = 12) -> Path:
    """A folder of small images with captions: crops of real photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.astronaut(), skimage.data.rocket()]
    for i in range(count):
        image = images[i % len(images)]
        y, x = (37 * i) % (image.shape[0] - 160), (53 * i) % (image.shape[1] - 160)
        Image.fromarray(image[y : y + 160, x : x + 160]).resize((48, 40)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"photograph number {i}")
    return folder
