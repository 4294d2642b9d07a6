"""The text encoders of a base model as one: prompts as token ids to what the UNet is conditioned on."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ipadapter_jax.models.clip import CLIPText
from ipadapter_jax.runtime.trees import Params


class TextConditioning(NamedTuple):
    """What P prompts condition the UNet on."""

    states: Array
    """(P, S, D): the keys and values of the text are made of them."""


class TextEncoder(NamedTuple):
    """A network and the name of its part of the base model, such as "text_encoder"."""

    part: str
    network: CLIPText


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a base model, without their weights, in the order in which their states are concatenated."""

    encoders: tuple[TextEncoder, ...]

    @classmethod
    def of(cls, networks: Mapping[str, CLIPText]) -> "TextEncoders":
        """From networks by part, in their order."""
        return cls(tuple(TextEncoder(part, network) for part, network in networks.items()))

    @property
    def first(self) -> TextEncoder:
        return self.encoders[0]

    @property
    def layers(self) -> int:
        """Layers of each encoder, or of the one with the fewest."""
        return min(network.config.num_hidden_layers for _, network in self.encoders)

    def __call__(self, params: Mapping[str, Params], ids: Mapping[str, Array], clip_skip: int = 0) -> TextConditioning:
        """Token ids (P, S) of the same prompts and the weights of each encoder, by part. The states leave out the last
        `clip_skip` layers."""
        outputs: list[Any] = [
            network.apply({"params": params[part]}, ids[part], clip_skip) for part, network in self.encoders
        ]
        return TextConditioning(jnp.concatenate([output.last_hidden_state for output in outputs], axis=-1))
