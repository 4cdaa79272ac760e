"""What tests share: the CPU with eight virtual devices, a compilation cache, golden vectors, a generator."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Shared by the workers, by later runs and by the programs that tests start: a second run compiles in a sixth
# of the time and a first one is not slower. A damaged entry is reported and compiled again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(TESTS.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# The suite is thousands of small programs, most of its time XLA's. Without LLVM's passes and with the older emitters of
# loops, compiling takes half of the processor's time, and even files that train take less in all.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
FLAGS = os.environ["XLA_FLAGS"]
if version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Sharding tests run in this process: eight devices cost the other tests nothing that could be measured. A
# config value and not XLA_FLAGS, so that programs a test starts do not inherit it.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)

jax.block_until_ready(jax.jit(lambda x: x + 1)(1))  # reads the flags; TPU's compiler, which may not know them all, is later
os.environ["XLA_FLAGS"] = FLAGS


@pytest.fixture(scope="session")
def golden():
    """`golden(name)`: the arrays of tests/golden/<name>/io.npz as a dict; `<number>-` may be left out."""

    def load(name: str) -> dict[str, np.ndarray]:
        root = TESTS / "golden"
        folders = [root / name] if (root / name).is_dir() else sorted(root.glob(f"[0-9][0-9][0-9]-{name}"))
        if len(folders) != 1 or not (folders[0] / "io.npz").is_file():
            known = ", ".join(sorted(p.parent.name for p in root.glob("*/io.npz")))
            raise FileNotFoundError(f"no golden vectors {name!r} in {root}; there are: {known or 'none'}")
        with np.load(folders[0] / "io.npz") as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers for every test, whatever the order or the worker."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Programs of modules that are done are let go before they are too many: each holds several memory maps, of which Linux
    allows a process 65,530 by default, and a compiler that gets no more of them crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 12_000:
        jax.clear_caches()
        gc.collect()
