"""DDIM against diffusers' scheduler, step by step on a synthetic model, and its own algebra."""

import jax
import numpy as np
import pytest
from helpers import load_case

from ipadapter_jax.diffusion.ddim import ddim_step, ddim_steps, to_x0_and_epsilon
from ipadapter_jax.diffusion.guidance import guide
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.mark.parametrize("name", ["ddim", "ddim_eta", "ddim_linspace", "ddim_trailing", "ddim_zero_snr"])
def test_steps_equal_diffusers(name):
    case = load_case(f"sched_{name}")
    for run, config in case.meta["configs"].items():
        schedule = NoiseSchedule.from_json(config)
        steps = ddim_steps(schedule, int(run.split("_")[1]), eta=0.5 if name == "ddim_eta" else 0.0)
        before = np.concatenate([case.inputs["x0"][None], case.outputs[f"{run}/prev"][:-1]])
        outputs = case.outputs[f"{run}/model_out"]
        first, count = case.meta["noise_used"][run]
        noise = [case.inputs[f"noise_{i}"] for i in range(first, count)] or [None] * len(outputs)
        after = []
        for i, (x, output) in enumerate(zip(before, outputs, strict=True)):
            after.append(ddim_step(schedule, jax.tree.map(lambda f, i=i: f[i], steps), x, output, noise[i]))
        case.check(**{f"{run}/timesteps": np.float32(steps.timestep), f"{run}/prev": np.stack(after)})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_recovers_the_same_sample_and_noise(prediction_type):
    rng = np.random.default_rng(0)
    x0, epsilon, alpha = rng.standard_normal(5), rng.standard_normal(5), 0.3
    x = np.sqrt(alpha) * x0 + np.sqrt(1 - alpha) * epsilon
    v = np.sqrt(alpha) * epsilon - np.sqrt(1 - alpha) * x0
    output = {"epsilon": epsilon, "v_prediction": v, "sample": x0}[prediction_type]
    found = to_x0_and_epsilon(prediction_type, x, output, np.float64(alpha))
    np.testing.assert_allclose(found[0], x0, rtol=1e-5)
    np.testing.assert_allclose(found[1], epsilon, rtol=1e-5)


def test_one_step_of_a_perfect_model_lands_on_the_schedule():
    schedule = NoiseSchedule.from_json(SD15)
    steps = ddim_steps(schedule, 10)
    step = jax.tree.map(lambda field: field[3], steps)
    x0, epsilon = np.float32([1.0, -2.0]), np.float32([0.5, 0.25])
    x = np.sqrt(step.alpha) * x0 + np.sqrt(1 - step.alpha) * epsilon
    expected = np.sqrt(step.alpha_next) * x0 + np.sqrt(1 - step.alpha_next) * epsilon
    np.testing.assert_allclose(ddim_step(schedule, step, x, epsilon), expected, rtol=1e-5)
    assert steps.alpha_next[2] == steps.alpha[3]


def test_guidance():
    output = np.float32([[[1.0], [3.0]]])
    np.testing.assert_array_equal(guide(output, 1.0), [[3.0]])
    np.testing.assert_array_equal(guide(output, 7.5), [[16.0]])


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(InputError, match=f"num_inference_steps={steps} must be a whole number between 1 and 1000"):
        NoiseSchedule.from_json(SD15).timesteps(steps)


@pytest.mark.parametrize(
    "wrong",
    [{"beta_schedule": "sigmoid"}, {"prediction_type": "flow"}, {"timestep_spacing": "x"}, {"thresholding": True}],
)
def test_unknown_conventions_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        NoiseSchedule.from_json(SD15 | wrong)


def test_a_config_without_clip_sample_clips_like_diffusers_and_says_so():
    with pytest.warns(UserWarning, match="no clip_sample"):
        assert NoiseSchedule.from_json({}).clip_sample
