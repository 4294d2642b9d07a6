"""Programs on disk: found again by a new process, never for another function, shape or setting, never when damaged."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax import StableDiffusion
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.pipelines import programs
from ipadapter_jax.runtime.export_cache import ExportedFunction, register_serializable


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


register_serializable(Pair)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place for programs."""
    monkeypatch.setattr("ipadapter_jax.runtime.export_cache.cache_folder", lambda: tmp_path / "compiled")
    monkeypatch.setattr("ipadapter_jax.runtime.export_cache.cache_is_on", lambda: True)
    return tmp_path / "compiled"


def program():
    """A function as a new process has it, and how often it was traced."""
    traced = []

    def scaled(factor, pair, x):
        traced.append(factor)
        return Pair(factor * pair.left + x, jnp.sin(pair.right))

    return ExportedFunction(scaled, 1), traced


def pair(*shape):
    return Pair(jnp.ones(shape), jnp.full(shape, 0.3, jnp.float32))


def test_a_new_process_does_not_trace(folder):
    first, traced = program()
    expected = first(3.0, pair(4), np.float32(2))
    assert len(traced) == 1 and len(list(folder.iterdir())) == 1
    again, traced = program()
    found = again(3.0, pair(4), np.float32(2))
    assert traced == []
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert type(found) is Pair


def test_threads_that_ask_for_one_program_make_it_once(folder):
    function, traced = program()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: function(3.0, pair(4), np.float32(number)).left, range(16)))
    assert len(traced) == 1
    for number, left in enumerate(found):
        np.testing.assert_array_equal(left, np.full(4, 3 + number))


def test_values_of_arguments_are_no_part_of_it(folder):
    function, traced = program()
    np.testing.assert_array_equal(function(3.0, pair(4), np.float32(2)).left, np.full(4, 5))
    np.testing.assert_array_equal(function(3.0, pair(4), np.float32(7)).left, np.full(4, 10))
    assert len(traced) == 1


def test_every_other_thing_is(folder):
    """Static arguments, shapes, dtypes, weak types, shardings, settings."""
    function, _ = program()
    function(3.0, pair(4), np.float32(2))
    calls = [
        lambda: function(4.0, pair(4), np.float32(2)),
        lambda: function(3.0, pair(5), np.float32(2)),
        lambda: function(3.0, pair(4), np.int32(2)),
        lambda: function(3.0, pair(4), 2.0),
        lambda: function(3.0, jax.device_put(pair(4), jax.devices()[1]), 2.0),
    ]
    for call in calls:
        before = len(list(folder.iterdir()))
        call()
        assert len(list(folder.iterdir())) == before + 1
    with jax.default_matmul_precision("bfloat16"):
        function(3.0, pair(4), np.float32(2))
    assert len(list(folder.iterdir())) == len(calls) + 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_program_is_reported_and_traced_again(folder, damage, caplog):
    expected = program()[0](3.0, pair(4), np.float32(2))
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes({"flipped": bytes(content), "cut": content[: len(content) // 2], "empty": b""}[damage])
    again, traced = program()
    jax.tree.map(np.testing.assert_array_equal, again(3.0, pair(4), np.float32(2)), expected)
    assert len(traced) == 1 and f"{file} is damaged" in caplog.text
    healed, traced = program()
    healed(3.0, pair(4), np.float32(2))
    assert traced == []


def planted(folder: Path, factor: float) -> None:
    """In place of the program that is there, another one that is as whole."""
    (file,) = folder.iterdir()
    other = jax.export.export(jax.jit(lambda pair, x: Pair(factor * pair.left + x, pair.right)))
    content = bytes(other(pair(4), np.float32(2)).serialize())
    file.write_bytes(hashlib.sha256(content).digest() + content)


@pytest.mark.parametrize("which", ["folder", "file"])
def test_programs_that_others_could_have_written_are_not_run(folder, which, caplog):
    """A digest beside it is no protection: who writes the one writes the other."""
    expected = program()[0](3.0, pair(4), np.float32(2))
    planted(folder, 100.0)
    assert program()[0](3.0, pair(4), np.float32(2)).left[0] == 102  # where only we can have put it, it is ours
    (file,) = folder.iterdir()
    (folder if which == "folder" else file).chmod(0o777)
    before = file.read_bytes()
    again, traced = program()
    jax.tree.map(np.testing.assert_array_equal, again(3.0, pair(4), np.float32(2)), expected)
    assert len(traced) == 1
    (line,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    if which == "folder":
        assert line.endswith(f"others can write to {folder} (mode 0777); run: chmod 700 {folder}")
        assert file.read_bytes() == before
    else:
        assert line.endswith(f"compiled again: others can write to {file} (mode 0777)")  # nothing is left to do
        assert file.read_bytes() != before and file.stat().st_mode & 0o777 == 0o600


def test_programs_are_private(folder):
    before = os.umask(0)
    try:
        program()[0](3.0, pair(4), np.float32(2))
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (folder, file)] == [0o700, 0o600]


def test_an_unwritable_cache_does_not_stop_a_run(folder):
    folder.write_text("a file, where a folder should be")
    function, traced = program()
    for _ in range(2):
        np.testing.assert_array_equal(function(3.0, pair(4), np.float32(2)).left, np.full(4, 5))
    assert len(traced) <= 2


def test_a_program_that_lacks_a_kernel_is_not_cached(folder, monkeypatch):
    """The kernel may run in the next process, whose program would be another one."""
    monkeypatch.setattr("ipadapter_jax.runtime.export_cache.REFUSED", {40})
    program()[0](3.0, pair(4), np.float32(2))
    assert not folder.exists()


def test_who_turned_the_cache_off_finds_no_files(folder, monkeypatch):
    monkeypatch.setattr("ipadapter_jax.runtime.export_cache.cache_is_on", lambda: False)
    program()[0](3.0, pair(4), np.float32(2))
    assert not folder.exists()


def test_static_arguments_without_a_stable_name_are_not_cached(folder):
    """An object that prints its address would be another one for every process, and the disk would fill."""
    function, traced = program()
    function.jitted = jax.jit(lambda factor, pair, x: pair.left + x, static_argnums=0)
    np.testing.assert_array_equal(function(object(), pair(4), np.float32(2)), np.full(4, 3))
    assert not folder.exists() and traced == []


def test_inside_another_program_it_is_a_part_of_it(folder):
    function, _ = program()
    assert jax.jit(lambda x: function(3.0, pair(4), x).left.sum())(np.float32(2)) == 20
    assert not folder.exists()


def test_a_second_process_samples_without_tracing_the_networks(folder, monkeypatch):
    pipe = StableDiffusion.from_pretrained("mini").with_ip_adapter("mini")
    call = {"ip_adapter_image": np.full((64, 64, 3), 200, np.uint8), "num_inference_steps": 2, "output_type": "np"}
    functions = [f for f in vars(programs).values() if isinstance(f, ExportedFunction)]
    for function in functions:
        function.forget()
    expected = pipe("a red heart", **call)
    kinds = {file.name.partition("-")[0] for file in folder.iterdir()}
    assert kinds == {"encode_prompts", "encode_image", "image_keys_values", "text_keys_values", "denoise", "decode"}
    for function in functions:
        function.forget()
    monkeypatch.setattr(UNet, "at", None)  # would fail where it is traced
    np.testing.assert_array_equal(pipe("a red heart", **call), expected)


def test_on_one_device_a_result_is_an_argument_like_any_other(folder):
    """What comes back says otherwise where it lies, and is no reason for another program: a loop of steps has one."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    function, traced = program()
    given = jax.device_put(pair(4), NamedSharding(mesh, P("data")))
    again = function(3.0, given, np.float32(0))
    function(3.0, jax.device_put(again, NamedSharding(mesh, P())), np.float32(0))
    assert len(traced) == 1 and len(list(folder.iterdir())) == 1
