"""Every pipeline on every way to run it: the same pictures to the bit, on another backend to a level, and KerasCV's beside them."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bloodnb import data
from bloodnb.augmentation import PIPELINES, augment, augmented_dataset, find_pipeline, keras_cv_dataset

SEED = 5
DIGEST = """
import json, sys
import numpy as np
from bloodnb import data
from bloodnb.augmentation import augment, find_pipeline
cells = data.take(data.load("drawn:n=60,seed=2"), np.arange(24))
for name in json.loads(sys.argv[1]):
    images, labels = augment(cells, find_pipeline(name, 5), epoch=1, batch_size=12)
    np.savez(f"{sys.argv[2]}/{name}.npz", images=images, labels=labels)
import keras
print(keras.backend.backend(), "tensorflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def cells() -> data.CellImages:
    return data.take(data.load("drawn:n=60,seed=2"), np.arange(40))


def through_tf_data(cells, pipeline, epochs, batch_size, calls):
    batches = list(augmented_dataset(cells, pipeline, epochs, batch_size, calls))
    return [np.concatenate([np.asarray(batch[i]) for batch in batches]) for i in (0, 1)]


@pytest.mark.parametrize("name", PIPELINES)
def test_same_pictures_whatever_runs_them(cells, name):
    """Two batch sizes, another order, tf.data with one and four parallel calls, from the start and resumed: bit for bit."""
    pipeline = find_pipeline(name, SEED)
    images, labels = augment(cells, pipeline, epoch=1, batch_size=20)
    turned = augment(data.CellImages(cells.images[::-1], cells.labels[::-1], index=cells.index[::-1]), pipeline, 1, batch_size=8)
    assert np.array_equal(turned[0][::-1], images) and np.array_equal(turned[1][::-1], labels)
    order = np.random.default_rng([SEED, 1]).permutation(len(cells))
    whole = through_tf_data(cells, pipeline, range(0, 3), 16, 1)
    resumed = through_tf_data(cells, pipeline, range(1, 3), 20, 4)
    for i, made in enumerate((images, labels)):
        assert np.array_equal(resumed[i][: len(cells)], made[order])
        assert np.array_equal(whole[i][len(cells) :], resumed[i])
    assert np.allclose(labels.sum(1), 1, atol=1e-5)
    changed = (augment(cells, pipeline, 2, batch_size=20)[0] != images).mean()
    assert changed == 0 if name == "none" else changed > 0.05


def test_jax_draws_the_same_pictures(tmp_path):
    """Another process on JAX, without TensorFlow: equal up to one level in a few values (sums are rounded elsewhere)."""
    names = ["siumgpt_mixup", "machine_dumbening", "robust", "deepdrive", "backpropagators"]
    command = [sys.executable, "-c", DIGEST, json.dumps(names), str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "jax"}).stdout
    assert said.split() == ["jax", "False"]
    cells = data.take(data.load("drawn:n=60,seed=2"), np.arange(24))
    for name in names:
        images, labels = augment(cells, find_pipeline(name, SEED), epoch=1, batch_size=12)
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as made:
            apart = np.abs(made["images"].astype(int) - images)
            assert apart.max() <= 1 and (apart > 0).mean() < 0.01 and np.allclose(made["labels"], labels, atol=1e-6), name


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("none", "robust")])
def test_keras_cv_pipelines(cells, name):
    batches = list(keras_cv_dataset(cells, name, epochs=1, batch_size=16))
    images, labels = (np.concatenate([np.asarray(batch[i]) for batch in batches]) for i in (0, 1))
    assert images.dtype == np.uint8 and images.shape == cells.images.shape and np.allclose(labels.sum(1), 1, atol=1e-5)
    assert (np.sort(images.mean((1, 2, 3))) != np.sort(cells.images.mean((1, 2, 3)))).mean() > 0.5
