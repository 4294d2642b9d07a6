"""Prompts to what they condition the UNet on."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.models.text_encoders import TextConditioning, TextEncoders
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.request import SamplingPlan
from ipadapter_jax.runtime.trees import Params
from ipadapter_jax.weights.tokenizer import Tokenizer, tokenize


@dataclasses.dataclass(frozen=True, eq=False)
class TextConditioner:
    """The text encoders of a base model, and the tokenizer of each by its part."""

    encoders: TextEncoders
    tokenizers: Mapping[str, Tokenizer]

    def encode(
        self,
        params: Mapping[str, Params],
        prompts: Sequence[str],
        prompts_2: Sequence[str] | None = None,
        clip_skip: int = 0,
    ) -> TextConditioning:
        """P prompts, with the weights of each encoder by part; `prompts_2` is what a second text encoder reads, by
        default the same. Warns of the words that a truncation loses."""
        ids = {}
        for number, (role, network) in enumerate(self.encoders.encoders):
            tokenizer = self.tokenizers[role.part]
            length = min(tokenizer.model_max_length, network.config.max_position_embeddings)
            texts = prompts if number == 0 or prompts_2 is None else prompts_2
            ids[role.part] = tokenize(tokenizer, texts, length)
        weights = {part: params[part] for part in ids}
        return programs.encode_prompts(self.encoders, clip_skip, weights, ids)

    def encode_branches(self, params: Mapping[str, Params], plan: SamplingPlan) -> TextConditioning:
        """(P, G, ...): the prompts of a plan, those of the unconditional branch first where there is one."""
        branches = [self.encode(params, plan.prompts, plan.second.prompts, plan.clip_skip)]
        if plan.guided:  # diffusers leaves out layers for the prompt alone
            negative = self.encode(params, plan.negative_prompts, plan.second.negatives)
            if plan.zero_negative.any():
                negative = jax.tree.map(lambda x: _zeroed(x, plan.zero_negative), negative)
            branches.insert(0, negative)
        return jax.tree.map(lambda *of_branches: jnp.stack(of_branches, axis=1), *branches)


def _zeroed(x: Array, where: np.ndarray) -> Array:
    """Arrays of prompts (P, ...), zero where `where` (P,) says so."""
    return jnp.where(where.reshape(-1, *(1,) * (x.ndim - 1)), 0, x)
