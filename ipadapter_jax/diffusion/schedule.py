"""The noise schedule of a trained model (DDPM, arXiv 2006.11239): how much signal is left at every timestep."""

import dataclasses
import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.settings import typed


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A model's schedule and the conventions its samplers follow; defaults are those of diffusers' DDIMScheduler."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None  # a sampler's own
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None  # a sampler's own
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool | None = None
    final_sigmas_type: str | None = "zero"
    solver_type: str | None = None  # UniPC's bh1; everything else is its bh2 and DPM-Solver's midpoint
    others: tuple[tuple[str, Any], ...] = ()  # settings that some samplers cannot follow

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "NoiseSchedule":
        """From scheduler/scheduler_config.json of any scheduler. Raises InputError naming what is not supported.

        What a config leaves out takes DDIMScheduler's default, but for clip_sample: diffusers' pipelines of latent
        models turn it off.
        """
        if raw.get("thresholding"):
            raise InputError("scheduler config: thresholding=true is not supported for latent models")
        fields = {field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw}
        if raw.get("clip_sample"):
            warnings.warn("scheduler config: clip_sample clips predictions, which latents do not bear", stacklevel=2)
        others = tuple((name, raw[name]) for name in OTHERS if raw.get(name) is not None)
        schedule: NoiseSchedule = typed(cls, {**fields, "others": ()}, "scheduler")
        schedule = dataclasses.replace(schedule, others=others)
        for name, choices in _CHOICES.items():
            if getattr(schedule, name) not in choices:
                known = ", ".join(filter(None, choices))
                raise InputError(f"scheduler config: {name}={getattr(schedule, name)!r}, known are {known}")
        total = schedule.num_train_timesteps
        if schedule.trained_betas is not None and len(schedule.trained_betas) != total:
            raise InputError(f"scheduler config: {len(schedule.trained_betas)} trained_betas for {total} timesteps")
        if not total or not 0 < schedule.beta_start <= schedule.beta_end < 1:
            raise InputError("scheduler config: it needs training timesteps and 0 < beta_start <= beta_end < 1")
        return schedule

    def changed(self, settings: Mapping[str, Any]) -> "NoiseSchedule":
        """The same with these settings of scheduler_config.json. Raises InputError for one that is not known."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "others"}
        names = [*own, *OTHERS]
        for name in settings:
            if name not in names:
                raise InputError(f"scheduler_config: {name!r} is not known; choose among {', '.join(names)}")
        return self.from_json({**own, **dict(self.others), **settings}) if settings else self

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """The share of the signal's variance left at each timestep, (T,) float32, non-increasing."""
        alphas_cumprod = np.cumprod(1.0 - self._betas(), dtype=np.float64)
        if self.rescale_betas_zero_snr:  # arXiv 2305.08891, algorithm 1: shift and stretch so that the last one is 0
            root = np.sqrt(alphas_cumprod)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root**2
        return alphas_cumprod.astype(np.float32)

    @property
    def final_alpha_cumprod(self) -> np.float32:
        """The share of signal after the last step, beyond timestep 0."""
        return self.alphas_cumprod[0] if self.set_alpha_to_one is False else np.float32(1.0)

    def _betas(self) -> np.ndarray:
        start, end, steps = self.beta_start, self.beta_end, self.num_train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, np.float64)
        if self.beta_schedule == "linear":
            return np.linspace(start, end, steps)
        if self.beta_schedule == "scaled_linear":  # Stable Diffusion's
            return np.linspace(start**0.5, end**0.5, steps) ** 2
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2  # arXiv 2102.09672, equation 17
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)

    def timesteps(self, num_steps: int) -> np.ndarray:
        """Timesteps (num_steps,) int32 from noisy to clean, by `timestep_spacing` (arXiv 2305.08891, table 2).

        Raises InputError unless 1 <= num_steps <= num_train_timesteps.
        """
        total = self.num_train_timesteps
        if not isinstance(num_steps, Integral) or not 1 <= num_steps <= total:
            raise InputError(
                f"{argument('num_inference_steps', num_steps)} must be a whole number between 1 and "
                f"{total}, the training timesteps"
            )
        spacing = self.timestep_spacing or "leading"
        if spacing == "linspace":
            steps = np.linspace(0, total - 1, num_steps).round()[::-1]
        elif spacing == "leading":
            steps = (np.arange(num_steps) * (total // num_steps))[::-1] + self.steps_offset
        else:  # trailing
            # diffusers' rounding error can append a timestep -1 (for 61 steps, say); the cut leaves it out
            steps = np.arange(total, 0, -total / num_steps).round()[:num_steps] - 1
        return steps.astype(np.int32)


_KARRAS_ALONE = dict.fromkeys(
    ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"), (False,)
)
# Settings that are fixed here, by sampler: another value is an error where that sampler is used.
FIXED: Mapping[str, Mapping[str, tuple]] = {
    "dpmsolver++": {
        **{
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (2,),
            "solver_type": ("midpoint", "bh1", "bh2", "logrho"),
        },
        **{"lower_order_final": (True,), "euler_at_final": (False,)},
        **_KARRAS_ALONE,
    },
    "unipc": {"solver_order": (2,), "predict_x0": (True,), "lower_order_final": (True,), **_KARRAS_ALONE},
    "euler": {"interpolation_type": ("linear",), "timestep_type": ("discrete",), **_KARRAS_ALONE},
    "ddpm": {"variance_type": ("fixed_small",)},
    "pndm": {"skip_prk_steps": (True,)},
    "lcm": {"original_inference_steps": (50,), "timestep_scaling": (10.0,)},
}
OTHERS = sorted({name for fixed in FIXED.values() for name in fixed} - {"solver_type"})

_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": (None, "linspace", "leading", "trailing"),
    "final_sigmas_type": (None, "zero", "sigma_min"),
    "solver_type": (None, "midpoint", "heun", "logrho", "bh1", "bh2"),
}
