"""Eight CPU devices for every test, and hypothesis without chance."""

import importlib.util
import os
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"
# unoptimized code: the tests compile much and run little
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("default")


# T5X leaves event loops and sockets to the garbage collector
_HAS_T5X = importlib.util.find_spec("t5x") is not None


def pytest_configure(config):
    if _HAS_T5X:
        config.addinivalue_line("filterwarnings", "ignore:unclosed:ResourceWarning")


def pytest_unconfigure():
    if _HAS_T5X:
        warnings.filterwarnings("ignore", "unclosed", ResourceWarning)
