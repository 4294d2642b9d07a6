"""What several tests share: recorded cases of PyTorch diffusers on tiny random weights, and models built from them."""

import contextlib
import dataclasses
import functools
import gc
import json
import lzma
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ipadapter_jax import StableDiffusion
from ipadapter_jax.pipelines import programs, sample_batch, stable_diffusion
from ipadapter_jax.pipelines.conditioning import Conditioning, Guidance, ImageBranch
from ipadapter_jax.pipelines.sample_batch import SampleBatch
from ipadapter_jax.runtime.export_cache import ExportedFunction

ORACLES = Path(__file__).parent / "data" / "oracles"
TORCH_MODEL = ORACLES / "models" / "sd15_torch"
ADAPTERS = ORACLES / "models" / "ip_adapter" / "models"
IMAGE_ENCODER = ADAPTERS / "image_encoder"


def slow(*values: object) -> list:
    """Parameters whose path through the code default tests walk with another one."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@functools.cache
def recorded_pipe() -> StableDiffusion:
    """With the 16 layers of SD 1.5, which presets are for; small_model.py's is compiled sooner."""
    base = StableDiffusion.from_pretrained(TORCH_MODEL)
    return base.with_ip_adapter(ADAPTERS / "ip-adapter_tiny.safetensors", image_encoder=IMAGE_ENCODER)


@dataclasses.dataclass(frozen=True)
class Case:
    """A recorded call: its description, inputs and outputs (NCHW) and the tolerance measured for each output."""

    meta: dict
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def check(self, **results) -> None:
        """Every result must have the recorded shape and lie within the tolerance (4 x the reference's own error)."""
        assert results
        for name, result in results.items():
            reference, tolerance = self.outputs[name], self.meta["outputs"][name]["tol_abs"]
            assert np.shape(result) == reference.shape, f"{name}: {np.shape(result)} instead of {reference.shape}"
            error = np.abs(np.asarray(result, np.float64) - reference).max()
            assert error <= tolerance, f"{self.meta['case']} {name}: error {error:.3g} exceeds {tolerance:.3g}"


def load_case(name: str) -> Case:
    folder = ORACLES / "cases" / name
    inputs = folder / "inputs.safetensors"
    return Case(
        json.loads((folder / "case.json").read_text()),
        load_file(inputs) if inputs.exists() else {},
        load_file(folder / "outputs.safetensors"),
    )


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, -3, -1))


def nchw(x) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, -3))


def legacy_msgpack(torch_file: Path, *, vae: bool = False) -> bytes:
    """The bytes that the removed FlaxModelMixin.save_pretrained wrote for these weights, in float32.

    Spelled out here apart from the product's rules: the recorded sha256 of the genuine files says that it is right.
    """
    tree: dict = {}
    for key, array in sorted(load_file(torch_file).items()):
        key = re.sub(r"\.(\d+)(?=\.)", r"_\1", key)
        if vae:
            for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}.items():
                key = key.replace(f".{new}.", f".{old}.")
        *parents, leaf = key.split(".")
        array = array.astype(np.float32)
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = np.ascontiguousarray(array)
    return flax.serialization.msgpack_serialize(_sorted(tree))


def _sorted(tree):
    return {name: _sorted(tree[name]) for name in sorted(tree)} if isinstance(tree, dict) else tree


def conditioned(pipe: StableDiffusion, batch: SampleBatch, image_branches: list[ImageBranch]) -> Conditioning:
    """The prompt "a cat" under guidance of 7.5, with these image branches."""
    text = np.stack([pipe.text.encode(pipe.params, [prompt]).states for prompt in ("", "a cat")], axis=1)
    return Conditioning(
        prompt_of_sample=batch.prompt_of_sample,
        text_kv=programs.text_keys_values(pipe.unet, pipe.params["unet"], text),
        image_branches=image_branches,
        guidance=Guidance(scale=np.float32(7.5), rescale=np.float32(0)),
    )


def handed_to_sampler(pipe: StableDiffusion, prompt="", **call) -> Conditioning:
    """What a call conditions the denoising on."""
    with without_sampling() as handed:
        pipe(prompt, **call | {"output_type": "latent"})
    [found] = handed
    return found


@contextlib.contextmanager
def without_sampling() -> Iterator[list[Conditioning]]:
    """The sampler leaves the initial latents as they are, so that nothing large is compiled: what conditions it, for
    each call of a pipeline."""
    handed: list[Conditioning] = []

    def run_sampler(_program, _table, latents, conditioning: Conditioning, *_):
        handed.append(conditioning)
        return latents, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stable_diffusion, "run_sampler", run_sampler)
        yield handed


def assert_same(found, expected, atol: float = 0) -> None:
    """Two pytrees of arrays, such as `Conditioning`, have the same structure, shapes and values."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.shape(one) == np.shape(other)
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


def forbid_sampling(monkeypatch) -> None:
    """From here on no jitted function of the sampler may be called: what is wrong must be found before."""

    def reached(*_args, **_kwargs):
        raise AssertionError("the sampler was reached")

    for name, function in vars(programs).items():
        if isinstance(function, ExportedFunction):
            monkeypatch.setattr(programs, name, reached)
    monkeypatch.setattr(sample_batch, "draw_noise", reached)


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Pipelines that are made inside run on one device."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stable_diffusion, "local_mesh", lambda: mesh)
        yield


@contextlib.contextmanager
def noise_in_every_step() -> Iterator[None]:
    """A step of a sampler without noise is given zeros of it: then it is the program of those with noise. All steps in
    one call are left as they are."""
    denoise = programs.denoise

    def with_noise(denoiser, mesh, params, state, steps, conditioning):
        if steps.noise is None and len(steps.table.timestep) == 1:
            steps = steps._replace(noise=jnp.stack([0 * state.x]))
        return denoise(denoiser, mesh, params, state, steps, conditioning)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "denoise", with_noise)
        yield


@contextlib.contextmanager
def compilations():
    """Counts the programs that XLA is asked for (compiled or taken from the cache) while the block runs."""
    events: list[str] = []
    active = [True]

    def listen(name: str, _seconds: float, **_kwargs) -> None:
        if active[0] and name.endswith("backend_compile_duration"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(events)
    active[0] = False


@contextlib.contextmanager
def jax_settings(environment: dict):
    """As jax has them from variables such as JAX_DEFAULT_PRNG_IMPL; what was compiled before is forgotten."""
    before = {name: getattr(jax.config, name) for name in environment}
    jax.clear_caches()
    try:
        for name, value in environment.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.clear_caches()


def flax_folder(root: Path) -> Path:
    """The recorded tiny model as a Flax repository: configs and text encoder as recorded, UNet and VAE rewritten."""
    for name in ("unet", "vae"):
        (root / name).mkdir()
        shutil.copy(ORACLES / "models" / "sd15_flax" / name / "config.json", root / name)
        torch_file = TORCH_MODEL / name / "diffusion_pytorch_model.safetensors"
        (root / name / "diffusion_flax_model.msgpack").write_bytes(legacy_msgpack(torch_file, vae=name == "vae"))
    for name in ("text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(ORACLES / "models" / "sd15_flax" / name, root / name)
    return root


def ldm_file(path: Path) -> Path:
    """The recorded tiny model as a single file, rewritten from the folder by the recorded names of the genuine file."""
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    parts = {part: load_file(TORCH_MODEL / part / f"{stem}.safetensors") for part, stem in stems.items()}
    tensors = {"cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77, dtype=np.int64)[None]}
    for line in lzma.decompress((ORACLES.parent / "ldm_names.txt.xz").read_bytes()).decode().splitlines():
        part, key, name = line.split()
        matrix = part == "vae" and ".attn_1." in key and parts[part][name].ndim == 2
        tensors[key] = parts[part][name][:, :, None, None] if matrix else parts[part][name]
    save_file(tensors, path)
    return path


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What happens inside takes less of the processor. Of other processes, and of what other tests have left for the
    garbage collector to look through, nothing counts."""
    gc.freeze()
    began = time.process_time()
    try:
        yield
    finally:
        took = time.process_time() - began
        gc.unfreeze()
    assert took < seconds, f"{took:.1f} s"
