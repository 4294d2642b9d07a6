"""What a run exports: adapter.safetensors with its model card, and the UNet where that was trained."""

import json

import numpy as np
import optax

from ipadapter_jax.storage.store import Store
from ipadapter_jax.storage.text_files import encode_utf8
from ipadapter_jax.train.config import Model
from ipadapter_jax.train.model_card import model_card
from ipadapter_jax.train.networks import LoadedNetworks
from ipadapter_jax.train.optim import Partitioned, combine
from ipadapter_jax.train.run_identity import RunIdentity
from ipadapter_jax.weights.component_export import save_component
from ipadapter_jax.weights.components import UNET
from ipadapter_jax.weights.ip_adapter_export import adapter_metadata, save_ip_adapter

ADAPTER = "adapter.safetensors"


def export_run(
    store: Store,
    trainable: Partitioned,
    loaded: LoadedNetworks,
    *,
    model: Model,
    dtype: str,
    identity: RunIdentity,
    step: int,
) -> None:
    """Writes `trainable`, partitioned parameters as arrays of this process, into the store of the run, in `dtype`.

    The model card shows the data and settings of `identity`. Raises InputError when
    something is not finite or cannot be written; older files then stay.
    """
    if not isinstance(trainable["unet"], optax.MaskedNode):
        settings = json.dumps(loaded.base.component_config("unet").settings, indent=2)
        save_component(UNET, store.path("unet"), trainable["unet"], np.dtype(dtype), settings.encode())
    projection = loaded.networks.projection
    if projection is None:
        return
    params = {part: tree for part, tree in combine(trainable, loaded.frozen.params).items() if part != "unet"}
    metadata = adapter_metadata(projection.config, step=step)
    save_ip_adapter(store.path(ADAPTER), params, dtype=dtype, metadata=metadata)
    card = model_card(
        ADAPTER,
        metadata,
        base=model.base,
        image_encoder=model.image_encoder,
        variant=model.variant,
        data=identity.data,
        settings=identity.settings,
    )
    store.write("README.md", encode_utf8(card))
