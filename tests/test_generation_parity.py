"""Whole generations against PyTorch diffusers on the same tiny random weights, latents and pictures."""

import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, ORACLES, TORCH_MODEL, Case, load_case, nchw, nhwc

import ipadapter_jax.sampling
from ipadapter_jax import StableDiffusion
from ipadapter_jax.diffusion.schedule import NoiseSchedule


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return StableDiffusion.from_pretrained(TORCH_MODEL)


def generate(base: StableDiffusion, case: Case, **more):
    """Runs a recorded call and returns (timesteps, latents after every step, final latents, raw picture)."""
    meta, kwargs = case.meta, dict(case.meta["call"]["kwargs"])
    name = meta["ip_adapter"][0].rsplit("/", 1)[-1]
    image = meta["images"]["ip_adapter_image"].removeprefix("assets/").removesuffix(".png")
    import dataclasses

    pipe = base.with_ip_adapter(ADAPTERS / name, image_encoder=IMAGE_ENCODER)
    pipe = dataclasses.replace(pipe, schedule=NoiseSchedule.from_json(meta["scheduler"]["config"]))
    seen = []
    final = pipe(
        **kwargs,
        ip_adapter_image=ORACLES / "assets" / f"{image}.png",
        ip_adapter_scale=meta["ip_adapter_scale"],
        latents=nhwc(case.inputs["latents"]),
        output_type="latent",
        callback=lambda number, timestep, latents: seen.append((timestep, np.asarray(latents))),
        **more,
    )
    timesteps, steps = zip(*seen, strict=True)
    decoded = ipadapter_jax.sampling.decode(
        pipe.vae, pipe.mesh, pipe.params["vae"], np.repeat(final, pipe.mesh.size, 0)
    )
    return np.asarray(timesteps, np.float32), np.stack(steps), final, np.asarray(decoded)[:1]


@pytest.mark.parametrize(
    "name", ["gen_ddim_eps_g1p0", "gen_ddim_eps_g7p5", "gen_ddim_v_g1p0", "gen_ddim_v_g7p5", "gen_full"]
)
def test_generation_equals_diffusers(base, name):
    case = load_case(name)
    timesteps, steps, final, picture = generate(base, case)
    case.check(timesteps=timesteps, latents_steps=nchw(steps), latents=nchw(final))
    if "image" in case.outputs:
        case.check(image=nchw(picture))


def test_stochastic_ddim_equals_diffusers_given_its_noise(base, monkeypatch):
    case = load_case("gen_ddim_eta")

    def recorded(batch, shape, step):
        return batch.spread(nhwc(case.inputs[f"noise_{step - 1}"]))

    monkeypatch.setattr(ipadapter_jax.sampling.Batch, "noise", recorded)
    timesteps, steps, final, _ = generate(base, case)
    case.check(timesteps=timesteps, latents_steps=nchw(steps), latents=nchw(final))
