"""Does a submission.zip answer under another Keras as it does under this one?

    python experiments/old_keras.py submission.zip PYTHON...     # interpreters of environments with another Keras

The zip is unpacked into an empty folder for each interpreter, which is asked for the labels of 64 drawn cells in a process of its own.
An environment for it: python -m venv old; old/bin/pip install "tensorflow==2.15.*" (Keras 2.15 comes with it).
"""
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from bloodnb.data import load

ASK = """
import sys
import numpy as np
try:
    import keras
except ImportError:
    from tensorflow import keras
from model import Model
np.save("labels.npy", Model().predict(np.load(sys.argv[1], allow_pickle=False)))
print(keras.__version__)
"""


def ask(python: str, archive: str, images: Path) -> tuple[str, np.ndarray]:
    """Version of Keras and the labels that it gives."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(archive).extractall(folder)
        Path(folder, "ask.py").write_text(ASK)
        version = subprocess.run([python, "ask.py", images], cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        return version, np.load(Path(folder, "labels.npy"), allow_pickle=False)


def main(archive: str, pythons: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        np.save(images, load("drawn:n=64,seed=5").images)
        here, wanted = ask(sys.executable, archive, images)
        for python in pythons:
            version, labels = ask(str(Path(python).absolute()), archive, images)
            print(f"Keras {version}: {(labels == wanted).sum()} of {len(wanted)} labels as under Keras {here}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
