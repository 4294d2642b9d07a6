"""What is installed is what lies in the repository: modules, recipes, and the embedded model."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
