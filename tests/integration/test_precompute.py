"""What `encode` writes is what training would compute live, in one run or many, by one process or several."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import IMAGE_ENCODER, TORCH_MODEL, slow
from PIL import Image
from training import tiny
from weight_files import refused

from ipadapter_jax.data import feature_shards
from ipadapter_jax.data.dataset import LiveSamples
from ipadapter_jax.data.feature_cache import CachedSamples
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.images.preprocess import CLIP_TABLE
from ipadapter_jax.models.clip_config import CLIPVisionConfig
from ipadapter_jax.runtime.mesh import batch_sharding, global_mesh
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train import precompute as precompute_module
from ipadapter_jax.train.batches import FrozenModels, batch_of
from ipadapter_jax.train.frozen_encoders import load_frozen_encoders
from ipadapter_jax.train.networks import load_networks
from ipadapter_jax.train.precompute import PrecomputeConfig, check_cache, precompute, precompute_shards
from ipadapter_jax.train.step import RandomDraws, denoising_inputs

BAD = 5


@pytest.fixture(scope="module", autouse=True)
def load_once():
    """The same encoders for all tests here: reading and tracing them takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute_module, "load_frozen_encoders", functools.cache(load_frozen_encoders))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """11 images with captions; one of them is a web page."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(rng.integers(0, 256, (40 + i, 70, 3), np.uint8)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"the image number {i}")
    (folder / f"{BAD:02}.png").write_text("<!DOCTYPE html><html>not found</html>")
    return folder


def settings(images: Path, out: Path, **changes) -> PrecomputeConfig:
    """Shards of 4 records, batches of one row per device of 4 at the tests."""
    names = {"model": str(TORCH_MODEL), "image_encoder": str(IMAGE_ENCODER), "data": str(images), "out": out}
    sizes = {"resolution": 64, "dtype": "float32", "batch_size": 1, "shard_records": 4, "threads": 2}
    return PrecomputeConfig(**names | sizes | changes)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Path:
    """What one uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    assert precompute(settings(images, out)) == 1
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@pytest.mark.parametrize("adapter", ["base", *slow("plus")])
def test_training_sees_the_same_from_the_cache_as_live(images, whole, tmp_path, adapter):
    """With one row per device in both. What the encoders give is the same to the bit; noisy latents, text states, and
    features of kept and dropped images are to 1e-6 (measured 2.4e-7: another program rounds x * y + z elsewhere)."""
    out = whole
    if adapter == "plus":
        out = tmp_path / "cache"
        precompute(settings(images, out, features="penultimate"))
    cache, mesh = CachedSamples(LocalStore(out)), global_mesh()
    loaded = load_networks(tiny(model__adapter=adapter, data__resolution=64), mesh, None)
    networks, frozen = loaded.networks, loaded.frozen
    vision = networks.image_encoder.config
    assert CLIPVisionConfig(**cache.plan.made_from["image_encoder"]["config"]) == vision
    samples = LiveSamples(open_dataset(str(images)), TORCH_MODEL / "tokenizer", 64, vision.image_size)
    assert len(cache) == len(samples) == 11

    def batch(source):
        arrays = {name: np.stack([source[i][name] for i in (0, 3, 4, 10)]) for name in source[0]}
        return jax.device_put(batch_of(arrays), batch_sharding(mesh))

    live, cached = batch(samples), batch(cache)

    @jax.jit
    def encoders(frozen, batch):
        posterior = networks.posterior(frozen, batch.pixels)
        normalised = jnp.asarray(CLIP_TABLE)[batch.clip_pixels, jnp.arange(3)]
        return *posterior, networks.image_features(frozen, normalised)

    for name, array in zip(("mean", "logvar", "features"), encoders(frozen, live), strict=True):
        np.testing.assert_array_equal(getattr(cached, name), array, err_msg=name)

    noise, posterior_noise = np.random.default_rng(0).normal(size=(2, 4, *networks.latent_shape)).astype(np.float32)
    some = np.array([True, False, False, True])
    draws = RandomDraws(some, ~some, np.array([0, 10, 500, 999], np.int32), noise, posterior_noise)
    step_inputs = jax.jit(functools.partial(denoising_inputs, networks))
    without_encoder = {name: tree for name, tree in frozen.params.items() if name != "image_encoder"}
    zero_features = cache.zero_features() if adapter == "plus" else None
    without_encoder = FrozenModels(frozen.empty_ids, without_encoder, zero_features)
    expected, found = step_inputs(frozen, live, draws), step_inputs(without_encoder, cached, draws)
    for name in expected._fields:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-6, err_msg=name)


def test_captions_are_as_long_as_the_text_encoder_reads(images, tmp_path):
    """Of Stable Diffusion 77 tokens, of other models what their text encoder says."""
    base = shutil.copytree(TORCH_MODEL, tmp_path / "base")
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 40}))
    precompute(settings(images, tmp_path / "cache", model=str(base)))
    assert CachedSamples(LocalStore(tmp_path / "cache"))[0]["input_ids"].shape == (40,)


def test_an_unreadable_record_keeps_its_index_and_is_listed(whole):
    cache = CachedSamples(LocalStore(whole))
    refused(lambda: cache[BAD], cache.key(BAD), "skipped.jsonl")
    assert all(np.isfinite(cache[i]["mean"]).all() for i in range(11) if i != BAD)
    assert '"key": "05.png"' in (whole / "skipped.jsonl").read_text()


KILLED = """
import os, signal, sys
from pathlib import Path
from ipadapter_jax.data import feature_shards
from ipadapter_jax.train.precompute import PrecomputeConfig, precompute
left = [int(sys.argv[1])]
add = feature_shards.ShardWriter.add
def last_add(self, sample):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, sample)
feature_shards.ShardWriter.add = last_add
images, out, base, image_encoder = sys.argv[2:]
sizes = dict(resolution=64, batch_size=1, shard_records=4)
precompute(PrecomputeConfig(base, image_encoder, images, Path(out), dtype="float32", **sizes))
"""


def test_a_killed_run_resumes_to_the_same_bytes(images, whole, tmp_path):
    out = tmp_path / "cache"
    words = [sys.executable, "-c", KILLED, "7", str(images), str(out), str(TORCH_MODEL), str(IMAGE_ENCODER)]
    assert subprocess.run(words, capture_output=True).returncode == -signal.SIGKILL
    first = out / "shard-00000-of-00003.array_record"
    written = first.stat().st_mtime_ns
    refused(lambda: CachedSamples(LocalStore(out)), "not complete")
    assert precompute(settings(images, out)) == 1
    assert first.stat().st_mtime_ns == written  # it was not made again
    assert contents(out) == contents(whole)


def test_two_processes_write_what_one_writes(images, whole, tmp_path):
    config = settings(images, tmp_path / "cache")
    assert precompute_shards(config, 0, 2) is None
    assert precompute_shards(config, 1, 2) == 1
    assert contents(config.out) == contents(whole)


def test_a_lost_shard_is_made_again(images, whole, tmp_path):
    out = tmp_path / "cache"
    shutil.copytree(whole, out)
    os.truncate(out / "shard-00001-of-00003.array_record", 70_000)
    assert precompute(settings(images, out)) == 1
    assert contents(out) == contents(whole)


def test_a_full_disk_leaves_complete_shards(images, whole, tmp_path, monkeypatch):
    config = settings(images, tmp_path / "cache")

    class Full(feature_shards.ArrayRecordWriter):
        def close(self):
            super().close()
            if "00001-of" in self.path:
                raise RuntimeError("write() failed: No space left on device; writing it")

        def __init__(self, path, *options):
            super().__init__(path, *options)
            self.path = path

    with monkeypatch.context() as full:
        full.setattr(feature_shards, "ArrayRecordWriter", Full)
        refused(lambda: precompute(config), "shard-00001-of", "No space left on device", "same command")
    assert sorted(contents(config.out)) == ["plan.json", "shard-00000-of-00003.array_record"]
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 3000))
        refused(lambda: precompute(config), "7 samples need 0.0 GB", "make room")
    assert precompute(config) == 1
    assert contents(config.out) == contents(whole)


def test_other_settings_and_other_data_are_refused(images, whole, tmp_path):
    before = contents(whole)
    message = refused(lambda: precompute(settings(images, whole, features="penultimate")), str(whole))
    assert 'made_from.features: "pooled" -> "penultimate"' in message
    other = tmp_path / "images"
    shutil.copytree(images, other)
    (other / "00.png").unlink()
    refused(lambda: precompute(settings(other, whole)), "records: 11 -> 10")
    assert contents(whole) == before


def test_a_run_is_checked_against_the_cache(whole, tmp_path):
    vae, tokenizer = TORCH_MODEL / "vae" / "diffusion_pytorch_model.safetensors", TORCH_MODEL / "tokenizer"
    needed = {"vae": vae, "tokenizer": tokenizer, "resolution": 64, "features": "pooled"}
    needed["image_encoder"] = IMAGE_ENCODER / "model.safetensors"
    check_cache(CachedSamples(LocalStore(whole)), **needed)
    check_cache(CachedSamples(LocalStore(whole)), **needed | {"features": None, "image_encoder": None})
    other = tmp_path / "vae.safetensors"
    other.write_bytes(b"another")
    learned = tmp_path / "learned"
    shutil.copytree(tokenizer, learned)
    (learned / "added_tokens.json").write_text('{"<cat-toy>": 707}')
    wrong = [
        {"tokenizer": learned},
        {"vae": other},
        {"image_encoder": other},
        {"tokenizer": tmp_path},
        {"resolution": 128},
        {"features": "penultimate"},
    ]
    for change in wrong:
        refused(
            lambda change=change: check_cache(CachedSamples(LocalStore(whole)), **needed | change), str(whole), *change
        )


def test_too_many_unreadable_records_stop_with_advice(images, tmp_path, monkeypatch):
    config = settings(images, tmp_path / "cache", max_unreadable_fraction=0.05)
    refused(lambda: precompute(config), "1 of 11", "05.png", "web page", "--max-unreadable-fraction")
    assert precompute(dataclasses.replace(config, max_unreadable_fraction=0.1)) == 1

    def overflowing(*args):
        encoders = load_frozen_encoders(*args)
        params = jax.tree.map(lambda x: x * 1e30, encoders.vae.params)
        return dataclasses.replace(encoders, vae=dataclasses.replace(encoders.vae, params=params))

    monkeypatch.setattr(precompute_module, "load_frozen_encoders", overflowing)
    config = settings(images, tmp_path / "other")
    refused(lambda: precompute(config), "11 of 11", "10.png", "not finite")


WRONG = [
    ({"resolution": 72}, "--resolution 72 must be a multiple of 64"),
    ({"batch_size": 0}, "--batch-size 0"),
    ({"shard_records": 0}, "--shard-records 0"),
    ({"max_unreadable_fraction": 2}, "--max-unreadable-fraction 2"),
    ({"data": "{whole}"}, "encoded already"),
    ({"out": "{images}/cache"}, "lies in the data"),
    ({"image_encoder": "{images}"}, "no image encoder weights"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_bad_settings_are_refused(images, whole, tmp_path, changes, message):
    places = {"images": images, "whole": whole}
    changes = {name: value.format(**places) if isinstance(value, str) else value for name, value in changes.items()}
    if "out" in changes:
        changes["out"] = Path(changes["out"])
    refused(lambda: precompute(dataclasses.replace(settings(images, tmp_path / "cache"), **changes)), message)


def test_the_command(images, tmp_path):
    words = ["encode", "--model", TORCH_MODEL, "--image-encoder", IMAGE_ENCODER, "--data", images]
    words += ["--out", tmp_path / "cache", "--resolution", 64, "--batch-size", 1]
    done = subprocess.run([sys.executable, "-m", "ipadapter_jax.cli", *map(str, words)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'cache'}: 10 samples, 1 records skipped\n"), done.stderr
    cache = CachedSamples(LocalStore(tmp_path / "cache"))
    assert cache[0]["features"].dtype == jnp.bfloat16
    assert f"{images}: 11 records, 0 files not used\n" in done.stderr
    assert cache.account().startswith("10 records, 0 files not used; 1 more could not be encoded, see ")
