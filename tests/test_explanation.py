"""Heat maps of every backbone of the table, and the same ones on every backend."""
import importlib.util
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from jobs import job_environment

from bloodnb.explanation import METHODS, grad_cam, split_model
from bloodnb.models import BACKBONES, classifier, find_backbone

# The smallest of their family is tried: the others differ in depth and width alone.
LARGER = {"MobileNet", "MobileNetV2", "MobileNetV3Large", "EfficientNetV2S", "EfficientNetV2L", "ConvNeXtSmall", "ConvNeXtBase", "VGG19"}


def noise(n: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def lively(backbone: str, side: int, head: str = "default") -> keras.Model:
    """A classifier whose normalisation knows its pictures: without, signals fade from layer to layer until all pictures look alike."""
    model = classifier(backbone, None, side, head)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(noise(8, side), training=True)
    return model


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in LARGER])
def test_every_family_has_maps(backbone):
    side = find_backbone(backbone).min_size
    model, images = classifier(backbone, None, side), noise(2, side).astype(np.float32)
    front, back = split_model(model)
    held = front(images, training=False)
    said = keras.ops.convert_to_numpy(keras.ops.softmax(back(held, training=False)))
    assert np.allclose(said, keras.ops.convert_to_numpy(model(images, training=False)), atol=1e-5), "the halves together are the whole"
    assert min(keras.tree.flatten(held)[0].shape[1:3]) >= 6
    heat = grad_cam(model, images, classes=[0, 7], method="hires_cam")
    assert heat.shape == (2, side, side) and heat.dtype == np.float32 and np.isfinite(heat).all() and heat.min() >= 0 and heat.max() <= 1
    keras.backend.clear_session()


def test_a_split_leaves_the_model_as_it_was(tmp_path):
    model, images = lively("MobileNetV2_0.35", 96), noise(4, 96)
    before = model.predict_on_batch(images)
    grad_cam(model, images, layer="block_4_expand_relu")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert np.array_equal(model.predict_on_batch(images), before) and np.allclose(again.predict_on_batch(images), before, atol=1e-6)
    assert np.allclose(grad_cam(again, images), grad_cam(model, images), atol=1e-4), "a model read from a file has the same maps"


CASES = {"mobilenet": None, "unet": "down2_2_relu", "own": None}  # the second one beside a shortcut
ON_ANOTHER_BACKEND = """
import json, sys
from pathlib import Path
import keras
import numpy as np
from bloodnb.explanation import METHODS, grad_cam
from bloodnb import models
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
maps = {}
for name, layer in cases.items():
    model, images = keras.saving.load_model(folder / f"{name}.keras"), np.load(folder / f"{name}.npy")
    maps.update({f"{name}/{method}": grad_cam(model, images, classes=np.arange(len(images)), layer=layer, method=method) for method in METHODS})
np.savez(folder / f"{keras.backend.backend()}.npz", **maps)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models that this process's backend made, pictures, and their maps."""
    folder, maps = tmp_path_factory.mktemp("explained"), {}
    for name, backbone, side, head in (("mobilenet", "MobileNet_0.25", 32, "16"), ("unet", "UNet_0.125", 32, "default"), ("own", "Backpropagators_CNN_0.25", 48, "gap")):
        model, images, layer = lively(backbone, side, head), noise(4, side), CASES[name]
        model.save(folder / f"{name}.keras")
        np.save(folder / f"{name}.npy", images)
        maps |= {f"{name}/{method}": grad_cam(model, images, classes=np.arange(4), layer=layer, method=method) for method in METHODS}
    return folder, maps


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_give_the_same_maps(saved, backend):
    if importlib.util.find_spec(backend) is None or keras.backend.backend() == backend:
        pytest.skip(f"{backend} is not installed, or this process is on it already")
    folder, maps = saved
    environment = job_environment({"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"})
    run = subprocess.run([sys.executable, "-c", ON_ANOTHER_BACKEND, str(folder), json.dumps(CASES)], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    with np.load(folder / f"{backend}.npz", allow_pickle=False) as there:
        assert set(there) == set(maps)
        for name, heat in maps.items():
            assert np.abs(there[name] - heat).max() < 2e-3, f"{name}: {np.abs(there[name] - heat).max()}"
            assert heat.std() > 0.02, f"{name}: maps differ from place to place, so the comparison means something"
