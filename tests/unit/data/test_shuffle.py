"""The order of the records: every one once an epoch, at random, for ever the same."""

import numpy as np
import pytest

from ipadapter_jax.data.shuffle import record_order


@pytest.mark.parametrize("records", [1, 2, 3, 4, 5, 7, 16, 100, 257])
def test_an_epoch_reads_every_record_once(records):
    epochs = [[record_order(5, records, epoch * records + i) for i in range(records)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(records)) for epoch in epochs)
    if records >= 16:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert all([record_order(6, records, i) for i in range(records)] != epoch for epoch in epochs)


def test_the_order_is_frozen():
    """Recorded: with another order resumed runs would see other data."""
    assert [record_order(0, 10, g) for g in range(20)] == [1, 0, 9, 2, 6, 4, 3, 8, 7, 5, 7, 9, 8, 3, 1, 4, 5, 0, 6, 2]
    rows = (0, 1, 10**9, 64 * 10**9)
    assert [record_order(2**63 + 1, 10**9, g) for g in rows] == [429719376, 961901574, 280102826, 7924993]


@pytest.mark.parametrize("records", [2, 3, 8, 10])
def test_every_place_reads_every_record_equally_often(records):
    counts = np.zeros((records, records))
    for seed in range(2000):
        for place in range(records):
            counts[place, record_order(seed, records, place)] += 1
    expected = 2000 / records
    chi_squared = ((counts - expected) ** 2 / expected).sum() / (records - 1) ** 2
    assert chi_squared < 1 + 4 * np.sqrt(2) / (records - 1)  # 4 standard deviations


@pytest.mark.parametrize("records", [10**4, 10**6, 10**9])
def test_neighbouring_places_have_nothing_in_common(records):
    places = np.array([record_order(0, records, g) for g in range(4000)]) / records
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 4 / np.sqrt(4000)  # 4 standard deviations
    assert abs(places.mean() - 0.5) < 4 / np.sqrt(12 * 4000)
    histogram, _ = np.histogram(places, 20, (0, 1))
    assert np.abs(histogram - 200).max() < 4 * np.sqrt(200)
