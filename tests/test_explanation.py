"""Heat maps of every backbone of the table, and the same ones on every backend."""
import importlib.util
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from jobs import job_environment
from sklearn.metrics import roc_auc_score

from bloodnb.explanation import METHODS, grad_cam, split_model
from bloodnb.models import BACKBONES, classifier, feature_model, find_backbone
from bloodnb.training import predict

# The smallest of their family is tried: the others differ in depth and width alone.
LARGER = {"MobileNet", "MobileNetV2", "MobileNetV3Large", "EfficientNetV2S", "EfficientNetV2L", "ConvNeXtSmall", "ConvNeXtBase", "VGG19"}


def noise(n: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def lively(backbone: str, side: int, head: str = "default", images: np.ndarray | None = None, **options) -> keras.Model:
    """A classifier whose normalisation knows its pictures: without, signals fade from layer to layer until all pictures look alike."""
    model = classifier(backbone, None, side, head, **options)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(noise(8, side) if images is None else images, training=True)
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


def planted(n: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grey noise with a white square (class 0), a black one (1) or none (2) at a random place; pictures, labels, and where the square is."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(110, 146, (n, side, side, 3), dtype=np.uint8), np.arange(n) % 3
    where, size = np.zeros((n, side, side), bool), side // 3
    for at, (y, x) in zip(where, rng.integers(0, side - size + 1, (n, 2))):
        at[y : y + size, x : x + size] = True
    where[labels == 2] = False
    images[where & (labels == 0)[:, None, None]] = 250
    images[where & (labels == 1)[:, None, None]] = 5
    return images, labels, where


def decided_by_a_square(backbone: str, side: int, **options) -> keras.Model:
    """A network at random whose last layer, by least squares, says which square is there: 1 and 0 for each, and 0 and 0 for what grey noise looks like."""
    model = lively(backbone, side, "gap", planted(24, side, 2)[0], **options)
    images, labels, _ = planted(96, side, 0)
    features = predict(feature_model(model), images)
    blank = features[labels == 2].mean(0)
    rows, wanted = np.vstack([features - blank, 100 * blank]), np.vstack([np.eye(8)[labels] * (labels < 2)[:, None], np.zeros(8)])
    products = rows @ rows.T
    kernel = rows.T @ np.linalg.solve(products + 1e-3 * np.trace(products[:-1, :-1]) / len(rows) * np.eye(len(rows)), wanted)
    model.get_layer("probabilities").set_weights([10 * kernel, np.array([0, 0, 3] + 5 * [-9.0])])
    return model


# By name: backbone, side, options of the classifier, layer of the map. The first is a network within the network that enlarges its pictures, the second's layer is beside a shortcut.
CASES = {
    "nested": ("MobileNetV2_0.35", 48, {"input_size": 96}, None),
    "unet": ("UNet_0.125", 32, {}, "down2_2_relu"),
    "own": ("SiumGPT_CNN_0.25", 48, {}, None),
}
SMALLER = CASES | {"nested": ("MobileNet_0.25", 24, {"input_size": 32}, None)}


@pytest.mark.parametrize("name", CASES)
def test_the_map_lies_over_the_picture(name):
    backbone, side, options, layer = CASES[name]
    front, _ = split_model(lively(backbone, side, **options), layer)
    places = np.array([(0.2, 0.2), (0.2, 0.8), (0.8, 0.3), (0.5, 0.5), (0.6, 0.9)]) * side
    before = np.repeat(noise(1, side), len(places), axis=0)
    after = before.copy()
    for image, (y, x) in zip(after, places.astype(int)):
        image[y - 2 : y + 2, x - 2 : x + 2] = 255 - image[y - 2 : y + 2, x - 2 : x + 2]
    maps = [keras.ops.convert_to_numpy(keras.tree.flatten(front(images.astype(np.float32), training=False))[0]) for images in (before, after)]
    change = np.abs(maps[1] - maps[0]).sum(-1)
    found = np.array([np.unravel_index(one.argmax(), one.shape) for one in change]) + 0.5
    one_place = side / change.shape[1]
    # Strides with padding on one side alone let a place see up to one further to the right and below; mirrored or transposed maps are further off than that.
    assert (np.abs(found * one_place - places) <= 2 * one_place).all(), "a picture altered here alters the map here"


@pytest.mark.parametrize("name", ["unet", "own"])
def test_the_heat_is_where_the_decision_is(name):
    backbone, side, options, _ = CASES[name]
    model = decided_by_a_square(backbone, side, **options)
    images, labels, where = planted(60, side, 1)
    assert (predict(model, images).argmax(1) == labels).mean() > 0.8, "the square decides"
    images, labels, where = images[labels < 2], labels[labels < 2], where[labels < 2]
    for method in METHODS:
        heat = grad_cam(model, images, labels, method=method)
        areas = [roc_auc_score(square.ravel(), one.ravel()) for square, one in zip(where, heat)]
        assert np.mean(areas) > 0.7, f"{method}: {np.mean(areas):.2f}; by chance a place on the square is hotter than one beside it in half of the cases"
        others = [roc_auc_score(square.ravel(), one.ravel()) for square, one in zip(where, heat[::-1])]
        assert np.mean(others) < 0.65, "another picture's map does not find it"


ON_ANOTHER_BACKEND = """
import json, sys
from pathlib import Path
import keras
import numpy as np
from bloodnb.explanation import METHODS, grad_cam
from bloodnb import models
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
maps = {}
for name, (*_, layer) in cases.items():
    model, images = keras.saving.load_model(folder / f"{name}.keras"), np.load(folder / f"{name}.npy")
    maps.update({f"{name}/{method}": grad_cam(model, images, classes=np.arange(len(images)), layer=layer, method=method) for method in METHODS})
np.savez(folder / f"{keras.backend.backend()}.npz", **maps)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):  # on JAX each size of each layer is compiled, so the network within is a shorter one
    """Models that this process's backend made, pictures, and their maps."""
    folder, maps = tmp_path_factory.mktemp("explained"), {}
    for name, (backbone, side, options, layer) in SMALLER.items():
        model, images = lively(backbone, side, "16", **options), noise(4, side)
        model.save(folder / f"{name}.keras")
        np.save(folder / f"{name}.npy", images)
        maps |= {f"{name}/{method}": grad_cam(model, images, classes=np.arange(4), layer=layer, method=method) for method in METHODS}
    return folder, maps


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_give_the_same_maps(saved, backend):
    if importlib.util.find_spec(backend) is None or keras.backend.backend() == backend:
        pytest.skip(f"{backend} is not installed, or this process is on it already")
    folder, maps = saved
    quickly_compiled = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # of no account on PyTorch
    environment = job_environment({"KERAS_BACKEND": backend, **quickly_compiled})
    run = subprocess.run([sys.executable, "-c", ON_ANOTHER_BACKEND, str(folder), json.dumps(SMALLER)], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    with np.load(folder / f"{backend}.npz", allow_pickle=False) as there:
        assert set(there) == set(maps)
        for name, heat in maps.items():
            assert np.abs(there[name] - heat).max() < 2e-3, f"{name}: {np.abs(there[name] - heat).max()}"
            assert heat.std() > 0.02, f"{name}: maps differ from place to place, so the comparison means something"
