"""Every sampler against diffusers' scheduler, step by step on a synthetic model; orders of convergence; algebra."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_case

from ipadapter_jax.diffusion.guidance import guide
from ipadapter_jax.diffusion.sampler_table import BASIS, HISTORY, M0, init_state, sampler_step
from ipadapter_jax.diffusion.samplers import SAMPLERS, sample_table
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}

# The recorded schedulers, and our name for each.
CASES = {
    **dict.fromkeys(("ddim", "ddim_eta", "ddim_linspace", "ddim_trailing", "ddim_zero_snr"), "ddim"),
    **{"ddpm": "ddpm", "pndm": "pndm", "lcm": "lcm", "dpmpp2m": "dpmsolver++", "dpmpp2m_karras": "dpmsolver++"},
    **dict.fromkeys(("euler", "euler_karras", "euler_leading"), "euler"),
    **{"euler_a": "euler_a", "unipc": "unipc", "unipc_bh1": "unipc", "unipc_karras": "unipc"},
}


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_diffusers(name):
    case = load_case(f"sched_{name}")
    for run, config in case.meta["configs"].items():
        eta = 0.5 if name == "ddim_eta" else 0.0
        table = sample_table(CASES[name], NoiseSchedule.from_json(config), int(run.split("_")[1]), eta)
        outputs = case.outputs[f"{run}/model_out"]
        first, last = case.meta["noise_used"][run]
        noise = iter([case.inputs[f"noise_{i}"] for i in range(first, last)])
        state, inputs, after = init_state(case.inputs["x0"] * np.float32(table.init_noise_sigma)), [], []
        for i, output in enumerate(outputs):
            step = jax.tree.map(lambda field, i=i: field[i], table.steps)
            inputs.append(np.asarray(state.x) * step.input_scale)
            state = sampler_step(step, state, output, next(noise, None) if first < last else None)
            after.append(np.asarray(state.x))
        found = {"timesteps": table.steps.timestep, "model_in": np.stack(inputs), "prev": np.stack(after)}
        case.check(**{f"{run}/{name}": value for name, value in found.items()})


def test_names():
    assert BASIS[:3] == ("x", "aux_sample", "output") and len(BASIS) == 3 + HISTORY
    assert set(CASES.values()) == set(SAMPLERS)


# --- order of convergence ------------------------------------------------------------------------------------------


def error(sampler: str, num_steps: int, skip_prk_steps: bool) -> float:
    """Relative error of a run with the exact network for data of N(0, 1/4), where x is sqrt(variance) times a constant
    along the exact solution. Noise levels fall as the sampler likes them: sigma evenly, or by Karras's rule."""
    total = 20_000  # so that timesteps are hardly rounded
    sigma = np.linspace(0.02, 5, total)
    alphas = 1 / (1 + sigma**2)
    betas = 1 - alphas / np.concatenate([[1.0], alphas[:-1]])
    more = {"num_train_timesteps": total, "trained_betas": tuple(betas.tolist()), "final_sigmas_type": "sigma_min"}
    more |= {"use_karras_sigmas": sampler not in ("ddim", "pndm"), "set_alpha_to_one": False}
    more |= {"skip_prk_steps": skip_prk_steps}
    schedule = NoiseSchedule.from_json({**SD15, **more, "timestep_spacing": "trailing"})
    steps, scale, _ = sample_table(sampler, schedule, num_steps)

    def alpha(timestep: float) -> float:
        return 1 / (1 + np.interp(timestep, np.arange(total), sigma) ** 2)

    def variance(a: float) -> float:
        return a / 4 + 1 - a

    start, end = alpha(steps.timestep[0]), alphas[0]
    x, aux_sample = np.sqrt(variance(start)), 0.0
    history = [0.0] * (steps.weights.shape[-1] - 4)
    if scale != 1:  # in the space of x0 + sigma epsilon
        x /= np.sqrt(start)
    for timestep, input_scale, (of_x, of_output), _, weights, *_ in zip(*steps, strict=True):
        here = alpha(timestep)
        output = np.sqrt(1 - here) * input_scale * x / variance(here)
        m = of_x * x + of_output * output
        x, aux_sample = weights.astype(np.float64) @ np.array([x, aux_sample, output, m, *history])
        history = [m, *history][:-1]
    return abs(x * (np.sqrt(end) if scale != 1 else 1) / np.sqrt(variance(end)) - 1)


@pytest.mark.parametrize(
    ("sampler", "order", "skip_prk_steps"),
    [
        *(("ddim", 1, True), ("euler", 1, True), ("dpmsolver++", 2, True), ("unipc", 2, True)),
        *(("pndm", 2, True), ("pndm", 2, False)),
    ],
)
def test_order_of_convergence(sampler, order, skip_prk_steps):
    """Halving the steps' size divides the error by 2^order."""
    coarse, fine = error(sampler, 40, skip_prk_steps), error(sampler, 80, skip_prk_steps)
    assert order - 0.3 < np.log2(coarse / fine), (coarse, fine)
    assert fine < 10**-order


# --- algebra -------------------------------------------------------------------------------------------------------


def test_one_step_of_a_perfect_model_lands_on_the_schedule():
    schedule = NoiseSchedule.from_json(SD15)
    steps, alphas = sample_table("ddim", schedule, 10).steps, schedule.alphas_cumprod
    a, b = (alphas[int(steps.timestep[i])] for i in (3, 4))
    x0, noise = np.float32([1.0, -2.0]), np.float32([0.5, 0.25])
    state = init_state(np.sqrt(a) * x0 + np.sqrt(1 - a) * noise)
    found = sampler_step(jax.tree.map(lambda field: field[3], steps), state, noise).x
    np.testing.assert_allclose(found, np.sqrt(b) * x0 + np.sqrt(1 - b) * noise, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "lcm", "euler"])
def test_clipping_is_for_the_samplers_that_have_it(sampler):
    schedule = NoiseSchedule.from_json(SD15 | {"clip_sample": True, "clip_sample_range": 0.5})
    table = sample_table(sampler, schedule, 4)
    assert np.all(table.steps.clip == (np.inf if sampler == "euler" else 0.5))
    step = jax.tree.map(lambda field: field[0], table.steps)._replace(weights=np.stack([M0, M0]), noise=np.float32(0))
    found = sampler_step(step, init_state(np.float32([100.0])), np.float32([0.0])).x
    assert abs(found[0]) == (pytest.approx(0.5) if sampler != "euler" else pytest.approx(100.0))


def test_guidance():
    output = np.float32([[[1.0], [3.0]]])
    np.testing.assert_array_equal(guide(output, 1.0), [[3.0]])
    np.testing.assert_array_equal(guide(output, 7.5), [[16.0]])


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5])
def test_impossible_step_counts_are_refused(sampler, steps):
    with pytest.raises(InputError, match=f"num_inference_steps={steps}"):
        sample_table(sampler, NoiseSchedule.from_json(SD15), steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_and_few(sampler):
    for steps in (1, 2, 3):
        table = sample_table(sampler, NoiseSchedule.from_json(SD15 | {"skip_prk_steps": True}), steps)
        assert len(table.steps.timestep) == steps + (sampler == "pndm" and steps > 1)


def test_runge_kutta_steps_of_pndm():
    """Three steps of four calls, where a file does not skip them; not for few steps, nor from the middle."""
    schedule = NoiseSchedule.from_json(SD15)
    assert len(sample_table("pndm", schedule, 10).steps.timestep) == 10 + 9
    for steps, strength in ((3, 1.0), (10, 0.5)):
        with pytest.raises(InputError, match="skip_prk_steps"):
            sample_table("pndm", schedule, steps, strength=strength)


@pytest.mark.parametrize(
    ("sampler", "changes", "words"),
    [
        ("heun", {}, "scheduler 'heun' is not known; choose ddim, ddpm"),
        ("pndm", {"prediction_type": "sample"}, "prediction_type='sample' is not supported by pndm"),
        ("euler_a", {"prediction_type": "sample"}, "prediction_type='sample' is not supported by euler_a"),
        ("lcm", {"steps": 51}, "at most 50"),
        ("euler", {"eta": 0.5}, "eta=0.5 is for the scheduler ddim"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "only v_prediction"),
        ("unipc", {"steps": 1000}, "fewer than 1000"),
        ("unipc", {"lower_order_final": False}, "lower_order_final=False is not supported"),
        ("dpmsolver++", {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}, "lambda_min_clipped"),
        ("ddim", {"steps_offset": 900}, "steps_offset=900"),
    ],
)
def test_settings_that_a_sampler_does_not_support_are_refused(sampler, changes, words):
    steps, eta = changes.pop("steps", 10), changes.pop("eta", 0.0)
    with pytest.raises(InputError, match=words):
        sample_table(sampler, NoiseSchedule.from_json(SD15 | changes), steps, eta)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"beta_schedule": "sigmoid"}, {"prediction_type": "flow"}, {"timestep_spacing": "x"}),
        *({"final_sigmas_type": "x"}, {"solver_type": "x"}, {"timestep_type": "x"}),
        *({"num_train_timesteps": 10**9}, {"num_train_timesteps": 10**400}, {"num_train_timesteps": 0}),
        *({"num_train_timesteps": -1}, {"num_train_timesteps": "x"}, {"num_train_timesteps": 1e9}),
        *({"steps_offset": 10**30}, {"steps_offset": 1000}, {"beta_start": 10**400}, {"beta_end": float("nan")}),
        *({"sigma_min": 0.0}, {"sigma_max": -1}, {"clip_sample_range": 0.0}, {"solver_order": True}),
        *({"beta_start": None}, {"steps_offset": None}, {"prediction_type": None}),
        *({"disable_corrector": ["x"]}, {"disable_corrector": 3}, {"lambda_min_clipped": "x"}),
    ],
)
def test_unknown_conventions_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        NoiseSchedule.from_json(SD15 | wrong)


def test_null_is_the_default_where_it_can_mean_that():
    names = ("timestep_spacing", "trained_betas", "sigma_min", "use_karras_sigmas", "set_alpha_to_one")
    assert NoiseSchedule.from_json(SD15 | dict.fromkeys(names)) == NoiseSchedule.from_json(SD15)


def test_changed_settings():
    schedule = NoiseSchedule.from_json(SD15)
    assert schedule.changed({"use_karras_sigmas": True}).use_karras_sigmas
    assert schedule.changed({}) == schedule
    with pytest.raises(InputError, match="'karras' is not known"):
        schedule.changed({"karras": True})


def test_clip_sample_is_off_by_default_and_warned_about_where_a_config_sets_it():
    assert not NoiseSchedule.from_json({}).clip_sample
    with pytest.warns(UserWarning, match="clip_sample clips predictions"):
        assert NoiseSchedule.from_json({"clip_sample": True}).clip_sample


@pytest.mark.parametrize(
    ("sampler", "setting"),
    [
        ("dpmsolver++", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmsolver++", {"solver_order": 3}),
        ("dpmsolver++", {"solver_type": "heun"}),
        ("unipc", {"predict_x0": False}),
        ("euler", {"use_beta_sigmas": True}),
        ("ddpm", {"variance_type": "fixed_large"}),
        ("unipc", {"solver_p": "x"}),
        ("unipc", {"solver_order": 3}),
    ],
)
def test_settings_that_a_sampler_does_not_follow_are_refused_by_it_alone(sampler, setting):
    schedule = NoiseSchedule.from_json(SD15 | setting)
    assert schedule == NoiseSchedule.from_json(SD15).changed(setting)
    with pytest.raises(InputError, match=f"{next(iter(setting))}=.* is not supported by "):
        sample_table(sampler, schedule, 4)
    sample_table("euler_a", schedule, 4)


def test_a_table_with_a_longer_history_runs_in_the_same_step():
    """Against the same sums in numpy."""
    steps = sample_table("pndm", NoiseSchedule.from_json(SD15), 8).steps
    x = np.float32([0.3, -1.2])
    length = steps.weights.shape[-1]
    assert length == 16 > len(BASIS)
    state, _ = jax.lax.scan(
        lambda state, step: (sampler_step(step, state, jnp.sin(state.x)), None), init_state(x, length), steps
    )
    found, aux_sample = x.astype(np.float64), np.zeros(2)
    history = [np.zeros(2)] * (length - 4)
    for weights in steps.weights.astype(np.float64):
        output = np.sin(found)
        found, aux_sample = weights @ np.stack([found, aux_sample, output, output, *history])
        history = [output, *history][:-1]
    np.testing.assert_allclose(state.x, found, rtol=1e-4)


def test_thresholding_is_refused_by_the_samplers_that_have_it():
    schedule = NoiseSchedule.from_json(SD15 | {"thresholding": True})
    for sampler in ("ddim", "ddpm", "dpmsolver++", "unipc", "lcm"):
        with pytest.raises(InputError, match="thresholding=True is not supported by "):
            sample_table(sampler, schedule, 4)
    sample_table("euler", schedule, 4)


def test_unknown_names_in_a_scheduler_config_are_warned_about():
    with pytest.warns(UserWarning, match="no scheduler here knows it: shift, sigma_data$"):
        NoiseSchedule.from_json(SD15 | {"shift": 3.0, "sigma_data": 0.5, "_class_name": "EDMEulerScheduler"})


def test_the_steps_that_lcm_was_distilled_with_lie_within_those_of_training():
    for original in (0, 2000, 10**12):
        with pytest.raises(InputError, match="original_inference_steps"):
            sample_table("lcm", NoiseSchedule.from_json(SD15 | {"original_inference_steps": original}), 4)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_ddpm_ends_a_step_where_the_next_one_begins(spacing):
    """A perfect network's sample is then at the noise level of the timestep that the network is given."""
    schedule = NoiseSchedule.from_json(SD15 | {"timestep_spacing": spacing})
    table, alphas = sample_table("ddpm", schedule, 7).steps, schedule.alphas_cumprod.astype(np.float64)
    levels = [*alphas[table.timestep.astype(int)], 1.0]
    for i in range(7):
        of_x, of_m = table.weights[i, 0, 0], table.weights[i, 0, 3]
        variance = (of_x * np.sqrt(1 - levels[i])) ** 2 + float(table.noise[i]) ** 2
        assert of_x * np.sqrt(levels[i]) + of_m == pytest.approx(np.sqrt(levels[i + 1]), rel=1e-5)
        assert variance == pytest.approx(1 - levels[i + 1], abs=1e-4 if i < 6 or int(table.timestep[i]) else 1e-2)


def test_settings_that_a_call_names_without_effect_are_warned_about():
    schedule = NoiseSchedule()
    with pytest.warns(UserWarning, match="use_karras_sigmas has no effect on the scheduler ddim; it is for dpmsolver"):
        schedule.changed({"use_karras_sigmas": True}, "ddim")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.changed({"use_karras_sigmas": True}, "euler")
        schedule.changed({"use_karras_sigmas": False, "sigma_min": None}, "ddim")
        NoiseSchedule.from_json({"skip_prk_steps": True}).changed({"timestep_spacing": "trailing"}, "ddim")
    with pytest.raises(InputError, match="'use_karas_sigmas' is not known; did you mean use_karras_sigmas"):
        schedule.changed({"use_karas_sigmas": True}, "ddim")
    with pytest.raises(InputError, match="is not a dictionary of settings"):
        schedule.changed([1], "ddim")
