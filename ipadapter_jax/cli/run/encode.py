"""`ipadapter-jax encode`: latents and image features of a data set, computed once."""

from ipadapter_jax.data.feature_cache import CachedSamples
from ipadapter_jax.train.precompute import Encode
from ipadapter_jax.train.precompute import encode as run


def encode(config: Encode) -> int:
    """Runs it and says what is there now. Returns the exit code."""
    skipped = run(config)
    if skipped is not None:
        print(f"{config.out}: {len(CachedSamples(config.out)) - skipped} samples, {skipped} records skipped")
    return 0
