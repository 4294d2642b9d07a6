"""Every test runs on the CPU, offline, in full float32, on four virtual devices.

The settings are environment variables, made before anything imports jax, so that subprocesses inherit them.
"""

import gc
import importlib.metadata
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = os.environ.get("IPADAPTER_JAX_TEST_PLATFORM", "cpu")

# Containers often set this. Each process of a test would then compile every module that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

os.environ["JAX_PLATFORMS"] = PLATFORM
if PLATFORM == "cpu":
    os.environ["JAX_NUM_CPU_DEVICES"] = "4"
    # Half the time of a test run is compiling; the tests' small arrays gain nothing from LLVM's optimiser. The old
    # emitters compile a sampler in a third of the time, a training step in half; jaxlib 0.12 has them no more, and ends
    # the process where it is given a flag that it does not know.
    quick = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        quick += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ.setdefault("XLA_FLAGS", " ".join(quick))
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# A second run compiles nothing; `make clean` empties it.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "jax")
os.makedirs(os.environ["JAX_COMPILATION_CACHE_DIR"], mode=0o700, exist_ok=True)  # else it is not used
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # else it prints that PyTorch was not found
os.environ["MPLBACKEND"] = "agg"

# Tests send these to programs, which would inherit that nohup or a job in the background ignores or blocks them.
for _number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [_number])

# Tracing makes millions of objects that stay: looking for garbage after every 700 of them
# was 7 % of a profile.
gc.set_threshold(50_000, 20, 20)

# Whole files go to the processes of a run, and a long one that begins last leaves the others without work.
LONGEST_FIRST = (
    "integration/test_trainer.py",
    "parity/test_generation.py",
    "integration/test_layouts.py",
    "parity/test_inpainting.py",
    "integration/test_mini.py",
    "unit/pipelines/test_stable_diffusion.py",
    "unit/train/test_step.py",
    "parity/test_models.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; xdist keeps this order with --no-loadscope-reorder."""
    rank = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))  # a stable sort: the others stay as they are


MOST_PIECES = 20_000


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Compiled programs are let go before the process has as many pieces of memory as the kernel allows it (65,530):
    jaxlib crashes there, wherever it compiles next. Short tests compile little, and counting is not free."""
    began = time.monotonic()
    yield
    if time.monotonic() - began > 0.5 and _pieces_of_memory() > MOST_PIECES:
        import jax

        jax.clear_caches()


def _pieces_of_memory() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0  # Linux alone has them


@pytest.fixture(autouse=True, scope="session")
def memory_is_given_back() -> None:
    """A run keeps what it had, for the whole process; here that would be the sum of what the tests need."""
    from ipadapter_jax.runtime import malloc

    malloc.disable_trim = lambda: None


@pytest.fixture(autouse=True, scope="session")
def no_program_is_kept() -> None:
    """Writing them costs more than finding them again saves, and they would never be let go; test_export_cache.py
    keeps some."""
    from ipadapter_jax.runtime import export_cache

    export_cache.cache_is_on = lambda: False


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches out fails, on a machine with a network too."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address[0]}: tests are offline")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="module")
def single_device() -> Iterator[None]:
    """The package sees one of the four devices: programs for it compile faster. For files that are not about meshes."""
    import jax

    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        patch.setattr(jax, "local_devices", lambda: first)
        yield


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of recorded inputs and expectations."""
    return Path(__file__).resolve().parent / "data"


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Pipelines of a file run on one device, for which programs compile in three quarters of the time, and which makes
    one image where four make as many. test_stable_diffusion.py checks that an image does not depend on their number."""
    from helpers import on_one_device

    with on_one_device():
        yield


@pytest.fixture(scope="module")
def base():
    """The small model, for one file of tests, with which its compiled programs go."""
    from small_model import small_model

    from ipadapter_jax import StableDiffusion

    return StableDiffusion.from_pretrained(small_model())


@pytest.fixture(scope="module")
def pipe(base):
    """The small model with an adapter."""
    from helpers import IMAGE_ENCODER
    from small_model import small_adapter

    return base.with_ip_adapter(small_adapter("ip-adapter_tiny"), image_encoder=IMAGE_ENCODER)
