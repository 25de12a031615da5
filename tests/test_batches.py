"""Batches: what is finished is never repeated, what is not is done again, whatever was killed; and a wrong file is refused with its line."""
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import yaml
from jobs import SMALL, job_environment

import bloodnb
import bloodnb.command
from bloodnb.batches import list_runs, plan_batch, read_batch, run_id
from bloodnb.comparison import read_runs
from bloodnb.workers import LocalStore, Task, carry_out, is_whole

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and locks are POSIX")
# A job that takes moments: it writes a real run folder, in several files with pauses between them, and a line when it is done.
FAKE = ["output = None\noverwrite = False\nseed = 0\nseconds = 0.2\nfail = False", """
import hashlib, time
import numpy as np
from bloodnb.runs import executed_notebook, finish_run, start_run
run = start_run(output)
run.record(job="fake", seed=seed, nanoseconds=time.time_ns())
""", """
print("epoch 1 of 1")
sums = {}
for i in range(8):
    content = np.random.default_rng([seed, i]).bytes(100_000)
    run.path(f"part-{i}.bin").write_bytes(content)
    sums[f"part-{i}.bin"] = hashlib.sha256(content).hexdigest()
    time.sleep(seconds / 8)
assert not fail, "it was told to fail"
""", """
finish_run(run, {"accuracy": seed / 1000, "sums": sums}, executed_notebook())
with open(run.output.parent.parent / "ledger", "a") as file:
    file.write(f"{seed}\\n")
"""]


def write_job(path: Path, kernel: str = "python3") -> Path:
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}})
    notebook.cells = [nbformat.v4.new_code_cell(source.strip()) for source in FAKE]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


def write_batch(folder: Path, text: str = "", **keys) -> Path:
    path = folder / "batch.yaml"
    path.write_text(text or yaml.safe_dump(keys))
    return path


def command(*words) -> list[str]:
    return [sys.executable, "-m", "bloodnb.command", *map(str, words)]


def bloodnb_command(folder: Path, *words) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), cwd=folder, env=job_environment(), capture_output=True, text=True, timeout=600)


@pytest.fixture
def here(capsys, monkeypatch):
    """Runs the command in this process, which has imported everything: its exit code and what it printed."""
    def run(folder: Path, *words) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        capsys.readouterr()
        return bloodnb.command.main(list(words)), *capsys.readouterr()

    return run


def start_batch(folder: Path, *words) -> subprocess.Popen:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's background job; children would inherit deafness to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command("batch", "batch.yaml", *words), cwd=folder, env=job_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(what: str, found, seconds: float = 300):
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, f"{what}: waited {seconds} s in vain"
        time.sleep(0.1)
    return result


def processes_of(store: Path) -> list[psutil.Process]:
    """Every process of a run in this store: papermills and kernels."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("BLOODNB_RUN", "").startswith(f"{store}#") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def papermills(store: Path) -> list[psutil.Process]:
    found = []
    for process in processes_of(store):
        with suppress(psutil.Error):
            if "papermill" in process.cmdline():
                found.append(process)
    return found


def writers(store: Path) -> list[int]:
    """Kernels that are writing a run."""
    return [pid for pid in (int(path.name.rpartition("-")[2]) for path in store.glob("*.partial-*")) if psutil.pid_exists(pid)]


def snapshot(store: Path) -> dict[str, tuple]:
    """Every finished run: its run.json's inode, time and bytes. Each must be whole, down to the last byte that was written."""
    found = {}
    for id in LocalStore(store).finished():
        record = LocalStore(store).read_record(id)
        for name, digest in record["metrics"]["sums"].items():
            assert hashlib.sha256((store / id / name).read_bytes()).hexdigest() == digest, f"{id}/{name} is not what was written"
        facts = (store / id / "run.json").stat()
        found[id] = facts.st_ino, facts.st_mtime_ns, (store / id / "run.json").read_bytes()
    return found


def ended(folder: Path, batch: subprocess.Popen) -> str:
    """What a batch printed, once it has ended."""
    return batch.communicate(timeout=300)[0]


@pytest.fixture
def room(tmp_path):
    """A folder with the fake job; whatever of its batch is alive after the test is killed."""
    write_job(tmp_path / "fake.ipynb")
    yield tmp_path
    for process in processes_of(tmp_path / "_runs" / "batch"):
        with suppress(psutil.Error):
            process.kill()


def kill_one(kind: str, batch: subprocess.Popen, store: Path, chance: random.Random) -> bool:
    """Wait for something of that kind to be at work, then for a random while, and kill it with signal 9; False if the batch ended before."""
    look = {"batch": lambda: [batch.pid], "worker": lambda: [process.pid for process in papermills(store)], "writing": lambda: writers(store)}
    if kind != "batch" or chance.random() < 0.7:
        wait_for(kind, lambda: look["worker" if kind == "batch" else kind]() or batch.poll() is not None)
    time.sleep(chance.uniform(0, {"batch": 2.5, "worker": 2.0, "writing": 0.25}[kind]))
    targets = look[kind]()
    if batch.poll() is not None or not targets:
        return False
    os.kill(chance.choice(targets), signal.SIGKILL)
    return True


def test_twenty_kills_cost_no_result_and_no_finished_run_is_repeated(room):
    chance, store, ledger = random.Random(7), room / "_runs" / "batch", room / "_runs" / "ledger"
    kinds = ["batch"] * 7 + ["worker"] * 6 + ["writing"] * 7
    chance.shuffle(kinds)
    batch, seen, n = None, {}, 0
    killed = []
    while kinds:
        if batch is None or batch.poll() is not None:
            n = len(seen) + 4 if len(seen) + 2 > n else n  # so that there is always something to do
            write_batch(room, job="fake.ipynb", grid={"seed": list(range(n))}, jobs=2, threads=1)
            batch = start_batch(room)
        with suppress(psutil.Error, ProcessLookupError):
            if kill_one(kinds[-1], batch, store, chance):
                killed.append(kinds.pop())
                if killed[-1] == "batch":
                    ended(room, batch)
        now = snapshot(store)
        assert all(now.get(id) == facts for id, facts in seen.items()), "a finished run was lost or done again"
        seen = now
    assert len(killed) == 20
    if batch.poll() is None:
        batch.kill()
        ended(room, batch)
    last = start_batch(room)
    said = ended(room, last)
    assert last.returncode == 0, said
    now = snapshot(store)
    assert all(now[id] == facts for id, facts in seen.items()) and len(now) == n
    assert set(list_runs(store)["id"]) == set(now) and not list_runs(store).attrs["damaged"]
    finished = ledger.read_text().split()
    assert len(finished) == len(set(finished)), "each run was finished once at most"
    assert f"{n} runs, {len(seen)} of them done before" in said
    assert {path.name for path in store.iterdir()} == {*now, "logs", ".lock"}, "nothing half written is left"


def test_nothing_outlives_a_killed_batch(room):
    store = room / "_runs" / "batch"
    write_batch(room, job="fake.ipynb", parameters={"seconds": 300}, grid={"seed": [0, 1]}, jobs=2)
    batch = start_batch(room)
    wait_for("two kernels at work", lambda: len(writers(store)) == 2)
    assert len(processes_of(store)) >= 4
    batch.kill()
    ended(room, batch)
    wait_for("the end of papermill and kernels", lambda: not processes_of(store), seconds=30)
    with LocalStore(store).lock():  # free at once
        pass


@pytest.mark.parametrize("how, jobs", [(signal.SIGINT, 2), (signal.SIGTERM, 1)], ids=["ctrl-c", "terminated"])
def test_stopped_batch_stops_its_runs_and_says_how_to_go_on(room, how, jobs):
    store = room / "_runs" / "batch"
    write_batch(room, job="fake.ipynb", parameters={"seconds": 300}, grid={"seed": [0, 1, 2]}, jobs=jobs)
    batch = start_batch(room)
    wait_for("kernels at work", lambda: len(writers(store)) == jobs)
    batch.send_signal(how)
    said = ended(room, batch)
    assert batch.returncode == 130 and "The same command goes on: bloodnb batch batch.yaml" in said, said
    assert not processes_of(store)
    assert {path.name for path in store.iterdir()} == {"logs", ".lock"}, "stopped runs take their partial folders with them"


def test_failing_run_stops_no_other_and_is_done_again(room, here):
    store = LocalStore(room / "_runs" / "batch")
    write_batch(room, job="fake.ipynb", runs=[{"seed": 1}, {"seed": 2, "fail": True}, {"seed": 3}], jobs=3)
    first = bloodnb_command(room, "batch", "batch.yaml")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "AssertionError: it was told to fail" in first.stdout and "2 of 3 runs are done" in first.stdout
    assert len(store.finished()) == 2
    (failed,) = {task.id for task in plan_batch(read_batch(write_batch(room, job=str(room / "fake.ipynb"), runs=[{"seed": 2, "fail": True}])))}
    kept = nbformat.read(store.notebook_path(failed), as_version=4)
    printed = [output.text for cell in kept.cells for output in cell.get("outputs", []) if output.output_type == "stream"]
    assert "epoch 1 of 1\n" in printed and any(output.output_type == "error" for cell in kept.cells for output in cell.get("outputs", []))
    before = snapshot(store.root)
    write_batch(room, job="fake.ipynb", runs=[{"seed": 1}, {"seed": 2, "fail": True}, {"seed": 3}])
    code, said, _ = here(room, "batch", "batch.yaml", "--jobs", "2")
    assert code == 1 and said.count("start ") == 1 and "2 of them done before" in said
    assert snapshot(store.root) == before


def test_dry_run_starts_and_writes_nothing(room, here):
    write_batch(room, job="fake.ipynb", grid={"seed": [0, 1]}, runs=[{"seconds": 1}, {"seconds": 1.0}])
    code, said, _ = here(room, "batch", "batch.yaml", "--dry-run")
    assert code == 0 and said.count("to do") == 4 and not (room / "_runs").exists(), said


def test_wrong_file_is_refused_with_line_and_nearest_key(room):
    write_batch(room, "job: fake.ipynb\ngird:\n  seed: [0, 1]\n")
    refused = bloodnb_command(room, "batch", "batch.yaml")
    assert refused.returncode == 2 and refused.stderr.startswith("bloodnb: batch.yaml, line 2: unknown key 'gird'. Did you mean 'grid'?"), refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and not (room / "_runs").exists()


@pytest.mark.parametrize("text, line, words", [
    ("job: fake.ipynb\nparameters:\n  secnods: 1\n", 3, "Did you mean 'seconds'"),
    ("job: fake.ipynb\ngrid:\n  seed: [0]\n  seed: [1]\n", 4, "the first is in line 3"),
    ("job: fake.ipynb\ngrid:\n\tseed: [0]\n", 3, "takes no tabs"),
    ("job: fake.ipynb\ngrid:\n  seed: 3\n", 3, "seed: [3]"),
    ("job: fake.ipynb\nruns:\n  - seed: 1\n  - output: x\n", 4, "`output`"),
    ("job: fakes.ipynb\n", 1, "no notebook 'fakes.ipynb'"),
    ("job: fake.ipynb\njobs: 0\n", 2, "wanted a whole number"),
    ("parameters: {recipe: demo}\ngrid:\n  epochs:\n    - 3\n    - few\n", 5, "epochs is 'few'"),
    ("parameters:\n  recipe: demo\n  backbone: MobilNet\ngrid:\n  seed: [0, 1]\n", 3, "MobileNet"),
    ("parameters:\n  recipe: demo\n  data: photos.zip\n", 3, "photos.zip"),
])
def test_every_error_of_a_file_has_its_line(room, monkeypatch, text, line, words):
    monkeypatch.chdir(room)
    with pytest.raises(ValueError) as error:
        read_batch(write_batch(room, text))
    assert str(error.value).startswith(f"{room / 'batch.yaml'}, line {line}: ") and words in str(error.value), str(error.value)


def test_second_batch_on_a_folder_is_refused(room, here):
    write_batch(room, job="fake.ipynb", grid={"seed": [0]})
    with LocalStore(room / "_runs" / "batch").lock():
        code, _, said = here(room, "batch", "batch.yaml")
    assert code == 2 and f"process {os.getpid()} on" in said and "another batch is at work" in said
    assert not LocalStore(room / "_runs" / "batch").finished()


@pytest.mark.parametrize("retries", [0, 1])
def test_kernel_that_does_not_start_is_tried_again(room, monkeypatch, retries):
    """A kernel whose first start fails, as one does whose port was taken meanwhile."""
    spec = room / "jupyter" / "kernels" / "flaky"
    spec.mkdir(parents=True)
    code = f"import os, sys; m = {str(room / 'tried')!r}; os.path.exists(m) or sys.exit(open(m, 'w').close() or 1); os.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', *sys.argv[1:]])"
    (spec / "kernel.json").write_text(json.dumps({"argv": [sys.executable, "-c", code, "-f", "{connection_file}"], "display_name": "flaky", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(room / "jupyter"))
    job = str(write_job(room / "flaky.ipynb", kernel="flaky"))
    store = LocalStore(room / "results")
    store.workspace("a").mkdir(parents=True)  # what a machine that lost its power may leave is no hindrance
    (store.workspace("a") / "run.json").write_text("{}")
    (store.workspace("a") / "metrics.json").write_text('{"accuracy": 0.')
    assert store.finished() == set() and not is_whole(store.workspace("a"))
    outcome = carry_out(Task("a", job, job, {"seed": 5}, store.url, retries=retries))
    if retries:
        assert (outcome.state, outcome.attempts, outcome.error) == ("done", 2, "") and store.read_record("a")["metrics"]["accuracy"] == 0.005
    else:
        assert (outcome.state, outcome.attempts) == ("failed", 1) and "kernel did not start" in outcome.error


def test_ids_follow_choices_content_and_version_and_nothing_else(tmp_path, monkeypatch):
    def write_photos(path, seed):
        np.savez(path, images=np.random.default_rng(seed).integers(0, 256, (16, 32, 32, 3), np.uint8), labels=np.arange(16) % 8)
        return str(path)

    first = {"data": write_photos(tmp_path / "a.npz", 0), "recipe": "demo", "seed": 3}
    wanted = run_id("train", first)
    assert wanted == run_id("train", dict(reversed(first.items()))) == run_id("train", first | {"epochs": 12, "cache": False, "test_data": None})
    (tmp_path / "elsewhere").mkdir()
    assert wanted == run_id("train", first | {"data": write_photos(tmp_path / "elsewhere" / "b.npz", 0)})
    others = {run_id("train", first | change) for change in ({"seed": 4}, {"repeats": 2}, {"epochs": 11}, {"test_data": first["data"]})}
    write_photos(tmp_path / "a.npz", 1)
    others.add(run_id("train", first))
    write_photos(tmp_path / "a.npz", 0)
    assert run_id("train", first) == wanted
    monkeypatch.setattr(bloodnb, "__version__", "9.9.9")
    assert len({wanted, run_id("train", first), *others}) == 7


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A batch of two trainings on drawn cells, side by side; its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("trained")
    write_batch(folder, parameters={name: value for name, value in SMALL.items() if name != "output"}, grid={"seed": [0, 1]}, jobs=2)
    return folder, bloodnb_command(folder, "batch", "batch.yaml")


def test_batch_of_trainings_is_done_once(trained, here):
    folder, first = trained
    assert first.returncode == 0, first.stdout + first.stderr
    store = LocalStore(folder / "_runs" / "batch")
    ids = store.finished()
    assert len(ids) == 2 and all(id.startswith("SiumGPT_CNN_0.25-") for id in ids)
    records = [store.read_record(id) for id in sorted(ids)]
    assert sorted(record["run"]["seed"] for record in records) == [0, 1]
    for id in ids:
        whole = nbformat.read(store.notebook_path(id), as_version=4)
        assert all(cell.execution_count for cell in whole.cells if cell.cell_type == "code")
        assert (store.workspace(id) / f"{id}.ipynb").is_file() and (store.workspace(id) / "model.keras").is_file()
    before = {id: (store.workspace(id) / "run.json").read_bytes() for id in ids}
    code, said, _ = here(folder, "batch", "batch.yaml")
    assert code == 0 and "2 runs, 2 of them done before" in said and "start " not in said
    assert before == {id: (store.workspace(id) / "run.json").read_bytes() for id in ids}


def test_finished_runs_are_listed(trained, here):
    folder, _ = trained
    code, said, _ = here(folder, "runs")
    assert code == 0 and said.count("SiumGPT_CNN_0.25-") == 2 and "2 finished runs in _runs" in said
    table = list_runs(folder / "_runs")
    assert set(table["job"]) == {"train"} and set(table["backbone"]) == {"SiumGPT_CNN_0.25"} and table["accuracy"].between(0, 1).all()
    assert table["accuracy"].is_monotonic_decreasing and table["seconds"].gt(0).all() and table["when"].str.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d").all()


@contextmanager
def opened_below(folder: Path):
    """The files below a folder that this process opens meanwhile; an audit hook stays, so it is told when to listen no more."""
    names, listening = [], [True]
    sys.addaudithook(lambda event, args: names.append(str(args[0])) if listening and event == "open" and str(args[0]).startswith(f"{folder}/") else None)
    try:
        yield names
    finally:
        listening.clear()


@pytest.mark.parametrize("read", [list_runs, read_runs])
def test_two_hundred_runs_are_listed_from_two_small_files_each(trained, tmp_path, read):
    "Seconds are measured in benchmarks/batch.py: here, that no run's model, probabilities or notebook is read, and nothing twice."
    folder, _ = trained
    source = folder / "_runs" / "batch" / sorted(LocalStore(folder / "_runs" / "batch").finished())[0]
    for i in range(200):
        shutil.copytree(source, tmp_path / f"run-{i}", copy_function=os.link)
    with opened_below(tmp_path) as names:
        table = read(tmp_path)
    assert len(getattr(table, "table", table)) == 200
    assert len(names) == len(set(names)) and {Path(name).name for name in names} <= {"run.json", "metrics.json", "config.json"}, sorted(names)[:9]
