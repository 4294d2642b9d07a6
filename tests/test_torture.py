"""The short form of scripts/torture.py; its long form takes ten minutes."""

from torture import Torture, main


def test_a_run_that_is_killed_ends_as_one_that_is_not(capsys) -> None:
    assert main(Torture(kills=2, steps=40, seed=1)) == 0
    output = capsys.readouterr().out
    assert "2 kills" in output and "survived" in output and "DIFFERENT" not in output
