"""What runs a network on a CPU: Keras against ONNX Runtime, images a second in one run.

    python benchmarks/submission.py [IMAGES [BACKBONE ...]]

96 x 96 pixels, drawn cells; networks with random weights, which are as fast as trained ones. Both get the same float32 batches, and the best of three
rounds over IMAGES (256) pictures counts. `ratio` is ONNX Runtime against Keras at the same batch size. It wants the extra `onnx`.
"""
import os
import sys
from importlib.metadata import version

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the CPU is what is asked for
import keras

from bloodnb import submission
from bloodnb.data import load
from bloodnb.models import classifier
from bloodnb.runs import device_name

BACKBONES = ("MobileNetV2", "EfficientNetB0", "ResNet50", "SiumGPT_CNN")
BATCHES = (1, 32, 128)


def main() -> None:
    images = load(f"drawn:n={int(sys.argv[1]) if len(sys.argv) > 1 else 256},seed=1").images
    versions = ", ".join(f"{name} {version(name)}" for name in ("keras", "tensorflow", "onnxruntime", "onnx", "tf2onnx"))
    print(f"{len(images)} images, {device_name()}, {versions}")
    print(f"{'network':<16}{'batch':>6}{'Keras':>9}{'ONNX':>9}{'ratio':>7}{'difference':>12}", flush=True)
    for backbone in sys.argv[2:] or BACKBONES:
        network = submission.plain_network(classifier(backbone, "none"))
        onnx = submission.onnx_bytes(network)
        for batch_size in BATCHES:
            table = submission.compare_engines(network, onnx, images[: 64 if batch_size == 1 else None], batch_size)
            (slow, fast), far = table["images per second"], table["largest difference"].max()
            print(f"{backbone:<16}{batch_size:>6}{slow:>9.0f}{fast:>9.0f}{fast / slow:>7.2f}{far:>12.1e}", flush=True)
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
