"""Runs the tests with the oldest and with the newest releases that pyproject.toml allows, each in its own environment.

    python3.12 scripts/test_versions.py                    all default tests twice, an hour and a half on 2 cores
    python3.12 scripts/test_versions.py --only oldest --tests tests/unit/train

The environments use the Python that runs this script, which needs no packages. The oldest set pins every direct
dependency to its lower bound and lets pip choose their dependencies; the newest is what pip finds today.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("jax", "flax", "orbax-checkpoint", "grain", "tokenizers")


def lower_bounds() -> list[str]:
    """Requirements of pyproject.toml at their oldest: "jax>=0.10" as "jax==0.10"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement) for requirement in project["dependencies"])
    return [f"{match[1]}=={match[2]}" for match in found if match]


def passes(folder: Path, constraints: list[str], tests: list[str], pip_flags: list[str], jobs: int) -> bool:
    """Makes the environment `folder`, says what is in it, and runs the tests there."""
    python, pins = folder / "bin" / "python", folder.with_suffix(".txt")
    folder.parent.mkdir(parents=True, exist_ok=True)
    pins.write_text("".join(f"{line}\n" for line in constraints))
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "-c", pins, *pip_flags]
    subprocess.run([*install, "-e", f"{ROOT}[torch,dev]"], check=True)
    versions = "; ".join(f"print({name!r}, importlib.metadata.version({name!r}))" for name in SHOWN)
    subprocess.run([python, "-c", f"import importlib.metadata; {versions}"], check=True)
    spread = ["-n", str(jobs), "--dist", "loadfile", "--no-loadscope-reorder"]  # as `make test`
    return subprocess.run([python, "-m", "pytest", "-q", *spread, *tests], cwd=ROOT).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", choices=("oldest", "newest"), help="by default both")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "versions", help="where the environments are made")
    parser.add_argument("--tests", nargs="+", default=[], help="by default all default tests")
    parser.add_argument(
        "--pip-flags", nargs="+", default=[], help="such as --extra-index-url=URL for PyTorch's CPU build"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes of the tests; each takes up to 6 GB")
    args = parser.parse_args()
    sets = {"oldest": lower_bounds(), "newest": []}
    chosen = [args.only] if args.only else list(sets)
    good = {
        name: passes(args.out.absolute() / name, sets[name], args.tests, args.pip_flags, args.jobs) for name in chosen
    }
    print(", ".join(f"{name}: {'passed' if passed else 'FAILED'}" for name, passed in good.items()))
    return 0 if all(good.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
