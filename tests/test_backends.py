"""What needs no TensorFlow runs without it: on JAX a training in two phases, broken off and resumed, and a model that TensorFlow saved."""
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from jobs import job_environment

from bloodnb import data
from bloodnb.models import classifier
from bloodnb.training import predict, train_classifier

TRAINING = """
import json, sys
from pathlib import Path
class NoTensorFlow:  # as if it were not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ImportError("no TensorFlow here")
sys.meta_path.insert(0, NoTensorFlow())
import keras
import numpy as np
from bloodnb import checkpoints, data
from bloodnb.models import classifier
from bloodnb.training import predict, train_classifier

folder = Path(sys.argv[1])
cells = data.load("drawn:n=160,seed=3", size=32)
parts = data.split(cells, val=0.25, test=0, seed=0)
train, val = data.take(cells, parts.train), data.take(cells, parts.val)
plan = dict(head_epochs=1, epochs=2, unfreeze=1.0, normalization="updated", optimizer="ranger", ema=0.9, label_smoothing=0.1, verbose=False)

def fit(checkpoint=None, seed=0):
    model = classifier("Backpropagators_CNN_0.25", "none", 32, "bn dropout")
    return model, train_classifier(model, train, val, **plan, checkpoint=checkpoint, cache=folder / "features")

straight, history = fit()
write, written = checkpoints.write_state, []
def write_and_break(path, state):
    write(path, state)
    written.append(state.epoch)
    if len(written) == 2:
        raise KeyboardInterrupt
checkpoints.write_state = write_and_break
try:
    fit(folder / "state.npz")
except KeyboardInterrupt:
    checkpoints.write_state = write
resumed, again = fit(folder / "state.npz")
answers = {
    "backend": keras.backend.backend(), "phases": history["phase"].tolist(), "broken after": len(written),
    "same": all(np.array_equal(a, b) for a, b in zip(straight.get_weights(), resumed.get_weights())) and history.drop(columns="seconds").equals(again.drop(columns="seconds")),
    "finite": bool(np.isfinite(history["loss"]).all()), "features kept": len(list((folder / "features").glob("*.npz"))),
}
for file in folder.glob("*.keras"):
    answers[file.stem] = predict(keras.saving.load_model(file), cells.images[:8]).tolist()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models that this process's backend trained a little and saved, and what they say of eight pictures."""
    folder, said = tmp_path_factory.mktemp("saved"), {}
    cells = data.load("drawn:n=160,seed=3", size=32)
    for name, options in {"plain": {}, "grouped": {"normalization": "group", "input_size": 48}, "dropout": {"backbone": "TeamName_CNN_0.125", "head": "team_name"}}.items():
        model = classifier(**{"backbone": "Backpropagators_CNN_0.25", "weights": "none", "image_size": 32, **options})
        train_classifier(model, data.take(cells, cells.index[:32]), None, head_epochs=0, epochs=1, unfreeze=1.0, optimizer="ranger", verbose=False)
        model.save(folder / f"{name}.keras")
        said[name] = predict(model, cells.images[:8])
    return folder, said


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="this process is on JAX already")
def test_jax_trains_resumes_and_reads_models_of_this_backend(saved):
    folder, said = saved
    environment = job_environment({"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"})
    run = subprocess.run([sys.executable, "-c", TRAINING, str(folder)], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    assert answers["backend"] == "jax" and answers["phases"] == ["head", "fine-tune", "fine-tune"] and answers["finite"]
    assert answers["broken after"] == 2 and answers["same"], "broken off in the second phase and resumed, to the last bit"
    assert answers["features kept"] == 2, "of the training and the validation pictures"
    for name, y_prob in said.items():
        assert np.allclose(answers[name], y_prob, atol=1e-4), name
        assert np.ptp(y_prob, axis=0).max() > 1e-3, "pictures differ, so the comparison means something"
