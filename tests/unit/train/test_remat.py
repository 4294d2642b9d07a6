"""Blocks are rematerialized in the backward pass where a step would not fit otherwise."""

import json

import numpy as np
import pytest
from training import changed, nano, photographs

from ipadapter_jax.errors import InputError
from ipadapter_jax.train import build
from ipadapter_jax.train.memory import MemoryPlan
from ipadapter_jax.train.step import make_step
from ipadapter_jax.train.trainer import train

STEPS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = photographs(tmp_path_factory.mktemp("data") / "photos")
    return nano(steps=STEPS, data__path=str(data), log__validate_every=0)


@pytest.fixture
def crowded(monkeypatch):
    """A device of 110 bytes for a step that needs 150, or `needed` with remat. Gives the choices that were made."""

    def crowd(needed: int) -> list[bool]:
        seen: list[bool] = []

        def recorded(networks, *rest):
            seen.append(networks.unet.remat)
            return make_step(networks, *rest)

        def plan_memory(make, mesh, *rest):
            make(mesh)
            return MemoryPlan(0, 0, 0, 0, needed if seen[-1] else 150)

        monkeypatch.setattr(build, "make_step", recorded)
        monkeypatch.setattr(build, "plan_memory", plan_memory)
        monkeypatch.setattr(build, "device_memory_limit", lambda: 110)
        return seen

    return crowd


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow  # two runs; models/test_unet.py holds that blocks computed again give the same
def test_blocks_are_rematerialized_if_needed_and_losses_are_the_same(run, crowded, tmp_path):
    plain = changed(run, out=str(tmp_path / "plain"))
    assert train(plain) == 0
    seen = crowded(80)
    assert train(changed(run, out=str(tmp_path / "crowded"))) == 0
    assert seen == [False, True, True]  # planned without, planned with, compiled
    np.testing.assert_allclose(losses(tmp_path / "crowded"), losses(tmp_path / "plain"), rtol=1e-6)


def test_a_step_that_does_not_fit_even_with_remat_is_refused(run, crowded, tmp_path):
    crowded(10_000)
    with pytest.raises(InputError) as found:
        train(changed(run, out=str(tmp_path / "run")))
    assert "remat" not in str(found.value)  # it is on already
    assert "--data.batch-size" in str(found.value) or "--optim.accumulate" in str(found.value)


def test_with_remat_never_the_error_names_remat_always(run, crowded, tmp_path):
    seen = crowded(80)
    with pytest.raises(InputError, match="--model.remat always"):
        train(changed(run, out=str(tmp_path / "run"), model__remat="never", optim__accumulate=1))
    assert not any(seen)
