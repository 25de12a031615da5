"""What a batch costs beside the work: papermill and its kernel around one training, and the listing of 200 finished runs.

    python benchmarks/batch.py [ROUNDS]

A short training (nbs/train.ipynb, recipe demo, 2 epochs on drawn cells) is carried out by a worker, as `bloodnb batch` does it, and the same cells
run as one script in a fresh process; ROUNDS (3) of each in turn, medians. Their difference is all that papermill, the kernel and the worker add: two more
processes to start, messages between them, figures drawn a second time for the notebook, the notebook saved after each cell. Both import the same libraries
once and write the same run folder.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
from bloodnb.batches import find_job, list_runs
from bloodnb.workers import Task, carry_out, worker_environment

# The cells one after another in one namespace; what a notebook would show of a cell's last value is not made.
SCRIPT = """import json, sys
ran = []
names = {"In": ran, "__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        for source in ["".join(cell["source"]), *(sys.argv[2:] if "parameters" in cell["metadata"].get("tags", []) else [])]:
            ran.append(source)
            exec(source, names)
"""
SHORT = {"data": "drawn:n=240,seed=1", "recipe": "demo", "epochs": 2}  # what is measured does not depend on how long it trains
RUNS = 200


def seconds_of(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def processor_seconds() -> float:
    """Of all child processes that have ended, and theirs."""
    return os.times().children_user + os.times().children_system


def by_worker(task: Task) -> None:
    outcome = carry_out(task)
    assert outcome.state == "done", outcome.error


def by_script(task: Task, output: Path) -> None:
    given = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in {**task.parameters, "output": str(output)}.items())
    subprocess.run([sys.executable, "-c", SCRIPT, task.notebook, given], check=True, env=worker_environment(task) | {"MPLBACKEND": "agg"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def trainings(folder: Path, rounds: int) -> Path:
    """Print what both ways take; a finished run."""
    notebook, found = str(find_job("train")), {"worker": [], "script": []}
    used = {"worker": [], "script": []}
    for i in range(rounds):
        task = Task(f"run-{i}", "train", notebook, SHORT, str(folder / "results"))
        for name, way in (("worker", lambda: by_worker(task)), ("script", lambda: by_script(task, folder / f"script-{i}"))):
            before = processor_seconds()
            found[name].append(seconds_of(way))
            used[name].append(processor_seconds() - before)
    made = {"worker": folder / "results", "script": folder}
    training = {name: [json.loads((root / f"{'run' if name == 'worker' else 'script'}-{i}" / "run.json").read_bytes())["stages"]["train"] for i in range(rounds)] for name, root in made.items()}
    worker, script = (statistics.median(found[name]) for name in ("worker", "script"))
    besides = {name: statistics.median(whole - trained for whole, trained in zip(found[name], training[name])) for name in found}
    print(f"train.ipynb, recipe demo, 2 epochs, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, median of {rounds}:")
    print(f"  by a worker, papermill and a kernel   {worker:6.1f} s   ({', '.join(f'{value:.1f}' for value in found['worker'])})")
    print(f"  the same cells as a script            {script:6.1f} s   ({', '.join(f'{value:.1f}' for value in found['script'])})", flush=True)
    print(f"  processor seconds                     {statistics.median(used['worker']):6.1f} and {statistics.median(used['script']):.1f}, which other work on the machine changes less")
    print(f"  of these, training                    {statistics.median(training['worker']):6.1f} and {statistics.median(training['script']):.1f}, by the runs' own records")
    print(f"  besides training                      {besides['worker']:6.1f} and {besides['script']:.1f}: difference {besides['worker'] - besides['script']:.1f} s, ratio {besides['worker'] / besides['script']:.2f}; in all, ratio {worker / script:.2f}")
    return folder / "results" / "run-0"


def plain_loop(folder: Path) -> None:
    for path in sorted(folder.rglob("metrics.json")):
        json.loads(path.read_bytes()), json.loads(path.with_name("run.json").read_bytes())


def listing(folder: Path, run: Path) -> None:
    """Print what it takes to list copies of a run."""
    for i in range(RUNS):
        shutil.copytree(run, folder / f"run-{i}", copy_function=os.link)
    table, loop = (min(seconds_of(lambda: function(folder)) for _ in range(5)) for function in (list_runs, plain_loop))
    words = [sys.executable, "-m", "bloodnb.command", "runs", str(folder)]
    whole = min(seconds_of(lambda: subprocess.run(words, check=True, env=worker_environment(Task("", "", "")), stdout=subprocess.DEVNULL)) for _ in range(3))
    print(f"{RUNS} finished runs: list_runs {table:.3f} s, a plain loop over their JSON files {loop:.3f} s, ratio {table / loop:.2f}; the command bloodnb runs in all {whole:.2f} s")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as room:
        (Path(room) / "many").mkdir()
        run = trainings(Path(room), rounds)
        listing(Path(room) / "many", run)


if __name__ == "__main__":
    main()
