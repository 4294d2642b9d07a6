"""Encoded samples on disk: what was written is read, in any order by any number of threads; damage is always found."""

import dataclasses
import json
import os
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from weight_files import refused

from ipadapter_jax import InputError
from ipadapter_jax.data.feature_cache import CachedSamples, finish_cache, is_cache, start_cache
from ipadapter_jax.data.feature_shards import CachePlan, SampleLayout, ShardWriter, read_shard_footer
from ipadapter_jax.storage.store import LocalStore

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LAYOUT = SampleLayout(
    {
        "mean": (BFLOAT16, (4, 4, 4)),
        "logvar": (BFLOAT16, (4, 4, 4)),
        "features": (np.dtype(np.float32), (7, 3)),
        "input_ids": (np.dtype(np.int32), (5,)),
    }
)
MADE_FROM = {"resolution": 32, "vae": {"model.safetensors": "ab" * 32}}
PLAN = CachePlan(23, 10, LAYOUT, MADE_FROM)
SKIPPED = 12


def sample(index: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    return {
        name: np.full(shape, index, dtype) if dtype == np.int32 else rng.normal(size=shape).astype(dtype)
        for name, (dtype, shape) in LAYOUT.arrays.items()
    }


def write(folder: Path, plan: CachePlan = PLAN, shards=None) -> None:
    for shard in range(plan.shards) if shards is None else shards:
        with ShardWriter(LocalStore(folder), plan, shard) as writer:
            for index in plan.shard_records(shard):
                if index == SKIPPED:
                    writer.skip(index, "images/12.png", "is a web page")
                else:
                    writer.add(sample(index))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole cache of 3 shards, with one record that could not be read."""
    start_cache(LocalStore(tmp_path / "cache"), PLAN)
    write(tmp_path / "cache")
    assert finish_cache(LocalStore(tmp_path / "cache"), PLAN, np.ones((7, 3), BFLOAT16)) == 1
    return tmp_path / "cache"


def shard(folder: Path, number: int) -> Path:
    return folder / PLAN.shard_name(number)


def test_written_samples_are_read_back(folder):
    cache = CachedSamples(LocalStore(folder))
    assert len(cache) == 23 and is_cache(LocalStore(folder))
    for index in np.random.default_rng(0).permutation(23):
        if index == SKIPPED:
            continue
        found, expected = cache[index], sample(index)
        assert found.keys() == expected.keys()
        for name in found:
            assert (found[name].dtype, found[name].shape) == LAYOUT.arrays[name]
            assert found[name].tobytes() == expected[name].tobytes()
    assert cache.key(22) == "shard-00002-of-00003.array_record:2"
    zero = cache.zero_features()
    assert zero is not None and zero.dtype == BFLOAT16 and zero.shape == (7, 3) and (zero == 1).all()


def test_a_skipped_record_keeps_its_place(folder):
    """Record i of the cache is record i of the source, so that training replaces the same ones as it would live."""
    refused(lambda: CachedSamples(LocalStore(folder))[SKIPPED], "shard-00001-of-00003.array_record:2", "skipped.jsonl")
    assert json.loads((folder / "manifest.json").read_text())["skipped"] == 1
    (line,) = (folder / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"index": 12, "key": "images/12.png", "reason": "is a web page"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_by_name(folder, value, monkeypatch):
    cached = CachedSamples(LocalStore(folder))
    for name in ("mean", "logvar", "features"):
        found = sample(0)
        found[name].flat[3] = value
        payload = PLAN.layout.pack(found)
        monkeypatch.setattr(cached, "_reader", lambda _, it=payload: SimpleNamespace(read=lambda _: [it]))
        with pytest.raises(InputError, match=f"shard-00000-of-00003.array_record:0: its {name} are not finite"):
            cached[0]


def test_threads_and_pickling(folder):
    cache = CachedSamples(LocalStore(folder))
    assert cache[3]["input_ids"][0] == 3  # with a reader open
    copy = pickle.loads(pickle.dumps(cache))
    order = [int(i) for i in np.random.default_rng(1).integers(0, 23, 4000) if i != SKIPPED]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: copy[i], order))
    assert [int(s["input_ids"][0]) for s in found] == order
    assert all(s["mean"].tobytes() == sample(i)["mean"].tobytes() for s, i in zip(found[:50], order, strict=False))


def test_identity_is_of_content_not_of_place(folder, tmp_path):
    before = CachedSamples(LocalStore(folder)).identity()
    assert before == json.loads(json.dumps(before)) and before["records"] == 23 and str(tmp_path) not in str(before)
    assert CachedSamples(LocalStore(folder.rename(tmp_path / "moved"))).identity() == before
    other = tmp_path / "other"
    plan = dataclasses.replace(PLAN, made_from=MADE_FROM | {"resolution": 64})
    start_cache(LocalStore(other), plan)
    write(other, plan)
    finish_cache(LocalStore(other), plan, None)
    assert (
        CachedSamples(LocalStore(other)).identity() != before
        and CachedSamples(LocalStore(other)).zero_features() is None
    )


def test_an_unfinished_cache_says_how_to_resume(tmp_path):
    refused(lambda: CachedSamples(LocalStore(tmp_path)), str(tmp_path), "ipadapter-jax encode")
    assert not is_cache(LocalStore(tmp_path))
    start_cache(LocalStore(tmp_path), PLAN)
    write(tmp_path, shards=[0, 2])
    assert finish_cache(LocalStore(tmp_path), PLAN, None) is None and is_cache(LocalStore(tmp_path))
    refused(
        lambda: CachedSamples(LocalStore(tmp_path)),
        str(tmp_path),
        "not complete",
        "rerun the command that started it to resume",
    )
    write(tmp_path, shards=[1])
    assert finish_cache(LocalStore(tmp_path), PLAN, None) == 1 and len(CachedSamples(LocalStore(tmp_path))) == 23


WRONG_SHAPE = json.dumps(PLAN.to_json()).replace('"shape": [', '"shape": ["a", ')


def test_a_folder_keeps_the_plan_that_it_was_started_with(folder):
    assert start_cache(LocalStore(folder), CachePlan(24, 10, LAYOUT, {})) == PLAN
    for content in ("{", "[" * 100_000, "[]", '{"format": 1, "records": 1e999}', WRONG_SHAPE):
        (folder / "plan.json").write_text(content)
        refused(lambda: start_cache(LocalStore(folder), PLAN), "plan.json is damaged")


def test_a_shard_of_another_plan_does_not_count(folder):
    assert read_shard_footer(LocalStore(folder), PLAN, 0) is not None
    assert read_shard_footer(LocalStore(folder), dataclasses.replace(PLAN, made_from={}), 0) is None
    shard(folder, 0).write_bytes(shard(folder, 1).read_bytes())
    assert read_shard_footer(LocalStore(folder), PLAN, 0) is None


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_lost_or_cut_shard_is_found_at_the_start(folder, damage):
    if damage == "cut":
        os.truncate(shard(folder, 1), shard(folder, 1).stat().st_size - 100)
    else:
        shard(folder, 1).unlink()
    refused(lambda: CachedSamples(LocalStore(folder)), shard(folder, 1), "copy it again")
    assert read_shard_footer(LocalStore(folder), PLAN, 1) is None


def test_every_changed_byte_is_found_or_harmless(folder):
    """200 flipped bits inside the first shard: a sample is what was written, or an error that names it."""
    whole, rng, errors = shard(folder, 0).read_bytes(), np.random.default_rng(0), 0
    for position in rng.integers(0, 11 * LAYOUT.size, 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        shard(folder, 0).write_bytes(damaged)
        cache = CachedSamples(LocalStore(folder))
        for index in range(10):
            try:
                found = cache[index]
            except ValueError as error:
                assert cache.key(index) in str(error) and str(error).isprintable()
                errors += 1
            else:
                assert all(found[name].tobytes() == value.tobytes() for name, value in sample(index).items())
    assert errors >= 190


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 1}', '{"format": 1, "records": "x"}', "null"])
def test_a_damaged_manifest_is_one_line(folder, content):
    (folder / "manifest.json").write_text(content)
    refused(lambda: CachedSamples(LocalStore(folder)), "manifest.json is damaged")


def test_another_format_version_is_refused(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(raw | {"format": 2}))
    refused(lambda: CachedSamples(LocalStore(folder)), "manifest.json has format 2", "reads 1")


def test_damaged_zero_features_are_refused(folder):
    path = folder / "zero_features.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    refused(CachedSamples(LocalStore(folder)).zero_features, path)


def test_a_failed_shard_leaves_nothing(tmp_path):
    start_cache(LocalStore(tmp_path), PLAN)
    with pytest.raises(KeyError), ShardWriter(LocalStore(tmp_path), PLAN, 0) as writer:
        writer.add(sample(0))
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_no_room_is_an_error_that_keeps_the_shards_before(tmp_path, monkeypatch):
    start_cache(LocalStore(tmp_path), PLAN)
    write(tmp_path, shards=[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = read_shard_footer(LocalStore(tmp_path), PLAN, 0)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2000, hard)
    )  # the same error path as a full disk; Python ignores SIGXFSZ
    try:
        refused(lambda: write(tmp_path, shards=[1]), PLAN.shard_name(1), "not written", "make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before is not None and read_shard_footer(LocalStore(tmp_path), PLAN, 0) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", PLAN.shard_name(0)]


def test_more_shards_than_a_process_may_open_files(tmp_path):
    plan = CachePlan(60, 1, SampleLayout({"input_ids": (np.dtype(np.int32), (1,))}), {})
    start_cache(LocalStore(tmp_path), plan)
    for number in range(60):
        with ShardWriter(LocalStore(tmp_path), plan, number) as writer:
            writer.add({"input_ids": np.full(1, number, np.int32)})
    finish_cache(LocalStore(tmp_path), plan, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
        cache = CachedSamples(LocalStore(tmp_path))
        assert [int(cache[i]["input_ids"][0]) for i in range(60)] == list(range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
