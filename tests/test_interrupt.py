"""Work that is broken off, by Ctrl-C or from outside, leaves nothing that looks finished, and the next call goes on."""
import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from jobs import SMALL, files_of, job_environment, run_cells, train_command

from bloodnb.data import download

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals to process groups are POSIX")
ENDLESS = SMALL | {"epochs": 10_000, "patience": 10_000}


def wait_for(what: str, found, job: subprocess.Popen | None = None, seconds: float = 300):
    """What `found` gives, as soon as it gives anything; fails when `job` ends before."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert job is None or job.poll() is None, f"the job ended with {job.returncode} while waiting for {what}"
        assert time.monotonic() < end, f"{what}: waited {seconds} s in vain"
        time.sleep(0.1)
    return result


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def partials(folder: Path) -> list[Path]:
    return list(folder.glob("run.partial-*"))


@pytest.fixture
def start(tmp_path):
    """Starts endless training in `tmp_path`, in a process group of its own as a terminal would; ends what still runs after the test."""
    jobs, processes = [], []

    def start_training() -> tuple[subprocess.Popen, psutil.Process]:
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's background job; children would inherit deafness to Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command = [*train_command(**ENDLESS), "--autosave-cell-every", "1"]
        job = subprocess.Popen(command, cwd=tmp_path, env=job_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        jobs.append(job)
        kernel = wait_for("a kernel", psutil.Process(job.pid).children, job)[0]
        processes.append(kernel)
        return job, kernel

    yield start_training
    for job in jobs:
        job.kill()
        job.wait()
    for process in processes:
        if process.is_running():
            process.kill()


def wait_for_training(folder: Path, job: subprocess.Popen) -> None:
    """Until an epoch after the first shows in the notebook that papermill saves as it goes."""
    saved = folder / "out.ipynb"
    wait_for("the second epoch", lambda: saved.exists() and re.search(r"epoch ([2-9]|\d\d+) of 10000", saved.read_text(errors="replace")), job)
    assert [(path / "split.csv").is_file() for path in partials(folder)] == [True]


def test_ctrl_c_leaves_nothing_and_the_next_run_works(tmp_path, start):
    job, kernel = start()
    wait_for_training(tmp_path, job)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(60) != 0
    wait_for("the kernel's end", lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, seconds=60)
    assert not list(tmp_path.rglob("metrics.json")) and not (tmp_path / "run").exists()
    assert names(tmp_path) == {"out.ipynb", "run.checkpoint"}, "the partial folder goes with the run; what lets it go on stays"
    again = run_cells("train", tmp_path, **ENDLESS | {"epochs": 1})
    assert again.returncode == 0, again.stderr
    assert names(tmp_path) == {"out.ipynb", "run"} and "metrics.json" in files_of(tmp_path / "run")


def test_killed_run_leaves_a_partial_folder_that_the_next_run_clears_away(tmp_path, start):
    job, kernel = start()
    wait_for_training(tmp_path, job)
    os.killpg(os.getpgid(kernel.pid), signal.SIGKILL)
    assert job.wait(120) != 0, "papermill says that its kernel died"
    stale = tmp_path / f"run.partial-{kernel.pid}"
    assert names(tmp_path) == {"out.ipynb", stale.name, "run.checkpoint"}
    assert not (stale / "metrics.json").exists() and not (stale / "run.json").exists()
    job, kernel = start()
    wait_for("the next run's folder", (tmp_path / f"run.partial-{kernel.pid}").is_dir, job)
    assert not stale.exists()


def test_killed_run_goes_on_and_ends_as_if_left_alone(tmp_path):
    given = SMALL | {"epochs": 60, "patience": 1000, "augmentation": "flip", "optimizer": "ranger"}
    (tmp_path / "killed").mkdir(), (tmp_path / "alone").mkdir()
    state = tmp_path / "killed" / "run.checkpoint" / "seed-0.npz"
    job = subprocess.Popen(train_command(**given), cwd=tmp_path / "killed", env=job_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for("the first epoch's state", state.exists, job)
    for process in (*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended with the one killed before it
            process.kill()
    job.wait(60)
    assert state.exists() and not (tmp_path / "killed" / "run").exists()
    said = {}
    for folder in ("killed", "alone"):
        done = run_cells("train", tmp_path / folder, **given)
        assert done.returncode == 0, done.stderr
        said[folder] = "going on after epoch" in done.stdout
    assert said == {"killed": True, "alone": False}
    killed, alone = (files_of(tmp_path / folder / "run") for folder in ("killed", "alone"))
    assert killed["metrics.json"] == alone["metrics.json"] and killed["predictions.npz"] == alone["predictions.npz"]
    histories = [pd.read_csv(tmp_path / folder / "run" / "history.csv").drop(columns="seconds") for folder in ("killed", "alone")]
    assert histories[0].equals(histories[1]) and len(histories[0]) == 60
    assert names(tmp_path / "killed") == {"out.ipynb", "run"}, "nothing of the first attempt stays"


CONTENT = np.random.default_rng(0).bytes(3_000_000)
DOWNLOAD = "import sys; from bloodnb.data import download; download(*sys.argv[1:])"


@pytest.fixture
def slow_server():
    """A server that knows `Range` and stops for good after a megabyte of the first answer; gives its address and the starts asked for."""
    starts, over = [], threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            starts.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start:] if start else CONTENT[:1_000_000])
            self.wfile.flush()
            if not start:
                over.wait(300)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/cells.npz", starts
        over.set()
        server.shutdown()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_download_goes_on_where_it_stopped(tmp_path, slow_server, how):
    (url, starts), md5 = slow_server, hashlib.md5(CONTENT).hexdigest()
    path, part = tmp_path / "cells.npz", tmp_path / "cells.npz.part"
    job = subprocess.Popen([sys.executable, "-c", DOWNLOAD, url, path, md5], env=job_environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for("some of the file", lambda: part.exists() and part.stat().st_size > 0, job, seconds=60)
        os.killpg(job.pid, how)
        assert job.wait(60) != 0
    finally:
        job.kill()
    assert names(tmp_path) == {part.name}, "half a file must not have the whole one's name"
    have = part.stat().st_size
    assert 0 < have < len(CONTENT)
    assert download(url, path, md5).read_bytes() == CONTENT
    assert starts == [0, have] and names(tmp_path) == {path.name}
