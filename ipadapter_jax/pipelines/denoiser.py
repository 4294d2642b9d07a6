"""The denoiser: all networks that take part in one denoising step, as one function of arrays.

Which networks there are is static and known here alone; what they are conditioned on is `conditioning.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.diffusion.guidance import guide
from ipadapter_jax.models.forward import UNetContext, time_shifts, unet_output, unet_output_with_maps
from ipadapter_jax.models.unet import UNet, UNetResiduals
from ipadapter_jax.pipelines.conditioning import Conditioning, ImageBranch, ResidualInputs
from ipadapter_jax.runtime.trees import Params

UNET = "unet"  # the name of the UNet's parameters among those of the denoiser


class DenoiserStep(NamedTuple):
    """What the networks know of a step."""

    timestep: Array  # (n,) for n steps, () for one of them
    time_shifts: Sequence[Sequence[Array]]  # of the UNet: per block and resnet (n, R or 1, C), or (R or 1, C)


class ResidualNetwork(Protocol):
    """A network whose outputs the UNet adds to its skip connections and its middle block. Immutable and hashable;
    prints no addresses, as its text is part of a program's name."""

    @property
    def name(self) -> str:
        """Of its parameters among those of the denoiser."""
        ...

    def __call__(
        self, params: Params, latents: Array, step: DenoiserStep, conditioning: Conditioning, inputs: ResidualInputs
    ) -> UNetResiduals:
        """The UNet's input (B, h, w, C) at one step -> residuals for the R = B G elements of the UNet's batch."""
        ...


class Denoised(NamedTuple):
    """The guided output (B, h, w, C); and where they are asked for the conditional branch's attention maps, per image
    branch and layer (B, L, N)."""

    output: Array
    maps: list[list[Array]] | None


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A UNet and any number of residual networks. `attention_maps`: whether it gives the attention to image tokens."""

    unet: UNet
    residual_networks: tuple[ResidualNetwork, ...] = ()
    attention_maps: bool = False

    def steps(self, params: Mapping[str, Params], timesteps: Array, conditioning: Conditioning) -> DenoiserStep:
        """All that does not depend on the latents, for timesteps (n,), computed once for all steps."""
        added = None if conditioning.added is None else conditioning.by_sample(conditioning.added)
        return DenoiserStep(timesteps, time_shifts(self.unet, params[UNET], timesteps[:, None], added))

    def __call__(
        self, params: Mapping[str, Params], x: Array, step: DenoiserStep, conditioning: Conditioning
    ) -> Denoised:
        """Scaled latents (B, h, w, C), one of `steps` and the conditioning of that step -> the networks' output."""
        if conditioning.extra_channels is not None:
            x = jnp.concatenate([x, conditioning.extra_channels], axis=-1)
        context = UNetContext(
            text_kv=conditioning.by_sample(conditioning.text_kv),
            image_kv=[conditioning.by_sample(branch.kv) for branch in conditioning.image_branches],
            image_weight=[branch_weights(branch, len(x)) for branch in conditioning.image_branches],
            residuals=self._residuals(params, x, step, conditioning),
        )
        maps, branches = None, conditioning.guidance_branches
        if self.attention_maps:
            output, maps = unet_output_with_maps(self.unet, params[UNET], x, step.time_shifts, context)
        else:
            output = unet_output(self.unet, params[UNET], x, step.time_shifts, context)
        output = output.reshape(-1, branches, *output.shape[1:])
        if branches == 2:
            output = guide(output, conditioning.guidance.scale, conditioning.guidance.rescale)
        else:
            output = output[:, 0]
        return Denoised(output, jax.tree.map(lambda attention: attention[branches - 1 :: branches], maps))

    def _residuals(
        self, params: Mapping[str, Params], x: Array, step: DenoiserStep, conditioning: Conditioning
    ) -> UNetResiduals | None:
        """The sum over all residual networks."""
        total: UNetResiduals | None = None
        for network, inputs in zip(self.residual_networks, conditioning.residual_inputs, strict=True):
            found = network(params[network.name], x, step, conditioning, inputs)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        return total


def branch_weights(branch: ImageBranch, samples: int) -> list[Array]:
    """The weight of a branch at one step, where its mask is: per cross-attention layer (B G, L, 1)."""
    by_element = jnp.tile(branch.weight, (samples, 1))
    return [by_element[:, layer, None, None] * mask[None, :, None] for layer, mask in enumerate(branch.mask)]
