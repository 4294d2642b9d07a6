"""job.json, the settings that the images of a folder are made with: options of the command line, digests of files and
of configurations, versions of packages."""

from collections.abc import Mapping

from ipadapter_jax.storage.store import Store

FILE_NAME = "job.json"
CONFIGURATIONS = "configurations"  # digests of the model's configurations; older releases recorded none

_FORMER_NAMES: Mapping[str, str] = {"base": "model", "fit": "reference_resize", "layers": "layer_scales"}
_FORMER_UNCOND = {"zero pixels": "zero-pixels"}


def read_settings(store: Store) -> dict[str, object]:
    """The recorded settings of a folder; those that older releases recorded get the names and values of today.

    Raises InputError when job.json is missing or damaged.
    """
    recorded = store.read_json_object(FILE_NAME)
    settings: dict[str, object] = {_FORMER_NAMES.get(name, name): value for name, value in recorded.items()}
    if isinstance(uncond := settings.get("uncond"), str):
        settings["uncond"] = _FORMER_UNCOND.get(uncond, uncond)
    return settings
