"""Batches beyond one machine: results on an S3 server, runs on a Ray of two workers of which one is killed, an upload that is killed.

The S3 server is moto's, Ray runs on this machine; neither is asked for anything elsewhere. No Google Cloud Storage is tried.
"""
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import build_opener

import psutil
import pytest
from jobs import NO_NETWORK, job_environment

from bloodnb.batches import list_runs, read_batch, run_batch
from bloodnb.clusters import RayRunner, RemoteStore, _connected, _quick_imports

boto3, _, _ = (pytest.importorskip(name) for name in ("boto3", "moto", "s3fs"))

# A job that is as small as a job can be. It writes down when it begins and when its run is whole.
JOB = '''output = None
number = 1
seconds = 0.0
files = 0
journal = ""
# cell
import json, os, time
from pathlib import Path

def note(word):
    with open(f"{journal}.txt", "a") as file:  # the parameter itself names no file, whose content would count in the run's id
        file.write(f"{word} {number} {os.getpid()}\\n")

note("began")
time.sleep(seconds)
if number < 0:
    raise ValueError(f"{number} has no root")
# cell
written = Path(f"{output}.partial-{os.getpid()}")
written.mkdir(parents=True)
(written / "run.json").write_text(json.dumps({"job": "root", "choices": {}, "seconds": 1.0}))
for n in range(files):
    (written / f"{n:03}.bin").write_bytes(bytes(100_000))
(written / "metrics.json").write_text(json.dumps({"accuracy": number ** 0.5 / 10}))
written.rename(output)
note("ended")'''


def write_batch(folder: Path, output: str, numbers: list[int], **parameters) -> Path:
    """The job, and a file that asks for it with each number."""
    cells = [{"cell_type": "code", "id": f"c{n}", "metadata": {"tags": [] if n else ["parameters"]}, "execution_count": None, "outputs": [], "source": part.strip()}
             for n, part in enumerate(JOB.split("# cell\n"))]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (folder / "root.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    file = folder / "batch.yaml"
    file.write_text(json.dumps({"job": str(folder / "root.ipynb"), "output": output, "parameters": {"journal": str(folder / "journal"), **parameters}, "grid": {"number": numbers}}))
    return file


def journal(folder: Path, word: str) -> list[tuple[int, int]]:
    """(number, process) of each line of the journal that begins so."""
    file = folder / "journal.txt"
    lines = [line.split() for line in file.read_text().splitlines()] if file.is_file() else []
    return [(int(number), int(process)) for first, number, process in lines if first == word]


def until(what, seconds: float = 60, every: float = 0.02):
    """What `what` gives once it is true."""
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        found = what()
        if found:
            return found
        time.sleep(every)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def run_in_process(file: Path, **environment) -> subprocess.Popen:
    """`bloodnb batch FILE` in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "bloodnb.command", "batch", str(file)], cwd=file.parent, env=job_environment({**NO_NETWORK, "no_proxy": "127.0.0.1", **environment}),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without a package that costs each process 3 s (see `bloodnb.clusters._quick_imports`)."""
    with _quick_imports():
        yield


@pytest.fixture(scope="module")
def s3():
    """An S3 server of this machine with a bucket `results`, and the settings by which everything here finds it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            patch.delenv("AWS_PROFILE", raising=False)

            def answers():
                with contextlib.suppress(OSError):
                    return build_opener().open(f"{settings['AWS_ENDPOINT_URL']}/moto-api/", timeout=5).status == 200

            until(answers)
            boto3.client("s3").create_bucket(Bucket="results")
            yield boto3.client("s3")
    finally:
        server.kill()
        server.wait()


def keys(s3, prefix: str) -> list[str]:
    """Names of the bucket's objects, as S3's own client sees them."""
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket="results", Prefix=prefix).get("Contents", [])]


def test_a_batch_leaves_its_results_on_s3(s3, tmp_path, monkeypatch):
    """Done runs are whole there, a failed one leaves its notebook, a second call repeats nothing but that one; the list comes from S3."""
    monkeypatch.setenv("BLOODNB_CACHE", str(tmp_path / "cache"))
    file = write_batch(tmp_path, "s3://results/first", [4, -1])
    first = run_batch(read_batch(file), jobs=2)
    assert [outcome.state for outcome in first] == ["done", "failed"] and "-1 has no root" in first[1].error
    there = keys(s3, "first/")
    assert {f"first/{first[0].id}/{name}" for name in ("run.json", "metrics.json")} < set(there)
    assert f"first/logs/{first[1].id}.ipynb" in there and not [key for key in there if key.endswith((".lock", ".part"))]
    assert not list((tmp_path / "cache").rglob("metrics.json")), "what was uploaded is kept twice"
    table = list_runs("s3://results/first")
    assert table["id"].tolist() == [first[0].id] and table["accuracy"].tolist() == [0.2]
    again = run_batch(read_batch(file))
    assert [outcome.attempts for outcome in again] == [0, 1] and [number for number, _ in journal(tmp_path, "ended")] == [4]


def test_a_killed_upload_is_repeated_and_not_the_run(s3, tmp_path, monkeypatch):
    """`kill -9` in the middle of an upload: the run is not listed; a rerun gets past the dead one's lock, uploads what is whole on this machine, and computes nothing."""
    monkeypatch.setenv("BLOODNB_CACHE", str(tmp_path / "cache"))
    file = write_batch(tmp_path, "s3://results/killed", [4], files=80)
    batch = run_in_process(file)
    until(lambda: len(keys(s3, "killed/root")) >= 5)
    os.killpg(batch.pid, signal.SIGKILL)
    batch.communicate()
    half = keys(s3, "killed/")
    assert 5 <= len([key for key in half if key.endswith(".bin")]) < 80 and not [key for key in half if key.endswith("metrics.json")]
    assert "killed/batch.lock" in half and len(list_runs("s3://results/killed")) == 0
    rerun = run_batch(read_batch(file))
    assert [(outcome.state, outcome.attempts) for outcome in rerun] == [("done", 0)]
    assert len(keys(s3, f"killed/{rerun[0].id}/")) == 82 and list_runs("s3://results/killed")["accuracy"].tolist() == [0.2]
    assert [number for number, _ in journal(tmp_path, "ended")] == [4], "the run was done twice"


def test_two_batches_at_one_address(s3, tmp_path, monkeypatch):
    """The second is refused while the first lives; a lock is made by one alone on S3."""
    first, second = (RemoteStore("s3://results/busy", local=tmp_path / name) for name in ("a", "b"))
    with first.lock():
        with pytest.raises(RuntimeError, match="another batch is at work in s3://results/busy"), second.lock():
            pass
        with pytest.raises(FileExistsError):
            second.create("batch.lock", b"{}")
    with second.lock():
        assert "busy/batch.lock" in keys(s3, "busy")
    assert keys(s3, "busy") == []


def test_a_bucket_that_is_not_there_is_named_before_any_run(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOODNB_CACHE", str(tmp_path / "cache"))
    file = write_batch(tmp_path, "s3://result/first", [4])
    with pytest.raises(OSError, match=r"s3://result/first could not be .*Remedy"):
        run_batch(read_batch(file))
    assert not journal(tmp_path, "began") and [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == ["results"], "a bucket was made"


def test_data_from_an_address(s3, tmp_path, monkeypatch):
    """A parameter `data` with an address is fetched, and its content counts in the run's id, not its name."""
    from bloodnb.batches import run_id

    monkeypatch.setenv("BLOODNB_CACHE", str(tmp_path / "cache"))
    notebook = json.loads(write_batch(tmp_path, "results", [1]).read_text())["job"]
    (tmp_path / "photos.bin").write_bytes(b"photos")
    for name, content in (("a.bin", b"photos"), ("b.bin", b"photos"), ("c.bin", b"others")):
        s3.put_object(Bucket="results", Key=f"data/{name}", Body=content)
    ids = [run_id(notebook, {"data": data}) for data in (str(tmp_path / "photos.bin"), *(f"s3://results/data/{name}.bin" for name in "abc"))]
    assert ids[0] == ids[1] == ids[2] != ids[3]


# Ray's sockets have long names, which Linux limits to 107 bytes: a short folder.
@pytest.fixture(scope="module")
def ray_here(s3):
    """A Ray of this machine with two workers, which inherit the S3 server's settings."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}.items():
            patch.setenv(name, value)  # before the import, which reads them; without a token here, Ray writes one into the home folder
        ray = pytest.importorskip("ray")
        with _connected(None, {"num_cpus": 2, "_temp_dir": folder}):
            yield ray
    assert not [process.pid for process in psutil.Process().children(recursive=True) if "raylet" in process.name()], "Ray left processes"


def worker_of(process: int) -> psutil.Process:
    """The Ray worker above a notebook's kernel."""
    return next(parent for parent in psutil.Process(process).parents() if parent.cmdline() and parent.cmdline()[0].startswith("ray::"))


def test_a_killed_worker_costs_no_run(ray_here, tmp_path):
    """Three runs on two workers, one of which is killed at work: its run is done again, none twice, none lost."""
    file = write_batch(tmp_path, str(tmp_path / "results"), [1, 4, 9], seconds=2.0)
    ended, killed = [], []

    class Watched(RayRunner):
        def run(self, tasks, on_start, on_end):
            def start(task):
                on_start(task)
                if not killed and task.parameters["number"] == 1:
                    killed.append(None)
                    kernel = until(lambda: journal(tmp_path, "began") and dict(journal(tmp_path, "began")).get(1))
                    killed[0] = worker_of(kernel)
                    killed[0].kill()

            return super().run(tasks, start, lambda outcome: (ended.append(outcome), on_end(outcome)))

    outcomes = run_batch(read_batch(file), Watched())
    assert [outcome.state for outcome in outcomes] == ["done"] * 3 and [outcome.attempts for outcome in outcomes] == [2, 1, 1]
    assert sorted(outcome.id for outcome in ended) == sorted(outcome.id for outcome in outcomes), "an outcome was told twice, or never"
    began, whole = [number for number, _ in journal(tmp_path, "began")], [number for number, _ in journal(tmp_path, "ended")]
    assert sorted(whole) == [1, 4, 9] and sorted(began) == [1, 1, 4, 9]
    assert len(list_runs(tmp_path / "results")) == 3 and f":{killed[0].pid}" not in outcomes[0].worker
    assert not [path.name for path in (tmp_path / "results").iterdir() if path.name.startswith(".probe")]
    again = run_batch(read_batch(file), RayRunner())
    assert [outcome.attempts for outcome in again] == [0] * 3 and len(journal(tmp_path, "began")) == 4


def test_ray_and_s3_together(ray_here, s3, tmp_path, monkeypatch):
    """Results of Ray's workers on S3, the second from a notebook that is gone by then; a failed run does not stop the rest."""
    monkeypatch.setenv("BLOODNB_CACHE", str(tmp_path / "cache"))
    file = write_batch(tmp_path, "s3://results/ray", [-1, 4])
    batch = read_batch(file)

    class Gone(RayRunner):
        def run(self, tasks, on_start, on_end):
            return super().run(tasks, on_start, lambda outcome: ((tmp_path / "root.ipynb").unlink(missing_ok=True), on_end(outcome)))

    outcomes = run_batch(batch, Gone(jobs=1))
    assert [outcome.state for outcome in outcomes] == ["failed", "done"] and "-1 has no root" in outcomes[0].error
    assert list_runs("s3://results/ray")["id"].tolist() == [outcomes[1].id]


def test_what_the_cluster_does_not_have_is_refused(ray_here, tmp_path):
    file = write_batch(tmp_path, str(tmp_path / "results"), [1])
    asked = json.loads(file.read_text())
    file.write_text(json.dumps(asked | {"num_gpus": 1}))
    with pytest.raises(ValueError, match="wants 1 CPUs and 1 GPUs on one machine; the cluster has 1 .each with 2 CPUs and 0 GPUs"):
        run_batch(read_batch(file), RayRunner())
    assert not journal(tmp_path, "began")


def test_ctrl_c_stops_the_runs_on_ray(ray_here, tmp_path):
    """An interrupt ends what is at work, notebooks included, and goes on to the caller."""
    file = write_batch(tmp_path, str(tmp_path / "results"), [1, 4], seconds=100.0)

    class Interrupted(RayRunner):
        def run(self, tasks, on_start, on_end):
            def start(task):
                until(lambda: journal(tmp_path, "began"))
                raise KeyboardInterrupt

            return super().run(tasks, start, on_end)

    with pytest.raises(KeyboardInterrupt):
        run_batch(read_batch(file), Interrupted())
    kernels = [process for _, process in journal(tmp_path, "began")]
    until(lambda: not any(psutil.pid_exists(process) for process in kernels), 20)
    assert len(list_runs(tmp_path / "results")) == 0 and not journal(tmp_path, "ended")
