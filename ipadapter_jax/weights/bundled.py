"""The model inside the package: `mini`, small, trained by this project, in diffusers' layout as any other.

Its name takes precedence over a path: mini is this model wherever a model is expected, ./mini is a folder of that
name. A path inside it is written as on the Hub: mini/image_encoder.
"""

from pathlib import Path, PurePosixPath

from ipadapter_jax.errors import InputError

NAME = "mini"
FOLDER = Path(__file__).parents[1] / NAME
REFERENCE = FOLDER / "reference.png"  # a scene that none of its networks was trained on
GUIDANCE_SCALE = 4.0  # the default for this model

# (kind of thing, short name) -> its place.
_SHORT = {
    ("adapter", "mini"): "mini/ip-adapter_mini.safetensors",
    ("adapter", "mini-plus"): "mini/ip-adapter-plus_mini.safetensors",
    ("image encoder", "mini"): "mini/image_encoder",
    **{(what, "mini-plus"): "mini/ip-adapter-plus_mini.safetensors" for what in ("source", "weights")},
}


def names(what: str) -> list[str]:
    """The short names by which the bundled model has a `what`, such as "adapter"."""
    return sorted({NAME} | {name for kind, name in _SHORT if kind == what})


def bundled_path(reference: str, what: str) -> Path | None:
    """Where the model inside the package has the "base model", "adapter" or "image encoder" of this name; None for
    every other name. Raises InputError where the package was installed without its model."""
    place = _SHORT.get((what, reference), reference)
    first, *rest = PurePosixPath(place).parts or ("",)
    if first != NAME or ".." in rest or place.startswith("."):
        return None
    path = FOLDER.joinpath(*rest)
    if path.exists():
        return path
    if place == reference != NAME:
        return None
    raise InputError(f"{what} {reference}: the package was installed without it ({path} is missing); install it again")
