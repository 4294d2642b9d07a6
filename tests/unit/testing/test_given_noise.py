"""Given noise replaces random draws in one call, and nothing of it is ignored. Recorded cases go through it in
tests/parity."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from helpers import compilations

from ipadapter_jax import InputError, StableDiffusion
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.noise import INITIAL, MASKED_POSTERIOR, POSTERIOR
from ipadapter_jax.pipelines.sample_batch import SampleBatch
from ipadapter_jax.testing import given_noise, tiny_pipeline
from ipadapter_jax.testing.sizes import NANO

pytestmark = pytest.mark.usefixtures("one_device")
SHAPE = (2, 8, 8, 4)
NOISE = np.random.default_rng(0).standard_normal((5, *SHAPE), np.float32)
CALL = {"num_images_per_prompt": 2, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np"}
STEPS = CALL | {"scheduler": "euler_a"}
IMAGE = {"image": np.arange(192, dtype=np.uint8).reshape(8, 8, 3), "strength": 1.0}
MASK = {"mask_image": np.tile(np.uint8([0, 255]), (8, 4))}
INPAINTING = dataclasses.replace(NANO, unet=dataclasses.replace(NANO.unet, in_channels=9))


@pytest.fixture(scope="module")
def pipe(one_device) -> StableDiffusion:
    return tiny_pipeline(ip_adapter=False)


@pytest.fixture(scope="module")
def inpainting(one_device) -> StableDiffusion:
    return tiny_pipeline(INPAINTING, ip_adapter=False)


def drawn(pipe: StableDiffusion, number: int) -> np.ndarray:
    """What a call of the seeds 7 and 8 draws."""
    batch = SampleBatch(pipe.mesh, np.uint32([7, 8]), np.zeros(2, np.int64))
    return np.asarray(batch.noise(SHAPE[1:], number))[:2]


DRAWS = {"initial": INITIAL, "posterior": POSTERIOR, "masked_posterior": MASKED_POSTERIOR, "steps": (1, 2, 3)}


@pytest.mark.parametrize(
    ("kind", "call", "names"),
    [
        ("pipe", CALL, ["initial"]),
        ("pipe", STEPS, ["initial", "steps"]),
        ("pipe", STEPS | {"callback": lambda *_: None}, ["initial", "steps"]),
        ("pipe", CALL | IMAGE, ["initial", "posterior"]),
        ("pipe", CALL | IMAGE | MASK, ["initial", "posterior"]),
        ("inpainting", CALL | IMAGE | MASK, ["initial", "masked_posterior"]),
        ("inpainting", STEPS | IMAGE | MASK | {"strength": 0.99}, ["initial", "posterior", "masked_posterior"]),
    ],
)
def test_the_draws_of_a_seed_make_its_images(request, kind, call, names):
    """To the bit, beside another seed, by the same programs; and the call after the block draws from its seed again."""
    pipe = request.getfixturevalue(kind)
    numbers = {name: DRAWS[name] for name in names}
    noise = {
        name: [drawn(pipe, one) for one in number] if name == "steps" else drawn(pipe, number)
        for name, number in numbers.items()
    }
    if call.get("strength") == 0.99:
        noise["steps"] = [drawn(pipe, number) for number in (1, 2)]
    expected, other = pipe("a cat", **call, seed=7), pipe("a cat", **call, seed=1)
    with compilations() as count, given_noise(**noise):
        found = pipe("a cat", **call, seed=1)
    assert count() == 0
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - other).max() > 0.01
    np.testing.assert_array_equal(pipe("a cat", **call, seed=1), other)


def test_what_is_not_given_is_drawn_from_the_seeds(pipe):
    with given_noise(steps=[drawn(pipe, number) for number in (1, 2, 3)]):
        found = pipe("a cat", **STEPS, seed=7)
    np.testing.assert_array_equal(found, pipe("a cat", **STEPS, seed=7))
    with given_noise():
        np.testing.assert_array_equal(pipe("a cat", **STEPS, seed=7), found)


def test_a_last_step_without_noise_needs_none(pipe):
    call = CALL | {"scheduler": "lcm", "latents": NOISE[0]}
    found = []
    for given in (NOISE[1:3], NOISE[1:4]):
        with given_noise(steps=given):
            found.append(pipe("a cat", **call))
    np.testing.assert_array_equal(*found)


def test_programs_on_disk_hold_no_noise(pipe, tmp_path, monkeypatch):
    """A program that was exported by a call with given noise serves the calls after it."""
    monkeypatch.setattr("ipadapter_jax.runtime.export_cache.cache_folder", lambda: tmp_path / "compiled")
    expected = pipe("a cat", **STEPS, seed=3)
    monkeypatch.setattr("ipadapter_jax.runtime.export_cache.cache_is_on", lambda: True)
    with given_noise(initial=NOISE[0], steps=NOISE[1:4]):
        given = pipe("a cat", **STEPS)
    files = sorted((tmp_path / "compiled").iterdir())
    found = pipe("a cat", **STEPS, seed=3)
    programs.denoise.forget()
    assert files and sorted((tmp_path / "compiled").iterdir()) == files
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - given).max() > 0.01


@pytest.mark.parametrize(
    ("given", "call", "message"),
    [
        ({"initial": NOISE[0, :1]}, CALL, r"initial has shape \(1, 8, 8, 4\), this call needs \(2, 8, 8, 4\)"),
        ({"initial": NOISE[0].transpose(0, 3, 1, 2)}, CALL, r"initial has shape \(2, 4, 8, 8\)"),
        ({"initial": 0.5}, CALL, r"initial has shape \(\)"),
        ({"posterior": NOISE[0, 0]}, CALL | IMAGE, "posterior has shape"),
        ({"steps": [NOISE[0], NOISE[1, :1], NOISE[2]]}, STEPS, r"steps\[1\] has shape"),
        ({"steps": NOISE[0]}, STEPS, r"steps\[0\] has shape \(8, 8, 4\)"),
        ({"steps": NOISE[:1]}, STEPS, "steps holds 1 draws; this call makes 3 steps: give 2 or 3"),
        ({"steps": NOISE[:4]}, STEPS, "steps holds 4 draws"),
        ({"steps": NOISE[:1]}, CALL | {"scheduler": "lcm"}, "steps holds 1 draws; .* give 2 or 3"),
        ({"steps": NOISE[:3]}, CALL, "does not use steps: its scheduler adds no noise"),
        ({"initial": NOISE[0]}, CALL | {"latents": NOISE[0]}, "does not use initial: .* latents"),
        ({"posterior": NOISE[0]}, CALL, "does not use posterior: it encodes no image"),
        ({"masked_posterior": NOISE[0]}, CALL | IMAGE | MASK, "does not use masked_posterior: .* inpainting models"),
    ],
)
def test_noise_that_does_not_fit_is_refused_before_anything_is_compiled(pipe, given, call, message):
    refused = pytest.raises(InputError, match=f"^given_noise: .*{message}")
    with compilations() as count, refused as caught, given_noise(**given):
        pipe("a cat", **call)
    assert count() == 0 and "\n" not in str(caught.value)


def test_an_image_that_is_not_encoded_has_no_posterior(inpainting):
    with pytest.raises(InputError, match="does not use posterior"), given_noise(posterior=NOISE[0]):
        inpainting("a cat", **CALL, **IMAGE, **MASK)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"initial": "noise.npy"}, "given_noise: initial must be an array of numbers"),
        ({"initial": np.full(SHAPE, np.nan)}, "given_noise: initial holds numbers that are not finite"),
        ({"steps": 3}, "given_noise: steps must be a list of arrays, one for each step, not 3"),
        ({"steps": [NOISE[0], "b"]}, r"given_noise: steps\[1\] must be an array of numbers"),
    ],
)
def test_what_is_no_noise_is_refused_at_once(given, message):
    with pytest.raises(InputError, match=message), given_noise(**given):
        raise AssertionError("the block was entered")


def test_a_block_is_for_one_call(pipe):
    with given_noise(initial=NOISE[0]):
        pipe("a cat", **CALL)
        with pytest.raises(InputError, match="an earlier call inside the block used the draws"):
            pipe("a cat", **CALL)
    with pytest.raises(InputError, match="no pipeline was called inside the block"), given_noise(initial=NOISE[0]):
        pass
    with pytest.raises(KeyError), given_noise(initial=NOISE[0]):  # not hidden by the draws that it leaves
        raise KeyError
    pipe("a cat", **CALL)


def test_a_block_inside_another_is_for_its_own_call(pipe):
    with given_noise(initial=NOISE[0]):
        with given_noise(initial=NOISE[1]):
            inner = pipe("a cat", **CALL)
        outer = pipe("a cat", **CALL)
    for number, found in enumerate((outer, inner)):
        np.testing.assert_array_equal(found, pipe("a cat", **CALL, latents=NOISE[number]))


def test_other_threads_draw_at_random(pipe):
    expected = pipe("a cat", **CALL)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(jax.devices).result()  # its thread is there before the block
        with given_noise(initial=NOISE[0]):
            other = pool.submit(pipe, "a cat", **CALL).result()
            own = pipe("a cat", **CALL)
    np.testing.assert_array_equal(other, expected)
    np.testing.assert_array_equal(own, pipe("a cat", **CALL, latents=NOISE[0]))
