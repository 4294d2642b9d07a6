"""Which settings of a scheduler_config.json each sampler reads, as the scheduler of that name in diffusers does.

A file may be written for one scheduler and used with another. As in diffusers, settings that the other scheduler does
not know are ignored, and settings that the file does not have get that scheduler's defaults.

- `SHARED`: settings of the noise schedule, which all samplers read.
- `FOLLOWED`: by sampler, the other settings that it follows, with the defaults of diffusers' scheduler. A setting of
  `SHARED` stands here too if its default is another.
- `FIXED`: by sampler, settings of which it supports only these values. Any other value is an error when the sampler is
  used.
"""

from collections.abc import Mapping

SHARED = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("timestep_spacing", "steps_offset"),
)

# diffusers' own default of clip_sample is true for DDIM and DDPM, but its pipelines of latent models turn it off.
_CLIPPED = {"clip_sample": False, "clip_sample_range": 1.0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_BY_SIGMA = {"timestep_spacing": "linspace", **_ZERO_SNR}
# With use_karras_sigmas, sigma_min and sigma_max of a file are read even if the scheduler has no such setting.
_KARRAS = {"use_karras_sigmas": False, "sigma_min": None, "sigma_max": None, "final_sigmas_type": "zero"}

FOLLOWED: Mapping[str, Mapping[str, object]] = {
    "ddim": {"set_alpha_to_one": True, **_CLIPPED, **_ZERO_SNR},
    "ddpm": {**_CLIPPED, **_ZERO_SNR},
    "pndm": {"set_alpha_to_one": False, "skip_prk_steps": False},
    "dpmsolver++": {
        **{**_BY_SIGMA, **_KARRAS, "solver_order": 2, "lower_order_final": True, "euler_at_final": False},
        "lambda_min_clipped": None,
    },
    "euler": {**_BY_SIGMA, **_KARRAS, "timestep_type": "discrete"},
    "euler_a": _BY_SIGMA,
    "unipc": {
        **{**_BY_SIGMA, **_KARRAS, "solver_order": 2, "lower_order_final": True, "solver_type": "bh2"},
        "disable_corrector": (),
    },
    "lcm": {
        **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **_CLIPPED, **_ZERO_SNR},
        **{"original_inference_steps": 50, "timestep_scaling": 10.0},
    },
}

_UNTHRESHOLDED = {"thresholding": (False,)}
_NO_OTHER_SIGMAS = {"use_exponential_sigmas": (False,), "use_beta_sigmas": (False,)}
FIXED: Mapping[str, Mapping[str, tuple]] = {
    "ddim": _UNTHRESHOLDED,
    "ddpm": {**_UNTHRESHOLDED, "variance_type": ("fixed_small", "fixed_small_log")},  # the same variance
    "pndm": {"prediction_type": ("epsilon", "v_prediction")},
    "dpmsolver++": {
        **{**_UNTHRESHOLDED, **_NO_OTHER_SIGMAS, "use_lu_lambdas": (False,), "use_flow_sigmas": (False,)},
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint", "bh1", "bh2", "logrho"),  # and the last three as midpoint
        "solver_order": (1, 2),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),  # DDPM's, ignored here
    },
    "euler": {**_NO_OTHER_SIGMAS, "interpolation_type": ("linear",)},
    "euler_a": {"prediction_type": ("epsilon", "v_prediction")},
    "unipc": {
        **{**_UNTHRESHOLDED, **_NO_OTHER_SIGMAS, "use_flow_sigmas": (False,), "use_dynamic_shifting": (False,)},
        **{"solver_order": (1, 2), "predict_x0": (True,), "solver_p": (), "shift_terminal": ()},
    },
    "lcm": _UNTHRESHOLDED,
}

# Settings that some scheduler knows, without effect if the other settings are supported.
_WITHOUT_EFFECT = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}
KNOWN = sorted(
    {*SHARED, *_WITHOUT_EFFECT, *(name for by in (FOLLOWED, FIXED) for settings in by.values() for name in settings)}
)
