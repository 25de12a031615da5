"""Searches that are killed, shared, repeated or told nonsense; and that what one finds can be trained with."""
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from jobs import ROOT, run_job, settings_error

from bloodnb import recipes, tuning

SPACE = "head_learning_rate=log:1e-5..1e-1;head_layers=1..2;head_units=16..64/16"


def work(folder: Path, trials: int, wait: float, sampler: str, name: str) -> None:
    """A search whose trials take no training, in a process that can be killed; it writes down what it begins."""
    space = tuning.parse_space(SPACE, recipes.resolve_recipe("frozen"))

    def measure(values, report):
        top = 1 - 0.1 * (math.log10(values["head_learning_rate"]) + 3) ** 2 - 0.1 * values["head_layers"]
        for epoch in range(4):
            with (folder / "begun.txt").open("a") as file:
                file.write(f"{os.getpid()} {epoch} {values['head_learning_rate']}\n")
            report(epoch, top * (1 - 0.5 ** (epoch + 1)))
            time.sleep(wait)
        return {"value": top, "epochs": 4}

    plan = tuning.SearchPlan(trials=trials, sampler=sampler, objective="accuracy", seed=3)
    tuning.search(measure, space, plan, folder / "study.db", epochs=4).to_csv(folder / f"{name}.csv", index=False)


def start(folder: Path, trials: int = 12, wait: float = 0.0, sampler: str = "tpe", name: str = "trials") -> multiprocessing.Process:
    """`work` in a process of its own, forked, since to import TensorFlow for each would take longer than all the trials."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder, trials, wait, sampler, name), daemon=True)
    process.start()
    return process


def ended(process: multiprocessing.Process) -> None:
    process.join(600)
    assert process.exitcode == 0


def table(folder: Path, name: str = "trials") -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv").drop(columns="seconds")


def begun(folder: Path) -> list[tuple[str, ...]]:
    path = folder / "begun.txt"
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(found, process: multiprocessing.Process, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert process.exitcode is None and time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork is POSIX")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A search of twelve trials by one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    ended(start(folder))
    return folder


def test_killed_search_goes_on_as_if_left_alone(tmp_path, unbroken):
    """Killed twice in the middle of a trial: those two trials begin again, no finished one does, and TPE and the pruner come to the same."""
    for epochs in (17, 36):
        process = start(tmp_path, wait=0.1)
        wait_for(lambda: len(begun(tmp_path)) >= epochs, process)
        process.kill()
        process.join()
    ended(start(tmp_path))
    assert table(tmp_path).equals(table(unbroken)), "every number as without a break"
    assert set(table(unbroken)["state"]) == {"complete", "pruned"}, "there is something to prune, or this shows less than it seems"
    firsts = [rate for _, epoch, rate in begun(tmp_path) if epoch == "0"]
    assert len(set(firsts)) == 12 and 12 <= len(firsts) <= 14, "at most the two that were killed began twice"


def test_two_processes_share_a_study(tmp_path):
    """Neither waits for the other to end, no trial is made twice, and both come home with all of them."""
    both = [start(tmp_path, trials=16, wait=0.15, sampler="random", name=name) for name in ("one", "two")]
    for process in both:
        ended(process)
    tables = [table(tmp_path, name) for name in ("one", "two")]
    assert tables[0].equals(tables[1]) and list(tables[0]["trial"]) == list(range(16)) and set(tables[0]["state"]) <= {"complete", "pruned"}
    firsts = [(pid, rate) for pid, epoch, rate in begun(tmp_path) if epoch == "0"]
    assert len({rate for _, rate in firsts}) == 16 == len(firsts), "no trial twice"
    assert len({pid for pid, _ in firsts}) == 2, "both worked"


def test_work_of_a_dead_process_is_taken_over_by_a_living_one(tmp_path):
    one = start(tmp_path, trials=8, wait=0.3, sampler="random", name="one")
    wait_for(lambda: begun(tmp_path), one)
    two = start(tmp_path, trials=8, wait=0.3, sampler="random", name="two")
    wait_for(lambda: len({pid for pid, *_ in begun(tmp_path)}) == 2, two)
    one.kill()
    one.join()
    ended(two)
    assert set(table(tmp_path, "two")["state"]) <= {"complete", "pruned"} and len(table(tmp_path, "two")) == 8
    firsts = [rate for _, epoch, rate in begun(tmp_path) if epoch == "0"]
    assert len(set(firsts)) == 8 and 8 <= len(firsts) <= 9


def test_another_study_of_the_same_name_is_refused(unbroken):
    recipe = recipes.resolve_recipe("frozen")
    space = tuning.parse_space(SPACE, recipe)
    plan = tuning.SearchPlan(trials=12, objective="accuracy", seed=3)
    for other, more, wanted in (((space, tuning.SearchPlan(trials=12, seed=3)), {}, "objective 'accuracy' there, 'shifted_accuracy' here"), ((space, plan), {"data_sha256": "0"}, "data_sha256 None there, '0' here"),
                                ((tuning.SPACES["head"], plan), {}, "space")):
        with pytest.raises(ValueError, match="begun with other settings") as error:
            tuning.search(lambda values, report: pytest.fail("a trial of another study"), *other, unbroken / "study.db", settings=more)
        assert wanted in str(error.value) and "Remedy" in str(error.value)


@pytest.mark.parametrize(("wanted", "given"), [
    ("Did you mean 'machine_dumbening'", {"space": "machine_dumbning"}),
    ("Did you mean 'learning_rate'", {"space": "learnin_rate=log:1e-5..1e-2"}),
    ("epochs is 0", {"space": "learning_rate=log:1e-5..1e-2"}),
    ("dropout_rate is 1.0", {"space": "dropout_rate=0..1"}),
    ("cannot be searched", {"space": "image_size=32..96/32"}),
    ("100,000", {"sampler": "grid"}),
    ("Valid: tpe, random, grid", {"sampler": "bayes"}),
    ("Did you mean 'shifted_accuracy'", {"objective": "shifted_acuracy"}),
    ("Did you mean 'median'", {"pruner": "medain"}),
    ("trials is 0", {"trials": 0}),
    ("Did you mean 'trials'", {"trial": 3}),
    ("Did you mean 'MobileNet'", {"backbone": "MobilNet"}),
    ("unknown recipe 'frosen'", {"recipe": "frosen"}),
    ("val_fraction is 0", {"val_fraction": 0}),
    ("overwrite is 'false'", {"overwrite": "false"}),
    ("there is no folder", {"storage": "sqlite:///nowhere/study.db"}),
    ("with its driver installed", {"storage": "nosql://host/base"}),
    ("file is not a database", {"storage": str(Path(__file__))}),
    ("unknown parameter 'validation'", {"validation": "clean"}),
])
def test_wrong_settings_are_refused_before_data_is_read(tmp_path, monkeypatch, wanted, given):
    monkeypatch.chdir(tmp_path)
    assert wanted in str(settings_error("tune", **{"data": "missing.npz", "weights": "none", "backbone": "SiumGPT_CNN_0.125", **given}))
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_the_job_leaves_what_train_repeats(tmp_path):
    """A grid on drawn cells; the best of it, given to train.ipynb, gets the same score on the same pictures."""
    given = {"data": "drawn:n=160,seed=1", "backbone": "SiumGPT_CNN_0.125", "weights": "none", "image_size": 32, "head_epochs": 3, "head_learning_rate": 1e-2, "replicates": 0}
    done = run_job("tune", tmp_path, **given, space="head=gap|default;label_smoothing=0..0.2", sampler="grid", trials=2, output="run")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} == {
        "run.json", "metrics.json", "trials.csv", "study.db", "best.yaml", "blacklist.csv", "split.csv", "out.ipynb", "figures/history.png", "figures/slices.png", "figures/importances.png"}
    assert not (tmp_path / "run.checkpoint").exists()
    record, metrics = (json.loads((run / name).read_text()) for name in ("run.json", "metrics.json"))
    trials = pd.read_csv(run / "trials.csv")
    assert record["job"] == "tune" and record["plan"]["sampler"] == "grid" and "test_reads" not in record
    assert metrics["value"] == trials["value"].max() and metrics["trials"] == {"complete": 2} and metrics["confidence_interval"][0] < metrics["value"] < metrics["confidence_interval"][1]
    assert len(trials) == 2 and metrics["n"] == (pd.read_csv(run / "split.csv")["part"] == "val").sum()
    parameters = yaml.safe_load((run / "best.yaml").read_text())
    assert parameters == metrics["parameters"] and record["train_command"].startswith("papermill nbs/train.ipynb")
    trained = run_job("train", tmp_path, **parameters, output="best")
    assert trained.returncode == 0, trained.stderr[-3000:]
    history = pd.read_csv(tmp_path / "best" / "history.csv")
    assert history.loc[history["val_loss"].idxmin(), "val_accuracy"] == pytest.approx(metrics["value"], abs=1e-6)
    assert (tmp_path / "best" / "split.csv").read_bytes() == (run / "split.csv").read_bytes(), "the same pictures were kept for the test"


def test_the_job_takes_the_recipes_choices():
    cell = next(c for c in json.loads((ROOT / "nbs" / "tune.ipynb").read_text())["cells"] if "parameters" in c["metadata"].get("tags", []))
    names = [line.split(" = ")[0] for line in "".join(cell["source"]).splitlines() if " = " in line]
    assert sorted(names) == sorted([*tuning.TUNE_PARAMETERS, *tuning.tune_fields(), "PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"])
