"""Runs recorded calls of diffusers' pipelines here."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np
from helpers import ORACLES, Case, nhwc
from safetensors.numpy import save_file

from ipadapter_jax import StableDiffusion
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.pipelines import programs
from ipadapter_jax.runtime.mesh import batch_sharding
from ipadapter_jax.testing import given_noise
from ipadapter_jax.weights.ip_adapter_file import open_ip_adapter

SAMPLERS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}


def image(name):
    if isinstance(name, list):
        return [image(inner) for inner in name]
    return ORACLES / "assets" / f"{name.removeprefix('assets/').removesuffix('.png')}.png"


def adapter(place: Path, first: Path, folder: Path) -> Path:
    """The adapter as diffusers takes it beside a first one: keys and values in the dtype of the first one's."""
    dtype = open_ip_adapter(first).ip_adapter["1.to_k_ip.weight"].dtype
    tensors = {name: np.array(tensor.read()) for name, tensor in open_ip_adapter(place).tensors.items()}
    save_file({n: a.astype(dtype) if n.startswith("ip_adapter.") else a for n, a in tensors.items()}, folder / "a")
    return folder / "a"


def generate(base: StableDiffusion, case: Case, folder: Path):
    """Runs a recorded call and returns (timesteps, latents after every step, final latents); and the raw image, where
    one was recorded."""
    meta, kwargs, pipe = case.meta, dict(case.meta["call"]["kwargs"]), base
    files = [ORACLES / file for file in meta.get("ip_adapter") or []]
    encoders = meta.get("image_encoder")
    for i, file in enumerate(files):
        file = file if i == 0 else adapter(file, files[0], folder)
        encoder = encoders[i] if isinstance(encoders, list) else encoders
        pipe = pipe.with_ip_adapter(file, image_encoder=ORACLES / encoder)
    images = {name: image(value) for name, value in meta.get("images", {}).items()}
    if kwargs.get("guidance_scale") == 1:
        kwargs.pop("negative_prompt", None)  # it has no effect, which we refuse
    if "mask_image" in case.inputs and "mask_image" not in images:
        images["mask_image"] = case.inputs["mask_image"][0, 0]
    if "strength" in kwargs and "image" not in images:
        images["image"] = image("init")
    if pipe.adapters:
        kwargs["ip_adapter_scale"] = meta["ip_adapter_scale"]
    if "ip_adapter_image_embeds" in case.inputs:
        kwargs["ip_adapter_image_embeds"] = [case.inputs["ip_adapter_image_embeds"]]
    if "ip_adapter_masks" in case.inputs:
        del kwargs["cross_attention_kwargs"]
        kwargs["ip_adapter_masks"] = [case.inputs["ip_adapter_masks"][None, :, 0]]
    if "force_zeros_for_empty_prompt" in meta:
        pipe = dataclasses.replace(pipe, zeros_for_no_negative=meta["force_zeros_for_empty_prompt"])
    pipe = dataclasses.replace(pipe, schedule=NoiseSchedule.from_json(meta["scheduler"]["config"]))
    seen = []
    final = pipe(
        **kwargs,
        **images,
        scheduler=SAMPLERS[meta["scheduler"]["class"]],
        latents=nhwc(case.inputs["latents"]) if "latents" in case.inputs else None,
        output_type="latent",
        callback=lambda number, timestep, latents: seen.append((timestep, np.asarray(latents))),
    )
    timesteps, steps = zip(*seen, strict=True)
    decoded = None
    if "image" in case.outputs:
        latents = jax.device_put(final, batch_sharding(pipe.mesh))
        decoded = np.asarray(programs.decode(pipe.vae, pipe.mesh, pipe.params["vae"], latents))
    return np.asarray(timesteps, np.float32), np.stack(steps), final, decoded


def recorded_noise(case: Case) -> contextlib.AbstractContextManager[None]:
    """The recorded noise, in the order in which diffusers drew it: that of an image's posterior comes first. Inpainting
    drew that of the masked image as a third, which a UNet of four channels is not shown."""
    noise = [nhwc(case.inputs[f"noise_{i}"]) for i in range(len(case.inputs)) if f"noise_{i}" in case.inputs]
    if "strength" in case.meta["call"]["kwargs"]:
        return given_noise(posterior=noise[0], initial=noise[1])
    return given_noise(steps=noise)
