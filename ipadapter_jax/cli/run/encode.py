"""`ipadapter-jax precompute`: latents and image features of a data set, computed once."""

from ipadapter_jax.data.feature_cache import CachedSamples
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.precompute import PrecomputeConfig
from ipadapter_jax.train.precompute import precompute as run


def precompute(config: PrecomputeConfig) -> int:
    """Runs it and says what is there now. Returns the exit code."""
    skipped = run(config)
    if skipped is not None:
        samples = CachedSamples(LocalStore(config.out))
        print(f"{config.out}: {len(samples) - skipped} samples, {skipped} records skipped")
    return 0
