"""Real data, where this machine has them: what they hold, that every kind of file gives the same, and what loading costs in memory."""
import json
import subprocess
import sys

import numpy as np
import pytest
from jobs import job_environment

from bloodnb.data import load

# Loads the zip in a process of its own, so that nothing loaded before counts. VmHWM and not ru_maxrss where there is a choice:
# Linux hands a parent's ru_maxrss down to its children, and pytest's own is larger than the data.
HOMEWORK = """
import json, re, resource, sys, tempfile
from pathlib import Path
import numpy as np
from bloodnb.data import load, sha256

def peak():
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before = peak()
cells = load(sys.argv[1])
found = {"grown": peak() - before, "bytes": cells.images.nbytes, "shape": cells.images.shape, "dtype": str(cells.images.dtype),
         "counts": np.bincount(cells.labels).tolist(), "index is the position": bool((cells.index == np.arange(len(cells))).all())}
with tempfile.TemporaryDirectory() as folder:
    np.savez(Path(folder) / "homework.npz", images=cells.images, labels=cells.labels[:, None])
    again = load(Path(folder) / "homework.npz")
found["npz is equal"] = bool((again.images == cells.images).all() and (again.labels == cells.labels).all() and sha256(again) == sha256(cells))
found["loaded"] = sorted({"tensorflow", "keras", "torch", "jax"} & sys.modules.keys())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def homework(real_data) -> dict:
    """What a process of its own found in the homework's training set."""
    run = subprocess.run([sys.executable, "-c", HOMEWORK, real_data / "homework_96.zip"], env=job_environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_homework_zip(homework):
    assert homework["shape"] == [13759, 96, 96, 3] and homework["dtype"] == "uint8" and homework["index is the position"]
    assert homework["counts"] == [1052, 2381, 1285, 2226, 1049, 1393, 2530, 1843]


def test_loading_holds_less_than_two_arrays(homework):
    assert homework["bytes"] == 13759 * 96 * 96 * 3
    # Below one array nothing was measured: every page of it has been written.
    assert homework["bytes"] <= homework["grown"] < 2 * homework["bytes"], f"{homework['grown'] / homework['bytes']:.2f} arrays"


def test_homework_npz_holds_the_same(homework):
    assert homework["npz is equal"]


def test_loading_needs_no_deep_learning_library(homework):
    assert homework["loaded"] == []


@pytest.mark.parametrize(("name", "n", "classes"), [("pbc_original_sample.zip", 200, 8), ("val_96.zip", 1711, 8), ("chula_96.zip", 511, 5)])
def test_real_data(real_data, name, n, classes):
    cells = load(real_data / name)
    assert cells.images.shape == (n, 96, 96, 3) and cells.images.dtype == np.uint8
    count = np.bincount(cells.labels, minlength=8)
    assert count.sum() == n and (count > 0).sum() == classes
    assert name != "pbc_original_sample.zip" or set(count) == {25}
    assert cells.images.std(axis=(1, 2, 3)).min() > 5, "a flat picture was not decoded"


def test_original_photos_become_pictures_of_the_same_scale(real_data):
    """Cropped as the homework was, a cell fills as much of the picture: whole photos shrunk to 96 would show it at half the size."""
    original, homework_like = load(real_data / "pbc_original_sample.zip"), load(real_data / "val_96.zip")

    def dark_share(cells):
        """Median share of a picture that is nucleus (dark, and bluer than green), neutrophils only."""
        images = cells.images[cells.labels == 6].astype(int)
        return np.median(((images[..., 1] < 110) & (images[..., 2] > images[..., 1] + 30)).mean(axis=(1, 2)))

    assert dark_share(original) == pytest.approx(dark_share(homework_like), rel=0.35)
