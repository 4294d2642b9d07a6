"""Settings that have no effect beside others are said; the recipes of the package have none."""

import dataclasses
import warnings

import pytest

from ipadapter_jax import InputError
from ipadapter_jax.cli.recipes import load_recipe, recipes
from ipadapter_jax.train.config import Data, Log, Model, Train, check, check_batch_memory
from ipadapter_jax.train.unused_options import warn_of_unused_options


def said(config: Train) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_unused_options(config)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": Model(resampler_heads=20)}, "--model.resampler-heads has no effect without a Resampler (plus)"),
        (
            {"model": Model(adapter="full", resampler_depth=8, resampler_heads=16)},
            "--model.resampler-heads have no effect",
        ),
        ({"model": Model(adapter="none", num_tokens=4)}, "--model.num-tokens has no effect with --model.adapter none"),
        (
            {"log": Log(validate_every=0, validation_size=4)},
            "--log.validation-size has no effect with --log.validate-every 0",
        ),
        (
            {"log": Log(sample_steps=0, guidance_scale=2)},
            "--log.guidance-scale has no effect with --log.sample-steps 0",
        ),
    ],
)
def test_settings_without_effect_are_reported(changes, words):
    [line] = said(dataclasses.replace(Train(), **changes))
    assert words in line


def test_settings_with_effect_are_not():
    assert said(Train()) == []
    assert said(Train(model=Model(adapter="plus", resampler_heads=20))) == []


@pytest.mark.parametrize("name", recipes())
def test_recipes_have_no_settings_without_effect(name):
    assert said(load_recipe(name)[0]) == []


def test_too_large_settings_are_refused_before_anything_is_read():
    huge = Train(data=Data(path="x", resolution=10_000_000))
    with pytest.raises(
        InputError, match=r"--data.resolution 10000000 would need at least .* \(1,500,000,000,000,000 bytes"
    ):
        check(huge)
    with pytest.raises(InputError, match="a batch of 1,000,000,000 images of 512 pixels would need at least"):
        check_batch_memory(Train(data=Data(batch_size=10**9)), 2)
    check_batch_memory(Train(), 1)
