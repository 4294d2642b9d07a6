"""What the denoising of a batch is conditioned on: one pytree of arrays, so that other values never recompile.

A batch has B samples of P text prompts. With classifier-free guidance every sample has G = 2 guidance branches, the
unconditional one first, otherwise G = 1: element b * G + g of a network's batch is branch g of sample b.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from ipadapter_jax.models.unet import AddedConditioning
from ipadapter_jax.ops.attention import KeyValue
from ipadapter_jax.runtime.trees import PyTree

Tree = TypeVar("Tree")
BY_SAMPLE, REPLICATED = P("data"), P()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBranch:
    """One attention to image tokens in every cross-attention layer: that of an adapter, or of one of its images with a
    mask, for Q image prompts: one for all samples, or one for each text prompt."""

    kv: Sequence[KeyValue]  # per layer (Q, G, N, C)
    weight: Array | np.ndarray  # (n, G, layers) for n steps; (G, layers) for one of them
    mask: Sequence[Array | np.ndarray]  # per layer (L,): where in the image the branch acts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance, used where there are two branches."""

    scale: Array | np.floating
    rescale: Array | np.floating


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreservedRegion:
    """Inpainting with a UNet of 4 channels: where `mask` (B, h, w, 1) is 0, `latents` under `noise`, (B, h, w, C) each,
    replace the sample after every step."""

    mask: Array
    latents: Array
    noise: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualInputs:
    """What one residual network (`denoiser.ResidualNetwork`) takes, in any structure of its own: arrays (B, ...),
    arrays that all samples share, and arrays (n, ...) with a value for each step, such as its weight."""

    by_sample: PyTree = ()
    shared: PyTree = ()
    by_step: PyTree = ()


class StepConditioning(NamedTuple):
    """The parts of a `Conditioning` that differ from step to step, (n, ...) each, or those of one step."""

    image_weights: Sequence[Array | np.ndarray]  # of each image branch
    residual_inputs: Sequence[PyTree]  # of each residual network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioning:
    """All that the denoiser sees next to the latents and the step."""

    prompt_of_sample: Array  # (B,), the index of its text prompt
    text_kv: Sequence[KeyValue]  # per cross-attention layer (P, G, S, C)
    image_branches: list[ImageBranch]
    guidance: Guidance
    added: AddedConditioning | None = None  # (P or 1, G, ...), where the UNet has it
    preserved: PreservedRegion | None = None
    extra_channels: Array | None = None  # (B, h, w, 5): mask and masked image for a UNet of 9 channels
    # One for each residual network of the denoiser.
    residual_inputs: list[ResidualInputs] = dataclasses.field(default_factory=list)

    @property
    def guidance_branches(self) -> int:
        """G."""
        return self.text_kv[0].key.shape[1]

    def specs(self) -> "Conditioning":
        """The same fields, each with how it is sharded over the axis "data" of a mesh."""
        residual = ResidualInputs(by_sample=BY_SAMPLE, shared=REPLICATED, by_step=REPLICATED)
        sharding: dict[str, PyTree] = {
            "prompt_of_sample": BY_SAMPLE,
            "text_kv": REPLICATED,
            "image_branches": REPLICATED,
            "guidance": REPLICATED,
            "added": REPLICATED,
            "preserved": BY_SAMPLE,
            "extra_channels": BY_SAMPLE,
            "residual_inputs": [residual] * len(self.residual_inputs),
        }
        return Conditioning(**sharding)

    def by_step(self) -> StepConditioning:
        """What a scan takes slices of."""
        weights = [branch.weight for branch in self.image_branches]
        return StepConditioning(weights, [inputs.by_step for inputs in self.residual_inputs])

    def with_steps(self, by_step: StepConditioning) -> "Conditioning":
        """With these in place of `by_step`: those of a part of the steps, or of one of them without its axis."""
        branches = [
            dataclasses.replace(branch, weight=weight)
            for branch, weight in zip(self.image_branches, by_step.image_weights, strict=True)
        ]
        inputs = [
            dataclasses.replace(inputs, by_step=values)
            for inputs, values in zip(self.residual_inputs, by_step.residual_inputs, strict=True)
        ]
        return dataclasses.replace(self, image_branches=branches, residual_inputs=inputs)

    def of_steps(self, part: slice) -> "Conditioning":
        """For these steps alone."""
        return self.with_steps(jax.tree.map(lambda values: values[part], self.by_step()))

    def by_sample(self, by_prompt: Tree) -> Tree:
        """Arrays of prompts (P or 1, G, ...) -> those of the network's batch, (B G, ...)."""

        def pick(x: Array) -> Array:
            return x[jnp.minimum(self.prompt_of_sample, len(x) - 1)].reshape(-1, *x.shape[2:])

        return jax.tree.map(pick, by_prompt)
