"""Processes that begin with TensorFlow and the other large packages imported: importing them takes longer than most tests.

`multiprocessing`'s fork server imports them once and is forked for each call, before anything has used them, so every call starts from
the same state, as a process of its own does. The library itself is not among them: each call imports that of this checkout.
"""
import atexit
import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SERVED = multiprocessing.get_context("forkserver") if os.name == "posix" else multiprocessing.get_context("spawn")
if os.name == "posix":
    _SERVED.set_forkserver_preload(["tensorflow", "keras", "pandas", "sklearn.metrics", "matplotlib.pyplot", "seaborn", "cv2", "nbformat", "IPython.display", "psutil"])


def _run(function: Callable[..., int | None], arguments: tuple, folder: Path, environment: dict[str, str], written: tuple[str, str]) -> None:
    """In the new process: all that it prints, also from below Python, goes into two files; its exit code is the function's."""
    for number, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    code = 1
    try:
        code = function(*arguments) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out, and a run that is broken off removes its folder there
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def call(function: Callable[..., int | None], *arguments, folder: Path = ROOT, environment: Mapping[str, str] | None = None, timeout: float = 900) -> subprocess.CompletedProcess:
    """Call a function of a module in `tests/` in a new process, in `folder` and with this process's environment and `environment` in it; what it returns is the exit code."""
    settings = {**os.environ, "MPLBACKEND": "agg", **(environment or {})}
    with tempfile.TemporaryDirectory() as room:
        written = os.path.join(room, "stdout"), os.path.join(room, "stderr")
        process = _SERVED.Process(target=_run, args=(function, arguments, Path(folder), settings, written))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{function.__name__}{arguments}: not done in {timeout} s")
        said = []
        for path in written:
            with contextlib.suppress(FileNotFoundError):
                said.append(Path(path).read_text(errors="replace"))
    return subprocess.CompletedProcess([function.__name__, *map(str, arguments)], process.exitcode, *(said + ["", ""])[:2])
