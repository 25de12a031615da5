"""Many runs on the homework's photos, each measured clean and shifted: does the clean score say which is better elsewhere?

    python experiments/clean_vs_shifted.py DATA TEST_DATA WEIGHTS_FOLDER     # homework_96.zip val_96.zip weights/

Each run is a folder under _runs/clean_vs_shifted; finished ones are not run again. The table goes to experiments/clean_vs_shifted.csv, and
nbs/06_shifts.ipynb draws it.
"""
import functools
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

from bloodnb import ensembles, shifts
from bloodnb.data import load, take

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "MobileNetV2": "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
    "MobileNetV2_0.35": "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_224_no_top.h5",
    "MobileNet_0.25": "mobilenet_2_5_224_tf_no_top.h5",
}
FROZEN = {"recipe": "frozen", "replicates": 2}
# name: parameters of nbs/train.ipynb
RUNS = {
    "tuned MobileNetV2": {"backbone": "MobileNetV2", "recipe": "default"},
    "tuned MobileNetV2, robust": {"backbone": "MobileNetV2", "recipe": "robust"},
    "tuned MobileNetV2, as robust without it": {"backbone": "MobileNetV2", "recipe": "robust", "augmentation": "none", "validation": "clean", "patience": 3},
    "frozen MobileNetV2": {"backbone": "MobileNetV2", **FROZEN},
    **{f"frozen {backbone}{', ' + augmentation if augmentation != 'none' else ''}": {"backbone": backbone, **FROZEN, "augmentation": augmentation}
       for backbone, augmentations in (("MobileNetV2_0.35", ("none", "in_model", "robust")), ("MobileNet_0.25", ("none", "in_model", "machine_dumbening", "deepdrive", "robust")))
       for augmentation in augmentations},
    "frozen MobileNet_0.25, background removed": {"backbone": "MobileNet_0.25", **FROZEN, "background": "remove"},
    "frozen MobileNet_0.25, not cleaned": {"backbone": "MobileNet_0.25", **FROZEN, "cleaning": "none"},
    "frozen MobileNet_0.25, oversampled": {"backbone": "MobileNet_0.25", **FROZEN, "balance": "oversample"},
    **{f"tuned MobileNet_0.25{', ' + augmentation if augmentation != 'none' else ''}": {"backbone": "MobileNet_0.25", "recipe": "default", "augmentation": augmentation}
       for augmentation in ("none", "in_model", "robust")},
}


def papermill(job: str, output: Path, **parameters) -> None:
    """Run a job into `output`, unless it is finished there."""
    if (output / "metrics.json").is_file():
        return
    words = [word for name, value in {**parameters, "output": output}.items() for word in ("-p", name, str(value))]
    subprocess.run([sys.executable, "-m", "papermill", ROOT / "nbs" / f"{job}.ipynb", output.with_name(f"{output.name}.ipynb"), "--no-progress-bar", *words], check=True, cwd=ROOT)


pictures = functools.lru_cache(maxsize=2)(load)


def shifted_validation(path: Path, data: str) -> float:
    """Accuracy of a run on its own validation pictures, each under one corruption of the suite homework: what can be measured at home."""
    run = ensembles.find_classifier(path)
    table = ensembles.split_of(run)
    cells = shifts.validation_set(take(pictures(data, run.image_size), table.loc[table["part"] == "val", "index"].to_numpy()), "homework")
    return float((ensembles.load_any(run)(cells.images).argmax(1) == cells.labels).mean())


def main(data: str, test_data: str, weights: str) -> None:
    folder = ROOT / "_runs" / "clean_vs_shifted"
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, parameters in RUNS.items():
        path = folder / name.replace(", ", "-").replace(" ", "_")
        papermill("train", path, data=Path(data).resolve(), weights=Path(weights).resolve() / FILES[parameters["backbone"]], **parameters)
        papermill("evaluate", path.with_name(f"{path.name}-shifted"), run=path, data=Path(test_data).resolve())
        metrics = json.loads((path.with_name(f"{path.name}-shifted") / "metrics.json").read_text())
        validation = json.loads((path / "metrics.json").read_text())["val"]
        rows[name] = {"validation": validation["accuracy"], "validation_shifted": shifted_validation(path, data), "clean": metrics["accuracy"],
                      **{suite: one["accuracy"] for suite, one in metrics["suites"].items()}, "composed": metrics["suites"]["homework"]["corruptions"]["composed"]["accuracy"]}
        print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
        pd.DataFrame.from_dict(rows, orient="index").rename_axis("run").round(4).to_csv(ROOT / "experiments" / "clean_vs_shifted.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
