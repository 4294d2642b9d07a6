"""Runs `ipadapter-jax encode`: latents and image features of a data set, computed once."""

from ipadapter_jax.data.feature_cache import CachedSamples
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.precompute import PrecomputeConfig, precompute


def encode(config: PrecomputeConfig) -> int:
    """Computes the missing samples and prints how many there are now. Returns the exit code."""
    skipped = precompute(config)
    if skipped is not None:
        samples = CachedSamples(LocalStore(config.out))
        print(f"{config.out}: {len(samples) - skipped} samples, {skipped} records skipped")
    return 0
