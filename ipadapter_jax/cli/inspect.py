"""`ipadapter-jax inspect`: what it is told."""

import dataclasses

from ipadapter_jax.cli.option_types import Positional
from ipadapter_jax.storage.paths import PathOrHubId


@dataclasses.dataclass
class Inspect:
    """Shows what a file or folder of weights is: kind, variant, base model, the image encoder it needs, tokens, dtype,
    parameters, metadata and digest."""

    file: Positional[PathOrHubId]
    """A file of weights, a folder of them, a place on the Hub, or mini or mini-plus inside this package."""
    json: bool = False
    """As one JSON object rather than as a table."""
