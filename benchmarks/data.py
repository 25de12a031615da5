"""Reading, drawing and importing: time against a named alternative in the same run, and memory against the array.

    python benchmarks/data.py PHOTOS.zip

Each measurement is a fresh process, so that nothing is warm but the file cache; the best of three is shown, since machines are shared.
"""
import json
import subprocess
import sys

BEST_OF = 3

PRELUDE = """
import json, resource, sys, time
def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
"""

CASES = {
    "import bloodnb.data": PRELUDE + "t = time.perf_counter(); import bloodnb.data; print(json.dumps([time.perf_counter() - t, 0]))",
    "import numpy, cv2, PIL.Image": PRELUDE + "t = time.perf_counter(); import numpy, cv2, PIL.Image; print(json.dumps([time.perf_counter() - t, 0]))",
    "load(PHOTOS)": PRELUDE + """
import numpy as np
from bloodnb.data import load
before, t = memory(), time.perf_counter()
cells = load(sys.argv[1])
print(json.dumps([time.perf_counter() - t, (memory() - before) / cells.images.nbytes]))
""",
    "zipfile and PIL into a list, np.stack": PRELUDE + """
import io, zipfile
import numpy as np
from PIL import Image
before, t = memory(), time.perf_counter()
archive = zipfile.ZipFile(sys.argv[1])
images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(i)))) for i in archive.infolist() if i.filename.endswith(".jpg")])
print(json.dumps([time.perf_counter() - t, (memory() - before) / images.nbytes]))
""",
    "draw_cells(2000)": PRELUDE + """
from bloodnb.drawn import draw_cells
before, t = memory(), time.perf_counter()
images = draw_cells(2000).images
print(json.dumps([time.perf_counter() - t, (memory() - before) / images.nbytes]))
""",
}
# What each is held against.
AGAINST = {"import bloodnb.data": "import numpy, cv2, PIL.Image", "load(PHOTOS)": "zipfile and PIL into a list, np.stack"}


def measure(code: str, photos: str) -> tuple[float, float]:
    runs = [json.loads(subprocess.run([sys.executable, "-c", code, photos], check=True, capture_output=True, text=True).stdout) for _ in range(BEST_OF)]
    return min(runs)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    results = {name: measure(code, sys.argv[1]) for name, code in CASES.items()}
    print(f"{'what':40} {'seconds':>8} {'ratio':>6}  {'memory / array':>14}")
    for name, (seconds, memory) in results.items():
        ratio = f"{seconds / results[AGAINST[name]][0]:.2f}" if name in AGAINST else ""
        print(f"{name:40} {seconds:8.2f} {ratio:>6}  {f'{memory:.2f}' if memory else '':>14}")


if __name__ == "__main__":
    main()
