"""A submission as the course's server uses it, after a training as a shell runs it; ensembles; every family of backbones as plain layers; zips and settings that will not do."""
import ast
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import nbformat
import numpy as np
import pytest
from jobs import ROOT, SMALL, cells_run, files_of, job_environment, run_cells, run_job

from bloodnb import models, submission
from bloodnb import data as cell_data

FAMILIES = ("MobileNet_0.25", "MobileNetV2_0.35", "MobileNetV3Small", "NASNetMobile", "EfficientNetB0", "EfficientNetV2B0", "ConvNeXtTiny", "DenseNet121", "VGG16", "ResNet50",
            "InceptionV3")
MEMBERS = {"plain": {"background": "center"}, "views": {"backbone": "Backpropagators_CNN_0.25", "tta": "flips", "seed": 0}}
# What a server does, and nothing that the library does: no path of this checkout, no help from the job. An argument is called and its error printed.
SERVER = """import sys
sys.path.insert(0, ".")
import numpy as np
from model import Model
X, model = np.load("homework.npz")["images"], Model()
np.save("labels.npy", model.predict(X))
assert model.predict(X[:0]).shape == (0,) and (model.predict(X[:1]) == np.load("labels.npy")[:1]).all()
for bad in (X / 255, X[0], X[:, ::2, ::3], X[:, :48, :48], X.tolist()):
    try:
        model.predict(bad)
    except ValueError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a homework file of 96 pixels, two finished trainings that see it with 32, and their ensemble `both`; tests only read it."""
    folder = tmp_path_factory.mktemp("submission")
    cells = cell_data.load("drawn:n=120,seed=1")
    np.savez(folder / "homework.npz", images=cells.images, labels=cells.labels[:, None])
    for name in MEMBERS:
        (folder / f"work_{name}").mkdir()
    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(lambda name: run_cells("train", folder / f"work_{name}", **SMALL | MEMBERS[name] | {"data": folder / "homework.npz", "output": folder / name}), MEMBERS))
    jobs.append(run_cells("ensemble", folder, runs="plain,views", method="geometric", output="both"))
    assert not any(job.returncode for job in jobs), [job.stderr for job in jobs]
    return folder


@pytest.fixture(scope="module")
def handed_in(folder) -> Path:
    """What the job leaves for the training `plain`."""
    job = run_job("submit", folder, run="plain", output="handed_in")
    assert job.returncode == 0, job.stderr
    return folder / "handed_in"


def ask_server(zipped: Path, run: Path, room: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels that a zip gives in an empty folder and a fresh process, those of the run's predictions.npz, and the errors of arrays that are no pictures."""
    with zipfile.ZipFile(zipped) as archive:
        assert all("/" not in name for name in archive.namelist())
        archive.extractall(room)
    with np.load(run / "predictions.npz") as kept:
        index, y_prob = kept["test_index"], kept["test_y_prob"]
    shown = cell_data.take(cell_data.load(run.parent / "homework.npz", 96), index)
    np.savez(room / "homework.npz", images=shown.images, labels=shown.labels[:, None])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", SERVER], cwd=room, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(room / "labels.npy"), y_prob.argmax(1), done.stdout.splitlines()


def refusal(folder: Path, how=run_cells, **parameters) -> str:
    """The error that ends the job; it must leave no zip and no partial folder."""
    before = sorted(folder.rglob("*"))
    job = how("submit", folder, **{"run": "plain", "output": "refused"} | parameters)
    assert job.returncode != 0, "the job was not refused"
    assert [path for path in sorted(folder.rglob("*")) if path.name != "out.ipynb"] == [path for path in before if path.name != "out.ipynb"]
    return [line for line in job.stderr.splitlines() if re.match(r"\w*(Error|Exception): ", line)][-1]


def test_parameters_are_those_that_the_job_checks():
    cells = nbformat.read(ROOT / "nbs" / "submit.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    names = {node.targets[0].id for node in ast.parse(source).body}
    assert names == {*submission.SUBMIT_PARAMETERS, "PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}


def test_job_leaves_a_verified_zip(handed_in):
    left, metrics = files_of(handed_in), json.loads((handed_in / "metrics.json").read_text())
    assert left.keys() == {"run.json", "metrics.json", "out.ipynb", "submission.zip", "figures/submission.png"}
    assert metrics["agreement"]["equal"] == metrics["agreement"]["n"] > 0 and "of the run's test part" in metrics["tried_on"]
    kept = json.loads((handed_in / "run.json").read_text())
    assert kept["job"] == "submit" and kept["choices"]["tta"] is None and [len(one) for one in kept["models_sha256"]] == [64]


def test_server_gets_the_labels_of_the_run(handed_in, folder, tmp_path):
    """From a homework file of 96 pixels, to a network of 32 pixels that knows no background: the labels of predictions.npz, every one. What is no picture is refused."""
    labels, wanted, errors = ask_server(handed_in / "submission.zip", folder / "plain", tmp_path)
    assert labels.dtype == np.int64 and np.array_equal(labels, wanted)
    for error, got in zip(errors, ("float64 with values 0..1", "shape (96, 96, 3)", ", 48, 32, 3)", ", 48, 48, 3)", "X is a list"), strict=True):
        assert got in error and "wanted a NumPy array uint8, 0..255, of shape (n, 32, 32, 3) or (n, 96, 96, 3)" in error


def test_ensemble_is_handed_in_with_its_members_own_views(folder, tmp_path):
    """Two networks in one zip, one that sees a background and four views of each picture, and one that sees neither."""
    job = run_cells("submit", folder, run="both", output="handed_in_both")
    assert job.returncode == 0, job.stderr
    labels, wanted, _ = ask_server(folder / "handed_in_both" / "submission.zip", folder / "both", tmp_path)
    assert np.array_equal(labels, wanted)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert [len(member["views"]) for member in settings["members"]] == [1, 4] and [member["background"] for member in settings["members"]] == ["center", "keep"]
    assert settings["combination"]["geometric"] and "views of each picture 4 (flips)" in (tmp_path / "README.txt").read_text()


def test_one_run_gives_one_zip(handed_in, folder, tmp_path):
    submission.write_zip(tmp_path / "again.zip", submission.submission_files(*submission.read_trained(folder / "plain")))
    assert (tmp_path / "again.zip").read_bytes() == (handed_in / "submission.zip").read_bytes()


def test_what_cannot_be_meant_is_refused_at_once(folder):
    """One mistake under papermill; the messages of the others are tested in 12_submission."""
    message = refusal(folder, run_job, tta="flip")
    assert "Did you mean 'flips'" in message, message
    assert "check_submit(" in cells_run(folder / "out.ipynb")[-1], "refused in the settings' cell"


def test_unknown_parameter_is_refused(folder):
    assert "unknown parameter 'ttta'. Did you mean 'tta'" in refusal(folder, ttta="flips")


def test_damaged_model_leaves_nothing(folder, tmp_path):
    for name, content in files_of(folder / "plain").items():
        (tmp_path / "broken" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "broken" / name).write_bytes(content if name != "model.keras" else content[: len(content) // 2])
    assert "model.keras does not hold a classifier that can be read" in refusal(tmp_path, run="broken")


def test_output_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    member = submission.TrainedModel(models.classifier("SiumGPT_CNN_0.125", "none", 32))
    with pytest.raises(PermissionError, match="cannot be written"):
        submission.build_submission([member], tmp_path / "file" / "submission.zip")
    assert files_of(tmp_path).keys() == {"file"}


def test_trial_that_fails_leaves_no_zip(monkeypatch, tmp_path):
    """A model.py that ends with an error in the fresh process: its last words are in the message."""
    member = submission.TrainedModel(models.classifier("SiumGPT_CNN_0.125", "none", 32))
    monkeypatch.setattr(submission, "model_text", lambda: "import bloodnb\n")
    with pytest.raises(RuntimeError, match="not on the server: bloodnb"):
        submission.build_submission([member], tmp_path / "submission.zip")
    assert not list(tmp_path.iterdir())


def test_interrupted_writing_leaves_nothing(monkeypatch, tmp_path):
    """Ctrl-C in the middle of the zip, and of the trial: an earlier zip stays, and nothing else."""
    member = submission.TrainedModel(models.classifier("SiumGPT_CNN_0.125", "none", 32))
    (tmp_path / "submission.zip").write_bytes(b"an earlier one")

    def interrupted(path, *arguments):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    for name in ("write_zip", "try_submission"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(submission, name, interrupted)
            submission.build_submission([member], tmp_path / "submission.zip")
        assert files_of(tmp_path) == {"submission.zip": b"an earlier one"}, name


def test_killed_while_it_is_tried(tmp_path):
    """SIGKILL leaves a zip under a name that nobody hands in; the next one does not mind."""
    code = ("import os, signal\nfrom bloodnb import models, submission\nsubmission.try_submission = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
            "submission.build_submission([submission.TrainedModel(models.classifier('SiumGPT_CNN_0.125', 'none', 32))], 'submission.zip')")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=job_environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "submission.zip").exists()
    assert all(".partial-" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_as_plain_layers(backbone):
    """`plain_network` itself checks that probabilities stay; the weights are moved first, so that statistics are not 0 and 1."""
    made = models.classifier(backbone, "none", models.find_backbone(backbone).min_size)
    rng = np.random.default_rng(1)
    made.set_weights([(w * rng.uniform(0.8, 1.2, w.shape) + rng.uniform(-0.01, 0.01, w.shape)).astype(w.dtype) if w.dtype.kind == "f" else w for w in made.get_weights()])
    network = submission.plain_network(made)
    assert all(hasattr(keras.layers, step["layer"]) for step in network.steps)
    json.dumps(network.steps, allow_nan=False)
    keras.backend.clear_session()
