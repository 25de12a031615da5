"""The report's search space on the homework's photos: does a search find a better head than the team's own search did?

    python experiments/tune_head.py DATA WEIGHTS_FILE     # homework_96.zip mobilenet_2_5_224_tf_no_top.h5

A head is searched on the features of MobileNet_0.25 with ImageNet's weights, at rest. Trial 0 has the team's values. What a trial is worth is its
accuracy on the photos kept for validation, each under one corruption of the suite "homework"; the test part is split off and not looked at. The
team's head and the best one are then asked again on the same photos under other corruptions, by which nothing was chosen.
It goes on where it was killed (_runs/tune_head). experiments/tune_head.csv has the trials, tune_head.json the rest; nbs/11_tuning.ipynb draws them.
"""
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bloodnb import tuning
from bloodnb.checkpoints import feature_cache
from bloodnb.cleaning import clean
from bloodnb.data import load, sha256, split, take
from bloodnb.duplicates import near_groups
from bloodnb.evaluation import wilson_interval
from bloodnb.recipes import resolve_recipe
from bloodnb.runs import device_name, git_revision, library_versions
from bloodnb.shifts import validation_set
from bloodnb.training import predict

ROOT = Path(__file__).resolve().parent.parent
PLAN = tuning.SearchPlan(space="machine_dumbening", sampler="tpe", trials=24, pruner="median", objective="shifted_accuracy", seed=0)
RECIPE = {"name": "frozen", "backbone": "MobileNet_0.25", "head_batch_size": 128, "replicates": 0}
OTHER_SHIFTS = (1, 2, 3)  # seeds of the corruptions that nothing is chosen by


def under_other_shifts(measure: tuning.TrialTraining, values: dict) -> dict:
    """Accuracy of a training with these values on the validation photos under corruptions drawn anew, and its interval over all of them."""
    model, _ = measure.fit(tuning.choices_of(values, measure.recipe))
    right = []
    for seed in OTHER_SHIFTS:
        shifted = validation_set(measure.val, measure.objective.validation, seed)
        right.append(float((predict(model, shifted.images).argmax(1) == shifted.labels).mean()))
    mean, n = sum(right) / len(right), len(measure.val)
    return {"by_seed": dict(zip(OTHER_SHIFTS, right)), "accuracy": mean, "interval": wilson_interval(round(mean * n), n)}


def main(data: str, weights: str) -> None:
    began = time.perf_counter()
    recipe = resolve_recipe(weights=weights, **RECIPE)
    cells = load(data, recipe.image_size)
    kept = clean(cells, recipe.cleaning)[0]
    parts = split(kept, recipe.val_fraction, recipe.test_fraction, recipe.seed, groups=near_groups(kept.images)[0])
    measure = tuning.TrialTraining(recipe, take(kept, parts.train), take(kept, parts.val), PLAN.objective, feature_cache())
    space = tuning.parse_space(PLAN.space, recipe)
    folder = ROOT / "_runs" / "tune_head"
    folder.mkdir(parents=True, exist_ok=True)
    table = tuning.search(measure, space, PLAN, folder / "study.db", epochs=recipe.head_epochs, settings={"data_sha256": sha256(cells)},
                          show=lambda line: print(line, flush=True))
    table.to_csv(ROOT / "experiments" / "tune_head.csv", index=False, float_format="%.6g")
    best, team = tuning.best_trial(table), table.iloc[0]
    facts = {"plan": asdict(PLAN), "recipe": RECIPE, "seed": recipe.seed, "data": Path(data).name, "data_sha256": sha256(cells), "n_train": len(parts.train), "n_val": len(parts.val),
             **{name: {"trial": int(row["trial"]), "choices": tuning.choices_of(tuning.values_of(row, space), recipe), "value": float(row["value"]), "interval": [row["low"], row["high"]],
                       "under_other_shifts": under_other_shifts(measure, tuning.values_of(row, space))} for name, row in (("team", team), ("best", best))},
             "importances": tuning.importances(table, space), "device": device_name(), "git_revision": git_revision(), "library_versions": library_versions(),
             "seconds": round(time.perf_counter() - began)}
    (ROOT / "experiments" / "tune_head.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps({name: facts[name] for name in ("team", "best", "seconds")}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
