"""The evaluation job as a shell runs it: what it measures, what it refuses, and that it writes down every look at a test set."""
import ast
import json
import os
import shutil
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from jobs import ROOT, SMALL, cells_run, files_of, run_cells, run_job, settings_error

from bloodnb import corruptions, evaluation, runs, shifts
from bloodnb import data as cell_data

evaluate = partial(run_job, "evaluate")
LEFT_BY_A_RUN = {"run.json", "metrics.json", "predictions.npz", "held_out.csv.gz", "focus.csv", "out.ipynb",
                 *(f"figures/{name}.png" for name in ("confusion", "mistakes", "heatmaps", "mistake_heatmaps", "held_out", "reliability"))}
REAL = Path(os.environ.get("BLOODNB_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a training run, `run`, and its evaluation, `seen`; tests only read them."""
    folder = tmp_path_factory.mktemp("evaluate")
    job = run_cells("train", folder, **SMALL | {"output": "run"})
    assert job.returncode == 0, job.stderr
    shutil.copytree(folder / "run", folder / "untouched")
    job = evaluate(folder, run="run", output="seen", suites="held_out", tta="flips")
    assert job.returncode == 0, job.stderr
    return folder


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def test_parameters_are_those_that_the_job_checks():
    cells = nbformat.read(ROOT / "nbs" / "evaluate.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    names = {node.targets[0].id for node in ast.parse(source).body}
    assert names == {*shifts.EVALUATE_PARAMETERS, "PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}


def test_run_leaves_all_its_files_and_no_more(folder):
    assert files_of(folder / "seen").keys() == LEFT_BY_A_RUN
    assert sorted(path.name for path in folder.iterdir()) == ["out.ipynb", "run", "seen", "untouched"], "no partial folder stays"


def test_its_own_data_means_its_own_test_part(folder):
    """Of the data that the run was made with, only what it had kept for the test is measured, and the numbers are those of its predictions."""
    metrics, split = read_json(folder / "seen" / "metrics.json"), runs.read_split(folder / "run")
    predictions = np.load(folder / "seen" / "predictions.npz", allow_pickle=False)
    assert sorted(predictions["test_index"]) == sorted(split.loc[split["part"] == "test", "index"])
    again = evaluation.evaluate(predictions["test_y_true"], predictions["test_y_prob"])
    assert np.isclose(metrics["accuracy"], again["accuracy"]) and metrics["n"] == len(predictions["test_index"]) and metrics["tta"] == "flips"


def test_suite_is_made_of_the_outcomes_that_are_kept(folder):
    metrics, record = read_json(folder / "seen" / "metrics.json"), read_json(folder / "run" / "run.json")
    outcomes = pd.read_csv(folder / "seen" / "held_out.csv.gz")
    again = shifts.summarize_suite(outcomes, "held_out", shifts.operations_in(record["pipeline"]), metrics["balanced_accuracy"])
    kept = metrics["suites"]["held_out"]
    assert kept["corruptions"] == again["corruptions"] and kept["unseen"] == again["unseen"] and kept["seen"] is None
    assert set(kept["corruptions"]) == set(corruptions.SUITES["held_out"]) and kept["looks"] == 9 * metrics["n"] and len(kept["sha256"]) == 64


def test_every_look_is_written_down(folder, tmp_path):
    """Once by the training itself, once by the first evaluation; the second one counts three, and shows the same pictures."""
    first, second = read_json(folder / "untouched" / "run.json")["test_reads"], read_json(folder / "run" / "run.json")["test_reads"]
    assert [read["job"] for read in first] == ["train"] and [read["job"] for read in second] == ["train", "evaluate"]
    assert first[0]["data_sha256"] == second[1]["data_sha256"] and read_json(folder / "seen" / "run.json")["reads"] == 2
    shutil.copytree(folder / "run", tmp_path / "run")
    job = run_cells("evaluate", tmp_path, run="run", output="again", suites="held_out", prior="estimated")
    assert job.returncode == 0, job.stderr
    again = read_json(tmp_path / "again" / "metrics.json")
    assert again["reads"] == 3 and again["suites"]["held_out"]["sha256"] == read_json(folder / "seen" / "metrics.json")["suites"]["held_out"]["sha256"]
    assert again["tta"] == "none" and again["prior"] == "estimated"


@pytest.mark.parametrize("wanted, given", [
    (["unknown parameter 'suite'", "'suites'"], {"suite": "homework"}), (["unknown suite 'homewrok'", "'homework'"], {"suites": "homewrok"}),
    (["beside it are ['run', 'seen', 'untouched']"], {"run": "rnu"}), (["is a run of evaluate"], {"run": "seen"}), (["tta", "'flips'"], {"tta": "flip"}),
    (["no data source 'nowhere.zip'"], {"data": "nowhere.zip"}), (["seed is -1"], {"seed": -1}), (["full is 'yes'"], {"full": "yes"}),
])
def test_what_cannot_work_is_refused_before_data_is_read(folder, monkeypatch, wanted, given):
    monkeypatch.chdir(folder)
    error = settings_error("evaluate", **{"run": "run", "output": "new", **given})
    assert error is not None and all(word in str(error) for word in wanted), error


def test_refusal_leaves_nothing(folder):
    before = files_of(folder)
    job = evaluate(folder, run="run", output="seen")
    assert job.returncode != 0 and "entries in it" in job.stderr, job.stderr[-2000:]
    assert not any("cell_data.load(" in source for source in cells_run(folder / "out.ipynb")[:-1])
    assert {name: content for name, content in files_of(folder).items() if name != "out.ipynb"} == {name: content for name, content in before.items() if name != "out.ipynb"}


@pytest.mark.skipif(not (REAL / "chula_96.zip").exists(), reason=f"the other laboratory's photos are not in {REAL.name}/ (BLOODNB_DATA)")
def test_photos_of_another_laboratory_that_lack_classes(folder, tmp_path):
    """Five of the eight classes: every score is over those."""
    shutil.copytree(folder / "run", tmp_path / "run")
    job = run_cells("evaluate", tmp_path, run="run", data=REAL / "chula_96.zip", output="seen", suites="none")
    assert job.returncode == 0, job.stderr
    metrics, cells = read_json(tmp_path / "seen" / "metrics.json"), cell_data.load(REAL / "chula_96.zip", SMALL["image_size"])
    assert metrics["n"] == len(cells) == 511 and len(metrics["per_class"]) == 5 and metrics["notice"] is None and metrics["reads"] == 1
