"""Warns of settings that have no effect with the others of a run. A recipe may state them, so they are not an error."""

import warnings
from operator import attrgetter
from typing import NamedTuple

from ipadapter_jax.train.config import Train, flag


class _UnusedOptions(NamedTuple):
    names: tuple[str, ...]
    idle: bool
    why: str


def warn_of_unused_options(config: Train) -> None:
    """Warns of settings that differ from their defaults and have no effect."""
    plain = Train()
    for names, idle, why in _rules(config):
        changed = [f"--{flag(name)}" for name in names if attrgetter(name)(config) != attrgetter(name)(plain)]
        if idle and changed:
            has = "have" if len(changed) > 1 else "has"
            warnings.warn(f"{', '.join(changed)} {has} no effect {why}", stacklevel=3)


def _rules(config: Train) -> list[_UnusedOptions]:
    model, log = config.model, config.log
    grid = ("log.clip", "log.guidance_scale")
    return [
        _UnusedOptions(
            ("model.resampler_depth", "model.resampler_heads"), model.adapter != "plus", "without a Resampler (plus)"
        ),
        _UnusedOptions(
            ("model.num_tokens", "model.image_encoder", "data.cond_image_column"),
            model.adapter == "none",
            "with --model.adapter none",
        ),
        _UnusedOptions(
            ("log.validation_path", "log.validation_size", "log.sample_steps", *grid),
            log.validate_every == 0,
            "with --log.validate-every 0",
        ),
        _UnusedOptions(grid, log.validate_every > 0 and log.sample_steps == 0, "with --log.sample-steps 0"),
    ]
