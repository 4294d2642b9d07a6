"""Options of `ipadapter-jax inspect`."""

import dataclasses

from ipadapter_jax.cli.option_types import Positional
from ipadapter_jax.storage.paths import PathOrHubId


@dataclasses.dataclass
class Inspect:
    """Shows what a file or folder of weights holds: kind, variant, base model, the image encoder that it needs, tokens,
    data type, parameters, metadata and digest."""

    file: Positional[PathOrHubId]
    """File or folder of weights, path on the Hub, or mini or mini-plus, which are inside this package."""
    json: bool = False
    """Print one JSON object instead of a table."""
