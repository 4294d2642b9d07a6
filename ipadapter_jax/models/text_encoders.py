"""The text encoders of a base model as one: prompts as token ids to what the UNet is conditioned on."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ipadapter_jax.models.clip import CLIPText, TextOutput
from ipadapter_jax.models.clip_config import CLIPTextConfig
from ipadapter_jax.models.families import Family, FamilyTextEncoder
from ipadapter_jax.runtime.trees import Params


class TextConditioning(NamedTuple):
    """What P prompts condition the UNet on."""

    states: Array
    """(P, S, D): the keys and values of the text are made of them."""
    pooled: Array | None
    """(P, F): what conditions the time embedding, where the family has it."""


class TextEncoder(NamedTuple):
    """A network, and what the family says of it."""

    role: FamilyTextEncoder
    network: CLIPText


def skippable_layers(encoders: Iterable[tuple[FamilyTextEncoder, CLIPTextConfig]]) -> int:
    """How many layers a prompt can leave out at most of all of these, plus one."""
    return min(config.num_hidden_layers - role.penultimate for role, config in encoders)


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a base model, without their weights, in the order in which their states are concatenated."""

    encoders: tuple[TextEncoder, ...]

    @classmethod
    def of(cls, family: Family, networks: Mapping[str, CLIPText]) -> "TextEncoders":
        """Those of a family, from its networks by part."""
        return cls(tuple(TextEncoder(role, networks[role.part]) for role in family.text_encoders))

    @property
    def layers(self) -> int:
        """How many layers a prompt can leave out at most, plus one."""
        return skippable_layers((role, network.config) for role, network in self.encoders)

    @property
    def first(self) -> TextEncoder:
        return self.encoders[0]

    def __call__(self, params: Mapping[str, Params], ids: Mapping[str, Array], clip_skip: int = 0) -> TextConditioning:
        """Token ids (P, S) of the same prompts and the weights of each encoder, by part. The states leave out the last
        `clip_skip` layers, next to those that the family leaves out; the pooled state does not."""
        states, pooled = [], None
        for role, network in self.encoders:
            skip = 0 if role.penultimate else clip_skip
            output: TextOutput = network.apply({"params": params[role.part]}, ids[role.part], skip)  # pyright: ignore[reportAssignmentType]
            states.append(output.hidden_states[-2 - clip_skip] if role.penultimate else output.last_hidden_state)
            pooled = output.text_embeds if role.pooled else pooled
        return TextConditioning(jnp.concatenate(states, axis=-1), pooled)
