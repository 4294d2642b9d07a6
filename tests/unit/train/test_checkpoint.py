"""Checkpoints: every bit back, every damage noticed, nothing lost to a kill, a full disk or a second run."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.checkpoint import Checkpoints
from ipadapter_jax.train.checksums import tree_checksums, tree_fingerprint
from ipadapter_jax.train.run_dir import run_lock
from tests.fault_injection.damage import DAMAGES

ROOT = Path(__file__).resolve().parents[3]
ABOUT = {"optim": {"learning_rate": 1e-4}, "data": [1, 2]}


def put(array: Any, *spec: str | None) -> jax.Array:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, NamedSharding(mesh, P(*spec)), lambda index: whole[index])


def make_state(seed: int) -> dict[str, Any]:
    """All that a training state may hold: frozen parts, None, tuples with names, five dtypes, split and whole."""
    rng = np.random.default_rng(seed)
    params = {
        "unet": optax.MaskedNode(),
        "proj": {"kernel": put(rng.standard_normal((64, 128), np.float32), "data"), "bias": put(np.zeros(12, "f4"))},
        "ip": put(jnp.asarray(rng.standard_normal((4, 6)), jnp.bfloat16)),
    }
    return {
        "step": put(np.int32(seed)),
        "params": params,
        "opt_state": jax.tree.map(lambda x: x if x.ndim else put(x), optax.adam(1e-3).init(params)),
        "ema": None,
        "scale": put(np.array([0.1, seed], np.float16)),
        "on": put(np.bool_(True)),
    }


def template(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, in structure, dtype and value."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    equal = (x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(equal)


def open_(folder: Path, keep_last: int = 5, keep_every: int | None = None) -> Checkpoints:
    return Checkpoints(folder, keep_last=keep_last, keep_every=keep_every)


def fill(folder: Path, *steps: int, **keep: int) -> Path:
    checkpoints = open_(folder, **keep)
    for step in steps:
        checkpoints.save(step, make_state(step), ABOUT | {"step": step})
    checkpoints.close()
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("checkpoints") / "good", 1, 2)


# --- digests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8])
def test_each_flipped_bit_changes_both_sums(dtype: Any) -> None:
    bits = 8 * jnp.dtype(dtype).itemsize
    words = np.random.default_rng(0).integers(0, 256, (6, bits // 8), np.uint8)
    flipped = np.repeat(words[None], 6 * bits, axis=0)
    for trial in range(6 * bits):
        element, bit = divmod(trial, bits)
        flipped[trial, element, bit // 8] ^= 1 << (bit % 8)
    arrays = {"before": words} | {str(i): array for i, array in enumerate(flipped)}
    found = tree_checksums({name: jnp.asarray(array.view(jnp.dtype(dtype))[:, 0]) for name, array in arrays.items()})
    sums = {name: digest.split(":")[1] for name, digest in found.items()}
    before = sums.pop("before")
    assert all(digest[:8] != before[:8] and digest[8:] != before[8:] for digest in sums.values())
    assert len(set(sums.values())) == 6 * bits


def test_checksums_depend_on_order_shape_dtype_and_paired_sign_flips() -> None:
    x = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    signs = x.copy()
    signs[[0, 1], 0] *= -1  # the top bits of two elements: what a sum of odd multiples would miss
    others = [x.T.copy(), x.reshape(4, 3), x[::-1].copy(), x.view(np.int32), signs, x.reshape(12), np.zeros((0,), "f4")]
    found = tree_checksums([jnp.asarray(x)] + [jnp.asarray(other) for other in others])
    assert len(set(found.values())) == len(found)
    assert found["0"].startswith("float32[3,4]:")
    assert tree_checksums({"a": True & jnp.bool_(True)}) != tree_checksums({"a": jnp.bool_(False)})
    assert tree_fingerprint(found) == tree_fingerprint(dict(reversed(found.items())))


def test_checksums_do_not_depend_on_the_sharding() -> None:
    x = np.random.default_rng(0).standard_normal((8, 12), np.float32)
    layouts = [jnp.asarray(x), put(x), put(x, "data"), put(x, None, "data")]
    assert len({tree_checksums({"x": layout})["x"] for layout in layouts}) == 1


# --- saving and restoring --------------------------------------------------------------------------------------------


def test_round_trip_is_exact_and_keeps_structure(two_steps: Path) -> None:
    checkpoints = open_(two_steps)
    assert checkpoints.about() == ABOUT | {"step": 2}
    step, state, about = checkpoints.restore(template(make_state(0)))
    assert (step, about) == (2, ABOUT | {"step": 2})
    assert same(state, make_state(2))
    checkpoints.close()


def test_another_sharding_and_none_without_steps(two_steps: Path, tmp_path: Path) -> None:
    wanted = template(make_state(0))
    kernel = wanted["params"]["proj"]["kernel"]
    across = NamedSharding(kernel.sharding.mesh, P(None, "data"))
    wanted["params"]["proj"]["kernel"] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=across)
    _, state, _ = open_(two_steps).restore(wanted)
    assert state["params"]["proj"]["kernel"].sharding == across
    assert same(state, make_state(2))
    assert open_(tmp_path / "new").restore(wanted) is None
    assert open_(tmp_path / "new").about() is None


def test_the_state_may_be_donated_after_save_returns(tmp_path: Path) -> None:
    checkpoints = open_(tmp_path)
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {
        "w": put(np.random.default_rng(0).standard_normal((1024, 1024), np.float32), "data"),
        "n": put(np.int32(0)),
    }
    expected = {}
    for step in range(1, 6):
        expected[step] = jax.tree.map(np.array, state)
        checkpoints.save(step, state, {})
        state = advance(advance(state))  # while orbax writes
    checkpoints.wait()
    for step in range(5, 0, -1):
        found, restored, _ = checkpoints.restore(template(state))
        assert found == step and same(restored, expected[step])
        shutil.rmtree(tmp_path / str(step))
    checkpoints.close()


def test_which_steps_are_retained(tmp_path: Path) -> None:
    fill(tmp_path, *range(1, 8), keep_last=2, keep_every=3)
    assert names(tmp_path) == {"3", "6", "7"}


def test_a_saved_step_is_not_saved_again(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    checkpoints = open_(tmp_path)
    checkpoints.save(1, make_state(9), {})
    assert same(checkpoints.restore(template(make_state(0)))[1], make_state(1))
    checkpoints.close()


def test_another_model_is_an_error_and_not_damage(two_steps: Path) -> None:
    wanted = template(make_state(0))
    wanted["params"]["ip"] = jax.ShapeDtypeStruct((4, 7), jnp.bfloat16, sharding=wanted["step"].sharding)
    wanted["scale"] = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=wanted["step"].sharding)  # orbax would cast
    del wanted["on"]
    with pytest.raises(InputError, match=r"on, params/ip, scale \(bool\[\] there, absent here\)"):
        open_(two_steps).restore(wanted)
    assert names(two_steps) == {"1", "2"}


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", *slow(*sorted(DAMAGES.keys() - {"flip"}))])
def test_damage_is_detected_or_harmless(two_steps: Path, tmp_path: Path, damage: str, caplog) -> None:
    rng, good = random.Random(damage), {step: tree_checksums(make_state(step)) for step in (1, 2)}
    wanted, outcomes = template(make_state(0)), []
    files = [path.relative_to(two_steps) for path in sorted((two_steps / "2").rglob("*")) if path.is_file()]
    assert {"metadata", "_METADATA", "manifest.ocdbt"} <= {file.name for file in files}
    for number, file in enumerate(file for file in files if (two_steps / file).stat().st_size):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        content = DAMAGES[damage]((folder / file).read_bytes(), rng)
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        caplog.clear()
        step, state, about = open_(folder).restore(wanted)
        assert tree_checksums(state) == good[step] and about == ABOUT | {"step": step}, f"silent: {file}"
        assert names(folder) == ({"1", "2"} if step == 2 else {"1", "damaged-2"})
        assert ("step 2 is damaged and skipped: " in caplog.text) == (step == 1)
        outcomes.append(step)
    assert outcomes.count(1) >= 3, "nothing was damaged"


def test_a_damaged_step_is_set_aside(two_steps: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    for number in ("damaged-2", "damaged-2-2"):
        (folder / "2" / "manifest" / "metadata").write_text("{}")
        checkpoints = open_(folder)
        assert checkpoints.restore(template(make_state(0)))[0] == 1
        assert number in names(folder)
        checkpoints.save(2, make_state(2), ABOUT)
        checkpoints.wait()
        assert checkpoints.restore(template(make_state(0)))[0] == 2
        checkpoints.close()


def test_nothing_is_moved_when_no_step_is_good(two_steps: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    for step in ("1", "2"):
        (folder / step / "manifest" / "metadata").write_text("{")
    for read in (lambda: open_(folder).restore(template(make_state(0))), lambda: open_(folder).about()):
        with pytest.raises(InputError, match=r"no checkpoint is good \(step 2: .*; step 1: .*\); put back a copy"):
            read()
    assert names(folder) == {"1", "2"}


def test_a_full_disk_is_reported_at_the_next_save(tmp_path: Path, capfd) -> None:
    fill(tmp_path, 1)
    checkpoints, (soft, hard) = open_(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"was not saved \(.*File too large\); the earlier ones are intact"):
            checkpoints.save(2, make_state(2), ABOUT)
            checkpoints.save(3, make_state(3), ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Traceback" not in capfd.readouterr().err
    assert checkpoints.restore(template(make_state(0)))[0] == 1
    checkpoints.save(4, make_state(4), ABOUT)  # there is room again
    checkpoints.wait()
    assert same(checkpoints.restore(template(make_state(0)))[1], make_state(4))
    checkpoints.close()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write there"):
        open_(tmp_path / "file" / "run")


# --- other processes -------------------------------------------------------------------------------------------------


def start(code: str, *arguments: Any, **environment: str) -> subprocess.Popen:
    """Runs `code` in a process that knows this file's functions."""
    prologue = "import sys; sys.path.insert(0, sys.argv[1]); from test_checkpoint import *\n"
    command = [sys.executable, "-c", prologue + code, str(Path(__file__).parent), *map(str, arguments)]
    places = [str(ROOT / name) for name in (".", "tests")]
    path = os.pathsep.join(filter(None, [*places, os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


KILLED = """
checkpoints = open_(Path(sys.argv[2]), keep_last=1)
for step in range(1, 100):
    state = {"w": jnp.full((1024, 1024), step, jnp.float32)}
    checkpoints.save(step, state, {})
    print(step, flush=True)
"""


def test_a_kill_while_saving_loses_no_saved_step(tmp_path: Path) -> None:
    process = start(KILLED, tmp_path)
    while int(process.stdout.readline()) < 3:
        pass
    process.send_signal(signal.SIGKILL)  # step 3 is being written now, step 2 is safe
    process.communicate()
    checkpoints = open_(tmp_path)
    step, state, _ = checkpoints.restore(template({"w": jnp.zeros((1024, 1024))}))
    assert step >= 2 and (np.asarray(state["w"]) == step).all()
    checkpoints.save(step + 1, state, {})
    checkpoints.close()
    assert not [name for name in names(tmp_path) if "tmp" in name]


TWO = """
number, port, folder = int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
assert jax.device_count() == 4 and jax.process_count() == 2
with run_lock(LocalStore(folder)):
    refused = ""
    try:
        with run_lock(LocalStore(folder)):
            pass
    except InputError as error:
        refused = str(error)
checkpoints = open_(folder)
for step in (1, 2):
    checkpoints.save(step, make_state(step), ABOUT)
checkpoints.wait()
if number == 0:  # the parts that process 1 wrote, and that it alone reads back
    for file in (folder / "2" / "state" / "ocdbt.process_1" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:100])
jax.experimental.multihost_utils.sync_global_devices("damaged")
step, state, _ = checkpoints.restore(template(make_state(0)))
checkpoints.save(3, make_state(3), ABOUT)
checkpoints.close()
print(json.dumps([refused, step, tree_checksums(state)]))
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = [start(TWO, number, port, tmp_path, JAX_NUM_CPU_DEVICES="2") for number in (0, 1)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results[0][1][-2000:] + results[1][1][-2000:]
    (refused, *first), (refused_too, *second) = (json.loads(out.splitlines()[-1]) for out, _ in results)
    assert f"in use by process {processes[0].pid} on {socket.gethostname()}" in refused
    assert refused_too == "see the message of process 0"
    assert first == second == [1, tree_checksums(make_state(1))]
    assert names(tmp_path) == {"lock", "1", "damaged-2", "3"}
    step, state, _ = open_(tmp_path).restore(template(make_state(0)))  # one process, four devices
    assert step == 3 and same(state, make_state(3))


HOLD = """
with run_lock(LocalStore(Path(sys.argv[2]))):
    print("held", flush=True)
    signal.pause()
"""


def test_one_run_per_folder(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path / "run")
    assert holder.stdout.readline() == "held\n"
    message = f"in use by process {holder.pid} on .*choose another folder"
    with pytest.raises(InputError, match=message), run_lock(LocalStore(tmp_path / "run")):
        pass
    holder.kill()
    holder.communicate()
    for _ in range(2):  # the kernel let go, and so do we
        with run_lock(LocalStore(tmp_path / "run")):
            pass


def test_a_file_system_without_locks_warns(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING), run_lock(LocalStore(tmp_path)):
        assert "cannot be locked (Operation not supported)" in caplog.text
