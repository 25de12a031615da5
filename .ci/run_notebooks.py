"""Run notebooks in place, top to bottom, so that the outputs which the site shows are those of this code.

    python .ci/run_notebooks.py                        # every notebook
    python .ci/run_notebooks.py nbs/04_models.ipynb    # some

Library notebooks and tutorials run in their own folder. A job runs under papermill with the demo's parameters, and its outputs are kept without papermill's own cell.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from papermill import execute_notebook

ROOT = Path(__file__).resolve().parent.parent
DEMO = {"train.ipynb": {"recipe": "demo"}, "evaluate.ipynb": {"run": "_runs/demo"}, "submit.ipynb": {"run": "_runs/demo"},
        "ensemble.ipynb": {"runs": "_runs/*", "method": "log_pool"},
        "tune.ipynb": {"data": "drawn:n=900,seed=1", "backbone": "SiumGPT_CNN_0.5", "weights": "none", "image_size": 32, "head_epochs": 12, "head_batch_size": 64, "replicates": 0, "trials": 10,
                       "space": "head_learning_rate=log:1e-4..1e-1;head_layers=1..2;head_units=16..128/16;head_bn=true|false;head_dropout=0..0.5/0.1"}}
# Jobs that read what others left: those run first, in the same folder.
TRAINED = [("train", {"recipe": "demo", "output": "_runs/demo"})]
SMALL = {"data": "drawn:n=600,seed=1", "recipe": "demo", "image_size": 32, "epochs": 8}
SEVERAL = [("train", {**SMALL, "backbone": f"SiumGPT_CNN_{width}", "output": f"_runs/width_{width}"}) for width in (0.125, 0.25, 0.5)]
BEFORE = {"evaluate.ipynb": TRAINED, "submit.ipynb": TRAINED, "ensemble.ipynb": SEVERAL,
          "compare.ipynb": [*SEVERAL, ("ensemble", {"runs": "_runs/*", "output": "_runs/ensemble"}),
                            *(("evaluate", {"run": run, "output": f"{run}-shifted", "suites": "homework"}) for run in ("_runs/width_0.5", "_runs/ensemble"))]}
# TensorFlow's start-up lines go to stderr whatever its settings (tensorflow issue 100442), with process ids in them; so do progress bars.
NOISE = re.compile(r"absl::InitializeLog|^[IWE]0000 |\r|\A\s*\Z", re.M)

WIDGET = "application/vnd.jupyter.widget-view+json"  # lives with its kernel alone


def run_library(path: Path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def run_job(path: Path):
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        for job, parameters in BEFORE.get(path.name, []):
            execute_notebook(path.with_name(f"{job}.ipynb"), None, parameters, cwd=folder, kernel_name="python3", progress_bar=False)
        output = "_runs/demo" if path.name not in BEFORE else f"_runs/{path.stem}"
        done = execute_notebook(path, None, {**DEMO.get(path.name, {}), "output": output}, cwd=folder, kernel_name="python3", progress_bar=False)
    cells = [cell for cell in done.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell, ran in zip(notebook.cells, cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = ran.outputs
    return notebook


def main() -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["PYTHONPATH"] = str(ROOT)
    paths = [Path(name).resolve() for name in sys.argv[1:]] or sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))
    for path in paths:
        print(path.name, flush=True)
        notebook = run_job(path) if path.parent.name == "nbs" and not re.match(r"\d\d_", path.name) else run_library(path)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if not (o.get("name") == "stderr" and NOISE.search(o.text)) and WIDGET not in o.get("data", {})]
        nbformat.write(notebook, path)
        subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", path], check=True)


if __name__ == "__main__":
    main()
