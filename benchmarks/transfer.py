"""Training a head on features that are computed once, against `fit` on the frozen model: seconds for the same epochs, and accuracy, in one run.

    python benchmarks/transfer.py DATA TEST WEIGHTS [EPOCHS]

DATA and TEST are what `bloodnb.data.load` takes, WEIGHTS a file for MobileNetV2 (or imagenet). Both ways train the same head from the same initial weights by
the same plan; the second one sees every picture through the resting backbone in every epoch, as a plain `fit` does. Our way runs twice, without and with its cache.
"""
import sys
import tempfile
import time

import keras

from bloodnb import cleaning, data, evaluation
from bloodnb.models import classifier
from bloodnb.training import Batches, predict, set_seed, set_trainable, train_classifier


def accuracy(model: keras.Model, test: data.CellImages) -> float:
    return evaluation.evaluate(test.labels, predict(model, test.images))["accuracy"]


def plain_fit(model: keras.Model, train: data.CellImages, epochs: int, learning_rate: float) -> None:
    """What a notebook does: freeze the backbone, compile, fit."""
    set_seed(0)
    set_trainable(model, 0)
    batches = Batches(train.images, train.labels, batch_size=32, seed=0)
    rate = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * len(batches))
    model.compile(keras.optimizers.Adam(rate), "categorical_crossentropy", metrics=["accuracy"])
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: print(".", end="", flush=True))])


def main() -> None:
    source, test_source, weights = sys.argv[1:4]
    epochs, learning_rate = int(sys.argv[4]) if len(sys.argv) > 4 else 20, 1e-3
    train = cleaning.clean(data.load(source))[0]
    test = data.load(test_source)
    print(f"{len(train):,} images, {epochs} epochs, backend {keras.backend.backend()}", flush=True)
    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("features, computed once", "features, from the cache", "plain fit on the frozen model"):
            model = classifier("MobileNetV2", weights)
            began = time.perf_counter()
            if name.startswith("plain"):
                plain_fit(model, train, epochs, learning_rate)
            else:
                train_classifier(model, train, None, head_epochs=epochs, head_learning_rate=learning_rate, epochs=0, cache=cache, verbose=False)
            rows[name] = time.perf_counter() - began, accuracy(model, test)
            print(f"{name}: {rows[name][0]:.1f} s, accuracy {rows[name][1]:.4f}", flush=True)
    plain, once, cached = (rows[name] for name in ("plain fit on the frozen model", "features, computed once", "features, from the cache"))
    print(f"plain fit takes {plain[0] / once[0]:.1f} x as long as features computed once, {plain[0] / cached[0]:.0f} x as from the cache; "
          f"accuracy {100 * (once[1] - plain[1]):+.2f} points")


if __name__ == "__main__":
    main()
