"""Eight CPU devices for every test, and hypothesis without chance."""

import gc
import importlib.util
import os
import shutil
import tempfile
import warnings

from xla_flags import QUICK_COMPILE

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK_COMPILE}"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# One program is compiled once by all workers and the runs they start; it is gone after the tests.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_OWN_CACHE = None
if _CACHE not in os.environ:
    _OWN_CACHE = os.environ[_CACHE] = tempfile.mkdtemp(prefix="t5x_sparsity_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Tracing makes many objects that stay. To look through them for cycles at the usual pace takes a
# twentieth of all time.
gc.set_threshold(200_000, 20, 100)

from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("default")


# T5X leaves event loops and sockets to the garbage collector
_HAS_T5X = importlib.util.find_spec("t5x") is not None


def pytest_configure(config):
    if _HAS_T5X:
        config.addinivalue_line("filterwarnings", "ignore:unclosed:ResourceWarning")


def pytest_collection_finish():
    gc.freeze()  # what all tests import is looked through no more


def pytest_unconfigure():
    if _OWN_CACHE:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)
    if _HAS_T5X:
        warnings.filterwarnings("ignore", "unclosed", ResourceWarning)
