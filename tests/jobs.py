"""How tests start a job: papermill in a process of its own, as a shell does."""
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import forks
import nbformat

ROOT = Path(__file__).resolve().parent.parent
# The least that is still a whole run: some seconds of training on drawn cells.
SMALL = {"data": "drawn:n=120,seed=1", "recipe": "demo", "backbone": "SiumGPT_CNN_0.25", "image_size": 32, "epochs": 2, "output": "run"}
# Nothing listens at this port of this machine, so every download fails at once.
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")} | {"no_proxy": "", "NO_PROXY": ""}


def job_command(job: str, **parameters) -> list[str]:
    """The command that runs a job and writes the executed notebook as `out.ipynb` in the current folder."""
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    return [sys.executable, "-m", "papermill", str(ROOT / "nbs" / f"{job}.ipynb"), "out.ipynb", *words]


def run_job(job: str, folder: Path, environment: dict | None = None, **parameters) -> subprocess.CompletedProcess:
    """Run a job in `folder` to its end; papermill's report of an error is in `stderr`."""
    return subprocess.run(job_command(job, **parameters), cwd=folder, env=job_environment(environment), capture_output=True, text=True, timeout=900)


def _run_cells(job: str, parameters: dict) -> None:
    """Execute a job's cells in this process, as papermill would with these parameters, but without a kernel and its messages."""
    sources = _sources(job, parameters)
    ran: list[str] = []
    names = {"In": ran, "__name__": "__main__"}
    for source in sources:
        ran.append(source)
        exec(compile(source, f"{job}.ipynb", "exec"), names)


def run_cells(job: str, folder: Path, environment: dict | None = None, **parameters) -> subprocess.CompletedProcess:
    """As `run_job`, in a third of the time: the job's cells in a process that has TensorFlow imported already, without Jupyter; it leaves no executed notebook."""
    return forks.call(_run_cells, job, parameters, folder=folder, environment=job_environment(environment))


def _sources(job: str, parameters: dict) -> list[str]:
    """The sources of a job's code cells with papermill's own cell of parameters after the first."""
    cells = [cell.source for cell in nbformat.read(ROOT / "nbs" / f"{job}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    injected = "# Parameters\n" + "\n".join(f"{name} = {str(value)!r}" if isinstance(value, Path) else f"{name} = {value!r}" for name, value in parameters.items())
    at = next(i for i, source in enumerate(cells) if source.startswith("# Parameters")) + 1
    return [*cells[:at], injected, *cells[at:]]


def settings_error(job: str, **parameters) -> Exception | None:
    """What a job's cells raise with these parameters before the cell that starts the run, in this process and the current folder: a kernel for each of many wrong settings would take minutes."""
    sources = _sources(job, parameters)
    ran: list[str] = []
    names = {"In": ran, "__name__": "__main__"}
    for source in sources[:next(i for i, source in enumerate(sources) if "start_run(" in source)]:
        ran.append(source)
        try:
            exec(source, names)
        except Exception as error:
            return error
    return None


train_command, train, clean = partial(job_command, "train"), partial(run_job, "train"), partial(run_job, "clean")


def job_environment(changes: dict | None = None) -> dict:
    """This process's environment, with this checkout's library first."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **(changes or {})}


def cells_run(notebook: Path) -> list[str]:
    """Sources of the code cells that an executed notebook got to, the failing one included."""
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code" and cell.execution_count]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file under `folder`, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
