"""The detectors of copies and junk: time against hashing the pixels (or the randomised search) in the same run, and memory against the array.

    python benchmarks/cleaning.py PHOTOS.zip [MOBILENETV2_NO_TOP.h5]

Each measurement is a fresh process in which the photos are already read; memory is what the process holds at its peak, less what it held
with modules and photos loaded, plus the photos, as a multiple of the photos. The best of three is shown, since machines are shared.
"""
import json
import subprocess
import sys

BEST_OF = 3

MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np
import sklearn.decomposition, sklearn.neighbors
from bloodnb import cleaning, duplicates, exploration
from bloodnb.data import load
def peak(): return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))) * 1024
def held(): return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))) * 1024
cells = load(sys.argv[1])
{prepare}
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before, t = held(), time.perf_counter()
{what}
print(json.dumps([time.perf_counter() - t, 1 + (peak() - before) / cells.images.nbytes]))
"""
WITHOUT_NETWORK = {
    "exact copies (digest of pixels)": "duplicates.find_duplicates(cells)",
    "randomised search, 300 drawn": "duplicates.find_by_sampling(cells, 300)",
    "randomised search, 3,000 drawn": "duplicates.find_by_sampling(cells, 3000)",
    "perceptual hash": "duplicates.find_by_phash(cells)",
    "near copies": "duplicates.find_near_duplicates(cells)",
    "unlike any cell (near copies included)": "cleaning.find_contaminants(cells)",
    "mean and deviation": "cleaning.find_outliers(cells)",
    "median and MAD": "cleaning.find_outliers(cells, robust=True)",
    "clean(cells)": "cleaning.clean(cells)",
    "exact, search, hash, means, medians, standard": """
duplicates.find_duplicates(cells); duplicates.find_by_sampling(cells, 300); duplicates.find_by_phash(cells)
cleaning.find_outliers(cells); cleaning.find_outliers(cells, robust=True); cleaning.find_all(cells)""",
}
NETWORK = "from bloodnb.models import feature_extractor, image_features; extractor = feature_extractor('MobileNetV2', sys.argv[2], stride=4); image_features(cells.images[:64], extractor)"
WITH_NETWORK = {"MobileNetV2's features, clean(cells)": "cleaning.clean(cells, features=image_features(cells.images, extractor))"}


def measure(prepare: str, what: str) -> list[float]:
    code = MEASURE.format(prepare=prepare, what=what)
    return min(json.loads(subprocess.run([sys.executable, "-c", code, *sys.argv[1:]], check=True, capture_output=True, text=True).stdout) for _ in range(BEST_OF))


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    results = {name: measure("", what) for name, what in WITHOUT_NETWORK.items()}
    results |= {name: measure(NETWORK, what) for name, what in WITH_NETWORK.items()} if len(sys.argv) == 3 else {}
    unit = results["exact copies (digest of pixels)"][0]
    print(f"{'what':46} {'seconds':>8} {'ratio':>6}  {'memory / array':>14}")
    for name, (seconds, memory) in results.items():
        print(f"{name:46} {seconds:8.2f} {seconds / unit:6.1f}  {memory:14.2f}")


if __name__ == "__main__":
    main()
