"""Every row of the reports as its team describes it, and every recipe through two steps of each of its phases: just the layers that should move do."""
import functools
import sys
import zlib
from dataclasses import asdict, replace

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from papermill.cli import _resolve_type

from bloodnb import balancing, data, models, training
from bloodnb.augmentation import find_pipeline, to_dict
from bloodnb.models import ImageNetScale, classifier, find_backbone
from bloodnb.networks import NETWORKS, head_layers
from bloodnb.recipes import RECIPES, choices_for, list_recipes, on_all_data, recipe_fields, resolve_recipe, training_plan
from bloodnb.reports import REPORTS

# What the teams say of their rows, copied from their reports by hand and not from the library. What a report leaves open is not here.
SIUMGPT = {"optimizer": "lion", "head": "siumgpt", "dropout_rate": 0.5, "batch_size": 128, "balance": "siumgpt", "patience": 5}
TWO_PHASES = SIUMGPT | {"weights": "imagenet", "head_learning_rate": 1e-4, "learning_rate": 1e-6, "head_epochs": 24, "epochs": 22, "unfreeze": 1.0}
V2S = {"backbone": "EfficientNetV2S", "weights": "imagenet", "head": "deepdrive"}
DUMBENING = {"head_learning_rate": 1e-4, "learning_rate": 1e-5, "head_batch_size": 128, "batch_size": 64, "head": "machine_dumbening", "weights": "imagenet",
             "balance": "machine_dumbening", "augmentation": "machine_dumbening", "scale": "auto"}
FROZEN, WRONG_SCALE = {"epochs": 0}, {"scale": "0..1"}
V2L = {"backbone": "EfficientNetV2L", "weights": "imagenet"}
V2L_FINAL = V2L | {"optimizer": "adamw", "weight_decay": 0.004, "head_learning_rate": 1e-3, "learning_rate": 1e-4, "batch_size": 64, "head_epochs": 400, "epochs": 400,
                   "patience": 15, "loss": "focal", "label_smoothing": 0.1, "head": "dropout0.4", "augmentation": "backpropagators", "normalization": "updated"}
STATED = {
    "siumgpt_convnextbase": TWO_PHASES | {"backbone": "ConvNeXtBase"},
    "siumgpt_vgg16": TWO_PHASES | {"backbone": "VGG16"},
    "siumgpt_custom": SIUMGPT | {"backbone": "SiumGPT_CNN", "weights": "none", "unfreeze": 1.0},
    "deepdrive_v2s": V2S | {"unfreeze": "after conv 120", "balance": "none", "augmentation": "deepdrive"},
    "deepdrive_b0": V2S | {"backbone": "EfficientNetB0"},
    "deepdrive_mobilenetv3small": V2S | {"backbone": "MobileNetV3Small"},
    "deepdrive_v2s_smote": V2S | {"unfreeze": "after conv 120", "balance": "smote"},
    "deepdrive_v2s_oversample": V2S | {"unfreeze": "after conv 120", "balance": "oversample"},
    "deepdrive_v2s_freeze_220": V2S | {"unfreeze": "after layer 220"},
    "deepdrive_v2s_freeze_420": V2S | {"unfreeze": "after layer 420"},
    "deepdrive_v2s_freeze_513": V2S | {"unfreeze": "after layer 513"},
    "machine_dumbening_unet": {"backbone": "UNet", "weights": "none", "head": "gap", "balance": "machine_dumbening", "augmentation": "machine_dumbening", "scale": "auto"},
    "machine_dumbening_mobilenet": DUMBENING | FROZEN | {"backbone": "MobileNet"},
    "machine_dumbening_mobilenet_finetuned": DUMBENING | {"backbone": "MobileNet", "unfreeze": "last 40"},
    "machine_dumbening_vgg16": DUMBENING | FROZEN | {"backbone": "VGG16"},
    "machine_dumbening_vgg16_finetuned": DUMBENING | {"backbone": "VGG16", "unfreeze": "last 10"},
    "machine_dumbening_vgg19": DUMBENING | FROZEN | {"backbone": "VGG19"},
    "machine_dumbening_vgg19_finetuned": DUMBENING | {"backbone": "VGG19", "unfreeze": "last 15"},
    "machine_dumbening_inceptionv3": DUMBENING | FROZEN | {"backbone": "InceptionV3"},
    "machine_dumbening_inceptionv3_finetuned": DUMBENING | {"backbone": "InceptionV3", "unfreeze": "last 40"},
    "machine_dumbening_resnet50": DUMBENING | FROZEN | WRONG_SCALE | {"backbone": "ResNet50"},
    "machine_dumbening_resnet50_corrected": DUMBENING | FROZEN | {"backbone": "ResNet50"},
    "machine_dumbening_resnet50_finetuned": DUMBENING | WRONG_SCALE | {"backbone": "ResNet50", "unfreeze": "last 75"},
    "machine_dumbening_resnet50_finetuned_corrected": DUMBENING | {"backbone": "ResNet50", "unfreeze": "last 75"},
    "machine_dumbening_efficientnetb0": DUMBENING | FROZEN | WRONG_SCALE | {"backbone": "EfficientNetB0"},
    "machine_dumbening_efficientnetb0_corrected": DUMBENING | FROZEN | {"backbone": "EfficientNetB0"},
    "machine_dumbening_efficientnetb0_finetuned": DUMBENING | WRONG_SCALE | {"backbone": "EfficientNetB0", "unfreeze": "last 75"},
    "machine_dumbening_efficientnetb0_finetuned_corrected": DUMBENING | {"backbone": "EfficientNetB0", "unfreeze": "last 75"},
    **{f"team_name_{backbone.lower()}": {"backbone": backbone, "weights": "imagenet", "augmentation": "team_name_randaugment"}
       for backbone in ("EfficientNetV2B0", "ConvNeXtTiny", "DenseNet121", "NASNetMobile")},
    "team_name_custom": {"backbone": "TeamName_CNN", "weights": "none", "head": "team_name", "augmentation": "team_name_augmix", "unfreeze": 1.0},
    "backpropagators_cnn": {"backbone": "Backpropagators_CNN", "weights": "none", "optimizer": "adam", "learning_rate": 1e-3, "batch_size": 128, "head_epochs": 0, "epochs": 1000,
                            "monitor": "val_accuracy", "patience": 30, "unfreeze": 1.0},
    "backpropagators_v2l_frozen": V2L | {"epochs": 0},
    "backpropagators_v2l_adamw": V2L | {"optimizer": "adamw"},
    "backpropagators_v2l_lion": V2L | {"optimizer": "lion"},
    "backpropagators_v2l_cutmix": V2L | {"optimizer": "lion"},
    "backpropagators_v2l_five_blocks": V2L,
    "backpropagators_v2l": V2L_FINAL | {"unfreeze": 1.0},
}


@pytest.mark.parametrize("name", STATED)
def test_recipe_is_what_the_team_says(name):
    recipe = asdict(resolve_recipe(name))
    assert {field: recipe[field] for field in STATED[name]} == STATED[name]


def test_no_row_goes_untold():
    assert set(STATED) == set(REPORTS) == set(RECIPES) - {"default", "frozen", "scratch", "robust", "demo"}
    assert sum(row.report == "Backpropagators" for row in REPORTS.values()) == 7
    for name, row in REPORTS.items():
        assert set(row.choices) <= set(recipe_fields()) and set(row.known) <= set(row.choices), name


def test_every_name_can_stand_after_p_recipe():
    """papermill reads -p values as numbers and truth where it can; a name must come through as it is, and the other parameters are None."""
    for name in RECIPES:
        assert _resolve_type(name) == name
        assert resolve_recipe(name, **dict.fromkeys(recipe_fields())) == resolve_recipe(name), name
    listed = list_recipes()
    assert list(listed.index) == list(RECIPES)
    assert list_recipes("Team Name").equals(listed[listed["report"] == "Team Name"]) and set(listed["report"]) == {"bloodnb", *(row.report for row in REPORTS.values())}


def described(head: str, dropout_rate: float, n_features: int) -> str:
    """A head as its layers say it, e.g. "512 bn relu dropout0.5"."""
    words = {keras.layers.Dense: lambda layer: f"{layer.units}{'l2' if layer.kernel_regularizer else ''}", keras.layers.BatchNormalization: lambda layer: "bn",
             keras.layers.ReLU: lambda layer: "relu", keras.layers.Dropout: lambda layer: f"dropout{layer.rate}"}
    return " ".join(words[type(layer)](layer) for layer in head_layers(head, n_features, dropout_rate))


def test_heads_are_what_the_teams_say():
    def head(name, n_features):
        recipe = resolve_recipe(name)
        return described(recipe.head, recipe.dropout_rate, n_features)

    assert head("siumgpt_convnextbase", 1024) == "512 bn relu dropout0.5 128 relu dropout0.5"
    first, *blocks, last = head("deepdrive_v2s", 1280).replace(" relu", "").split(" dropout0.2 ")  # "six blocks of dense, dropout, normalisation"
    assert first == "bn" and last == "bn" and len(blocks) == 6 and blocks[0].isdigit() and all(block.startswith("bn ") for block in blocks[1:])
    assert head("machine_dumbening_vgg16", 512) == "832 bn relu dropout0.3 320 bn relu dropout0.1"
    assert head("machine_dumbening_inceptionv3", 2048) == "2048 bn relu dropout0.3 320 bn relu dropout0.1", "no narrower than the pooled features"
    assert head("machine_dumbening_unet", 64) == "", "global average pooling alone"
    assert head("team_name_custom", 512) == " ".join(["128l2 relu"] * 5)
    assert head("backpropagators_v2l", 1280) == "dropout0.4"


def test_own_networks_are_what_the_teams_say(fresh_keras):
    def built(name, kind):
        model = classifier(**choices_for(classifier, resolve_recipe(name)))
        return model, [layer for layer in model.get_layer("backbone").layers if isinstance(layer, kind)]

    assert len(built("siumgpt_custom", keras.layers.Conv2D)[1]) == 8
    team, convolutions = built("team_name_custom", keras.layers.Conv2D)
    kinds = [type(layer).__name__ for layer in team.get_layer("backbone").layers]
    assert len(convolutions) == 6 and convolutions[0].filters == 32 and convolutions[-1].filters == 512
    assert kinds.count("BatchNormalization") == kinds.count("MaxPooling2D") == 6
    assert {layer.rate for layer in team.get_layer("backbone").layers if isinstance(layer, keras.layers.Dropout)} == {0.25}
    model, convolutions = built("backpropagators_cnn", keras.layers.Conv2D)
    assert len(convolutions) == 4 and model.count_params() == 422_344


def names_in(pipeline: dict) -> list:
    """The operations of a pipeline by name; for a OneOf the list of its ways, each such a list."""
    return [[names_in(way) for way in inner["ways"]] if "ways" in inner else inner["operation"] for inner in pipeline["operations"]]


@pytest.mark.parametrize(("name", "said"), {
    "siumgpt_convnextbase": ["Flip", "Brightness", "Rotation", "Translation", "Contrast"],
    "deepdrive_v2s": ["AugMix", "Flip", "Rotation", "Translation", "Zoom"],
    "deepdrive_v2s_smote": [],
    "deepdrive_v2s_oversample": [],
    "machine_dumbening_unet": ["Rotation", "Flip", "Zoom", "Brightness", "Contrast", "GaussianNoise"],
    "team_name_custom": ["AugMix", "GaussianNoise"],
    "team_name_densenet121": ["RandAugment", "GaussianNoise"],
    "backpropagators_cnn": [],
    "backpropagators_v2l": [[[], ["RandAugment", "CutMix", "MixUp"], ["AugMix"]], "Flip", "Rotation", "Translation", "Zoom"],
}.items())
def test_pictures_are_altered_as_the_team_says(name, said):
    pipeline = to_dict(find_pipeline(resolve_recipe(name).augmentation))
    assert names_in(pipeline) == said
    if name.startswith("team_name"):
        assert pipeline["operations"][-1]["factor"] == [0.2, 0.2], "20 % noise in every picture"


def test_rare_classes_are_filled_up_to_what_the_teams_say(monkeypatch):
    """5,000 a class with MixUp, and 1,500; without making the pictures."""
    made = []
    monkeypatch.setattr(balancing, "_altered", lambda train, pipeline, at, number, seed: made.append((pipeline, len(at))) or (train.images[at], np.eye(8, dtype=np.float32)[train.labels[at]]))
    cells = data.load("drawn:n=60,seed=2", 32)
    filled = {name: balancing.balance(cells, resolve_recipe(name).balance, held_out={}) for name in ("siumgpt_vgg16", "machine_dumbening_vgg16")}
    own = [np.bincount(part.labels.argmax(1)[part.origin < 3], minlength=8).tolist() for part in filled.values()]
    assert own == [[5000] * 8, [1500] * 8]
    assert made == [("siumgpt", 8 * 5000 - 60), ("siumgpt_mixup", 60), ("machine_dumbening", 8 * 1500 - 60)]


def test_reported_accuracies():
    reported = {name: row.reported for name, row in REPORTS.items()}
    assert reported["machine_dumbening_resnet50"] == {"unstated": 0.28} and reported["machine_dumbening_efficientnetb0"] == {"unstated": 0.27}
    assert reported["backpropagators_v2l"]["test"] == 0.9917
    assert not any(reported[name] for name in REPORTS if name.endswith("_corrected")), "nobody measured our twins"
    assert "test 0.9917" in list_recipes().loc["backpropagators_v2l", "reported"]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_corrected")])
def test_corrected_twin_differs_in_the_scale_alone(name):
    wrong, right = (asdict(resolve_recipe(each)) for each in (name.removesuffix("_corrected"), name))
    assert {field: (wrong[field], right[field]) for field in wrong if wrong[field] != right[field]} == {"scale": ("0..1", "auto")}
    assert find_backbone(right["backbone"]).scale != "0..1"


def test_siumgpts_last_training_is_of_19_and_17_epochs():
    """Its runs ended 5 epochs, the patience, after the best ones, in 24 and 22; the last one, on all data, stops at the best."""
    recipe = resolve_recipe("siumgpt_convnextbase")
    ran = pd.DataFrame([{"phase": phase, "epoch": i, "val_loss": 1 + abs(i - n + recipe.patience)} for phase, n in (("head", recipe.head_epochs), ("fine-tune", recipe.epochs))
                        for i in range(1, n + 1)])
    last, epochs = on_all_data(recipe, ran)
    assert epochs == (19, 17) and last == replace(recipe, val_fraction=0.0)


# The first layer of each backbone that learns, in Keras' order; all after it do too. Read off Keras' own lists, not worked out by the library.
FIRST = {
    ("MobileNetV2", 0.5): "block_8_project", ("MobileNetV2", 1.0): "Conv1", ("MobileNet_0.25", 1.0): "conv1", ("ConvNeXtBase", 1.0): "convnext_base_stem",
    ("VGG16", 1.0): "block1_conv1", ("SiumGPT_CNN", 1.0): "block1_1_conv", ("EfficientNetV2S", "after conv 120"): "block6f_expand_bn", ("EfficientNetB0", 0.5): "block5a_expand_conv",
    ("MobileNetV3Small", 0.5): "expanded_conv_5_project_bn", ("EfficientNetV2S", "after layer 220"): "block5e_se_reduce", ("EfficientNetV2S", "after layer 420"): "block6j_expand_conv",
    ("EfficientNetV2S", "after layer 513"): None, ("UNet", 1.0): "down1_1_conv", ("MobileNet", "last 40"): "conv_pw_7", ("VGG16", "last 10"): "block3_conv3",
    ("VGG19", "last 15"): "block3_conv1", ("InceptionV3", "last 40"): "activation_79", ("ResNet50", "last 75"): "conv4_block2_3_bn", ("EfficientNetB0", "last 75"): "block6a_expand_conv",
    ("EfficientNetV2B0", 0.5): "block5d_project_bn", ("ConvNeXtTiny", 0.5): "convnext_tiny_stage_2_block_2_layer_scale", ("DenseNet121", 0.5): "conv4_block11_2_conv",
    ("NASNetMobile", 0.5): "separable_conv_2_bn_normal_left5_5", ("TeamName_CNN", 1.0): "block1_1_conv", ("Backpropagators_CNN", 1.0): "block1_conv",
    ("EfficientNetV2L", "last 25"): "block7f_se_reduce", ("EfficientNetV2L", "last 70"): "block7c_se_reduce", ("EfficientNetV2L", "last 50"): "block7d_drop",
    ("EfficientNetV2L", 0.9): "block3e_project_conv", ("EfficientNetV2L", 1.0): "stem_conv",
}


@pytest.fixture
def fresh_keras():
    """Keras without the models of the tests before."""
    keras.backend.clear_session()
    yield
    keras.backend.clear_session()


@pytest.fixture
def without_graphs(request):
    """TensorFlow runs step by step: tracing a deep network takes many times longer than two steps of it. ConvNeXt's grouped convolutions learn in graphs alone on many processors."""
    tf.config.run_functions_eagerly("convnext" not in request.node.name)
    yield
    tf.config.run_functions_eagerly(False)


@functools.cache
def drawn(side: int) -> data.CellImages:
    return data.load("drawn:n=60,seed=2", side)


@pytest.fixture(scope="module")
def narrow_keras():
    """The three largest backbones with all their layers and an eighth of the channels: which layers learn does not hang on these, but time and memory do."""
    efficientnet, convnext = (sys.modules[make.__module__] for make in (keras.applications.EfficientNetV2L, keras.applications.ConvNeXtBase))
    make_efficientnet, make_convnext = efficientnet.EfficientNetV2, convnext.ConvNeXt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet, "EfficientNetV2", lambda **choices: make_efficientnet(**choices | {"width_coefficient": 1 / 8}))
        patch.setattr(convnext, "ConvNeXt", lambda **choices: make_convnext(**choices | {"projection_dims": [n // 8 for n in choices["projection_dims"]]}))
        yield


@pytest.fixture(scope="module")
def trunks(narrow_keras):
    """Builds backbones as the library does, but keeps the last one: some take longer to build than to train, and recipes come sorted by backbone."""
    kept, build_backbone = {}, models.build_backbone

    def build(name, weights, image_size):
        if name not in kept:
            kept.clear()
            keras.backend.clear_session()  # the names of some of Keras' layers count on from model to model
            kept[name] = build_backbone(f"{name}_0.125" if name in NETWORKS else name, weights, image_size)
            fit_statistics(kept[name], ImageNetScale(find_backbone(name).scale)(drawn(image_size).images))
        return kept[name]

    yield build
    kept.clear()
    keras.backend.clear_session()


def fit_statistics(trunk, x) -> None:
    """Bring the moving statistics of BatchNormalization near those of x, as a pretrained network's are: with Keras' 0 and 1 signals fade from layer to layer."""
    normalizations = [layer for layer in trunk._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in normalizations]
    for layer in normalizations:
        layer.momentum = 0.05
    trunk(x, training=True)
    for layer, momentum in zip(normalizations, momenta):
        layer.momentum = momentum


def checksums(model) -> dict[tuple[str, str], int]:
    """A number for each weight of a model, by layer and name, that changes when it does."""
    values = {(layer.name, weight.name): weight for layer in model._flatten_layers(include_self=False) if not list(layer._flatten_layers(include_self=False)) for weight in layer.weights}
    assert len(values) == len(model.weights), "every weight has a name of its own"
    return {name: zlib.crc32(np.ascontiguousarray(keras.ops.convert_to_numpy(weight))) for name, weight in values.items()}


def learning_layers(model, first: str | None, normalization: str) -> dict[str, keras.layers.Layer]:
    """The layers with weights that should learn: those of the backbone from `first` on, and the head."""
    trunk = model.get_layer("backbone")
    names = [layer.name for layer in trunk.layers]
    learning = [inner for layer in trunk.layers[names.index(first) if first else len(names) :] for inner in layer._flatten_layers()]
    if normalization != "updated":
        learning = [layer for layer in learning if not isinstance(layer, keras.layers.BatchNormalization)]
    head = model.layers[model.layers.index(model.get_layer("pool")) + 1 :]
    return {layer.name: layer for layer in (*learning, *head) if layer.weights and not list(layer._flatten_layers(include_self=False))}


@pytest.fixture
def two_steps(monkeypatch, trunks, without_graphs):
    """Trains two batches of one phase as `train_classifier` does, by train_on_batch in place of fit (after whose streams TensorFlow trims memory for seconds); the losses."""
    losses = []

    def fit(model, train, val, phase, plan, table, *more):
        training._compile(model, phase, plan, len(train))
        losses[:] = [model.train_on_batch(*train[i], return_dict=True)["loss"] for i in range(len(train))]
        return phase.name

    def train(model, pictures, recipe, phase):
        training.train_classifier(model, pictures, None, training_plan(recipe), stop_after=(1, 0) if phase == "head" else (0, 1), verbose=False)
        assert len(losses) == 2
        return losses

    monkeypatch.setattr(models, "build_backbone", trunks)
    monkeypatch.setattr(training, "_fit", fit)
    return train


# Deep networks take minutes to build; the first of each kind of recipe with a quicker one is tested always, and of EfficientNetV2S the one that counts its layers.
DEEP = {"EfficientNetV2L", "EfficientNetV2S", "ConvNeXtBase", "NASNetMobile", "DenseNet121", "InceptionV3", "VGG19"}


def by_backbone() -> list:
    """All recipes, those with the same backbone beside one another and, where several processes divide the tests, in one of them."""
    backbones = {name: choices.get("backbone", "MobileNetV2") for name, choices in RECIPES.items()}
    slow = {name: [pytest.mark.slow] * (backbone in DEEP and name != "deepdrive_v2s_freeze_220") for name, backbone in backbones.items()}
    return [pytest.param(name, id=name, marks=[pytest.mark.xdist_group(backbones[name]), *slow[name]]) for name in sorted(backbones, key=backbones.get)]


@pytest.mark.parametrize("name", by_backbone())
def test_just_the_layers_of_the_recipe_learn(name, two_steps):
    """Two steps of each phase on eight small pictures, and on what the recipe's balancing makes of them."""
    recipe = resolve_recipe(name)
    side = find_backbone(recipe.backbone).min_size
    cells = data.take(drawn(side), np.unique(drawn(side).labels, return_index=True)[1])  # one of each class
    train = balancing.balance(cells, recipe.balance, held_out={}, n=2 if recipe.balance in ("siumgpt", "machine_dumbening") else None)
    phases = [("head", None)] * (recipe.head_epochs > 0) + [("fine-tune", FIRST.get((recipe.backbone, recipe.unfreeze)))] * (recipe.epochs > 0)
    copies = min(recipe.replicates, 1) if len(phases) == 1 else 0  # where a second phase alters pictures, the first one need not
    copies *= recipe.augmentation != "none"
    recipe = replace(recipe, weights="none", image_size=side, batch_size=len(train) // 2, head_batch_size=len(train) * (1 + copies) // 2, replicates=copies)
    model = classifier(**choices_for(classifier, recipe))
    for phase, first in phases:
        before = checksums(model)
        assert np.isfinite(two_steps(model, train, recipe, phase)).all(), phase
        moved = {weight for weight, value in checksums(model).items() if value != before[weight]}
        learning = learning_layers(model, first, recipe.normalization)
        layers = {layer for layer, _ in moved}
        assert layers == set(learning), (phase, "at rest though they should learn:", sorted(set(learning) - layers), "moved though they should rest:", sorted(layers - set(learning)))
        statistics = {(layer.name, weight.name) for layer in learning.values() if isinstance(layer, keras.layers.BatchNormalization) for weight in layer.non_trainable_weights}
        assert statistics <= moved, (phase, "statistics at rest:", sorted(statistics - moved))
