"""A real MLflow server on SQLite, started here: what a run leaves there, read through its API and in a browser; and event files for TensorBoard."""
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from jobs import SMALL, run_job

from bloodnb import tracking
from bloodnb.runs import read_history

pytest.importorskip("mlflow", reason="mlflow is not installed (extra mlflow)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server that lives as long as the tests of this file."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while True:
            try:
                assert urllib.request.build_opener().open(f"{address}/health", timeout=5).read() == b"OK"
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture(scope="module")
def run(server, tmp_path_factory) -> Path:
    """A training under papermill that was told of the server."""
    folder = tmp_path_factory.mktemp("tracked")
    job = run_job("train", folder, {"MLFLOW_TRACKING_URI": server}, **SMALL | {"output": "small run", "tensorboard": True})
    assert job.returncode == 0, job.stderr
    assert f"on {server}" in (folder / "out.ipynb").read_text(), "it says where it was logged"
    return folder / "small run"


@pytest.fixture(scope="module")
def client(server):
    return tracking._client(server)


def logged(client) -> list:
    return client.search_runs([client.get_experiment_by_name("bloodnb").experiment_id])


def test_the_server_has_what_the_folder_has(run, client):
    there, = logged(client)
    record, metrics = (json.loads((run / name).read_text()) for name in ("run.json", "metrics.json"))
    assert there.info.status == "FINISHED" and there.info.run_name == "small run" and "nothing about blood" in there.data.tags["bloodnb.notice"]
    assert there.data.params == tracking.logged_parameters(run) and there.data.params["backbone"] == record["choices"]["backbone"] and there.data.params["epochs"] == "2"
    assert there.data.metrics["accuracy"] == pytest.approx(metrics["accuracy"]) and there.data.metrics["val/balanced_accuracy"] == pytest.approx(metrics["val"]["balanced_accuracy"])
    epochs = client.get_metric_history(there.info.run_id, "epoch/val_loss")
    assert [(one.step, one.value) for one in epochs] == [(step, pytest.approx(value)) for step, value in enumerate(read_history(run)["val_loss"], start=1)]


def test_its_files_are_the_folder(run, client, tmp_path):
    there, = logged(client)
    fetched = Path(client.download_artifacts(there.info.run_id, "", str(tmp_path)))
    for name in ("model.keras", "figures/confusion.png", "run.json", "predictions.npz"):
        assert (fetched / name).read_bytes() == (run / name).read_bytes(), name


def test_a_run_is_logged_once(run, client, server):
    first, = logged(client)
    assert tracking.track_run(run, server) == first.info.run_id and len(logged(client)) == 1
    broken = client.create_run(first.info.experiment_id, tags={"bloodnb.run": tracking.run_key(run)})  # as a process that was killed leaves it
    client.delete_run(first.info.run_id)
    again = tracking.track_run(run, server)
    assert [one.info.run_id for one in logged(client)] == [again] and again not in (first.info.run_id, broken.info.run_id)


PAGE = """
import sys
from playwright.sync_api import sync_playwright
executable, address, shot, *flags = sys.argv[1:]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=executable, args=flags)
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(address)
    page.get_by_text("small run").first.wait_for(timeout=120_000)
    page.screenshot(path=shot)
    browser.close()
"""


def test_the_page_shows_the_run(run, server, client, tmp_path):
    """In a process of its own: other tests of this one may have left an event loop at work, which Playwright refuses."""
    from browser import FLAGS, find_chromium

    home = client.get_experiment_by_name("bloodnb").experiment_id
    opened = subprocess.run([sys.executable, "-c", PAGE, find_chromium(), f"{server}/#/experiments/{home}/runs", str(tmp_path / "mlflow.png"), *FLAGS],
                            capture_output=True, text=True, timeout=240)
    assert opened.returncode == 0 and (tmp_path / "mlflow.png").stat().st_size > 10_000, opened.stderr


def test_a_server_that_is_down_costs_no_run(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert tracking.track(run) is None
    said = capsys.readouterr().out
    assert said.startswith("Warning: the run is not on the tracking server: ConnectionError") and "Remedy: start it" in said and "track_run(" in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_events_have_every_epoch(run):
    scalars = tracking.read_events(run / "tensorboard")
    losses = scalars[(scalars["folder"] == "fine-tune/validation") & (scalars["tag"] == "epoch_loss")]
    assert losses["value"].tolist() == pytest.approx(read_history(run)["val_loss"].tolist(), rel=1e-5) and losses["step"].tolist() == [0, 1]
    assert not run.with_name("small run.checkpoint").exists()
