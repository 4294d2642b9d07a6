"""What a long command says of itself."""

import logging
import re
import time

import pytest

from ipadapter_jax.runtime.announcements import AnnounceFirstCall, announce, announce_if_slow


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "ipadapter_jax")
    return lambda: [re.sub(r"[\d.]+ s$", "N s", record.getMessage()) for record in caplog.records]


def test_before_and_after(said):
    with announce("reading"):
        assert said() == ["reading ..."]
    with announce("compiling", "may take minutes"):
        pass
    assert said() == [
        "reading ...",
        "reading: done in N s",
        "compiling (may take minutes) ...",
        "compiling: done in N s",
    ]


def test_a_failure_is_not_done(said):
    with pytest.raises(ValueError, match="no room"), announce("reading"):
        raise ValueError("no room")
    assert said() == ["reading ..."]


def test_only_slow_work_is_announced(said):
    with announce_if_slow("looking", seconds=5):
        pass
    assert said() == []
    with announce_if_slow("looking", seconds=0.05):
        time.sleep(0.3)
        assert said() == ["looking ..."]
    assert said() == ["looking ...", "looking: done in N s"]


def test_only_the_first_call_is_announced(said):
    first_time = AnnounceFirstCall()
    for what in ("compiling a", "compiling b", "compiling a"):
        with first_time(what):
            pass
    assert [line for line in said() if line.endswith("...")] == [
        "compiling a (may take minutes) ...",
        "compiling b (may take minutes) ...",
    ]
