"""The short forms of scripts/torture.py; docs/reliability.md has what the long ones take and found."""

import pytest
from torture import FAULTS, main
from torture_alone import Alone
from torture_damage import Damage
from torture_disk import Disk
from torture_endurance import Endurance
from torture_jobs import Jobs
from torture_kill import Kill
from torture_layouts import Layouts
from torture_numbers import Numbers
from torture_pictures import Pictures
from torture_refuse import Refuse
from torture_stop import Stop

SHORT = [
    Kill(times=1, steps=100),
    Stop(times=1, steps=150),
    Layouts(steps=6, others=0),
    Damage(trials=24),
    Disk(disks=False),
    Pictures(records=40, percents=(50,)),
    Numbers(rates=(1e39,)),
    Refuse(),
    Jobs(times=1, commands=("batch",)),
    Alone(),
    # The first saves take memory once; a leak of the step would show as 10 MB.
    Endurance(steps=1500, every=50, save_every=300, settled=700, slope=100.0),
]
SLOW = [
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
    assert {type(fault) for fault in SHORT} == set(FAULTS.values())


def test_a_figure_that_does_not_hold_is_said(capsys) -> None:
    """Memory that may not grow at all: that of a process that has just begun does."""
    assert main(Endurance(steps=200, every=20, save_every=100, settled=0, slope=-1e9)) == 1
    assert capsys.readouterr().out.startswith("NOT survived: memory grows: ")
