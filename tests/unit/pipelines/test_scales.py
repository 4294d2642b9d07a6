"""Scales as a person writes them against the formulas written out, and against what diffusers makes of the same."""

import re

import numpy as np
import pytest
from helpers import TORCH_MODEL

from ipadapter_jax import InputError, Scale
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.pipelines.scales import preset_names, scale_table

SITES = cross_attention_layers(UNetConfig())
# The numbers of the layers in the order in which an image passes them (down, mid, up), in file order: mid is last
# in a file and the seventh to be passed.
EXECUTED = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 6]
STYLE = {0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15}
FORMULAS = {
    "linear": lambda t: 1.0,
    "ease in": lambda t: 0.05 + 0.95 * (1 - t / 16),
    "ease out": lambda t: 0.05 + 0.95 * t / 16,
    "ease in-out": lambda t: 0.05 + 0.95 * (1 - abs(t - 8) / 8),
    "reverse in-out": lambda t: 0.05 + 0.95 * abs(t - 8) / 8,
    "weak input": lambda t: 0.2 if t < 6 else 1.0,
    "weak middle": lambda t: 0.2 if t == 6 else 1.0,
    "weak output": lambda t: 0.2 if t > 6 else 1.0,
    "strong middle": lambda t: 1.0 if t == 6 else 0.2,
    "style": lambda t: float(t in STYLE),
    "composition": lambda t: {4: 0.25, 5: 1.0}.get(t, 0.0),
    "strong style": lambda t: float(t not in (4, 5)),
    "style+composition": lambda t: 1.0 if t in STYLE or t == 5 else 0.25 * (t == 4),
    "precise style": lambda t: float(t in STYLE),
    "precise composition": lambda t: {4: 0.25, 5: 1.0}.get(t, 0.0),
}


def executed(factors) -> np.ndarray:
    """Factors in the order of execution, or a function of the layer's number, in file order."""
    return np.array([factors(t) if callable(factors) else factors[t] for t in EXECUTED], np.float32)


def weight(scale, steps: int = 1, sites=SITES) -> np.ndarray:
    return scale_table(scale, sites, steps).weight


def test_there_is_a_formula_for_every_preset():
    assert set(preset_names()) == FORMULAS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_presets_by_their_formulas(name):
    for scale, value in ((name, 1.0), (Scale(0.6, name), 0.6)):
        found = weight(scale, 3)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, value * np.tile(executed(FORMULAS[name]), (3, 1)), rtol=1e-6)


STYLE = (*range(4), *range(9, 16))


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("precise style", {4: 0.25, 5: 1.0}),
        ("precise composition", {**dict.fromkeys(STYLE, 1.0), **dict.fromkeys((6, 7, 8), 0.1)}),
    ],
)
def test_precise_presets_exchange_the_branches_where_they_do_not_act(name, spared):
    """With the factors that ComfyUI has there."""
    table = scale_table(Scale(0.5, name, end=0.5), SITES, 4)
    expected = np.tile(executed(lambda t: 0.5 * spared.get(t, 0)), (2, 1))
    np.testing.assert_allclose(table.swapped[:2], expected, rtol=1e-6)
    assert not table.swapped[2:].any() and not table.weight[2:].any()
    assert not (table.weight * table.swapped).any()


@pytest.mark.parametrize("scale", [0.7, "style", "ease in"])
def test_nothing_else_exchanges_them(scale):
    assert not scale_table(scale, SITES, 2).swapped.any()


def test_precise_presets_are_no_part_of_a_sum():
    with pytest.raises(InputError, match="'precise style' cannot be a part of a sum; give it alone"):
        weight({"precise style": 1.0, "linear": 0.1})


def test_numbers_act_everywhere():
    for one in (0.7, np.float32(0.7), Scale(0.7)):
        np.testing.assert_array_equal(weight(one, 2), np.full((2, 16), np.float32(0.7)))
    assert not weight(0).any() and weight(-1).min() == -1


def test_a_factor_for_each_layer_is_in_the_order_of_execution():
    factors = np.arange(16) / 10
    for given in (factors, list(factors), tuple(factors)):
        np.testing.assert_array_equal(weight(Scale(2.0, given))[0], executed(2 * factors))


def test_presets_add_up_with_factors():
    found = weight(Scale(0.5, {"style": 1.0, "composition": 0.4, "linear": 0.1}))[0]
    style, composition = FORMULAS["style"], FORMULAS["composition"]
    np.testing.assert_allclose(found, executed(lambda t: 0.5 * (style(t) + 0.4 * composition(t) + 0.1)), rtol=1e-6)
    np.testing.assert_array_equal(weight({"style": 1, "composition": 1}), weight("style+composition"))


DICTIONARIES = [
    {"up": {"block_1": [0.0, 1.0, 0.0]}},
    {"down": {"block_2": [0.0, 1.0]}, "up": {"block_1": [0.0, 1.0, 0.0]}},
    {"down": 0.3, "mid": 0.9, "up": {"block_2": 0.5, "block_3": [0.1, 0.2, 0.4]}},
    {"mid": 2},
    {"mid": [0.3], "up": {"block_1": [0.7]}},  # a list of one number is that number
    {"down": [0.1, 0.2], "up": [0.3, 0.4, 0.5]},  # for a part: the layers of each of its blocks
    {},
]


@pytest.mark.torch
@pytest.mark.parametrize("tree", DICTIONARIES)
def test_dictionaries_mean_what_they_mean_to_diffusers(tree, peer):
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    [expanded] = _maybe_expand_lora_scales(peer, [tree], default_scale=0.0)
    sites = [name for name in peer.attn_processors if "attn2" in name]  # in the order of a file
    expected = [next(value for key, value in expanded.items() if name.startswith(key)) for name in sites]
    np.testing.assert_array_equal(weight(tree)[0], np.float32(expected))
    np.testing.assert_allclose(weight(Scale(0.5, tree))[0], 0.5 * np.float32(expected))


@pytest.fixture(scope="module")
def peer():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel.from_pretrained(TORCH_MODEL / "unet")


@pytest.mark.parametrize("steps", [1, 3, 4, 10])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.25, 1.0), (0.3, 0.71), (0.5, 0.75)])
def test_start_and_end_are_parts_of_the_run(start, end, steps):
    """As control_guidance_start and _end: step i of n, from i / n to (i + 1) / n, must lie inside as a whole."""
    expected = [0.0 if i / steps < start or (i + 1) / steps > end else 1.0 for i in range(steps)]
    if not any(expected):
        with pytest.raises(InputError, match=f"no whole step of {steps} lies between start={start} and end={end}"):
            weight(Scale(start=start, end=end), steps)
        return
    np.testing.assert_array_equal(weight(Scale(start=start, end=end), steps), np.tile(np.c_[expected], 16))


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ((1,), [1, 1, 1, 1, 1]),
        ((1, 0), [1, 0.75, 0.5, 0.25, 0]),
        ((0, 1), [0, 0.25, 0.5, 0.75, 1]),
        ((0, 1, 0), [0, 0.5, 1, 0.5, 0]),
        ((0.1, 0.2, 0.3, 0.4, 0.5), [0.1, 0.2, 0.3, 0.4, 0.5]),
        ((1, 2, 3, 4, 5, 6, 7, 8, 9), [1, 3, 5, 7, 9]),
    ],
)
def test_steps_spread_their_factors_evenly(curve, expected):
    found = weight(Scale(2.0, "ease out", steps=curve), 5)
    np.testing.assert_allclose(found, 2 * np.outer(expected, executed(FORMULAS["ease out"])), rtol=1e-6)


def test_the_steps_of_a_curve_go_on_outside_of_start_and_end():
    """They belong to the whole run; start and end only cut."""
    found = weight(Scale(start=0.5, steps=(1, 0)), 4)[:, 0]
    np.testing.assert_allclose(found, [0, 0, 1 / 3, 0], rtol=1e-6)


def test_one_step_takes_the_first_factor():
    assert weight(Scale(steps=(0.3, 0.9)), 1)[0, 0] == np.float32(0.3)


# As the model inside the package has them: down 0 and 1 of one layer each, up 0 and 1 of two, mid.
TWO_LEVELS = cross_attention_layers(
    UNetConfig(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
    )
)


def test_presets_of_sd15s_layers_are_refused_elsewhere():
    assert len(TWO_LEVELS) == 7
    for name in ("style", "composition", "strong style", "style+composition", "precise style", "precise composition"):
        words = re.escape(f"the preset '{name}' is for the 16 transformers")
        with pytest.raises(InputError, match=f"{words} .* this UNet has 7; give factors for its layers"):
            weight(name, sites=TWO_LEVELS)
        with pytest.raises(InputError, match="part of a sum" if "precise" in name else words):
            weight({name: 1.0, "linear": 1.0}, sites=TWO_LEVELS)


def test_other_presets_follow_the_number_of_layers():
    """Down 0 and 1, mid 2, up 3 to 6; in file order mid comes last."""
    np.testing.assert_array_equal(weight("weak output", sites=TWO_LEVELS), np.float32([[1, 1, 0.2, 0.2, 0.2, 0.2, 1]]))
    expected = [0.05 + 0.95 * t / 7 for t in (0, 1, 3, 4, 5, 6, 2)]
    np.testing.assert_allclose(weight("ease out", sites=TWO_LEVELS), [expected], rtol=1e-6)
    np.testing.assert_array_equal(weight({"up": {"block_1": [2, 3]}}, sites=TWO_LEVELS), [[0, 0, 0, 0, 2, 3, 0]])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("stlye", "no preset 'stlye'; did you mean 'style'"),
        ({4: 1.0}, "no preset 4; choose linear"),
        ({"style": 1, "down": 1}, "no preset 'down'"),
        ({"down": {"block_3": 1}}, "down.block_3 has no cross-attention here; down has block_0, block_1, block_2"),
        ({"up": {"block_0": 1}}, "up.block_0 has no cross-attention here; up has block_1, block_2, block_3"),
        ({"down": {"block_1": [1, 2, 3]}}, "down.block_1 has 3 factors for 2 transformers"),
        ({"mid": [1, 2]}, "mid.* has 2 factors for 1 transformers"),
        ({"mid": None}, "mid.*None"),
        ({"style": "1"}, "'style'.*=1 is not a finite number"),
        (Scale(layers=[1.0] * 15), "15 factors for 16 layers"),
        (Scale(layers=[np.nan] * 16), "nan is not a finite number"),
        (Scale(np.inf), "inf is not a finite number"),
        (Scale(start=-0.1), "start=-0.1"),
        (Scale(end=1.1), "end=1.1"),
        (Scale(start=0.5, end=0.4), "start=0.5 and end=0.4"),
        (Scale(start=np.nan), "start of a scale=nan"),
        (Scale(steps=[]), "steps is empty"),
        (Scale(steps="1"), "is not a list of numbers"),
        (Scale(layers=3), "is not a list of numbers"),
        (None, "None is not a finite number"),
    ],
)
def test_what_is_no_scale_is_refused_by_name(scale, message):
    with pytest.raises(InputError, match=message) as caught:
        weight(scale, 4)
    assert "\n" not in str(caught.value)
