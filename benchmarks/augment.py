"""How fast pictures are altered: each pipeline under each engine, and a training step that must not be starved, in one run.

    python benchmarks/augment.py [SECONDS]

96 x 96 pixels, drawn cells, tf.data with its own choice of parallel calls. Images a second, the best of three stretches of SECONDS (2);
`ratio` is the default engine against KerasCV at the same batch size.
"""
import itertools
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np
import tensorflow as tf

from bloodnb.augmentation import PIPELINES, augmented_dataset, keras_cv_dataset
from bloodnb.data import load
from bloodnb.models import classifier
from bloodnb.training import set_trainable

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
BATCHES = (32, 128)
# What Keras 3 itself has under the same name.
NATIVE = {"rand_augment": lambda: keras.layers.RandAugment((0, 255)), "aug_mix": lambda: keras.layers.AugMix((0, 255))}


def native_dataset(cells, name: str, batch_size: int):
    layer = NATIVE[name]()
    batches = tf.data.Dataset.from_tensor_slices(cells.images).repeat().batch(batch_size)
    return batches.map(lambda images: (layer(tf.cast(images, tf.float32), training=True), 0), num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def rate(dataset) -> float:
    """Images a second: the best of three stretches after a warm-up that builds and compiles what there is to compile."""
    batches = iter(dataset)
    start = time.perf_counter()
    for warm in itertools.count():
        next(batches)
        if warm > 10 and time.perf_counter() - start > SECONDS:
            break
    best = 0.0
    for _ in range(3):
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            n += len(next(batches)[0])
        best = max(best, n / (time.perf_counter() - start))
    return best


def training_rate(cells, unfreeze: float, batch_size: int = 32) -> float:
    """Images a second of MobileNetV2's training step on pictures that lie ready."""
    model = classifier("MobileNetV2", "none")
    set_trainable(model, unfreeze)
    model.compile("adam", "categorical_crossentropy")
    x, y = cells.images[:batch_size].astype(np.float32), np.eye(8, dtype=np.float32)[cells.labels[:batch_size]]
    for _ in range(3):
        model.train_on_batch(x, y)
    best = 0.0
    for _ in range(3):
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            model.train_on_batch(x, y)
            n += batch_size
        best = max(best, n / (time.perf_counter() - start))
    return best


def main() -> None:
    cells, epochs = load("drawn:n=512"), range(100_000)
    for share, what in ((1.0, "whole model"), (0.5, "last half, as the default recipe")):
        print(f"MobileNetV2 training step, {what}, batch 32: {training_rate(cells, share):.0f} images/s", flush=True)
    print(f"{'pipeline':24} {'batch':>5} {'default':>8} {'KerasCV':>8} {'ratio':>6} {'Keras':>8}")
    for name in [*(name for name in PIPELINES if name != "none"), "rand_augment", "aug_mix"]:
        for batch_size in BATCHES:
            ours = rate(augmented_dataset(cells, name, epochs, batch_size))
            theirs = rate(keras_cv_dataset(cells, name, len(epochs), batch_size)) if name != "robust" else None
            native = rate(native_dataset(cells, name, batch_size)) if name in NATIVE else None
            print(f"{name:24} {batch_size:5} {ours:8.0f} {f'{theirs:.0f}' if theirs else '':>8} {f'{ours / theirs:.2f}' if theirs else '':>6} "
                  f"{f'{native:.0f}' if native else '':>8}", flush=True)


if __name__ == "__main__":
    main()
