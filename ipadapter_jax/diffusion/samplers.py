"""All samplers by name, and a run of one as arrays (`steps.py`)."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import NamedTuple

import numpy as np

from ipadapter_jax.diffusion.sampler_table import SamplerStep, SamplerTable
from ipadapter_jax.diffusion.samplers_alpha import ddim, ddpm, lcm, pndm
from ipadapter_jax.diffusion.samplers_sigma import dpm_solver_pp_2m, euler, euler_ancestral, unipc
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.suggestions import did_you_mean_or_choose

SAMPLERS: Mapping[str, Callable[..., tuple[list[SamplerStep], float]]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "pndm": pndm,
    "dpmsolver++": dpm_solver_pp_2m,
    "euler": euler,
    "euler_a": euler_ancestral,
    "unipc": unipc,
    "lcm": lcm,
}


class Run(NamedTuple):
    """The steps of a run; what standard normal latents are multiplied with before the first one; and, where an image
    is painted over, how much of it and of the noise there is then, (2,)."""

    steps: SamplerTable
    init_noise_sigma: float
    level: np.ndarray


def sample_table(sampler: str, schedule: NoiseSchedule, num_steps: int, eta: float = 0.0, strength: float = 1.0) -> Run:
    """The table of a sampler of SAMPLERS. With a `strength` below 1 only the last int(num_steps strength) steps are
    made, of an image under noise (SDEdit, arXiv 2108.01073). Raises InputError for an unknown sampler or steps that it
    cannot make."""
    if sampler not in SAMPLERS:
        raise InputError(f"{argument('scheduler')} {sampler!r} is not known{did_you_mean_or_choose(sampler, SAMPLERS)}")
    if eta and sampler != "ddim":
        raise InputError(f"{argument('eta', eta)} is for the scheduler ddim; {sampler} has none")
    schedule = schedule.for_sampler(sampler)
    schedule.timesteps(num_steps)  # refuses a number of steps that cannot be
    made = int(num_steps * strength) if isinstance(strength, Real) and 0 < strength <= 1 else 0
    if not made:
        raise InputError(
            f"{argument('strength', strength)} of {argument('num_inference_steps', num_steps)} leaves no step to make: "
            f"give at most 1, and here at least {1 / num_steps:.2g}"
        )
    rows, init = SAMPLERS[sampler](schedule, num_steps, num_steps - made, *([eta] if eta else []))
    with np.errstate(over="ignore"):
        fields = {
            "timestep": [row.timestep for row in rows],
            "input_scale": [row.input_scale for row in rows],
            "memory": [row.memory for row in rows],
            "clip": [schedule.clip_sample_range if schedule.clip_sample else np.inf] * len(rows),
            "weights": _weights(rows),
            "noise": [row.noise for row in rows],
            "level": [*(row.level for row in rows[1:]), (1.0, 0.0)],
        }
        steps = SamplerTable(**{name: np.asarray(value, np.float32) for name, value in fields.items()})
    for name, field in steps._asdict().items():
        if name != "clip" and not np.isfinite(field).all():
            raise InputError(
                f"scheduler {sampler}: no finite {name} for prediction_type={schedule.prediction_type} with this noise "
                "schedule; where the last timestep has no signal only v_prediction can be used"
            )
    return Run(steps, init, np.asarray(rows[0].level, np.float32))


def _weights(rows: list[SamplerStep]) -> list[tuple[np.ndarray, ...]]:
    """Of x and kept, all of one length: a sampler that looks far back has longer ones."""
    length = max(len(row) for step in rows for row in (step.weights, step.kept))
    return [tuple(np.pad(row, (0, length - len(row))) for row in (step.weights, step.kept)) for step in rows]
