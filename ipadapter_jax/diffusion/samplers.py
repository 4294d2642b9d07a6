"""All samplers by name, and the table of one of them for a run (`sampler_table.py`)."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import NamedTuple

import numpy as np

from ipadapter_jax.diffusion.parameterization import NoiseLevel
from ipadapter_jax.diffusion.sampler_table import SamplerStep, SamplerSteps, SamplerTable
from ipadapter_jax.diffusion.samplers_alpha import ddim, ddpm, lcm, pndm
from ipadapter_jax.diffusion.samplers_sigma import dpm_solver_pp_2m, euler, euler_ancestral, unipc
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.suggestions import did_you_mean_or_choose

SAMPLERS: Mapping[str, Callable[..., SamplerSteps]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "pndm": pndm,
    "dpmsolver++": dpm_solver_pp_2m,
    "euler": euler,
    "euler_a": euler_ancestral,
    "unipc": unipc,
    "lcm": lcm,
}


class SamplerRun(NamedTuple):
    """The steps of a run, and how its latents begin: as standard normal noise times `init_noise_sigma`, or as those of
    an image with noise at `level`."""

    steps: SamplerTable
    init_noise_sigma: float
    level: NoiseLevel


def sample_table(
    sampler: str, schedule: NoiseSchedule, num_steps: int, eta: float = 0.0, strength: float = 1.0
) -> SamplerRun:
    """The table of a sampler of SAMPLERS. With a `strength` below 1 only the last int(num_steps strength) steps are
    in it, for an image to which noise was added (SDEdit, arXiv 2108.01073). Raises InputError for an unknown sampler
    and for a number of steps that it cannot make."""
    if sampler not in SAMPLERS:
        raise InputError(f"{argument('scheduler')} {sampler!r} is not known{did_you_mean_or_choose(sampler, SAMPLERS)}")
    if eta and sampler != "ddim":
        raise InputError(f"{argument('eta', eta)} is for the scheduler ddim; {sampler} has none")
    schedule = schedule.for_sampler(sampler)
    schedule.timesteps(num_steps)  # raises InputError for an impossible number of steps
    made = int(num_steps * strength) if isinstance(strength, Real) and 0 < strength <= 1 else 0
    if not made:
        raise InputError(
            f"{argument('strength', strength)} of {argument('num_inference_steps', num_steps)} leaves no step to make: "
            f"give at most 1, and here at least {1 / num_steps:.2g}"
        )
    rows, init_noise_sigma = SAMPLERS[sampler](schedule, num_steps, num_steps - made, **({"eta": eta} if eta else {}))
    levels = [*(row.level for row in rows), NoiseLevel(1.0, 0.0)]
    with np.errstate(over="ignore"):
        fields = {
            "timestep": [row.timestep for row in rows],
            "input_scale": [row.input_scale for row in rows],
            "prediction": [row.prediction for row in rows],
            "clip": [schedule.clip_sample_range if schedule.clip_sample else np.inf] * len(rows),
            "weights": _weights(rows),
            "noise": [row.noise for row in rows],
            "alpha": [level.alpha for level in levels[1:]],
            "sigma": [level.sigma for level in levels[1:]],
        }
        steps = SamplerTable(**{name: np.asarray(value, np.float32) for name, value in fields.items()})
    for name, field in steps._asdict().items():
        if name != "clip" and not np.isfinite(field).all():
            raise InputError(
                f"scheduler {sampler}: no finite {name} for prediction_type={schedule.prediction_type} with this noise "
                "schedule; where the last timestep has no signal only v_prediction can be used"
            )
    return SamplerRun(steps, init_noise_sigma, NoiseLevel(*map(float, levels[0])))


def _weights(rows: list[SamplerStep]) -> list[tuple[np.ndarray, ...]]:
    """The weights of x and aux_sample of every step, padded to one length, since they may differ in history."""
    length = max(len(row) for step in rows for row in (step.weights, step.aux_sample))
    return [tuple(np.pad(row, (0, length - len(row))) for row in (step.weights, step.aux_sample)) for step in rows]
