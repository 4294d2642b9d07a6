"""A training loop for small networks: Adam, data-parallel, resumable after any stop."""

import concurrent.futures
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save

from experiments.mini.run_settings import check_same
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.runtime.mesh import local_mesh, replicated
from ipadapter_jax.storage.atomic_files import write_atomically
from ipadapter_jax.weights.load_tree import Tree

_SAVE_SECONDS = 120
_LOG_STEPS = 100
_EMA = 0.999

Batch = Any
"""A tree of numpy arrays (B, ...)."""
Loss = Callable[[Tree, Batch, jax.Array], jax.Array]


class _State(NamedTuple):
    params: Tree
    optimizer: optax.OptState
    average: Tree


def fit(
    folder: Path,
    loss: Loss,
    params: Tree,
    batch: Callable[[int], Batch],
    *,
    steps: int,
    learning_rate: float,
    deadline: float = float("inf"),
) -> Tree | None:
    """Minimizes loss(params, batch(step), key). Returns the moving average of the weights.

    Returns None if `deadline` (in seconds of time.monotonic) is reached before the last step. The state is then saved
    in `folder`, from which the next call resumes. The learning rate rises over 200 steps and falls to 0 along a cosine.
    folder/log.jsonl has the mean losses.

    Raises InputError if `folder` has a run with another number of steps or learning rate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(200, steps // 2), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    mesh = local_mesh()
    # Copies, because the step donates its state.
    state = jax.tree.map(jnp.copy, _State(params, optimizer.init(params), params))
    state = jax.device_put(state, replicated(mesh))
    check_same(folder / "settings.json", {"steps": steps, "learning_rate": learning_rate})
    begin, state = _restore(folder / "state.safetensors", state)
    _cut_log(folder / "log.jsonl", begin)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: _State, batch: Batch, number: jax.Array):
        value, gradient = jax.value_and_grad(loss)(state.params, batch, jax.random.fold_in(random_keys.key(0), number))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer)
        params: Any = optax.apply_updates(state.params, updates)
        average = jax.tree.map(lambda a, p: a + (1 - _EMA) * (p - a), state.average, params)
        return _State(params, optimizer_state, average), value

    rows, losses, saved = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])), [], time.monotonic()
    with tqdm.tqdm(total=steps, initial=begin, desc=folder.name, disable=None) as bar:
        for number, arrays in _ahead(batch, begin, steps):
            state, value = step(state, jax.device_put(arrays, rows), jnp.int32(number))
            losses.append(value)
            bar.update()
            done = number + 1
            if done % _LOG_STEPS == 0 or done == steps:
                _log(folder / "log.jsonl", done, float(np.mean(jax.device_get(losses))))
                losses = []
            if done < steps and time.monotonic() > min(deadline, saved + _SAVE_SECONDS):
                _save(folder / "state.safetensors", done, state)
                saved = time.monotonic()
                if saved > deadline:
                    return None
    if begin < steps:
        _save(folder / "state.safetensors", steps, state)
    return jax.device_get(state.average)


def _ahead(batch: Callable[[int], Batch], begin: int, steps: int) -> Iterator[tuple[int, Batch]]:
    """Yields (number, batch). The next three batches are computed ahead in a thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        queue = [pool.submit(batch, number) for number in range(begin, min(begin + 3, steps))]
        for number in range(begin, steps):
            arrays = queue.pop(0).result()
            if number + 3 < steps:
                queue.append(pool.submit(batch, number + 3))
            yield number, arrays


def _log(path: Path, step: int, loss: float) -> None:
    if not np.isfinite(loss):
        raise SystemExit(f"{path}: the loss is {loss} at step {step}")
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss, "time": round(time.time())}) + "\n")


def _cut_log(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, from which the run resumes."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_atomically(path, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())


def _save(path: Path, step: int, state: _State) -> None:
    leaves = [np.ascontiguousarray(leaf) for leaf in jax.device_get(jax.tree.leaves(state))]
    tensors = {str(i): leaf for i, leaf in enumerate(leaves)}
    write_atomically(path, save(tensors, metadata={"step": str(step)}))


def _restore(path: Path, state: _State) -> tuple[int, _State]:
    if not path.exists():
        return 0, state
    with safe_open(path, "numpy") as file:
        step = int(file.metadata()["step"])
    arrays, (leaves, tree) = load_file(path), jax.tree.flatten(state)
    found = [jax.device_put(arrays[str(i)], leaf.sharding) for i, leaf in enumerate(leaves)]
    return step, jax.tree.unflatten(tree, found)
