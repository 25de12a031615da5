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

from bloodnb.models import BACKBONES, classifier, feature_extractor, image_features

SMALLEST_FILE = "mobilenet_2_5_224_tf_no_top.h5"  # of MobileNet_0.25; Keras' own name for it


@pytest.fixture
def fresh_keras():
    """Keras without the models of the tests before: the largest backbone alone holds half a gigabyte."""
    keras.backend.clear_session()
    yield
    keras.backend.clear_session()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone_gives_probabilities(backbone, fresh_keras):
    model = classifier(backbone, weights=None, image_size=96)
    assert {"scale", "backbone", "pool", "probabilities"} <= {layer.name for layer in model.layers}
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    y_prob = keras.ops.convert_to_numpy(model(images, training=False))  # no `predict`: tracing a deep graph takes far longer than two pictures
    assert y_prob.shape == (2, 8) and y_prob.dtype == np.float32
    assert (y_prob >= 0).all() and np.allclose(y_prob.sum(1), 1, atol=1e-5)


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
