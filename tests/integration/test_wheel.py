"""What is installed is what lies in the repository: modules, recipes, and the embedded model."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from scripts.test_versions import lower_bounds

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "ipadapter_jax", "configs")


def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")  # the build's own; pip would fetch it
    for name in SOURCES:  # a build leaves its traces where it runs
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "."]
    done = subprocess.run([*build, "--wheel-dir", "wheel"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))) as wheel:
        installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT) for path in (ROOT / "ipadapter_jax").rglob("*") if path.is_file()}
    expected |= {Path("ipadapter_jax", path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.py")}
    assert installed == {path.as_posix() for path in expected if path.suffix != ".pyc"}


def test_every_dependency_has_a_lower_bound() -> None:
    """Which the oldest environment pins: without one it would test the newest release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]]
    assert [bound.partition("==")[0] for bound in lower_bounds()] == names
