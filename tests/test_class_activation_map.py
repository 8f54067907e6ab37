"""ClassActivationMap, against its formula, Grad-CAM and the logit."""

import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LayerGradCam
from encoders import CONV, HAND_A, Classifier, Function, OfActivations, PooledEncoder, pooled, random, seeded
from helpers import arrays, close
from test_model_untouched import state
from torch import nn

from captum_fam import ClassActivationMap, SimilarityScore

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
X = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)


class TwoHeads(Classifier):
    """A classifier, and a linear layer that comes later but is not on the way to the logits."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(6, 7)

    def forward(self, x):
        mean = self.features(x).mean((2, 3))
        self.auxiliary(mean)
        return self.fc(mean)


def cam_of(W, A, target, contrast=None):
    """sum_k W_tk A_k of one example, by loops."""
    if contrast is None:
        weights = W[target]
    elif contrast == "rest":
        weights = W[target] - np.mean([W[t] for t in range(len(W)) if t != target], axis=0)
    else:
        weights = W[target] - W[contrast]
    return oracle.aligned_map(weights, A)


def weight_of(linear):
    return linear.weight.detach().numpy()


def test_a_class_activation_map_by_hand():
    model = OfActivations(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
        model[3].bias.fill_(100.0)
    cam = ClassActivationMap(model, model[0])
    close(cam.attribute(HAND_A, 1), [[[[2.0, 0.0], [-2.0, 8.0]]]])
    close(cam.attribute(HAND_A, 0, contrast=1), [[[[-1.0, 2.0], [5.0, -2.0]]]])


@pytest.mark.parametrize("contrast", [None, 3, "rest"])
@pytest.mark.parametrize("dim", CONV)
def test_a_class_activation_map_is_the_weighted_sum_of_the_activations(dim, contrast):
    model, x = seeded(lambda: Classifier(dim)), random(3, 3, *[6] * dim)
    A = arrays(model, x)[1]
    maps = ClassActivationMap(model, model.layer).attribute(x, [4, 0, 2], contrast=contrast)
    assert maps.shape == (3, 1, *[3] * dim)
    for b, target in enumerate([4, 0, 2]):
        close(maps[b, 0], cam_of(weight_of(model.fc), A[b], target, contrast))


@pytest.mark.parametrize("dim", CONV)
def test_the_mean_of_a_class_activation_map_and_the_bias_are_the_logit(dim):
    model, x = seeded(lambda: Classifier(dim)), random(3, 3, *[6] * dim)
    maps = ClassActivationMap(model, model.layer).attribute_all(x)
    assert maps.shape == (3, 5, *[3] * dim)
    close((maps.flatten(2).mean(2) + model.fc.bias).detach(), model(x).detach())


@pytest.mark.parametrize("positive", [lambda z: 2 * z, lambda z: F.normalize(z, dim=1)], ids=["double", "normalised"])
def test_of_a_multiple_of_the_mean_too_the_map_and_the_bias_are_the_logit(positive):
    model = seeded(Classifier)
    model.fc = nn.Sequential(Function(positive), model.fc)
    maps = ClassActivationMap(model, model.layer).attribute_all(X)
    close((maps.mean((2, 3)) + model.fc[1].bias).detach(), model(X).detach())


@pytest.mark.parametrize("contrast", [None, "rest"])
def test_all_class_activation_maps_at_once_are_those_one_by_one(contrast):
    model = seeded(Classifier)
    cam = ClassActivationMap(model, model.layer)
    each = [cam.attribute(X, t, contrast=contrast) for t in range(5)]
    close(cam.attribute_all(X, contrast=contrast), torch.cat(each, 1))


def real_shaped():
    """Batch norm, strides, and dropout between the mean and the linear layer, as in MobileNetV2."""
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU6()),
        *(nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 5)),
    )


@pytest.mark.parametrize(
    ("build", "layer", "shape"),
    [
        (real_shaped, lambda model: model[5], (3, 3, 10, 14)),
        (lambda: torchvision.models.resnet18(num_classes=7), lambda model: model.layer4, (2, 3, 64, 96)),
    ],
    ids=["sequential", "ResNet-18"],
)
def test_grad_cam_times_the_number_of_locations_is_the_class_activation_map(build, layer, shape):
    model, x = seeded(build), random(*shape)
    maps = ClassActivationMap(model, layer(model)).attribute(x, 2)
    assert maps[0, 0].numel() > 1
    close(LayerGradCam(model, layer(model)).attribute(x, 2).detach() * maps[0, 0].numel(), maps)


def test_of_two_heads_the_one_that_is_not_the_output_must_be_named():
    model = seeded(TwoHeads)
    A = arrays(model, X)[1]
    with pytest.raises(ValueError, match=r"several linear layers.*classifier="):
        ClassActivationMap(model, model.layer).attribute(X, 4)
    named = ClassActivationMap(model, model.layer, classifier=model.fc).attribute(X, 4)
    other = ClassActivationMap(model, model.layer, classifier=model.auxiliary).attribute(X, 6)
    for b in range(3):
        close(named[b, 0], cam_of(weight_of(model.fc), A[b], 4))
        close(other[b, 0], cam_of(weight_of(model.auxiliary), A[b], 6))


def test_functions_around_a_classifier_are_explained():
    model = seeded(Classifier)
    plain = ClassActivationMap(model, model.layer).attribute(X, 2)
    close(ClassActivationMap(model.forward, model.layer).attribute(X, 2), plain)
    close(ClassActivationMap(lambda x: model(x), model.layer, classifier=model.fc).attribute(X, 2), plain)


def test_a_class_activation_map_can_be_of_the_layers_input():
    model = seeded(Classifier)
    plain = ClassActivationMap(model, model.layer).attribute(X, 2)
    close(ClassActivationMap(model, model.again).attribute(X, 2, None, True), plain)


two_layers = lambda: nn.Sequential(  # noqa: E731
    *(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), *(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
)
flattened = lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 5))  # noqa: E731
maximum = lambda: nn.Sequential(  # noqa: E731
    nn.Conv2d(3, 6, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 5)
)
after_relu = lambda: nn.Sequential(  # noqa: E731
    nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
)


@pytest.mark.parametrize("build", [two_layers, flattened, maximum, after_relu])
def test_a_head_that_is_not_directly_after_the_mean_is_refused(build):
    model = seeded(build)
    before = state(model, X)
    with pytest.raises(ValueError, match=r"spatial mean of layer '.*0' \(Conv2d\).*LayerGradCam"):
        ClassActivationMap(model, model[0]).attribute(X, 1)
    assert state(model, X) == before


def test_models_without_a_weight_for_each_class_are_refused():
    encoder = seeded(PooledEncoder)
    with pytest.raises(ValueError, match=r"SimilarityScore.*SimilarityDecomposition"):
        ClassActivationMap(SimilarityScore(encoder, REFERENCES), encoder.layer)
    with pytest.raises(ValueError, match=r"`forward_func`.*torch.nn.Linear.*classifier=.*LayerGradCam"):
        ClassActivationMap(encoder, encoder.layer)


@pytest.mark.parametrize("classifier", ["fc", nn.Conv2d(6, 5, 1), 5, [nn.Linear(6, 5)]])
def test_a_classifier_that_is_no_linear_layer_is_refused(classifier):
    model = seeded(Classifier)
    with pytest.raises(TypeError, match=r"`classifier`.*torch\.nn\.Linear"):
        ClassActivationMap(model, model.layer, classifier=classifier)


def test_a_classifier_that_is_not_called_is_refused():
    model = seeded(Classifier)
    with pytest.raises(ValueError, match=r"`classifier`.*not called"):
        ClassActivationMap(model, model.layer, classifier=nn.Linear(6, 5).double()).attribute(X, 1)


@pytest.mark.parametrize("references", [{"reference": X}, {"reference_embedding": REFERENCES}])
def test_references_to_a_classifiers_map_are_refused(references):
    model = seeded(Classifier)
    cam = ClassActivationMap(model, model.layer)
    for call in (lambda: cam.attribute(X, 1, **references), lambda: cam.attribute_all(X, **references)):
        with pytest.raises(ValueError, match=r"no references.*`target`"):
            call()


@pytest.mark.parametrize("less", [{"contrast": "self"}, {"threshold": 0.3}], ids=str)
def test_a_class_has_nothing_with_itself(less):
    """A class is compared with a class: an input has no logit with itself."""
    model = seeded(Classifier)
    cam = ClassActivationMap(model, model.layer)
    for call in (lambda: cam.attribute(X, 1, **less), lambda: cam.attribute_all(X, **less)):
        with pytest.raises(ValueError, match=f"ClassActivationMap.*{next(iter(less))}"):
            call()


def test_a_forgotten_class_is_an_error_that_names_the_target():
    """Also where there are as many inputs as classes, which could pass for pairs."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *pooled(), nn.Linear(4, 3)))
    cam = ClassActivationMap(model, model[1])
    with pytest.raises(ValueError, match=r"`target` is needed: a class, 0 to 2"):
        cam.attribute(X)
    assert cam.attribute(X, [0, 1, 2]).shape[0] == 3


def test_a_class_has_no_other_side():
    model = seeded(Classifier)
    with pytest.raises(NotImplementedError, match="SimilarityDecomposition"):
        ClassActivationMap(model, model.layer).attribute_pair(X, X)


def test_a_classifier_with_one_class_needs_no_target():
    model = OfActivations(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([[2.0, -1.0]]))
    close(ClassActivationMap(model, model[0]).attribute(HAND_A), [[[[2.0, 0.0], [-2.0, 8.0]]]])
