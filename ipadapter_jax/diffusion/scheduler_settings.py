"""Which settings of a scheduler_config.json each sampler reads, as the scheduler of that name in diffusers does.

A file is written for one scheduler and read for another: what the other's class does not know is ignored, what the file
leaves out is that class's default. `FOLLOWED` are the settings that change a table here, with these defaults; `FIXED`
those of which only some values are supported. Every other value of those is an error where the sampler is used.
"""

from collections.abc import Mapping

# Of the noise schedule itself: every scheduler knows them, with the same default unless it says otherwise.
SHARED = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("timestep_spacing", "steps_offset"),
)

# diffusers' own default of clip_sample is true for DDIM and DDPM, but its pipelines of latent models turn it off.
_CLIPPED = {"clip_sample": False, "clip_sample_range": 1.0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_BY_SIGMA = {"timestep_spacing": "linspace", **_ZERO_SNR}
# A Karras schedule reads these two of any file, also where its class has no such setting.
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

# Known to some scheduler, and without effect on what is made of a supported file.
_WITHOUT_EFFECT = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}
KNOWN = sorted(
    {*SHARED, *_WITHOUT_EFFECT, *(name for by in (FOLLOWED, FIXED) for settings in by.values() for name in settings)}
)
