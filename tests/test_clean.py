"""The cleaning job as a shell runs it, and the standard cleaning held against the truth: planted copies and junk, sets that are clean, sets that are hardly sets."""
import ast
import json
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from jobs import NO_NETWORK, ROOT, SMALL, cells_run, clean, files_of, run_cells

from bloodnb import cleaning, recipes
from bloodnb import data as cell_data
from bloodnb.drawn import draw_cells

DRAWN = {"data": "drawn:n=200,seed=3", "output": "run"}
LEFT_BY_A_RUN = {"run.json", "blacklist.csv", "metrics.json", "out.ipynb", *(f"figures/{name}.png" for name in ("samples", "findings", "groups", "counts", "map"))}
REAL = Path(os.environ.get("BLOODNB_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = Path(os.environ.get("BLOODNB_WEIGHTS", ROOT.parent / "shared" / "weights")) / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
real_data = pytest.mark.skipif(not (REAL / "homework_96.zip").exists(), reason=f"the homework's photos are not in {REAL.name}/ (BLOODNB_DATA)")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run on drawn cells; tests only read it."""
    folder = tmp_path_factory.mktemp("clean")
    job = clean(folder, **DRAWN)
    assert job.returncode == 0, job.stderr
    return folder / "run"


def dropped(findings: pd.DataFrame) -> set[int]:
    return set(findings.loc[~findings["kept"], "index"])


def test_parameters_are_those_that_the_job_checks():
    cells = nbformat.read(ROOT / "nbs" / "clean.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    names = {node.targets[0].id for node in ast.parse(source).body}
    assert names == {*recipes.CLEAN_PARAMETERS, *recipes.CLEAN_CHOICES, "PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}


def test_run_leaves_all_its_files_and_no_more(run):
    left = files_of(run)
    assert left.keys() == LEFT_BY_A_RUN
    assert all(content[:8] == b"\x89PNG\r\n\x1a\n" for name, content in left.items() if name.endswith(".png"))
    assert sorted(path.name for path in run.parent.iterdir()) == ["out.ipynb", "run"], "no partial folder stays"


def test_blacklist_says_what_metrics_count(run):
    cells, metrics, kept = cell_data.load(DRAWN["data"]), json.loads((run / "metrics.json").read_text()), json.loads((run / "run.json").read_text())
    findings = cleaning.read_blacklist(run / "blacklist.csv", cells)
    assert metrics["dropped"] == len(dropped(findings)) == 200 - metrics["left"] > 0 and metrics["n"] == 200
    assert metrics["per_class"]["before"] == cell_data.counts(cells)
    assert metrics["per_class"]["after"] == cell_data.counts(cleaning.drop_findings(cells, findings))
    assert kept["job"] == "clean" and kept["data_sha256"]["data"] == cell_data.sha256(cells) and "nothing about blood" in kept["notice"]
    assert kept["choices"]["cleaning"] == "standard"


def test_training_takes_the_blacklist(run, tmp_path):
    """It drops what the blacklist says, and refuses one that was made from other data."""
    given = SMALL | {"data": DRAWN["data"], "image_size": 96, "backbone": "MobileNet_0.25", "head_epochs": 1, "epochs": 0, "blacklist": run / "blacklist.csv"}
    job = run_cells("train", tmp_path, **given)
    assert job.returncode == 0, job.stderr
    parts = pd.read_csv(tmp_path / "run" / "split.csv").set_index("index")["part"]
    findings = cleaning.read_blacklist(run / "blacklist.csv", cell_data.load(DRAWN["data"]))
    assert set(parts.index[parts == "dropped"]) == dropped(findings)


def refusal(folder: Path, environment: dict | None = None, **parameters) -> str:
    """The error that ends the job; it must leave nothing but papermill's own notebook."""
    job = clean(folder, environment, **parameters)
    assert job.returncode != 0, "the job was not refused"
    assert {path.name for path in folder.iterdir()} == {"out.ipynb"}
    return [line for line in job.stderr.splitlines() if re.match(r"\w*(Error|Exception): ", line)][-1]


def test_what_cannot_be_meant_is_refused_before_data_are_read(tmp_path):
    """One mistake under papermill; the messages of the others are tested where they are made, in 09_recipes."""
    message = refusal(tmp_path, **DRAWN | {"cleaning": "exact+meanstd"})
    assert "Did you mean 'mean_std'" in message, message
    assert "recipes.check_references(" in cells_run(tmp_path / "out.ipynb")[-1], "refused in the settings' cell"


def test_weights_that_cannot_be_had_are_refused_before_data_are_read(tmp_path):
    (tmp_path.parent / "keras").mkdir(exist_ok=True)
    message = refusal(tmp_path, NO_NETWORK | {"KERAS_HOME": str(tmp_path.parent / "keras")}, **DRAWN | {"backbone": "MobileNetV2"})
    assert message.startswith("ConnectionError") and "-p weights FILE" in message


@pytest.mark.parametrize("seed", range(5))
def test_drawn_cells_with_planted_copies_and_junk(seed):
    """Of what was planted at least 99 % is found, and of the cells that were neither copied nor planted at most 0.1 % are dropped."""
    drawn = draw_cells(1000, seed=seed + 100)
    truth, cells = drawn.truth, cell_data.CellImages(drawn.images, drawn.labels)
    cleaned, findings = cleaning.clean(cells)
    gone, named = dropped(findings), set(findings["index"])
    junk = set(np.flatnonzero(truth["kind"] == "junk"))
    copies = np.flatnonzero(np.isin(truth["kind"], ("exact_duplicate", "noisy_duplicate")))
    found = len(junk & gone) + sum(copy in named and truth["original"][copy] in named for copy in copies)
    assert found >= 0.99 * (len(junk) + len(copies))
    noisy = np.flatnonzero(truth["kind"] == "noisy_duplicate")
    assert sum(copy in named for copy in noisy) >= 0.99 * len(noisy)
    innocent = set(np.flatnonzero(truth["kind"] == "cell")) - set(truth["original"])
    assert len(innocent & gone) <= 0.001 * len(innocent)
    left = set(cleaned.index)
    assert not [copy for copy in copies if copy in left and truth["original"][copy] in left], "no picture stays twice"
    for original in set(truth["original"][copies]):  # one stays of each group whose labels agree
        group = [original, *copies[truth["original"][copies] == original]]
        if len({drawn.labels[i] for i in group}) == 1 and len(group) <= 3:
            assert len(left & set(group)) == 1


def test_a_set_without_copies_and_junk_stays_whole():
    drawn = draw_cells(1000, seed=7, n_exact_duplicates=0, n_noisy_duplicates=0, n_junk=0)
    assert len(dropped(cleaning.clean(cell_data.CellImages(drawn.images, drawn.labels))[1])) <= 1


@real_data
def test_the_homework_without_network(tmp_path):
    """All 1,800 planted pictures go, at most 12 of the 11,959 cells with them; of genuine duplicates one stays."""
    source = REAL / "homework_96.zip"
    job = clean(tmp_path, NO_NETWORK, data=source, output="run")
    assert job.returncode == 0, job.stderr
    findings = pd.read_csv(tmp_path / "run" / "blacklist.csv", skiprows=1)
    truth = pd.read_csv(REAL / "homework_96_truth.csv", keep_default_na=False)
    junk, gone = set(truth.loc[truth["junk"] != "", "index"]), dropped(findings)
    assert len(junk) == 1800 and junk <= gone
    of_pairs = findings[findings["kind"].isin(["exact duplicate", "near duplicate"])]
    assert len(gone - junk - dropped(of_pairs)) <= 12
    assert (of_pairs.groupby("group")["kept"].sum() == 1).all() and not set(of_pairs["index"]) & junk


@real_data
def test_the_rule_of_means_misses_the_monocytes_junk():
    """400 planted pictures among the 1,393 monocytes pull mean and deviation over themselves; median and MAD stay with the cells."""
    cells = cell_data.load(REAL / "homework_96.zip")
    truth = pd.read_csv(REAL / "homework_96_truth.csv", keep_default_na=False)
    monocytes = cell_data.take(cells, cells.index[cells.labels == cells.class_names.index("monocyte")])
    junk = set(truth.loc[truth["junk"] != "", "index"]) & set(monocytes.index)
    assert len(monocytes) == 1393 and len(junk) == 400
    assert not junk & dropped(cleaning.find_outliers(monocytes)) and junk <= dropped(cleaning.find_outliers(monocytes, alpha=4, robust=True))


@real_data
@pytest.mark.skipif(not WEIGHTS.exists(), reason="MobileNetV2's weights are not here (BLOODNB_WEIGHTS)")
def test_the_homework_with_the_features_of_a_backbone(tmp_path):
    """The same with MobileNetV2 and one picture of each kind named as a reference, on every eighth picture; the page of 02_cleaning shows all."""
    cells = cell_data.load(REAL / "homework_96.zip")
    kept = np.arange(0, len(cells), 8)
    np.savez(tmp_path / "eighth.npz", images=cells.images[kept], labels=cells.labels[kept][:, None])
    truth = pd.read_csv(REAL / "homework_96_truth.csv", keep_default_na=False)
    truth = truth[truth["index"].isin(kept)].assign(index=lambda rows: np.searchsorted(kept, rows["index"]))
    junk = set(truth.loc[truth["junk"] != "", "index"])
    named = truth[truth["junk"] != ""].groupby("junk")["index"].first().tolist()
    job = run_cells("clean", tmp_path, NO_NETWORK, data="eighth.npz", output="run", backbone="MobileNetV2", weights=WEIGHTS, references=",".join(map(str, named)))
    assert job.returncode == 0, job.stderr
    findings = pd.read_csv(tmp_path / "run" / "blacklist.csv", skiprows=1)
    of_pairs = findings[findings["kind"].isin(["exact duplicate", "near duplicate"])]
    assert junk <= dropped(findings) and len(dropped(findings) - junk - dropped(of_pairs)) <= 12
    assert set(findings.loc[findings["kind"] == "like a reference", "index"]) >= junk


@real_data
def test_clean_photos_give_an_almost_empty_blacklist():
    cells = cell_data.load(REAL / "val_96.zip")
    assert len(dropped(cleaning.clean(cells)[1])) <= 0.001 * len(cells)
