"""Damaged files of weights: 20,000 safetensors and 10,000 pickles. scripts/fuzz_weights.py runs more."""

import pytest
from fuzz_weights import Fuzzer, seeds


@pytest.mark.parametrize(("container", "count"), [("safetensors", 20_000), ("bin", 10_000)])
def test_only_whole_tensors_under_their_own_names_come_through(tmp_path, container, count):
    fuzzer = Fuzzer(tmp_path, seeds(tmp_path)[container], seed=20)
    fuzzer.run(count)
    assert fuzzer.faults == []
    assert fuzzer.seen["refused"] > count / 2 and fuzzer.seen["unharmed"] > count / 50  # neither too gentle nor rough
    assert fuzzer.seen.keys() <= {"refused", "unharmed", "other bits, no digest"}


def test_the_fuzzer_sees_what_must_not_happen(tmp_path, monkeypatch):
    """With a reader that lets a wrong shape through, that runs code, and that is slow."""
    import fuzz_weights

    from ipadapter_jax.weights.lazy import held

    fuzzer = Fuzzer(tmp_path, seeds(tmp_path)["bin"], seed=1)
    good = fuzz_weights.open_ip_adapter(tmp_path / "base-zip.bin")
    key, tensor = next(iter(good.ip_adapter.items()))
    good.ip_adapter[key] = held(tensor.read().T)
    monkeypatch.setattr(fuzz_weights, "open_ip_adapter", lambda _: good)
    monkeypatch.setattr(fuzz_weights, "check_ip_adapter", lambda *_: None)
    fuzzer.run(20)
    assert fuzzer.seen["fault: other names, shapes or dtypes"] == 20 == len(fuzzer.faults)

    def runs_code(_):
        import os

        os.system("true")
        raise fuzz_weights.WeightFileError("x")

    monkeypatch.setattr(fuzz_weights, "open_ip_adapter", runs_code)
    fuzzer.run(1)
    assert any("executed os.system" in fault for fault in fuzzer.faults)
