"""The short forms of tests/fault_injection/all.py; docs/reliability.md has the results of the long ones."""

import pytest

from tests.fault_injection.all import FAULTS, main
from tests.fault_injection.batch_jobs import Jobs
from tests.fault_injection.damage import Damage
from tests.fault_injection.disk import Disk
from tests.fault_injection.endurance import Endurance, Sample
from tests.fault_injection.images import Images
from tests.fault_injection.kill import Kill
from tests.fault_injection.layouts import Layouts
from tests.fault_injection.numerics import Numbers
from tests.fault_injection.preemption import Stop
from tests.fault_injection.refusals import Refuse
from tests.fault_injection.standalone import Alone

SHORT = [Kill(times=1, steps=48)]
# A minute or two each. These provoke faults in whole runs; default tests provoke them in one process or at one place:
# integration/test_trainer.py, unit/train/test_checkpoint.py, integration/test_layouts.py,
# unit/train/test_metrics_log.py, integration/test_precompute.py, unit/batch/test_runner.py, test_architecture.py. Only
# Endurance shows that the memory of a long run does not grow.
SLOW = [
    Disk(disks=False),
    Alone(),
    # The first saves take memory once; a leak of the step would show as 10 MB.
    Endurance(steps=800, every=40, save_every=200, settled=280, slope=100.0),
    Stop(times=1, steps=60),
    Layouts(steps=6, others=0),
    Damage(trials=24),
    Images(records=40, percents=(50,)),
    Numbers(steps=7, rates=(1e39,)),
    Refuse(),
    Jobs(times=1, commands=("batch",)),
    Kill(times=3, processes=2, devices=4),
    Stop(times=2, processes=2),
    Layouts(),
    Jobs(times=2),
]


@pytest.mark.parametrize("fault", [*SHORT, *(pytest.param(fault, marks=pytest.mark.slow) for fault in SLOW)], ids=str)
def test_survives(fault, capsys) -> None:
    assert main(fault) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.startswith("survived: ")


def test_every_fault_has_a_short_form() -> None:
    assert {type(fault) for fault in SHORT + SLOW} == set(FAULTS.values())


def looks(**growing: float) -> list[Sample]:
    """Of a run of 4,000 steps that is flat, but for what grows with every look."""
    flat = Sample(step=0, memory=500.0, files=10, programs=50)
    return [
        flat._replace(step=100 * i, **{name: getattr(flat, name) + i * by for name, by in growing.items()})
        for i in range(1, 41)
    ]


@pytest.mark.parametrize(("growing", "said"), [("memory", "memory grows"), ("files", "open"), ("programs", "programs")])
def test_a_figure_that_does_not_hold_is_said(growing, said, capsys) -> None:
    fault = Endurance(steps=4000, every=100, save_every=400, settled=800)
    assert fault.judge(looks(memory=0.009)).startswith("40 looks: memory 500 to 500 MB, +0.90 MB per 10,000 steps")
    assert main(lambda work: fault.judge(looks(**{growing: 1}))) == 1
    assert capsys.readouterr().out.startswith(f"NOT survived: {said}")
