"""What it is worth that freed memory stays with the process: the same training with TensorFlow's setting of malloc and with ours, in turn.

    python benchmarks/training.py [ROUNDS]

The recipe demo's network learns from 1,000 drawn cells, each time in a fresh process. "TensorFlow's" is what a user gets who
sets MALLOC_TRIM_THRESHOLD_ to TensorFlow's 128 KiB, which `bloodnb.augmentation.keep_freed_memory` respects.
"""
import json
import os
import statistics
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
SETTINGS = {"TensorFlow's": {"MALLOC_TRIM_THRESHOLD_": str(128 * 1024)}, "freed memory kept": {}}


def train() -> dict:
    """Seconds, of which in the system, pages that the system had to give, and the last loss."""
    import resource
    import time

    from bloodnb import data, models, recipes, training

    settings = recipes.resolve_recipe("demo")
    cells = data.load("drawn:n=1000,seed=1", settings.image_size)
    model = models.classifier(**recipes.choices_for(models.classifier, settings))
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    history = training.train_classifier(model, cells, None, recipes.training_plan(settings), verbose=False)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds, "system": after.ru_stime - before.ru_stime, "pages": after.ru_minflt - before.ru_minflt, "loss": float(history["loss"].iloc[-1])}


def main() -> None:
    rounds, found = int(sys.argv[1]) if len(sys.argv) > 1 else 3, {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, setting in SETTINGS.items():
            made = subprocess.run([sys.executable, __file__, "--once"], env=os.environ | setting, stdout=subprocess.PIPE, check=True)
            found[name].append(json.loads(made.stdout.splitlines()[-1]))
    print(f"{'malloc':20}{'seconds':>10}{'in system':>11}{'pages':>13}  last loss  (medians of {rounds})")
    median = {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}
    for name, row in median.items():
        print(f"{name:20}{row['seconds']:10.1f}{row['system']:11.1f}{row['pages']:13,.0f}  {row['loss']}")
    theirs, ours = (median[name]["seconds"] for name in SETTINGS)
    print(f"TensorFlow's setting takes {theirs / ours:.2f} x as long")


if __name__ == "__main__":
    if "--once" in sys.argv:
        print("\n" + json.dumps(train()))
    else:
        main()
