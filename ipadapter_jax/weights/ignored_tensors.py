"""Tensors in a file that are not weights of the network: left out, and reported."""

import logging
import re
from collections.abc import Mapping, Sequence

from ipadapter_jax.weights.lazy import Tensor

log = logging.getLogger("ipadapter_jax")


def drop_ignored(tensors: Mapping[str, Tensor], pattern: str, source: str) -> dict[str, Tensor]:
    """The tensors whose names do not match, reporting those that do."""
    ignored = dict.fromkeys(name for name in tensors if re.fullmatch(pattern, name))
    report_ignored([*ignored], source)
    return {name: tensor for name, tensor in tensors.items() if name not in ignored}


def report_ignored(names: Sequence[str], source: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.info("%s: ignored %s%s", source, ", ".join(names[:3]), more)
