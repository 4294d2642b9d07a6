"""The Frechet distance against the formula with a matrix square root, and what is wrong with files of features."""

import numpy as np
import pytest
import scipy.linalg
from safetensors.numpy import save_file

from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.frechet import Distance, Moments, distance_of_files, frechet_distance

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(12, 12))
A, B = RNG.normal(size=(300, 12)) @ MIX, 0.3 + RNG.normal(size=(500, 12)) * np.linspace(0.5, 2, 12)


def moments(rows: np.ndarray, parts: int = 1) -> Moments:
    found = Moments(rows.shape[1])
    for part in np.array_split(rows, parts):
        found.add(part)
    return found


def by_formula(a: np.ndarray, b: np.ndarray) -> float:
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.trace(first + second - 2 * root)


def test_equal_to_the_formula():
    assert frechet_distance(moments(A), moments(B)) == pytest.approx(by_formula(A, B), rel=1e-6)
    assert frechet_distance(moments(A, 7), moments(B, 3)) == pytest.approx(by_formula(A, B), rel=1e-6)
    assert frechet_distance(moments(A), moments(A[::-1])) == pytest.approx(0, abs=1e-6)


def test_fewer_rows_than_features():
    few = frechet_distance(moments(A[:5]), moments(B[:4]))
    shifted = frechet_distance(moments(A[:5]), moments(A[:5] + 2))
    assert np.isfinite(few) and shifted == pytest.approx(12 * 2**2, rel=1e-6)


def test_files(tmp_path):
    np.save(tmp_path / "a.npy", A.astype(np.float32))
    save_file({"features": B.astype(np.float32)}, tmp_path / "b.safetensors")
    found = distance_of_files(tmp_path / "a.npy", tmp_path / "b.safetensors")
    assert found == pytest.approx(by_formula(A.astype(np.float32), B.astype(np.float32)), rel=1e-6)


def test_files_that_cannot_be_used(tmp_path):
    good = tmp_path / "good.npy"
    np.save(good, A)
    wrong = {"flat": A[0], "whole": np.ones((4, 12), int), "one": A[:1], "nan": np.where(A > 3, np.nan, A)}
    for name, array in {**wrong, "narrow": A[:, :5]}.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(InputError, match=name):
            distance_of_files(good, tmp_path / f"{name}.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "wide.npy", np.ones((2, 20_000), np.float32))
    with open(tmp_path / "archive.npy", "wb") as file:
        np.savez(file, a=A)
    with open(tmp_path / "endless.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**19, 2)})
    save_file({"a": A, "b": B}, tmp_path / "two.safetensors")
    more = ("wide.npy", "archive.npy", "endless.npy")
    for name in (*more, "objects.npy", "text.npy", "two.safetensors", "nowhere.npy", "nowhere.safetensors"):
        with pytest.raises(InputError, match=name):
            distance_of_files(good, tmp_path / name)


@pytest.mark.parametrize(("rows", "few"), [((300, 12), True), ((12, 500), True), ((13, 500), False)])
def test_fewer_images_than_features_are_told(rows, few):
    """A covariance of N rows has rank N - 1 at most."""
    a, b = (Moments(12), Moments(12))
    a.add(A[: rows[0]])
    b.add(B[: rows[1]])
    found = Distance.between(a, b)
    assert found == frechet_distance(a, b)
    expected = f"biased: {rows[0]} and {rows[1]} images for 12 features; compare only with distances of as many images"
    assert found.caveat == (expected if few else None)
