"""Runs the encoders of a plan: all that the denoiser sees next to latents and time."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from ipadapter_jax.models.unet import AddedConditioning, UNet
from ipadapter_jax.models.unet_config import attention_grids
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.conditioning import Conditioning, Guidance
from ipadapter_jax.pipelines.inpainting import Start
from ipadapter_jax.pipelines.ip_adapter import Adapter
from ipadapter_jax.pipelines.request import SamplingPlan
from ipadapter_jax.pipelines.sample_batch import SampleBatch
from ipadapter_jax.pipelines.text_conditioner import TextConditioner
from ipadapter_jax.weights.load_tree import Tree


def encode_plan(
    unet: UNet,
    text_conditioner: TextConditioner,
    adapters: Sequence[Adapter],
    params: Mapping[str, Tree],
    plan: SamplingPlan,
    batch: SampleBatch,
    begin: Start,
) -> Conditioning:
    """The conditioning of a plan's batch; `params` by part: "unet" and the text encoders."""
    text, added = text_conditioner.encode_branches(params, plan), None
    if plan.time_ids is not None and text.pooled is not None:
        added = AddedConditioning(text.pooled, jnp.asarray(plan.time_ids)[None])
    grids = attention_grids(unet.config, *plan.latent_shape[:2])
    encoded = [planned.encode(adapter, grids) for adapter, planned in zip(adapters, plan.image_prompts, strict=True)]
    return Conditioning(
        prompt_of_sample=batch.prompt_of_sample,
        text_kv=programs.text_keys_values(unet, params["unet"], text.states),
        image_branches=[branch for of_adapter in encoded for branch in of_adapter],
        guidance=Guidance(scale=np.float32(plan.guidance_scale), rescale=np.float32(plan.guidance_rescale)),
        added=added,
        preserved=begin.preserved,
        extra_channels=begin.extra_channels,
    )
