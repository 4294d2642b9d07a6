"""What comes next plugs in without a change to the package: a residual network and a feature encoder of a test."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import conditioned

from ipadapter_jax import StableDiffusion
from ipadapter_jax.diffusion.samplers import sample_table
from ipadapter_jax.models.image_features import FeatureKind
from ipadapter_jax.models.unet import UNetResiduals
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.conditioning import BY_SAMPLE, REPLICATED, ResidualInputs
from ipadapter_jax.pipelines.denoise import run_sampler
from ipadapter_jax.pipelines.denoiser import Denoiser
from ipadapter_jax.pipelines.feature_encoder import PreparedImages
from ipadapter_jax.pipelines.sample_batch import SampleBatch
from ipadapter_jax.testing import tiny_pipeline

pytestmark = pytest.mark.usefixtures("one_device")
STEPS, SEEDS = 3, np.uint32([3, 4])


@pytest.fixture(scope="module")
def tiny(one_device) -> StableDiffusion:
    return tiny_pipeline(ip_adapter=False)


# --- a network whose outputs the UNet adds inside --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StubResidualNetwork:
    """Adds `gain` times the sample's hint times the step's weight to every skip connection and to the middle block."""

    shapes: tuple[tuple[int, ...], ...]  # (h, w, C) of the skip connections, then of the middle block
    name: str = "stub"

    def __call__(self, params, latents, step, conditioning, inputs):
        assert step.timestep.shape == () and latents.ndim == 4
        hint = params["gain"] * inputs.by_step * inputs.shared * inputs.by_sample  # (B,)
        by_element = jnp.repeat(hint, conditioning.guidance_branches)[:, None, None, None]
        *skips, mid = [jnp.broadcast_to(by_element, (len(by_element), *shape)) for shape in self.shapes]
        return UNetResiduals(skips, mid)


def skip_shapes(pipe: StableDiffusion, side: int) -> tuple[tuple[int, ...], ...]:
    config, shapes = pipe.unet.config, []
    shapes.append((side, side, config.block_out_channels[0]))
    for level, width in enumerate(config.block_out_channels):
        shapes += [(side, side, width)] * config.layers_per_block
        if level < config.levels - 1:
            side = -(-side // 2)
            shapes.append((side, side, width))
    return (*shapes, (side, side, config.block_out_channels[-1]))


def sampled(pipe: StableDiffusion, networks, inputs, params, on_step=None) -> np.ndarray:
    """Latents of two seeds."""
    batch = SampleBatch(pipe.mesh, SEEDS, np.zeros(2, np.int64))
    conditioning = dataclasses.replace(conditioned(pipe, batch, []), residual_inputs=inputs(batch))

    def program(state, steps, conditioning):
        denoiser = Denoiser(pipe.unet, networks)
        return programs.denoise(denoiser, pipe.mesh, {"unet": pipe.params["unet"]} | params, state, steps, conditioning)

    run = sample_table("ddim", pipe.schedule, STEPS)
    latents, _ = run_sampler(program, run.steps, batch.noise((8, 8, 4), 0), conditioning, batch, on_step)
    return np.asarray(latents)[:2]


def stub(pipe: StableDiffusion, window, hint, gain=0.5, on_step=None) -> np.ndarray:
    network = StubResidualNetwork(skip_shapes(pipe, 8))

    def inputs(batch: SampleBatch) -> list[ResidualInputs]:
        by_sample = batch.sharded(np.asarray(hint, np.float32))
        return [ResidualInputs(by_sample=by_sample, shared=jnp.float32(1), by_step=np.asarray(window, np.float32))]

    return sampled(pipe, (network,), inputs, {"stub": {"gain": jnp.float32(gain)}}, on_step)


def test_a_residual_network_plugs_in(tiny):
    """Its values are data: by sample, by step, and its parameters; without effect it leaves the images as they are."""
    plain = sampled(tiny, (), lambda batch: [], {})
    np.testing.assert_allclose(stub(tiny, [0, 0, 0], [1, 1]), plain, atol=1e-5)
    np.testing.assert_allclose(stub(tiny, [1, 1, 1], [1, 1], gain=0.0), plain, atol=1e-5)
    second = stub(tiny, [1, 1, 1], [0, 1])
    np.testing.assert_allclose(second[0], plain[0], atol=1e-5)
    assert np.abs(second[1] - plain[1]).max() > 0.01
    window = stub(tiny, [0, 1, 0], [0, 1])
    assert np.abs(window - second)[1].max() > 0.001 and np.abs(window - plain)[1].max() > 0.001
    stepped = stub(tiny, [0, 1, 0], [0, 1], on_step=lambda *_: None)
    np.testing.assert_allclose(stepped, window, atol=1e-4)


def test_several_residual_networks_are_added(tiny):
    network = StubResidualNetwork(skip_shapes(tiny, 8))
    other = dataclasses.replace(network, name="other")

    def inputs(batch: SampleBatch) -> list[ResidualInputs]:
        hint = batch.sharded(np.float32([1, 2]))
        return [ResidualInputs(by_sample=hint, shared=jnp.float32(1), by_step=np.ones(3, np.float32))] * 2

    gains = {"stub": {"gain": jnp.float32(0.2)}, "other": {"gain": jnp.float32(0.3)}}
    found = sampled(tiny, (network, other), inputs, gains)
    np.testing.assert_allclose(found, stub(tiny, [1, 1, 1], [1, 2]), atol=1e-4)


def test_specs_have_the_structure_of_the_conditioning(tiny):
    """Sharded by sample is what has an element for each sample, and nothing else."""
    batch = SampleBatch(tiny.mesh, SEEDS, np.zeros(2, np.int64))
    given = dataclasses.replace(conditioned(tiny, batch, []), residual_inputs=[ResidualInputs(by_sample=jnp.ones(4))])
    specs = given.specs()
    by_sample = {field.name for field in dataclasses.fields(specs) if getattr(specs, field.name) == BY_SAMPLE}
    assert by_sample == {"prompt_of_sample", "preserved", "extra_channels"}
    assert specs.residual_inputs == [ResidualInputs(by_sample=BY_SAMPLE, shared=REPLICATED, by_step=REPLICATED)]
    jax.tree.map(lambda spec, part: None, specs, given, is_leaf=lambda x: isinstance(x, type(BY_SAMPLE)))


# --- an encoder that makes other features ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StubInputs:
    """Reads the mean color of each image."""

    kind: FeatureKind = FeatureKind.IMAGE_EMBEDS
    positions: None = None

    def prepare(self, images, fit):
        return PreparedImages(np.stack([np.asarray(image, np.float32).mean(axis=(0, 1)) for image in images]))

    def unconditional(self, uncond):
        return None if uncond in ("default", "zeros") else PreparedImages(np.full((1, 3), 0.5, np.float32))


@dataclasses.dataclass(frozen=True)
class StubEncoder:
    """Repeats the mean color to the width that the projection reads."""

    width: int
    inputs: StubInputs = StubInputs()
    source: Path = Path("stub")

    def encode(self, pixels):
        return jnp.tile(jnp.asarray(pixels), (1, -(-self.width // 3)))[:, : self.width]


def test_a_feature_encoder_plugs_in():
    """Images go through it; the same features given as embeddings make the same image."""
    pipe = tiny_pipeline()
    [adapter] = pipe.adapters
    encoder = StubEncoder(adapter.projection.config.feature_dim)
    pipe = dataclasses.replace(pipe, adapters=(dataclasses.replace(adapter, feature_encoder=encoder),))
    image = np.full((5, 7, 3), (1.0, 2.0, 3.0), np.float32)
    call = {"num_inference_steps": 2, "output_type": "latent", "progress_bar": False}
    found = pipe("a cat", ip_adapter_image=image, ip_adapter_uncond="noise", **call)
    embeds = np.stack([encoder.encode(np.full((1, 3), value, np.float32)) for value in (0.5, 1)])
    embeds[1] = encoder.encode(np.float32([[1, 2, 3]]))
    np.testing.assert_array_equal(found, pipe("a cat", ip_adapter_image_embeds=[embeds], **call))
    assert np.abs(found - pipe("a cat", ip_adapter_image=image, **call)).max() > 1e-4
