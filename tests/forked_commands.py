"""Python commands in processes that have the heavy libraries imported: forks of a server of them.

Importing TensorFlow, JAX, Flax and Orbax takes longer than a command that ends in an error does. No
module of this package is imported before the fork: what a command does is its own.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

_LIBRARIES = ["jax", "tensorflow", "flax.linen", "orbax.checkpoint", "seqio", "clu.metrics", "gin"]


def run_module(module, arguments, env, *, cwd=None, merged=False, timeout=600):
    """What `python -m module arguments` does; `merged`: stdout has both streams."""
    return _run(_module, (module, [str(a) for a in arguments]), env, cwd, merged, timeout)


def run_code(code, env=os.environ, *, timeout=120):
    """What `python -c code` does."""
    return _run(_code, (code,), env, None, False, timeout)


@functools.cache
def _context():
    """Starts the server, which says nothing: TensorFlow logs while it is imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        forkserver.ensure_running()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
    return context


def without(*packages):
    """Code for the head of `run_code`, after which these packages are as if not installed."""
    return (  # Python takes a module that is None for one that isn't there
        f"import sys; gone = {packages!r}; "
        "loaded = [m for m in sys.modules if m.split('.')[0] in gone]; "
        "sys.modules.update(dict.fromkeys([*gone, *loaded])); "
    )


def _run(target, arguments, env, cwd, merged, timeout):
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        stdout = Path(folder, "stdout")
        stderr = stdout if merged else Path(folder, "stderr")
        process = context.Process(
            target=_child, args=(target, arguments, dict(env), cwd, stdout, stderr)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([target.__name__, *arguments], timeout)
        texts = [path.read_text(errors="replace") for path in (stdout, stderr)]
        return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def _child(target, arguments, env, cwd, stdout, stderr):
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p not in sys.path]
    if cwd is not None:
        os.chdir(cwd)
    for stream, file in ((sys.stdout, stdout), (sys.stderr, stderr)):
        # 1 and 2 are what libraries in C++ write to
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    try:
        target(*arguments)
    finally:
        atexit._run_exitfuncs()  # which a fork leaves out


def _module(module, arguments):
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _code(code):
    sys.argv = ["-c"]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
