"""Likely corrections, the same in every process."""

import subprocess
import sys
from pathlib import Path

import pytest

from ipadapter_jax.diffusion.samplers import SAMPLERS, sample_table
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, argument, errors_name_options, option
from ipadapter_jax.inputs.suggestions import closest_match, did_you_mean, find_synonym
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion

ROOT = Path(__file__).resolve().parents[3]

MEANT = {
    "dpmsolver": "dpmsolver++",
    "dpm++": "dpmsolver++",
    "DPM++ 2M Karras": "dpmsolver++",
    "dpmpp_2m": "dpmsolver++",
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "DDIMScheduler": "ddim",
    "ddmi": "ddim",
    "DDPM": "ddpm",
    "euler_ancestral": "euler_a",
    "Euler a": "euler_a",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "EulerDiscreteScheduler": "euler",
    "UniPCMultistepScheduler": "unipc",
    "PLMS": "pndm",
    "LCMScheduler": "lcm",
}


@pytest.mark.parametrize("name", MEANT)
def test_samplers_by_other_names(name):
    assert closest_match(name, SAMPLERS) == MEANT[name]
    with pytest.raises(InputError) as refused:
        sample_table(name, NoiseSchedule(), 5)
    assert str(refused.value) == f"scheduler {name!r} is not known; did you mean {MEANT[name]}?"


def test_nothing_near():
    assert (
        closest_match("heun", SAMPLERS) is None
        and closest_match("", SAMPLERS) is None
        and closest_match("x", ["y"]) is None
    )
    assert did_you_mean("heun", SAMPLERS) == "" and find_synonym("eul", SAMPLERS) is None


def test_of_equals_the_first():
    assert closest_match("aX", ["ab", "ac"]) == "ab" and closest_match("aX", ["ac", "ab"]) == "ac"
    code = (
        "from ipadapter_jax.inputs.suggestions import closest_match; "
        "print(closest_match('ste', ['steps', 'step', 'stem']))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        assert done.stdout == "steps\n"


def test_data_types_in_python():
    with pytest.raises(InputError, match="dtype 'fp16': choose float32, bfloat16, float16; did you mean float16?"):
        StableDiffusion.from_pretrained("mini", dtype="fp16")


def test_arguments_are_options_while_a_command_runs():
    assert argument("width", 65) == "width=65" and argument("width") == "width" and option("width") == ""
    with errors_name_options({"width": "--width", "scale/layers": "--layer-scales"}):
        assert argument("width", 65) == "--width 65" and option("width") == " (--width)"
        assert argument("scale", part="layers") == "--layer-scales" and argument("scale") == "scale"
    assert argument("scale", part="layers") == "scale" and argument("width", 65) == "width=65"
