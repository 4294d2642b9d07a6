"""Arguments that would have no effect, overflow or ask for too much: refused before anything is compiled."""

import dataclasses
import io
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ORACLES, forbid_sampling

from ipadapter_jax import InputError, Scale
from ipadapter_jax.errors import NonFiniteImageError
from ipadapter_jax.images.preprocess import load_image
from ipadapter_jax.inputs.arrays import to_python_number
from ipadapter_jax.inputs.validation import check_dtype, check_latents, resolve_seeds
from ipadapter_jax.models.unet_config import cross_attention_layers
from ipadapter_jax.pipelines import stable_diffusion
from ipadapter_jax.pipelines.image_prompt_settings import ImagePromptSettings
from ipadapter_jax.pipelines.image_prompts import plan_image_prompts
from ipadapter_jax.pipelines.outputs import check_finite
from ipadapter_jax.runtime.progress_bar import step_bar

CAT = ORACLES / "assets" / "img_a.png"
SMALL = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
EMBEDS = {"ip_adapter_image_embeds": [np.zeros((2, 1, 40))]}


def inputs(pipe):
    return [adapter.inputs for adapter in pipe.adapters]


@pytest.mark.parametrize(
    ("control", "name"),
    [({"ip_adapter_scale": 0.5}, "ip_adapter_scale"), ({"ip_adapter_scale": "style"}, "ip_adapter_scale")]
    + [
        ({"ip_adapter_scale": jnp.float32(0.5)}, "ip_adapter_scale"),
        ({"ip_adapter_scale": [[1.0, 1.0]]}, "ip_adapter_scale"),
    ]
    + [({"ip_adapter_scale": Scale(steps=(1, 0))}, "ip_adapter_scale"), ({"fit": "pad"}, "fit")],
)
def test_controls_of_no_image_prompt_are_refused(base, control, name, monkeypatch):
    forbid_sampling(monkeypatch)
    with pytest.raises(InputError, match=f"{name} has no effect without an image prompt"):
        base("a cat", **control, **SMALL)


def test_a_nested_list_gives_all_images_to_every_prompt(pipe):
    controls, sites = ImagePromptSettings(images=[[CAT, CAT]]), cross_attention_layers(pipe.unet.config)
    [planned] = plan_image_prompts(controls, inputs(pipe), sites, 2, True, (64, 64), 2)
    [branch] = planned.branches
    assert branch.image_weight.shape == (1, 2)


FLOAT16 = {"latents": np.full((1, 8, 8, 4), 7e4), "ip_adapter_scale": 7e4, **EMBEDS}
FLOAT16["ip_adapter_image_embeds"] = [np.full((2, 1, 40), 7e4)]


@pytest.mark.parametrize("name", ["latents", "ip_adapter_scale", "ip_adapter_image_embeds"])
def test_numbers_beyond_float16_are_refused_by_name(pipe, name, monkeypatch):
    forbid_sampling(monkeypatch)
    half = [dataclasses.replace(a, projection=a.projection.clone(dtype=jnp.float16)) for a in pipe.adapters]
    short = dataclasses.replace(pipe, unet=pipe.unet.clone(dtype=jnp.float16), adapters=tuple(half))
    given = EMBEDS | {name: FLOAT16[name]}
    with pytest.raises(InputError, match=f"{name} reaches 70000, beyond 65504, the largest number of float16; load"):
        short("a cat", **given, **SMALL)


def test_numbers_beyond_float32_are_refused_by_name(pipe, monkeypatch):
    forbid_sampling(monkeypatch)
    with pytest.raises(
        InputError, match=r"latents reaches 1e\+300, beyond 3.40282e\+38, the largest number of float32"
    ):
        pipe("a cat", **EMBEDS, latents=np.full((1, 8, 8, 4), 1e300), **SMALL)


@pytest.mark.torch
def test_tensors_of_any_kind_are_arguments(pipe):
    torch = pytest.importorskip("torch")
    given = torch.ones((2, 1, 40), dtype=torch.bfloat16, requires_grad=True)
    for embeds in ([given], [jnp.ones((2, 1, 40), jnp.bfloat16)], [[[[1.0] * 40]] * 2]):
        sites = cross_attention_layers(pipe.unet.config)
        [planned] = plan_image_prompts(ImagePromptSettings(embeds=embeds), inputs(pipe), sites, 2, True, (64, 64), 1)
        np.testing.assert_array_equal(pipe.adapters[0].encode(planned.features), np.ones((1, 2, 1, 40)))
    with pytest.raises(InputError, match="latents could not be read as an array .*Sparse"):
        check_latents(torch.ones(2, 2).to_sparse(), (2, 2))
    np.testing.assert_array_equal(resolve_seeds(torch.tensor([3, 4]), 2), [3, 4])


def test_no_seed_draws_one_and_says_it(capsys):
    found = resolve_seeds(None, 3)
    line = capsys.readouterr().err
    assert line == f"seed {found[0]}\n" and found.tolist() == [found[0], found[0] + 1, found[0] + 2]
    assert resolve_seeds(None, 1) != resolve_seeds(None, 1)


def test_a_seed_without_random_draws_is_a_warning(capsys):
    with pytest.warns(UserWarning, match="seed has no effect: latents are given and this scheduler draws no noise"):
        assert resolve_seeds(3, 2, used=False).tolist() == [3, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_seeds(0, 2, used=False)
        resolve_seeds(None, 2, used=False)
        resolve_seeds([3, 4], 2)
    assert capsys.readouterr().err == ""  # nothing was drawn


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("called", [True, False])
def test_a_progress_bar_in_a_terminal(monkeypatch, wanted, terminal, called):
    """Without a bar and without a callback there is nothing to call, so that all steps are one program."""
    seen, screen = [], Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    callback = (lambda *step: seen.append(step)) if called else None
    with step_bar(wanted, 2, callback) as on_step:
        assert (on_step is None) == (not called and not (wanted and terminal))
        for number in range(2 if on_step else 0):
            on_step(number, 1.0, jnp.zeros(1))
    assert [number for number, *_ in seen] == ([0, 1] if called else [])
    assert ("2/2" in screen.getvalue()) == (wanted and terminal)


@pytest.mark.parametrize("form", ["latents of image", "image"])
def test_numbers_that_are_not_finite_are_refused_by_name(form):
    rows = np.zeros((3, 2, 2, 4), np.float32)
    check_finite(rows, form)
    rows[0, 1, 1, 0], rows[2, 0, 0, 3] = np.nan, np.inf
    with pytest.raises(NonFiniteImageError, match=f"^{form} 0, 2 of 3, counted from 0, is not finite"):
        check_finite(rows, form)


def test_latents_that_are_not_finite_are_refused(pipe, monkeypatch):
    shape = (pipe.mesh.size, 8, 8, 4)
    monkeypatch.setattr(stable_diffusion, "run_sampler", lambda *_: (jnp.full(shape, jnp.nan), None))
    with pytest.raises(NonFiniteImageError, match="latents of image 0 of 1"):
        pipe("a cat", ip_adapter_image=CAT, **SMALL)


@pytest.mark.parametrize("name", ["fit", "ip_adapter_uncond"])
def test_words_are_words(pipe, name, monkeypatch):
    forbid_sampling(monkeypatch)
    with pytest.raises(InputError, match=f"{name} is ndarray; give one of its words"):
        pipe("a cat", ip_adapter_image=CAT, **{name: np.zeros(3)}, **SMALL)


@pytest.mark.torch
def test_numbers_may_be_tensors(pipe):
    torch = pytest.importorskip("torch")
    short = torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)
    sites = cross_attention_layers(pipe.unet.config)
    for scale in (short, [short], [[short]], short[None], [[jnp.float32(0.5)]], np.array([[0.5]])):
        settings = ImagePromptSettings(images=CAT, scale=scale)
        [planned] = plan_image_prompts(settings, inputs(pipe), sites, 2, True, (64, 64), 1)
        [branch] = planned.branches
        np.testing.assert_array_equal(branch.weight * branch.image_weight[0, 0], np.full((2, 2, len(sites)), 0.5))
    assert to_python_number((torch.tensor(3), [np.float32(0.5)], None, "a")) == (3, [0.5], None, "a")
    masks = torch.stack([torch.eye(64), 1 - torch.eye(64)])
    for given in (masks, masks[None], masks[:, None], [masks[None]]):
        controls = ImagePromptSettings(images=[[CAT, CAT]], masks=given)
        [planned] = plan_image_prompts(controls, inputs(pipe), sites, 2, True, (64, 64), 1)
        assert len(planned.branches) == 2


@pytest.mark.torch
def test_images_may_be_tensors_and_arrays_of_jax():
    torch = pytest.importorskip("torch")
    pixels = np.asarray(load_image(CAT))
    unit = pixels.astype(np.float32) / 255
    first = torch.tensor(unit).permute(2, 0, 1)
    given = [jnp.asarray(pixels), jnp.asarray(unit), first, first[None], first.requires_grad_(), torch.tensor(pixels)]
    for image in given:
        np.testing.assert_array_equal(load_image(image), pixels)
    rounded = np.abs(np.asarray(load_image(first.bfloat16())).astype(int) - pixels)
    assert rounded.max() <= 1  # bfloat16 has 8 bits of precision
    with pytest.raises(InputError, match=r"the image array has shape \(2, 3, 4, 4\)"):
        load_image(torch.zeros(2, 3, 4, 4))
    with pytest.raises(InputError, match="the image array could not be read as an array"):
        load_image(torch.zeros(3, 4).to_sparse())


def test_a_dtype_is_a_name_or_an_object_of_jax():
    known = ("float32", "bfloat16", "float16")
    given = ["bfloat16", jnp.bfloat16, np.float32, np.dtype("float16")]
    assert [check_dtype(dtype, known) for dtype in given] == ["bfloat16", "bfloat16", "float32", "float16"]
    for wrong in ("fp16", int, dict, np.float64, None, 16):
        with pytest.raises(InputError, match="choose float32, bfloat16, float16"):
            check_dtype(wrong, known)
