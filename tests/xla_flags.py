"""XLA flags under which programs compile fast: the tests compile much and run little."""

from importlib.metadata import version

QUICK_COMPILE = "--xla_backend_optimization_level=0"
# These two halve what a compilation costs. XLA aborts on a flag that it doesn't know, and later
# releases don't know the first.
if version("jaxlib").startswith("0.10."):
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
