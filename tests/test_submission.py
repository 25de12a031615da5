"""A submission as the course's server uses it, after a training as a shell runs it; every family of backbones as plain layers; zips and settings that will not do."""
import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import nbformat
import numpy as np
import pytest
from jobs import ROOT, SMALL, cells_run, files_of, run_job, train

from bloodnb import models, submission
from bloodnb import data as cell_data

SUBMIT = {"run": "trained", "output": "handed_in"}
FAMILIES = ("MobileNet_0.25", "MobileNetV2_0.35", "MobileNetV3Small", "NASNetMobile", "EfficientNetB0", "EfficientNetV2B0", "ConvNeXtTiny", "DenseNet121", "VGG16", "ResNet50",
            "InceptionV3")
# What a server does, and nothing that the library does: no path of this checkout, no help from the job.
SERVER = "import sys, numpy as np; sys.path.insert(0, '.'); from model import Model; X = np.load(sys.argv[1])['images']; np.save('labels.npy', Model().predict(X))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a finished training in `trained`; tests only read that."""
    folder = tmp_path_factory.mktemp("submission")
    job = train(folder, **SMALL | {"output": "trained", "background": "center"})
    assert job.returncode == 0, job.stderr
    return folder


@pytest.fixture(scope="module")
def handed_in(folder) -> Path:
    """What the job leaves for that training."""
    job = run_job("submit", folder, **SUBMIT)
    assert job.returncode == 0, job.stderr
    return folder / "handed_in"


def refusal(folder: Path, **parameters) -> str:
    """The error that ends the job; it must leave no zip and no partial folder."""
    before = sorted(folder.rglob("*"))
    job = run_job("submit", folder, **SUBMIT | {"output": "refused"} | parameters)
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
    assert kept["job"] == "submit" and kept["choices"]["tta"] == "none" and "nothing about blood" in kept["notice"]


def test_server_gets_the_labels_of_the_run(handed_in, folder, tmp_path):
    """From a homework file of 96 pixels, to a network of 32 pixels that knows no background: the labels of predictions.npz, every one."""
    with zipfile.ZipFile(handed_in / "submission.zip") as archive:
        assert all("/" not in name for name in archive.namelist())
        archive.extractall(tmp_path)
    with np.load(folder / "trained" / "predictions.npz") as kept:
        index, y_prob = kept["test_index"], kept["test_y_prob"]
    shown = cell_data.take(cell_data.load(SMALL["data"], 96), index)
    np.savez(tmp_path / "homework.npz", images=shown.images, labels=shown.labels[:, None])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", SERVER, "homework.npz"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    labels = np.load(tmp_path / "labels.npy")
    assert labels.dtype == np.int64 and np.array_equal(labels, y_prob.argmax(1))


def test_one_run_gives_one_zip(handed_in, folder, tmp_path):
    submission.write_zip(tmp_path / "again.zip", submission.submission_files([submission.read_run(folder / "trained")]))
    assert (tmp_path / "again.zip").read_bytes() == (handed_in / "submission.zip").read_bytes()


def test_what_cannot_be_meant_is_refused_at_once(folder):
    """One mistake under papermill; the messages of the others are tested in 12_submission."""
    message = refusal(folder, tta="flip")
    assert "Did you mean 'flips'" in message, message
    assert "check_submit(" in cells_run(folder / "out.ipynb")[-1], "refused in the settings' cell"


def test_unknown_parameter_is_refused(folder):
    assert "unknown parameter 'ttta'. Did you mean 'tta'" in refusal(folder, ttta="flips")


def test_damaged_model_leaves_nothing(folder, tmp_path):
    for name, content in files_of(folder / "trained").items():
        (tmp_path / "broken" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "broken" / name).write_bytes(content if name != "model.keras" else content[: len(content) // 2])
    (tmp_path / "out.ipynb").touch()
    assert "model.keras cannot be read" in refusal(tmp_path, run="broken")


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
