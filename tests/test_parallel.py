"""One training on one device and on two, on both backends that can share it: two virtual CPU devices in a process of their own."""
import json
import subprocess
import sys

import pytest
from jobs import job_environment

TRAINING = """
import json, sys
from pathlib import Path

import keras
import numpy as np
if keras.backend.backend() == "tensorflow":  # JAX is told by XLA_FLAGS
    import tensorflow as tf
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
from bloodnb import data
from bloodnb.training import predict, train_classifier

cells = data.load("drawn:n=120,seed=1", size=32)
train, val = data.take(cells, cells.index[:85]), data.take(cells, cells.index[85:])  # 21 and 3 pictures are left over by batches of 32
plan = dict(head_epochs=2, epochs=2, unfreeze=1.0, normalization="updated", optimizer="sgd", head_learning_rate=1e-2, learning_rate=1e-2, class_weight=True, verbose=False)

def little_net():
    "Two convolutions, each with BatchNormalization: rounding has little depth to grow in."
    keras.utils.set_random_seed(0)
    images = keras.Input((32, 32, 3))
    x = inside = keras.Input((32, 32, 3))
    for filters in (8, 16):
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(filters, 3, strides=2)(x)))
    x = keras.Model(inside, x, name="backbone")(keras.layers.Rescaling(1 / 255)(images))
    x = keras.layers.BatchNormalization()(keras.layers.GlobalAveragePooling2D(name="pool")(x))
    return keras.Model(images, keras.layers.Dense(8, activation="softmax")(x))

def fit(devices, **more):
    model = little_net()
    return model, train_classifier(model, train, val, devices=devices, **plan, **more)

def break_off(phase):
    def stop(epoch, logs):
        if phase == "fine-tune":
            raise KeyboardInterrupt
    return [keras.callbacks.LambdaCallback(on_epoch_end=stop)]

alone, history = fit(1)
state = Path(sys.argv[1]) / "state.npz"
try:
    fit(2, checkpoint=state, callbacks=break_off)
    broken = False
except KeyboardInterrupt:
    broken = True
shared, again = fit(2, checkpoint=state)
columns = ["loss", "accuracy", "val_loss", "val_accuracy"]
answers = [predict(model, val.images) for model in (alone, shared)]
print(json.dumps({
    "backend": keras.backend.backend(), "devices": keras.distribution.list_devices(), "broken": broken, "phases": again["phase"].tolist(),
    "history": float(np.abs(history[columns] - again[columns]).to_numpy().max()),
    "said": float(np.abs(answers[0] - answers[1]).max()), "shape": answers[1].shape,
    "learned": float(np.abs(history["loss"].iloc[-1] - history["loss"].iloc[0])),
    "weights": max(float(np.abs(a - b).max()) for a, b in zip(alone.get_weights(), shared.get_weights())),
}))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_train_as_one_does(tmp_path, backend):
    """Both phases, uneven last batches, class weights and BatchNormalization that learns; broken off in the second phase and taken up again."""
    environment = job_environment({"KERAS_BACKEND": backend, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"})
    run = subprocess.run([sys.executable, "-c", TRAINING, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["backend"] == backend and len(said["devices"]) == 2 and said["broken"] and said["phases"] == ["head", "head", "fine-tune", "fine-tune"]
    assert said["history"] < 1e-4 and said["said"] < 1e-4 and said["weights"] < 1e-3, said
    assert said["shape"] == [35, 8], "an answer for each picture"
    assert said["learned"] > 0.05, "something was learned that could have differed"
