"""An adapter attached to a pipeline: its projection, its keys and values, and the encoder that makes its features."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import DTypeLike

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.models.image_projections import Projection, image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.ops.attention import KeyValue
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.adapter_inputs import AdapterInputs, PlannedFeatures
from ipadapter_jax.pipelines.feature_encoder import CLIPFeatureEncoder, CLIPFeatureInputs, FeatureEncoder
from ipadapter_jax.weights.hub import check_revision, path_here
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.ip_adapter_file import (
    CheckedAdapter,
    IPAdapterFile,
    adapter_file,
    check_base,
    check_encoder,
    check_ip_adapter,
    open_ip_adapter,
)
from ipadapter_jax.weights.load_tree import Tree
from ipadapter_jax.weights.open_component import LazyComponent, LoadedComponent


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One IP-Adapter, weights included; without an encoder it takes features alone."""

    projection: Projection
    keys: IPAdapter
    params: dict[str, Tree]
    feature_encoder: FeatureEncoder | None
    source: Path

    @property
    def inputs(self) -> AdapterInputs:
        """What it takes, without its weights."""
        encoder = None if self.feature_encoder is None else self.feature_encoder.inputs
        return AdapterInputs(self.projection.config, encoder, self.projection.dtype, self.source)

    def encode(self, planned: PlannedFeatures) -> Array:
        """Features (Q, G, n, ...), G being 1 without guidance."""
        given = planned.positive
        if planned.encoded:
            positive = jnp.asarray(given)
        else:
            features = self._encode(given.reshape(-1, *given.shape[2:]))
            positive = features.reshape(*given.shape[:2], *features.shape[1:])
        if not planned.guided:
            return positive[:, None]
        if planned.negative is None:
            negative = jnp.zeros_like(positive[0])
        elif planned.negative_encoded:
            negative = jnp.asarray(planned.negative)
        else:
            negative = self._encode(planned.negative)
        return jnp.stack([jnp.broadcast_to(negative, positive.shape), positive], axis=1)

    def keys_values(self, features: Array, weight: np.ndarray) -> list[KeyValue]:
        """Features (Q, G, n, ...), weights of the images (Q or 1, n) -> per layer keys and values (Q, G, n N, C)."""
        return programs.image_keys_values(self.projection, self.keys, self.params, features, weight)

    def _encode(self, pixels: np.ndarray) -> Array:
        assert self.feature_encoder is not None  # else `inputs` gave no pixels
        return self.feature_encoder.encode(pixels)


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedAdapter:
    """An adapter file and its image encoder, which fit a UNet with cross-attentions of these widths; still unread."""

    file: IPAdapterFile
    weights: CheckedAdapter
    encoder: LazyComponent | None
    widths: tuple[int, ...]

    def inputs(self, dtype: DTypeLike) -> AdapterInputs:
        """What it will take when it is loaded in `dtype`."""
        kind = self.file.config.feature_kind
        encoder = None if self.encoder is None else CLIPFeatureInputs(self.encoder.config, kind)
        return AdapterInputs(self.file.config, encoder, dtype, self.file.path)

    def load(self, dtype: np.dtype, put: Callable, attached: Sequence[Adapter]) -> Adapter:
        """Reads both; the encoder is shared with an `attached` adapter that uses the same one."""
        params = self.weights.load(np.dtype(dtype), put)
        encoder = None
        if self.encoder is not None:
            kind = self.file.config.feature_kind
            shared = [component for component in encoders_of(attached) if component.source == self.encoder.source]
            component = shared[0] if shared else self.encoder.load(np.dtype(dtype), put)
            encoder = CLIPFeatureEncoder(component, kind)
        keys = IPAdapter(self.widths, dtype)
        return Adapter(image_projection(self.file.config, dtype), keys, params, encoder, self.file.path)


def encoders_of(adapters: Sequence[Adapter]) -> list[LoadedComponent]:
    """The CLIP vision models of adapters, one for each adapter that has one."""
    encoders = [adapter.feature_encoder for adapter in adapters]
    return [encoder.component for encoder in encoders if isinstance(encoder, CLIPFeatureEncoder)]


def open_adapter(
    path: str | os.PathLike,
    image_encoder: str | os.PathLike | Literal[False] | None,
    unet: UNetConfig,
    revision: str | None = None,
) -> OpenedAdapter:
    """Opens an adapter for this UNet and the image encoder that feeds it, by default the one beside the adapter; False
    leaves it out, for embeddings.

    Raises WeightFileError or InputError when the three do not fit, naming what is needed.
    """
    if not image_encoder or path_here(image_encoder, "image encoder") is not None:
        check_revision(path, revision, "adapter")  # else it may be meant for the encoder
    local = adapter_file(path, revision)
    file = open_ip_adapter(local)
    widths = tuple(site.width for site in cross_attention_layers(unet))
    check_base(file, unet.cross_attention_dim, widths)
    weights = check_ip_adapter(file, widths)
    if image_encoder is False:
        return OpenedAdapter(file, weights, None, widths)
    encoder = open_image_encoder(_encoder_beside(path, local) if image_encoder is None else image_encoder, revision)
    check_encoder(file, encoder.config.projection_dim, encoder.config.hidden_size, str(encoder.source))
    return OpenedAdapter(file, weights, encoder, widths)


def _encoder_beside(path: str | os.PathLike, local: Path) -> str | os.PathLike:
    here = path_here(path, "adapter") is not None  # else on the Hub, whose cache may hold half a download
    beside = (local if here else PurePosixPath(str(path))).parent / "image_encoder"
    if here and not os.path.isdir(beside):
        raise InputError(
            f"adapter {path}: there is no folder image_encoder beside it; name the encoder with "
            f"{argument('image_encoder')}"
        )
    return beside
