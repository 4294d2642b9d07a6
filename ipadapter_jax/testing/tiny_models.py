"""A pipeline of random weights in one call."""

import tempfile
from pathlib import Path

from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion
from ipadapter_jax.testing.random_weights import ADAPTER, write_model
from ipadapter_jax.testing.sizes import NANO, ModelConfigs


def tiny_pipeline(configs: ModelConfigs = NANO, *, dtype: str = "float32", ip_adapter: bool = True) -> StableDiffusion:
    """A model of random weights, with image encoder and base adapter unless `ip_adapter` is False: then a call takes
    no image prompt.

    The weights are the same at every call. `NANO`, of one level, makes images of 8 x 8 pixels and compiles within
    seconds; `ipadapter_jax.testing.sizes` has larger ones. The folder that it is read from is removed again.
    """
    with tempfile.TemporaryDirectory(prefix="tiny-pipeline-") as folder:
        write_model(Path(folder), configs)
        pipe = StableDiffusion.from_pretrained(folder, dtype=dtype)
        return pipe.with_ip_adapter(Path(folder, ADAPTER)) if ip_adapter else pipe
