"""`ipadapter-jax inspect`: what it is told."""

import dataclasses
from pathlib import Path

from ipadapter_jax.cli.declared import Positional


@dataclasses.dataclass
class Inspect:
    """Shows what a file or folder of weights is: kind, variant, base model, the image encoder it needs, tokens, dtype,
    parameters, metadata and digest."""

    file: Positional[Path]
    """A file of weights, or a folder of them."""
    json: bool = False
    """As one JSON object rather than as a table."""
