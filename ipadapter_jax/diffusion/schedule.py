"""The noise schedule of a trained model (DDPM, arXiv 2006.11239): how much signal is left at every timestep."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from numbers import Integral

import numpy as np

from ipadapter_jax.diffusion.parameterization import PREDICTION_TYPES
from ipadapter_jax.diffusion.scheduler_settings import FIXED, FOLLOWED, KNOWN, SHARED
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.config_fields import build_config
from ipadapter_jax.inputs.strings import short_repr
from ipadapter_jax.inputs.suggestions import did_you_mean

_MOST_TIMESTEPS = 100_000  # published models have 1000; this bounds the size of the arrays


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A model's noise schedule and the settings of its sampler, with the names of diffusers' schedulers.

    `from_json` reads the settings of a file. `for_sampler` gives the schedule that a sampler follows: it ignores
    settings that the sampler does not read, and sets the sampler's defaults where the file has none. The defaults below
    are those of DDIMScheduler.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    sigma_min: float | None = None  # with use_karras_sigmas; None: that of the noise schedule
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    timestep_type: str = "discrete"
    skip_prk_steps: bool = False
    solver_order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float | None = None  # None clips nothing
    disable_corrector: tuple[int, ...] = ()  # numbers of the steps that UniPC does not correct
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    given: tuple[tuple[str, object], ...] = ()  # all settings of the file that some scheduler knows, by name

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> "NoiseSchedule":
        """From scheduler/scheduler_config.json, whichever scheduler it was written for.

        A setting that is missing or null has the default of the sampler that is chosen later (`for_sampler`). Raises
        InputError for a value that cannot be used, also for null where a setting of the noise schedule needs a value.
        Warns of settings that no scheduler knows.
        """
        for name in set(SHARED) - {"trained_betas", "timestep_spacing"}:
            if name in raw and raw[name] is None:
                raise InputError(f"scheduler config: {name}=None is not usable; give a value or leave it out")
        if unknown := [name for name in raw if name not in KNOWN and not name.startswith("_")]:
            warnings.warn(
                f"scheduler config: ignored, as no scheduler here knows it: {', '.join(unknown)}", stacklevel=2
            )
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
        given = {name: found[name] for name in KNOWN if found.get(name) is not None}
        if given.get("lambda_min_clipped") == -math.inf:  # diffusers' default
            del given["lambda_min_clipped"]
        if given.get("clip_sample"):
            warnings.warn("scheduler config: clip_sample clips predictions, which latents do not bear", stacklevel=2)
        return cls._of(given, given)

    @classmethod
    def _of(cls, settings: Mapping[str, object], given: Mapping[str, object]) -> "NoiseSchedule":
        """A schedule with those `settings` that are fields, checked, and with `given` as it is."""
        names = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in settings.items() if name in names and value is not None}
        schedule: NoiseSchedule = build_config(cls, {**fields, "given": ()}, "scheduler")
        schedule = dataclasses.replace(schedule, given=tuple(given.items()))
        for name, choices in _CHOICES.items():
            if getattr(schedule, name) not in choices:
                raise InputError(
                    f"scheduler config: {name}={getattr(schedule, name)!r}, known are {', '.join(choices)}"
                )
        schedule._check_numbers()
        return schedule

    def _check_numbers(self) -> None:
        total = self.num_train_timesteps
        if not 1 <= total <= _MOST_TIMESTEPS:
            raise InputError(
                f"scheduler config: num_train_timesteps={short_repr(total)} is not usable, at most {_MOST_TIMESTEPS} "
                "and at least 1 can be"
            )
        if self.trained_betas is not None and len(self.trained_betas) != total:
            raise InputError(f"scheduler config: {len(self.trained_betas)} trained_betas for {total} timesteps")
        betas = self.trained_betas or (self.beta_start, self.beta_end)
        if not 0 < min(betas) <= max(betas) < 1 or self.beta_start > self.beta_end:
            raise InputError(
                "scheduler config: it needs 0 < beta_start <= beta_end < 1, and trained_betas between 0 and 1"
            )
        if self.steps_offset >= total:
            raise InputError(
                f"scheduler config: steps_offset={short_repr(self.steps_offset)} exceeds the {total} training "
                "timesteps; make it smaller"
            )
        for name in ("sigma_min", "sigma_max", "clip_sample_range", "timestep_scaling"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise InputError(f"scheduler config: {name}={value} is not usable, it must be a positive number")

    def for_sampler(self, sampler: str) -> "NoiseSchedule":
        """The schedule that this sampler follows: the file's settings that diffusers' scheduler of this name reads, and
        that scheduler's defaults for the others. Raises InputError for a value that diffusers follows and this sampler
        does not support."""
        given = dict(self.given)
        for name, accepted in FIXED[sampler].items():
            if name in given and given[name] not in accepted:
                known = " or ".join(map(repr, accepted)) or "no value"
                raise InputError(
                    f"scheduler config: {name}={given[name]!r} is not supported by {sampler}, only {known}; choose "
                    "another scheduler, or change the setting"
                )
        read = {name: value for name, value in given.items() if name in SHARED or name in FOLLOWED[sampler]}
        if "solver_type" in FIXED[sampler] or given.get("solver_type") not in ("bh1", "bh2"):
            read.pop("solver_type", None)  # a variant of another solver: use the default
        return self._of({**FOLLOWED[sampler], **read}, given)

    def changed(self, settings: Mapping[str, object], sampler: str | None = None) -> "NoiseSchedule":
        """This schedule with these settings of scheduler_config.json changed. Warns of settings that have no effect on
        `sampler`, and raises InputError for a setting that no scheduler knows."""
        if not isinstance(settings, Mapping):
            raise InputError(f"scheduler_config={short_repr(settings)} is not a dictionary of settings")
        for name, value in settings.items():
            if name not in KNOWN:
                known = did_you_mean(name, KNOWN) or f"; choose among {', '.join(KNOWN)}"
                raise InputError(f"scheduler_config: {name!r} is not known{known}")
            users = [user for user in FOLLOWED if name in (*SHARED, *FOLLOWED[user], *FIXED[user])]
            if sampler in FOLLOWED and sampler not in users and value not in (None, False):
                what = f"scheduler_config: {name} has no effect on the scheduler {sampler}"
                warnings.warn(f"{what}; it is for {' and '.join(users) or 'none of them'}", stacklevel=3)
        return self.from_json({**dict(self.given), **settings}) if settings else self

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """The fraction of the signal's variance that is left at each timestep, (T,) float32, non-increasing."""
        alphas_cumprod = np.cumprod(1.0 - self._betas(), dtype=np.float64)
        if self.rescale_betas_zero_snr:  # arXiv 2305.08891, algorithm 1: the last value becomes 0
            root = np.sqrt(alphas_cumprod)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root**2
        return alphas_cumprod.astype(np.float32)

    @property
    def final_alpha_cumprod(self) -> np.float32:
        """alphas_cumprod after the last step, which ends beyond timestep 0."""
        return np.float32(1.0) if self.set_alpha_to_one else self.alphas_cumprod[0]

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
        spacing = self.timestep_spacing
        if spacing == "linspace":
            steps = np.linspace(0, total - 1, num_steps).round()[::-1]
        elif spacing == "leading":
            steps = (np.arange(num_steps) * (total // num_steps))[::-1] + self.steps_offset
        else:  # trailing
            # Rounding can append a timestep -1, for example with 61 steps, as in diffusers; [:num_steps] removes it.
            steps = np.arange(total, 0, -total / num_steps).round()[:num_steps] - 1
        return steps.astype(np.int32)


_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_type": ("discrete", "continuous"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
}
