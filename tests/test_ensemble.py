"""Ensembles and comparisons as a shell makes them: what the jobs leave, that other processes read it, and that no ensemble is fitted on what a member has learned."""
import ast
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from jobs import ROOT, SMALL, files_of, job_environment, run_cells, run_job, settings_error

from bloodnb import comparison, ensembles
from bloodnb import data as cell_data
from bloodnb.runs import file_sha256

# So many that 50 pictures, the fewest that weights are fitted on, are kept for validation.
GIVEN = SMALL | {"data": "drawn:n=420,seed=1", "epochs": 1}
MEMBERS = {"narrow": {"backbone": "SiumGPT_CNN_0.25"}, "bare": {"backbone": "Backpropagators_CNN_0.25", "background": "remove"}}
LEFT = {"run.json", "metrics.json", "predictions.npz", "ensemble.json", "out.ipynb", "figures/members.png", "figures/confusion.png"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with two trainings, `narrow` and `bare`; tests only read it."""
    folder, work = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("work")
    for name in MEMBERS:
        (work / name).mkdir()
    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(lambda name: run_cells("train", work / name, **GIVEN | MEMBERS[name] | {"output": folder / name}), MEMBERS))
    for job in jobs:
        assert job.returncode == 0, job.stderr
    return folder


@pytest.fixture(scope="module")
def stack(runs, tmp_path_factory) -> Path:
    """The two stacked by dense layers; tests only read it."""
    folder = tmp_path_factory.mktemp("stack")
    job = run_job("ensemble", folder, runs=f"{runs}/*", method="dense", folds=2, output="stack")
    assert job.returncode == 0, job.stderr
    return folder / "stack"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def arrays_of(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "predictions.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("job, parameters", [("ensemble", ensembles.ENSEMBLE_PARAMETERS), ("compare", comparison.COMPARE_PARAMETERS)])
def test_parameters_are_those_that_the_job_checks(job, parameters):
    cells = nbformat.read(ROOT / "nbs" / f"{job}.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    assert {node.targets[0].id for node in ast.parse(source).body} == {*parameters, "PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}


def test_ensemble_leaves_a_run_folder(runs, stack):
    left, metrics, kept = files_of(stack), read_json(stack / "metrics.json"), read_json(stack / "run.json")
    assert left.keys() == LEFT | {"meta.keras"} and sorted(path.name for path in stack.parent.iterdir()) == ["out.ipynb", "stack"]
    said, members = arrays_of(stack), {name: arrays_of(runs / name) for name in MEMBERS}
    assert set(said) == {f"{part}_{name}" for part in ("val", "test") for name in ("index", "y_true", "y_prob")}
    for part, measured in (("test", metrics), ("val", metrics["val"])):
        for one in members.values():
            assert np.array_equal(said[f"{part}_index"], np.sort(one[f"{part}_index"])), "the members' own pictures"
        assert measured["accuracy"] == pytest.approx((said[f"{part}_y_prob"].argmax(1) == said[f"{part}_y_true"]).mean())
    assert metrics["part"] == "test" and metrics["val"]["cross_fitted"] and set(metrics["members"]) == set(MEMBERS)
    for name in MEMBERS:
        assert metrics["members"][name]["test"]["accuracy"] == pytest.approx(read_json(runs / name / "metrics.json")["accuracy"])
    assert set(metrics["mcnemar"]) == {"best_member", "chosen_on", "only_member", "only_ensemble", "p_value"}
    assert kept["job"] == "ensemble" and kept["method"] == "dense" and kept["data"] == {"data": GIVEN["data"]} and "nothing about blood" in kept["notice"]
    assert {entry["name"]: entry["background"] for entry in read_json(stack / "ensemble.json")["members"]} == {"narrow": "keep", "bare": "remove"}


def test_ensemble_says_the_same_in_a_fresh_process(stack, tmp_path):
    """From photos, through the members' models with their backgrounds and the meta-model, to what predictions.npz has."""
    said, cells = arrays_of(stack), cell_data.load(GIVEN["data"], GIVEN["image_size"])
    np.save(tmp_path / "images.npy", cell_data.take(cells, said["test_index"]).images)
    code = """if True:
        import sys
        import numpy as np
        from bloodnb.ensembles import load_ensemble
        np.save(sys.argv[2] + "/again.npy", load_ensemble(sys.argv[1]).predict(np.load(sys.argv[2] + "/images.npy")))
    """
    loaded = subprocess.run([sys.executable, "-c", code, stack, tmp_path], capture_output=True, text=True, env=job_environment())
    assert loaded.returncode == 0, loaded.stderr
    np.testing.assert_allclose(np.load(tmp_path / "again.npy"), said["test_y_prob"], atol=1e-4)


def test_ensemble_is_measured_like_a_run(stack, tmp_path):
    """Of its members' data, the test part that all kept; with the members' views and backgrounds; and the look is written into its own run.json."""
    shutil.copytree(stack, stack.parent / "measured")
    job = run_cells("evaluate", tmp_path, run=stack.parent / "measured", suites="held_out", prior="uniform", output="out")
    assert job.returncode == 0, job.stderr
    said, again = arrays_of(stack), arrays_of(tmp_path / "out")
    metrics, kept = read_json(tmp_path / "out" / "metrics.json"), read_json(stack.parent / "measured" / "run.json")
    assert sorted(again["test_index"]) == sorted(said["test_index"]) and metrics["suites"]["held_out"]["looks"] == 9 * metrics["n"] and metrics["tta"] == "none"
    assert [read["job"] for read in kept["test_reads"]] == ["ensemble", "evaluate"] and metrics["reads"] == 2
    order = np.argsort(again["test_index"])
    shares = ensembles.trained_shares(ensembles.find_classifier(stack))
    weighted = said["test_y_prob"][np.argsort(said["test_index"])] / shares
    np.testing.assert_allclose(again["test_y_prob"][order], weighted / weighted.sum(1, keepdims=True), atol=1e-3)
    shutil.rmtree(stack.parent / "measured")


def of_another_split(run: Path, folder: Path) -> Path:
    """The run as it would be with another seed: it has trained on what `run` holds back, but for a few pictures, and validated on others."""
    shutil.copytree(run, folder)
    table, said = pd.read_csv(folder / "split.csv"), arrays_of(run)
    moved = said["val_index"][4:]
    new = table.loc[table["part"] == "train", "index"].to_numpy()[: len(moved)]
    part = table.set_index("index")["part"]
    part[moved], part[new] = "train", "val"
    table["part"] = part.to_numpy()
    table.to_csv(folder / "split.csv", index=False)
    labels = table.set_index("index")["label"]
    said["val_index"] = np.r_[said["val_index"][:4], new]
    said["val_y_true"] = np.array([cell_data.CLASS_NAMES.index(labels[i]) for i in said["val_index"]], np.uint8)
    np.savez(folder / "predictions.npz", **said)
    return folder


def test_members_that_trained_on_the_others_validation_are_refused(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = of_another_split(runs / "bare", tmp_path / "other_seed")
    message = str(settings_error("ensemble", runs=f"{runs}/narrow,{other}", method="log_pool", output="out"))
    held = len(arrays_of(runs / "narrow")["val_index"])
    assert f"only 4 validation pictures were held back by all members; wanted at least {ensembles.FEWEST_ROWS}" in message, message
    assert f"other_seed was trained on {held - 4} of the {held} validation pictures of narrow" in message and "Remedy" in message
    assert {path.name for path in tmp_path.iterdir()} == {"other_seed"}, "nothing is left"


def test_members_that_trained_on_the_test_are_refused(runs, tmp_path):
    shutil.copytree(runs / "bare", tmp_path / "peeped")
    table = pd.read_csv(tmp_path / "peeped" / "split.csv")
    table.loc[table["part"] == "test", "part"] = "train"
    table.to_csv(tmp_path / "peeped" / "split.csv", index=False)
    with pytest.raises(ValueError, match="peeped: predictions.npz has .* test pictures that split.csv has elsewhere.* in train"):
        ensembles.read_members([runs / "narrow", tmp_path / "peeped"])


@pytest.mark.parametrize("job, wanted, given", [
    ("ensemble", "Did you mean 'logistic'", {"runs": "nowhere", "method": "logistics"}), ("ensemble", "no finished training run 'nowhere'", {"runs": "nowhere"}),
    ("ensemble", "folds is 1", {"runs": "nowhere", "folds": 1}), ("ensemble", "unknown parameter 'mehtod'", {"mehtod": "average"}), ("ensemble", "overwrite is 'yes'", {"overwrite": "yes"}),
    ("compare", "no folder 'nowhere'", {"runs": "nowhere"}), ("compare", "Did you mean 'accuracy'", {"sort": "acuracy"}),
    ("compare", "no folder 'neither'", {"runs": ".,neither"}), ("compare", "no folder 'nowhere'", {"pair": "nowhere,neither"}), ("compare", "wanted two", {"pair": "."}),
])
def test_wrong_settings_are_refused_before_members_are_read(tmp_path, monkeypatch, job, wanted, given):
    monkeypatch.chdir(tmp_path)
    assert wanted in str(settings_error(job, **given)) and not list(tmp_path.iterdir())


def test_comparison_reads_what_is_there(runs, stack, tmp_path):
    """Runs, an ensemble, an evaluation as evaluate.ipynb leaves it, a run at work, and folders that are broken."""
    base = tmp_path / "_runs"
    shutil.copytree(runs, base)
    shutil.copytree(stack, base / "stack")
    kept, measured = read_json(base / "narrow" / "run.json"), read_json(base / "narrow" / "metrics.json")
    own = {"job": "evaluate", "run": "_runs/narrow", "data": kept["data"], "notice": kept["notice"], "data_sha256": {"data": kept["test_reads"][0]["data_sha256"]}, "models_sha256": [file_sha256(base / "narrow" / "model.keras")]}
    scores = {"part": "test", "accuracy": measured["accuracy"], "n": measured["n"], "suites": {"homework": {"accuracy": 0.25, "n": 50}}}
    for name, run, metrics in (("evaluated", own, scores), ("of_photos", own | {"notice": None, "data": {"data": "val.zip"}, "data_sha256": {"data": "0"}, "started": "2999"}, scores), ("of_another", own | {"models_sha256": ["0"]}, scores),
                               ("torn", {"job": "train"}, None), ("empty_metrics", {"job": "train"}, {})):
        (base / name).mkdir()
        (base / name / "run.json").write_text(json.dumps(run))
        (base / name / "metrics.json").write_text('{"accur' if metrics is None else json.dumps(metrics))
    (base / "busy.partial-1").mkdir()
    job = run_job("compare", tmp_path, runs="_runs", output="compared", sort="size_mb", pair="_runs/narrow,_runs/bare")
    assert job.returncode == 0, job.stderr
    left = files_of(tmp_path / "compared")
    assert left.keys() == {"run.json", "metrics.json", "runs.csv", "out.ipynb", "figures/costs_drawn.png", "figures/reported.png"}, "all are drawn, so no figure of photos"
    table, metrics = pd.read_csv(tmp_path / "compared" / "runs.csv"), read_json(tmp_path / "compared" / "metrics.json")
    assert set(table["run"]) == {"narrow", "bare", "stack"} and table["size_mb"].is_monotonic_increasing and table["drawn"].all() and list(table) == list(comparison.COLUMNS)
    table = table.set_index("run")
    assert table.loc["narrow", ["shifted", "suite", "recipe", "backbone"]].tolist() == [0.25, "homework", "demo", "SiumGPT_CNN_0.25"]
    assert table.loc["narrow", ["clean", "shifted_on", "measured_on"]].tolist() == [pytest.approx(measured["accuracy"]), *2 * [f"{GIVEN['data']}, test part"]], "on its own test part"
    assert table.loc["stack", "accuracy"] == pytest.approx(read_json(stack / "metrics.json")["accuracy"])
    assert set(metrics["broken"]) == {"torn", "empty_metrics"} and metrics["unfinished"] == ["busy.partial-1"] and metrics["others"] == {"evaluate": 3}
    assert set(metrics["lost"]) == {"of_another"} and set(metrics["not_comparable"]) == {"of_photos"}
    assert metrics["pair"]["accuracy"] == [pytest.approx(read_json(runs / name / "metrics.json")["accuracy"]) for name in ("narrow", "bare")]
    assert metrics["pair"]["both_right"] + metrics["pair"]["both_wrong"] + metrics["pair"]["first_only"] + metrics["pair"]["second_only"] == metrics["pair"]["n"] == measured["n"]
    assert metrics["pair"]["notice"] and "McNemar" in (tmp_path / "out.ipynb").read_text()


def test_the_table_sorts_and_filters_in_a_browser(tmp_path, browser):
    rows = pd.DataFrame([{**dict.fromkeys(comparison.COLUMNS), "run": name, "drawn": name == "b", "accuracy": accuracy, "size_mb": size}
                         for name, accuracy, size in (("a", 0.9, 10.0), ("b", 0.95, 9.0), ("c", 0.5, np.nan))])
    (tmp_path / "table.html").write_text(comparison.show_table(rows, ["run", "accuracy", "size_mb"])._repr_html_())
    page = browser.new_page()
    page.goto((tmp_path / "table.html").as_uri())

    def shown(click: str) -> list[str]:
        page.get_by_role("button", name=click).click()
        return [cell.inner_text() for cell in page.locator("tbody tr:visible td:first-child").all()]

    assert shown("accuracy") == ["b (drawn cells)", "a", "c"] and shown("accuracy") == ["c", "a", "b (drawn cells)"], "scores fall first, then rise"
    assert shown("size mb") == ["b (drawn cells)", "a", "c"] and shown("size mb") == ["a", "b (drawn cells)", "c"], "9 before 10, and what is missing last"
    page.get_by_role("searchbox").fill("drawn")
    assert shown("run") == ["b (drawn cells)"]
    page.close()
