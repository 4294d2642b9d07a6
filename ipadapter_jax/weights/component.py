"""What kinds of networks there are: how one is stored and built, as data."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ipadapter_jax.weights.lazy import Tensor


@dataclasses.dataclass(frozen=True)
class Component:
    """How one network is stored and built.

    `translate` brings the tensors of another layout to PyTorch's, `modernise` an old PyTorch spelling of a key to
    today's; keys that match `ignored` hold no weights of this network (buffers, or the other half of a whole CLIP) and
    are reported. `kind` is what `kinds.identify` calls such a file.
    """

    title: str
    kind: str
    classes: tuple[str, ...]  # of diffusers or transformers, by which its config.json names it
    torch_stem: str
    flax_stem: str
    config: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., Any]
    example: Callable[[Any], Callable]  # config -> a function of the module that touches every parameter
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    other_files: tuple[str, ...] = ()  # names under which its weights are found, too
    translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    modernise: Callable[[str], str] = lambda key: key
    ignored: str = r"(?!)"
