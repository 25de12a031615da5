"""The training job as a shell runs it: what a run leaves, that it repeats, and that what cannot work is refused and leaves nothing."""
import ast
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import keras
import nbformat
import numpy as np
import pandas as pd
import pytest
from jobs import NO_NETWORK, ROOT, SMALL, cells_run, files_of, run_cells, settings_error, train

from bloodnb import data as cell_data
from bloodnb import recipes
from bloodnb.cleaning import read_blacklist

LEFT_BY_A_RUN = {"run.json", "split.csv", "blacklist.csv", "history.csv", "metrics.json", "predictions.npz", "model.keras", "out.ipynb",
                 "figures/curves.png", "figures/confusion.png", "figures/mistakes.png", "figures/closest_pairs.png", "figures/augmentation.png"}
# A head on a resting backbone: no fine-tuning to trace, for runs that are not about the training.
HEAD_ALONE = SMALL | {"recipe": "frozen", "backbone": "MobileNet_0.25", "weights": "none", "head_epochs": 1, "epochs": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the job has run once, as `run`; tests only read it."""
    folder = tmp_path_factory.mktemp("train")
    job = train(folder, **SMALL)
    assert job.returncode == 0, job.stderr
    return folder


@pytest.fixture(scope="module")
def run(folder) -> Path:
    return folder / "run"


@pytest.fixture(scope="module")
def cells() -> cell_data.CellImages:
    """What the run read."""
    return cell_data.load(SMALL["data"], SMALL["image_size"])


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def recipe_cell() -> str:
    """Source of the job's cell tagged `parameters`."""
    cells = nbformat.read(ROOT / "nbs" / "train.ipynb", as_version=4).cells
    return next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))


def test_parameters_are_the_recipe_and_the_job():
    defaults = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(recipe_cell()).body}
    of_papermill = ("PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH")
    assert set(defaults) == {*recipes.TRAIN_PARAMETERS, *recipes.recipe_fields(), *of_papermill}
    assert all(defaults[name] is None for name in (*recipes.recipe_fields(), *of_papermill)), "a default here would overrule every recipe"


def test_run_leaves_all_its_files_and_no_more(folder, run):
    left = files_of(run)
    assert left.keys() == LEFT_BY_A_RUN
    assert all(content[:8] == b"\x89PNG\r\n\x1a\n" for name, content in left.items() if name.endswith(".png"))
    assert sorted(path.name for path in folder.iterdir()) == ["out.ipynb", "run"], "no partial folder stays"


def test_run_json_says_what_was_run(run, cells):
    kept = read_json(run / "run.json")
    assert kept.keys() >= {"recipe", "choices", "data", "data_sha256", "library_versions", "git_revision", "backend", "device", "seed", "notice",
                           "dropped", "trained_on", "pipeline", "notebook", "started", "finished", "stages", "seconds", "peak_memory_mib"}
    assert kept["data"] == {"data": SMALL["data"]} and kept["data_sha256"] == {"data": cell_data.sha256(cells)}
    assert kept["backend"] == keras.backend.backend() and kept["library_versions"]["keras"] == keras.__version__
    assert kept["stages"].keys() == {"build", "load", "balance", "train", "predict"} and 0 < sum(kept["stages"].values()) <= kept["seconds"]
    assert "nothing about blood" in kept["notice"]


def test_single_choices_overrule_the_recipe_and_the_recipe_the_default(run):
    kept, default, demo = read_json(run / "run.json"), asdict(recipes.Recipe()), recipes.RECIPES["demo"]
    given = {name: SMALL[name] for name in ("backbone", "image_size", "epochs")}
    assert kept["recipe"] == "demo" and kept["choices"] == json.loads(json.dumps(default | demo | given))
    changed = {name for name in demo if demo[name] != default[name]}
    assert "learning_rate" in changed - given.keys() and all(given[name] not in (default[name], demo[name]) for name in given), "three levels that differ"


def test_executed_notebook_is_kept(run):
    notebook = nbformat.read(run / read_json(run / "run.json")["notebook"], as_version=4)
    nbformat.validate(notebook)
    given = next(cell.source for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert 'recipe = "demo"' in given
    assert any("image/jpeg" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])), "the figures are in it"
    assert any("nothing about blood" in str(cell.get("outputs", [])) for cell in notebook.cells), "and the warning"


def test_split_covers_the_data_and_no_picture_is_on_two_sides(run, cells):
    table = pd.read_csv(run / "split.csv")
    assert table["index"].tolist() == cells.index.tolist() and set(table["part"]) == {"train", "val", "test", "dropped"}
    assert table["label"].tolist() == [cells.class_names[label] for label in cells.labels]
    parts = {name: cell_data.take(cells, part["index"]) for name, part in table.groupby("part") if name != "dropped"}
    cell_data.check_no_leak(parts)
    shares = table[table["part"] != "dropped"]["part"].value_counts(normalize=True)
    assert abs(shares["val"] - 0.15) < 0.03 and abs(shares["test"] - 0.15) < 0.03


def test_blacklist_names_what_was_dropped(run, cells):
    table, findings = pd.read_csv(run / "split.csv"), read_blacklist(run / "blacklist.csv", cells)
    dropped = table.loc[table["part"] == "dropped", "index"].tolist()
    assert sorted(set(findings.loc[~findings["kept"], "index"])) == dropped and len(dropped) == read_json(run / "run.json")["dropped"] > 0


def test_history_has_a_row_an_epoch(run):
    history = pd.read_csv(run / "history.csv")
    assert history["phase"].tolist() == ["fine-tune"] * 2 and history["epoch"].tolist() == [1, 2]
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds"} <= set(history) and np.isfinite(history.iloc[:, 1:]).all(axis=None)


def test_metrics_follow_from_the_predictions(run, cells):
    metrics, table = read_json(run / "metrics.json"), pd.read_csv(run / "split.csv")
    with np.load(run / "predictions.npz", allow_pickle=False) as predictions:
        assert set(predictions) == {f"{part}_{name}" for part in ("val", "test") for name in ("index", "y_true", "y_prob")}
        for part, measured in (("test", metrics), ("val", metrics["val"])):
            index, y_true, y_prob = (predictions[f"{part}_{name}"] for name in ("index", "y_true", "y_prob"))
            assert index.tolist() == table.loc[table["part"] == part, "index"].tolist() and (y_true == cells.labels[index]).all()
            assert y_prob.shape == (len(index), 8) and np.allclose(y_prob.sum(1), 1, atol=1e-5)
            assert measured["n"] == len(index) and measured["accuracy"] == pytest.approx((y_prob.argmax(1) == y_true).mean())
            assert measured["log_loss"] == pytest.approx(-np.log(y_prob[np.arange(len(index)), y_true]).mean(), rel=1e-4)
    assert metrics["part"] == "test" and len(metrics["per_class"]) == 8
    assert {"accuracy", "balanced_accuracy", "macro_f1", "confidence_intervals"} <= metrics.keys()


def test_saved_model_says_the_same(run, cells, tmp_path):
    """In a process that imports what README says and no more: here other tests have imported everything."""
    with np.load(run / "predictions.npz", allow_pickle=False) as predictions:
        index, y_prob = predictions["test_index"], predictions["test_y_prob"]
    np.save(tmp_path / "images.npy", cell_data.take(cells, index).images)
    code = """if True:
        import sys
        import keras, numpy as np
        import bloodnb.models
        model = keras.saving.load_model(sys.argv[1], safe_mode=True)
        np.save(sys.argv[2] + "/again.npy", model.predict(np.load(sys.argv[2] + "/images.npy"), verbose=0))
    """
    loaded = subprocess.run([sys.executable, "-c", code, run / "model.keras", tmp_path], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    np.testing.assert_allclose(np.load(tmp_path / "again.npy"), y_prob, atol=1e-5)


def test_same_choices_give_the_same_numbers(run, tmp_path):
    """In another process, which is no Jupyter kernel."""
    job = run_cells("train", tmp_path, **SMALL)
    assert job.returncode == 0, job.stderr
    for name in ("metrics.json", "split.csv", "blacklist.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes(), name
    first, second = (pd.read_csv(path / "history.csv").drop(columns="seconds") for path in (run, tmp_path / "run"))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    first, second = (np.load(path / "predictions.npz") for path in (run, tmp_path / "run"))
    assert all((first[name] == second[name]).all() for name in first)


def test_test_data_and_blacklist(run, tmp_path):
    """A test set of its own is what is measured on; a blacklist drops what the first run's cleaning found, though this run has none."""
    given = {"test_data": "drawn:n=60,seed=2", "blacklist": run / "blacklist.csv", "cleaning": "none"}
    job = run_cells("train", tmp_path, **HEAD_ALONE | given)
    assert job.returncode == 0, job.stderr
    here = tmp_path / "run"
    assert files_of(here).keys() == LEFT_BY_A_RUN - {"out.ipynb"}
    kept, metrics, table = read_json(here / "run.json"), read_json(here / "metrics.json"), pd.read_csv(here / "split.csv")
    assert kept["data"] == {"data": SMALL["data"], "test_data": given["test_data"]} and kept["choices"]["test_fraction"] == 0
    assert set(table["part"]) == {"train", "val", "dropped"}, "data keeps no test part of its own"
    test = cell_data.load(given["test_data"], SMALL["image_size"])
    assert kept["data_sha256"]["test_data"] == cell_data.sha256(test)
    with np.load(here / "predictions.npz", allow_pickle=False) as predictions:
        assert (predictions["test_index"] == test.index).all() and (predictions["test_y_true"] == test.labels).all()
    assert metrics["part"] == "test" and metrics["n"] == 60
    first = pd.read_csv(run / "split.csv")
    assert (first["part"] == "dropped").equals(table["part"] == "dropped") and (here / "blacklist.csv").read_bytes() == (run / "blacklist.csv").read_bytes()


def test_last_training_on_all_data_from_several_seeds(run, tmp_path):
    """`epochs_from` reads an earlier run's best epochs and trains on its validation images too; `repeats` says how far chance moves the scores."""
    job = run_cells("train", tmp_path, **SMALL | {"epochs_from": run, "repeats": 2, "cache": False})
    assert job.returncode == 0, job.stderr
    kept, metrics, plain = (read_json(folder / name) for folder, name in ((tmp_path / "run", "run.json"), (tmp_path / "run", "metrics.json"), (run, "run.json")))
    earlier, history = (pd.read_csv(folder / "history.csv") for folder in (run, tmp_path / "run"))
    best = int(earlier.loc[earlier["val_loss"].idxmin(), "epoch"])
    assert kept["stop_after"] == [0, best] and len(history) == best and "val_loss" not in history
    assert kept["trained_on"] > plain["trained_on"] and set(pd.read_csv(tmp_path / "run" / "split.csv")["part"]) == {"train", "test", "dropped"}
    assert kept["seeds"] == [0, 1] and metrics["val"] is None
    accuracy = metrics["repeats"]["accuracy"]
    assert accuracy["values"][0] == metrics["accuracy"] and len(set(accuracy["values"])) == 2
    assert accuracy["mean"] == pytest.approx(np.mean(accuracy["values"])) and accuracy["std"] == pytest.approx(np.std(accuracy["values"], ddof=1))


@pytest.mark.parametrize("choices", [
    {"balance": "oversample", "augmentation": "robust", "replicates": 1},
    {"balance": "smote", "augmentation": "machine_dumbening", "engine": "keras_cv"},
])
def test_balanced_and_altered(run, tmp_path, choices):
    """What is split and measured stays as it was; what is trained on is larger, and run.json says how it was altered."""
    job = run_cells("train", tmp_path, **SMALL | {"head_epochs": 1} | choices)
    assert job.returncode == 0, job.stderr
    kept, plain = read_json(tmp_path / "run" / "run.json"), read_json(run / "run.json")
    table = pd.read_csv(run / "split.csv")
    of_class = table.loc[table["part"] == "train", "label"].value_counts()
    assert kept["trained_on"] == len(of_class) * of_class.max() > plain["trained_on"] == of_class.sum()
    if kept["choices"]["engine"] == "keras_cv":
        assert kept["pipeline"] == choices["augmentation"]
    else:
        assert kept["pipeline"]["operation"] == "Pipeline" and len(kept["pipeline"]["operations"]) > 3 and kept["pipeline"]["seed"] == kept["seed"]
    assert plain["pipeline"]["operations"] == []
    assert (tmp_path / "run" / "split.csv").read_bytes() == (run / "split.csv").read_bytes()


def refusal(folder: Path, environment: dict | None = None, papermill: bool = False, **parameters) -> str:
    """The error that ends a job; it must leave nothing (and what was in the folder before), under papermill nothing but its notebook."""
    before = {path.name for path in folder.iterdir()}
    job = train(folder, environment, **parameters) if papermill else run_cells("train", folder, environment, **parameters)
    assert job.returncode != 0, "the job was not refused"
    left = {path.name for path in folder.iterdir()} - before
    assert left == ({"out.ipynb"} if papermill else set()), f"left behind: {left}"
    lines = [line for line in job.stderr.splitlines() if re.match(r"\w*(Error|Exception): ", line)]
    assert lines, job.stderr
    return lines[-1]


@pytest.mark.parametrize(("name", "value", "near"), [
    ("recipe", "demoo", "'demo'"),
    ("backbone", "MobilNetV2", "'MobileNetV2'"),
    ("optimizer", "adm", "'adam'"),
    ("augmentation", "robustt", "'robust'"),
    ("data", "drawm", "'drawn'"),
])
def test_unknown_name_is_refused_with_the_nearest(tmp_path, monkeypatch, name, value, near):
    monkeypatch.chdir(tmp_path)
    message = str(settings_error("train", **SMALL | {name: value}))
    assert value in message and f"Did you mean {near}" in message and not list(tmp_path.iterdir())


def test_unknown_parameter_is_refused_with_the_nearest(tmp_path):
    message = refusal(tmp_path, papermill=True, **SMALL | {"epohcs": 3})
    assert "epohcs" in message and "Did you mean 'epochs'" in message
    assert "recipes.resolve_recipe(" in cells_run(tmp_path / "out.ipynb")[-1], "refused in the settings' cell, before a model is built or data are read"


def test_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "notes").write_text("a file, not a folder")
    message = refusal(tmp_path, papermill=True, **SMALL | {"output": "notes/run"})
    assert message.startswith("PermissionError") and "notes/run" in message and "-p output" in message
    assert not any("cell_data.load(" in source for source in cells_run(tmp_path / "out.ipynb"))
    assert (tmp_path / "notes").read_text() == "a file, not a folder"


def test_finished_run_is_not_replaced(tmp_path, run):
    before = files_of(run)
    message = refusal(tmp_path, **SMALL | {"output": run, "epochs": 1})
    assert message.startswith("FileExistsError") and "overwrite" in message
    assert files_of(run) == before and [path.name for path in run.parent.glob("run*")] == ["run"]


def test_imagenet_weights_without_network(tmp_path):
    (tmp_path / "keras").mkdir()
    message = refusal(tmp_path, NO_NETWORK | {"KERAS_HOME": str(tmp_path / "keras")}, papermill=True, **SMALL | {"weights": "imagenet", "backbone": "MobileNet_0.25"})
    assert message.startswith("ConnectionError") and "-p weights none" in message and "-p weights FILE" in message
    assert not any("cell_data.load(" in source for source in cells_run(tmp_path / "out.ipynb"))


def test_same_pictures_in_data_and_test_data_are_refused(tmp_path):
    message = refusal(tmp_path, **SMALL | {"test_data": SMALL["data"]})
    assert "stand in more than one of ['train', 'val', 'test']" in message and "flattered" in message


def test_blacklist_of_other_data_is_refused(tmp_path, run):
    message = refusal(tmp_path, **SMALL | {"data": "drawn:n=60,seed=2", "blacklist": run / "blacklist.csv"})
    assert "blacklist.csv was made from other data than drawn:n=60,seed=2" in message and "Remedy" in message


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    message = refusal(tmp_path, **SMALL | {"learning_rate": 1e30})
    assert message.startswith("FloatingPointError: the loss became") and "Remedy: a learning rate ten times smaller" in message
