"""Every backbone of the table, and where the published weights come from."""
import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from jobs import NO_NETWORK, job_environment
from keras.src.utils import file_utils  # what Keras downloads its weights with; there is no public name for it

from bloodnb.models import BACKBONES, build_backbone, classifier, feature_extractor, find_backbone, image_features
from bloodnb.networks import HEADS
from bloodnb.optimizers import build_optimizer

SMALLEST_FILE = "mobilenet_2_5_224_tf_no_top.h5"  # of MobileNet_0.25; Keras' own name for it


@pytest.fixture
def fresh_keras():
    """Keras without the models of the tests before: the largest backbone alone holds half a gigabyte."""
    keras.backend.clear_session()
    yield
    keras.backend.clear_session()


# Of each family a small one is tested always, these before a release: a deep graph takes ten seconds to build.
DEEP = {"EfficientNetV2S", "EfficientNetV2L", "NASNetMobile", "ConvNeXtSmall", "ConvNeXtBase", "DenseNet121", "InceptionV3", "ResNet50", "VGG19"}


def quicker_first(names) -> list:
    """Names of backbones, with "," and more behind some, as parameters; the deep ones are slow tests."""
    return [pytest.param(name, id=name, marks=[pytest.mark.slow] * (name.partition(",")[0] in DEEP)) for name in names]


@pytest.mark.parametrize("backbone", quicker_first(BACKBONES))
def test_backbone_gives_probabilities(backbone, fresh_keras):
    model = classifier(backbone, weights=None, image_size=96)
    assert {"scale", "backbone", "pool", "probabilities"} <= {layer.name for layer in model.layers}
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    y_prob = keras.ops.convert_to_numpy(model(images, training=False))  # no `predict`: tracing a deep graph takes far longer than two pictures
    assert y_prob.shape == (2, 8) and y_prob.dtype == np.float32
    assert (y_prob >= 0).all() and np.allclose(y_prob.sum(1), 1, atol=1e-5)


def pictures(side: int) -> np.ndarray:
    """Four pictures of noise, each around a colour of its own."""
    rng = np.random.default_rng(0)
    return np.clip(rng.uniform(0, 255, (4, 1, 1, 3)) + rng.normal(0, 40, (4, side, side, 3)), 0, 255).astype(np.uint8)


def said(model, images) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(images, training=False))


def built(backbone: str, **options) -> keras.Model:
    """A small classifier in which no weight has the value that Keras gives it at first, so one that is not read back shows."""
    model = classifier(backbone, None, find_backbone(backbone).min_size, **options)
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        if len(weight.shape) == 1:  # offsets and scales; kernels are random anyway
            weight.assign(weight + rng.uniform(0.01, 0.1, weight.shape))
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(pictures(model.input.shape[1]), training=True)  # with statistics of nothing seen, signals fade from layer to layer until all pictures look alike
    return model


SAVED = {
    # One of each family, a small one; NASNet, which has nothing that these have not, would take as long as the next three.
    **{backbone: {} for backbone in ("MobileNet_0.25", "MobileNetV2_0.35", "MobileNetV3Small", "EfficientNetB0", "EfficientNetV2B0", "ConvNeXtTiny", "DenseNet121", "VGG16",
                                     "ResNet50", "InceptionV3", "SiumGPT_CNN_0.125", "TeamName_CNN_0.125", "Backpropagators_CNN_0.125", "UNet_0.125")},
    **{f"SiumGPT_CNN_0.125, head {head}": {"head": head} for head in (*HEADS, "256,64", "832+ bn dropout0.3 64l2 relu")},
    "SiumGPT_CNN_0.125, group": {"normalization": "group"},
    "SiumGPT_CNN_0.125, enlarged": {"input_size": 48},
    "SiumGPT_CNN_0.125, another scale": {"scale": "BGR-mean"},
    "MobileNetV3Small, group": {"normalization": "group"},
    "MobileNet_0.25, bfloat16": {"precision": "mixed_bfloat16"},
    "EfficientNetV2B0, all": {"precision": "mixed_float16", "normalization": "group", "input_size": 40, "head": "machine_dumbening", "scale": "mean/std"},
}


@pytest.mark.parametrize("name", quicker_first(SAVED))
def test_saved_model_comes_back_as_it_was(name, tmp_path, fresh_keras):
    """In safe mode, which refuses code in a file: the same layers, precision and weights, and so the same probabilities to the last bit."""
    backbone = name.partition(",")[0]
    model, images = built(backbone, **SAVED[name]), pictures(find_backbone(backbone).min_size)
    before = said(model, images)
    assert np.ptp(before, axis=0).max() > 1e-3, "pictures differ, so the comparison means something"
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    layers, same = ([(type(layer), layer.name, layer.compute_dtype) for layer in each._flatten_layers() if not isinstance(layer, (keras.Model, keras.layers.InputLayer))]
                    for each in (model, again))
    assert layers == same
    for old, new in zip(model.weights, again.weights, strict=True):
        assert old.dtype == new.dtype and np.array_equal(old, new), old.path
    assert np.array_equal(said(again, images), before)


READ = """
import json, sys
from pathlib import Path
import keras
import numpy as np
import bloodnb.optimizers, bloodnb.models
images = np.load(sys.argv[2])
models = {path.stem: keras.saving.load_model(path) for path in Path(sys.argv[1]).glob("*.keras")}
print(json.dumps({name: [np.array(model(images, training=False)).tolist(), type(getattr(model, "optimizer", None)).__name__] for name, model in models.items()}))
"""


def test_saved_models_are_read_by_another_process(tmp_path, fresh_keras):
    """What has layers that Keras does not export, what was compiled with our optimiser, and what had its layers replaced: nothing of the kind was built there before."""
    models, images = {"layer scale": built("ConvNeXtTiny"), "ranger": built("SiumGPT_CNN_0.125", head="siumgpt"), "group": built("MobileNet_0.25", normalization="group", input_size=64)}, pictures(32)
    models["ranger"].compile(build_optimizer("ranger", 1e-3, ema=0.9), "categorical_crossentropy")
    models["ranger"].optimizer.build(models["ranger"].trainable_variables)
    for name, model in models.items():
        model.save(tmp_path / f"{name}.keras")
    np.save(tmp_path / "images.npy", images)
    got = in_python(READ, tmp_path, tmp_path, tmp_path / "images.npy")
    assert {name: optimizer for name, (_, optimizer) in got.items()} == {"layer scale": "NoneType", "ranger": "Ranger", "group": "NoneType"}
    for name, model in models.items():
        assert np.allclose(got[name][0], said(model, images), atol=1e-6), name


def in_python(code: str, keras_home, *arguments) -> dict:
    """What `code` prints as JSON, in a process with a Keras folder of its own and no network."""
    environment = job_environment({**NO_NETWORK, "KERAS_HOME": str(keras_home)})
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


COMPARE_WEIGHTS = """
import json, sys
import numpy as np
from bloodnb.models import classifier
first, second, random = (classifier("MobileNet_0.25", weights, 96).get_layer("backbone").get_weights() for weights in ("imagenet", sys.argv[1], "none"))
equal = lambda a, b: len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))
print(json.dumps({"from the file": equal(first, second), "random": equal(first, random)}))
"""


def test_imagenet_weights_are_found_in_keras_home(tmp_path, weights_dir):
    (tmp_path / "models").mkdir()
    shutil.copy(weights_dir / SMALLEST_FILE, tmp_path / "models")
    assert in_python(COMPARE_WEIGHTS, tmp_path, weights_dir / SMALLEST_FILE) == {"from the file": True, "random": False}


BUILD_WITHOUT_NETWORK = """
import json
from bloodnb.models import classifier
try:
    classifier("MobileNetV2", weights="imagenet", image_size=96)
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
else:
    print(json.dumps({"error": None, "message": ""}))
"""


def test_imagenet_weights_without_network(tmp_path):
    got = in_python(BUILD_WITHOUT_NETWORK, tmp_path)
    assert got["error"] == "ConnectionError", got
    assert all(words in got["message"] for words in ("MobileNetV2", "-p weights none", "-p weights FILE", os.fspath(tmp_path / "models"))), got["message"]
    assert not list(tmp_path.rglob("*.h5*")), "a broken download must not stay where Keras would take it for a whole one"


def test_dense_layers_of_vgg_are_features(fresh_keras):
    """`fc1` as one report used it; random weights, since VGG's own are large."""
    extractor = feature_extractor("VGG16", None, layer="fc1")
    images = np.random.default_rng(0).integers(0, 255, (2, 96, 96, 3), dtype=np.uint8)
    features = image_features(images, extractor)
    assert features.shape == (2, 4096) and (features >= 0).all() and not np.allclose(features[0], features[1])
    assert [layer.scale for layer in extractor.layers if hasattr(layer, "scale")] == ["BGR-mean"] and {224} == {layer.height for layer in extractor.layers if hasattr(layer, "height")}


# Families whose Keras function looks at `weights` while it builds, or might: EfficientNet gets a layer more with "imagenet".
@pytest.mark.parametrize("backbone", quicker_first(["EfficientNetB0", "EfficientNetV2B0", "MobileNetV3Small", "ConvNeXtTiny", "ResNet50"]))
def test_weights_from_a_file_make_the_same_backbone_as_keras_own(backbone, tmp_path, monkeypatch, fresh_keras):
    row = find_backbone(backbone)
    make = getattr(keras.applications, row.application)
    make(include_top=False, weights=None, input_shape=(32, 32, 3)).save_weights(tmp_path / "own.weights.h5")
    monkeypatch.setattr(file_utils, "get_file", lambda *args, **kwargs: str(tmp_path / "own.weights.h5"))
    downloaded, given = (build_backbone(backbone, weights, 32) for weights in ("imagenet", tmp_path / "own.weights.h5"))
    assert [type(layer) for layer in downloaded.layers] == [type(layer) for layer in given.layers]
    assert np.allclose(said(downloaded, pictures(32)), said(given, pictures(32)), atol=1e-5)
