"""Arguments that cannot work: each error names the argument, what came and what would work, before the model runs."""

import numpy as np
import pytest
import torch
from encoders import HeadEncoder, Modified, PooledEncoder, random, seeded
from torch import nn

from captum_fam import (
    ClassActivationMap,
    FeatureActivationMap,
    LabelFreeActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
)

INPUTS = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)
ENCODER = seeded(PooledEncoder)


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self, encoder=ENCODER):
        super().__init__()
        self.encoder, self.layer, self.calls = encoder, encoder.layer, 0

    def forward(self, *inputs):
        self.calls += 1
        return self.encoder(*inputs)


def explainer(encoder=ENCODER, **options):
    return FeatureActivationMap(encoder, encoder.layer, **options)


def returning(function):
    """The encoder with another output."""
    return Modified(ENCODER, function)


CALLS = {
    "attribute": lambda fam, x: fam.attribute(x, 1, reference_embedding=REFERENCES),
    "attribute_reference": lambda fam, x: fam.attribute(INPUTS, reference=x),
    "attribute_all": lambda fam, x: fam.attribute_all(x, reference_embedding=REFERENCES),
    "attribute_pair": lambda fam, x: fam.attribute_pair(x, INPUTS),
    "embed": lambda fam, x: fam.embed(x),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"similarity": "cosin"}, ValueError, r"`similarity`.*'dot', 'euclidean'.*'cosin'.*Did you mean 'cosine'"),
        ({"similarity": "euclidian"}, ValueError, r"`similarity`.*'euclidian'.*Did you mean 'euclidean'"),
        ({"similarity": "manhattan"}, ValueError, r"`similarity`.*'cosine', 'dot', 'euclidean'.*function.*'manhattan'"),
        ({"similarity": 2}, TypeError, r"`similarity`.*'cosine', 'dot', 'euclidean'.*function.*2"),
        ({"normalize": "l2"}, ValueError, r'`normalize`.*"minmax" or None.*l2'),
        ({"normalize": False}, (ValueError, TypeError), r'`normalize`.*"minmax" or None.*False'),
        ({"channel_weights": "gradient"}, ValueError, r'`channel_weights`.*"auto", "aligned".*"jacobian".*gradient'),
        ({"channel_weights": None}, (ValueError, TypeError), r'`channel_weights`.*"auto", "aligned".*"jacobian".*None'),
        ({"output_selector": "z"}, TypeError, r"`output_selector`.*function.*'z'"),
        ({"output_selector": 0}, TypeError, r"`output_selector`.*function.*0"),
        ({"reshape_transform": (14, 14)}, TypeError, r"`reshape_transform`.*function.*tuple"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_when_the_explainer_is_made(options, error, match):
    with pytest.raises(error, match=match):
        explainer(**options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"similarity": "cosin"}, ValueError, r"`similarity`.*'cosin'.*Did you mean 'cosine'"),
        ({"channel_weights": "gradient"}, ValueError, r'`channel_weights`.*"auto", "aligned".*"jacobian".*gradient'),
        ({"dimension_weights": "ones"}, TypeError, r"`dimension_weights`.*function.*'ones'"),
        (
            {"dimension_weights": lambda z, s: s, "similarity": "dot"},
            ValueError,
            r"`similarity` or `dimension_weights`.*both",
        ),
        ({"normalize": None}, TypeError, "normalize"),
    ],
)
def test_a_wrong_option_of_a_decomposition_is_refused_when_it_is_made(options, error, match):
    with pytest.raises(error, match=match):
        SimilarityDecomposition(ENCODER, ENCODER.layer, **options)


@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
def test_a_decomposition_needs_a_similarity_that_has_one(call):
    decomposition = SimilarityDecomposition(ENCODER, ENCODER.layer, similarity=lambda z, s: -(z - s).abs())
    with pytest.raises(ValueError, match=r"`similarity`.*'cosine', 'dot', 'euclidean'.*function.*`dimension_weights`"):
        CALLS[call](decomposition, INPUTS)


@pytest.mark.parametrize(
    ("weights", "came"),
    [
        (lambda z, s: (z * s).sum(-1), r"\(3, [14]\)"),
        (lambda z, s: s[..., :2], r"\(3, [14], 2\)"),
        (lambda z, s: 1.0, "1.0"),
    ],
    ids=["summed", "too few", "float"],
)
@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
def test_dimension_weights_of_another_shape_are_an_error_that_names_them(call, weights, came):
    decomposition = SimilarityDecomposition(ENCODER, ENCODER.layer, dimension_weights=weights)
    with pytest.raises(ValueError, match=rf"`dimension_weights`.*\(3, [14], 6\).*dimension.*but got.*{came}"):
        CALLS[call](decomposition, INPUTS)


@pytest.mark.parametrize("similarity", ["euclidean", None], ids=["euclidean", "of one's own weights"])
def test_a_matrix_of_pairs_of_places_needs_a_sum_over_them(similarity):
    options = {"similarity": similarity} if similarity else {"dimension_weights": lambda z, s: s}
    with pytest.raises(ValueError, match=r'attribute_matrix.*"cosine" or "dot".*but got'):
        SimilarityDecomposition(ENCODER, ENCODER.layer, **options).attribute_matrix(INPUTS, INPUTS)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        ("layer4.2", r"`layer`.*module.*'layer4.2'.*get_submodule"),
        (["layer4.2"], r"`layer`.*module.*str.*get_submodule"),
        ([ENCODER.layer, "layer4.2"], r"`layer`.*module.*ReLU.*str.*get_submodule"),
        (None, r"`layer`.*module or a list of modules.*None"),
        ([], r"`layer`.*module or a list of modules.*list"),
        ([ENCODER.layer, None], r"`layer`.*module or a list of modules.*NoneType"),
        ((ENCODER.layer, ENCODER.early), r"`layer`.*module or a list of modules.*tuple"),
        (ENCODER.forward, r"`layer`.*module or a list of modules.*method"),
    ],
)
def test_a_layer_that_is_no_module_is_refused(layer, match):
    with pytest.raises(TypeError, match=match):
        FeatureActivationMap(ENCODER, layer)


@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
def test_a_layer_that_is_reassigned_is_checked_before_the_model_runs(call):
    counted = Counted()
    fam = explainer(counted)
    fam.layer = "layer"
    with pytest.raises(TypeError, match=r"`layer`.*module.*'layer'.*get_submodule"):
        CALLS[call](fam, INPUTS)
    assert counted.calls == 0


@pytest.mark.parametrize(
    ("forward_func", "came"), [(None, "None"), ("resnet50", "resnet50"), (INPUTS, "tensor"), ({}, "dict")]
)
def test_a_forward_func_that_cannot_be_called_is_refused(forward_func, came):
    with pytest.raises(TypeError, match=rf"`forward_func`.*module or a function.*{came}"):
        FeatureActivationMap(forward_func, ENCODER.layer)
    with pytest.raises(TypeError, match=rf"`encoder`.*module or a function.*{came}"):
        SimilarityScore(forward_func, REFERENCES)


@pytest.mark.parametrize(
    ("inputs", "came"),
    [
        (INPUTS.numpy(), "ndarray"),
        ([INPUTS], "list"),
        (list(INPUTS), "list"),
        ((INPUTS, INPUTS.numpy()), r"\['Tensor', 'ndarray'\]"),
        (("cat.png",), r"\['str'\]"),
        ((), "tuple"),
        ("cat.png", "cat.png"),
        (None, "None"),
        ({"pixel_values": INPUTS}, "dict"),
    ],
)
@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair", "embed"])
def test_inputs_that_are_no_tensors_are_refused_before_the_model_runs(call, inputs, came):
    counted = Counted()
    with pytest.raises(TypeError, match=rf"`inputs`.*a tensor or a tuple of tensors.*{came}"):
        CALLS[call](explainer(counted), inputs)
    assert counted.calls == 0


@each_call
def test_inputs_without_a_batch_dimension_are_refused_before_the_model_runs(call):
    counted = Counted()
    with pytest.raises(ValueError, match=r"`(inputs|reference)`.*batch dimension.*without dimensions"):
        call(explainer(counted), torch.tensor(1.0))
    assert counted.calls == 0


OUTPUTS = {
    "dict": (lambda z: {"logits": z, "hidden": z}, TypeError, r"output_selector.*\['logits', 'hidden'\]"),
    "tuple": (lambda z: (z, z), TypeError, r"tuple of 2.*output_selector=lambda output: output\[i\]"),
    "list": (lambda z: [z], TypeError, r"list of 1.*output_selector"),
    "(B, D, 1, 1)": (lambda z: z[..., None, None], ValueError, r"\(3, 6, 1, 1\).*output_selector=.*flatten\(1\)"),
    "(B,)": (lambda z: z[:, 0], ValueError, r"shape \(3,\).*row per input"),
    "integers": (lambda z: z.long(), TypeError, r"int64.*\(3, 6\)"),
    "complex": (lambda z: z.to(torch.complex128), TypeError, r"complex128.*\(3, 6\)"),
    "None": (lambda z: None, TypeError, r"None.*output_selector"),
    "array": (lambda z: z.numpy(), TypeError, r"ndarray.*output_selector"),
}  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
@each_call
def test_an_encoder_that_returns_no_embeddings_is_an_error_with_a_cure(call, output):
    function, error, match = OUTPUTS[output]
    with pytest.raises(error, match=rf"the encoder.*floating-point embeddings \(B, D\).*{match}"):
        call(explainer(returning(lambda z: function(z.detach()))), INPUTS)


@pytest.mark.parametrize("output", OUTPUTS)
@each_call
def test_an_output_selector_that_returns_no_embeddings_is_an_error_that_names_it(call, output):
    function, error, _ = OUTPUTS[output]
    fam = explainer(returning(lambda z: {"z": z}), output_selector=lambda output: function(output["z"].detach()))
    with pytest.raises(error, match=r"`output_selector`.*floating-point embeddings \(B, D\).*but got"):
        call(fam, INPUTS)


def test_the_cure_for_pooled_maps_works():
    fam = explainer(returning(lambda z: z[..., None, None]), output_selector=lambda z: z.flatten(1))
    assert fam.attribute(INPUTS, 1, reference_embedding=REFERENCES).shape == (3, 1, 4, 4)


@pytest.mark.parametrize("call", ["attribute", "attribute_reference", "attribute_all", "attribute_pair"])
def test_embeddings_of_another_number_than_the_inputs_are_an_error_about_the_embeddings(call):
    fam = explainer(returning(lambda z: z[:2]))
    with pytest.raises(
        ValueError, match=r"one embedding for each of the 3 .*`(inputs|reference)`.*\(2, 6\).*output_selector"
    ):
        CALLS[call](fam, INPUTS)


class Layered(nn.Module):
    """An encoder whose ``layer`` returns what a function makes of the features."""

    class Function(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    def __init__(self, function):
        super().__init__()
        self.layer = self.Function(function)

    def forward(self, x):
        self.layer(x)
        return ENCODER(x)


@pytest.mark.parametrize(
    ("function", "came"),
    [
        (lambda x: {"features": x}, "dict"),
        (lambda x: x.long(), "int64 tensor"),
        (lambda x: x.sum(), r"float64 tensor of shape \(\)"),
        (lambda x: None, "None"),
        (lambda x: (x.long(), None), "tuple"),
        (lambda x: (), "tuple"),
    ],
)
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_a_layer_that_returns_no_floating_point_tensor_is_an_error_that_names_it(function, came, route):
    fam = explainer(Layered(function), channel_weights=route)
    with pytest.raises(
        TypeError, match=rf"layer 'layer' \(Function\).*floating-point tensors.*{came}.*choose a layer that does"
    ):
        fam.attribute(INPUTS, 1, reference_embedding=REFERENCES)


def test_a_layer_that_takes_no_floating_point_tensor_is_an_error_that_names_it():
    encoder = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(12, 6))
    fam = FeatureActivationMap(encoder, encoder[0])
    with pytest.raises(TypeError, match=r"layer '0' \(Embedding\) to take floating-point"):
        fam.attribute(torch.ones(2, 2, dtype=torch.long), 1, None, True, reference_embedding=REFERENCES.float())


@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
@pytest.mark.parametrize("several", [False, True], ids=["layer", "list of layers"])
def test_a_layer_that_the_forward_pass_does_not_call_is_an_error_that_names_it(call, several):
    stranger = nn.Conv2d(3, 6, 3)
    fam = FeatureActivationMap(ENCODER, [ENCODER.layer, stranger] if several else stranger)
    with pytest.raises(ValueError, match=r"`layer`.*forward pass.*Conv2d was not called.*this very model"):
        CALLS[call](fam, INPUTS)


def test_an_unused_layer_of_the_model_is_told_by_its_name():
    encoder = seeded(PooledEncoder)
    encoder.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'spare' \(Linear\) was not called"):
        FeatureActivationMap(encoder, encoder.spare).attribute(INPUTS, 1, reference_embedding=REFERENCES)


@pytest.mark.parametrize(
    ("fold", "shape"),
    [(lambda x: x.flatten(0, 1), r"\(9, 8, 8\)"), (lambda x: x[:, 0, 0, 0], r"\(3,\)")],
)
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_a_layer_without_a_batch_dimension_of_its_own_is_an_error_that_names_reshape_transform(fold, shape, route):
    fam = explainer(Layered(fold), channel_weights=route)
    with pytest.raises(
        ValueError, match=rf"layer 'layer' \(Function\).*B = 3.*{shape}.*another layer.*reshape_transform"
    ):
        fam.attribute(INPUTS, 1, reference_embedding=REFERENCES)


def test_a_folded_layer_can_be_unfolded_by_reshape_transform():
    fam = explainer(
        Layered(lambda x: x.flatten(0, 1)), channel_weights="aligned",
        reshape_transform=lambda a: a.unflatten(0, (3, 3)).repeat(1, 2, 1, 1),
    )  # fmt: skip
    assert fam.attribute(INPUTS, 1, reference_embedding=REFERENCES).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("junk", [lambda a: a.flatten(), lambda a: a[:2], lambda a: None, lambda a: a.numpy()])
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_a_reshape_transform_that_returns_no_maps_is_an_error_that_names_it(junk, route):
    fam = explainer(reshape_transform=junk, channel_weights=route)
    with pytest.raises((ValueError, TypeError), match=r"`reshape_transform`.*\(B, C, \*spatial\).*B = 3.*but got"):
        fam.attribute(INPUTS, 1, reference_embedding=REFERENCES)


@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
def test_aligned_weights_for_other_channels_than_dimensions_are_an_error_that_names_both_numbers(call):
    encoder = seeded(lambda: HeadEncoder(channels=8, embedding=6))
    fam = explainer(encoder, channel_weights="aligned")
    with pytest.raises(ValueError, match=r'channel_weights="aligned".*8.*6.*"auto" or "jacobian"'):
        CALLS[call](fam, INPUTS)


@pytest.mark.parametrize(
    ("function", "came"),
    [
        (lambda z, s: (z * s).sum(-1), "tensor of shape"),
        (lambda z, s: (z * s)[..., :2], "tensor of shape"),
        (lambda z, s: z[0] * s[0], "tensor of shape"),
        (lambda z, s: 1.0, "1.0"),
        (lambda z, s: None, "None"),
    ],
    ids=["summed", "too few", "one row", "float", "None"],
)
@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
def test_a_similarity_function_that_returns_another_shape_is_an_error_that_names_it(call, function, came):
    with pytest.raises(
        ValueError, match=rf"`similarity` function.*contributions of shape.*but got.*{came}.*leave out its sum"
    ):
        CALLS[call](explainer(similarity=function), INPUTS)


def counted_explainer():
    counted = Counted()
    return counted, explainer(counted)


BEFORE = {
    "no reference": lambda fam: fam.attribute(INPUTS),
    "two references": lambda fam: fam.attribute(INPUTS, reference=INPUTS, reference_embedding=REFERENCES),
    "list as reference": lambda fam: fam.attribute(INPUTS, reference=[INPUTS]),
    "reference of two tensors": lambda fam: fam.attribute(INPUTS, reference=(INPUTS, INPUTS)),
    "1-D reference_embedding": lambda fam: fam.attribute(INPUTS, reference_embedding=REFERENCES[0]),
    "array as reference_embedding": lambda fam: fam.attribute(INPUTS, reference_embedding=np.ones((1, 6))),
    "integer reference_embedding": lambda fam: fam.attribute(INPUTS, reference_embedding=REFERENCES.long()),
    "target too large": lambda fam: fam.attribute(INPUTS, 4, reference_embedding=REFERENCES),
    "target too large for inputs": lambda fam: fam.attribute(INPUTS, 3, reference=INPUTS),
    "float target": lambda fam: fam.attribute(INPUTS, 1.0, reference_embedding=REFERENCES),
    "float target for inputs": lambda fam: fam.attribute(INPUTS, 1.0, reference=INPUTS),
    "contrast too large": lambda fam: fam.attribute(INPUTS, 0, reference_embedding=REFERENCES, contrast=4),
    "contrast too large for inputs": lambda fam: fam.attribute(INPUTS, 0, reference=INPUTS, contrast=3),
    "contrast of another word": lambda fam: fam.attribute(INPUTS, 0, reference=INPUTS, contrast="others"),
    "rest of one": lambda fam: fam.attribute(INPUTS, reference=INPUTS[:1], contrast="rest"),
    "all: no reference": lambda fam: fam.attribute_all(INPUTS),
    "all: zero references": lambda fam: fam.attribute_all(INPUTS, reference_embedding=REFERENCES[:0]),
    "all: zero inputs as references": lambda fam: fam.attribute_all(INPUTS, reference=INPUTS[:0]),
    "all: contrast by number": lambda fam: fam.attribute_all(INPUTS, reference=INPUTS, contrast=1),
    "all: rest of one": lambda fam: fam.attribute_all(INPUTS, reference=INPUTS[:1], contrast="rest"),
    "threshold as a word": lambda fam: fam.attribute(INPUTS, 0, reference=INPUTS, threshold="0.5"),
    "threshold of yes or no": lambda fam: fam.attribute(INPUTS, 0, reference=INPUTS, threshold=True),
    "threshold of no number": lambda fam: fam.attribute(INPUTS, 0, reference=INPUTS, threshold=float("nan")),
    "infinite threshold": lambda fam: fam.attribute(INPUTS, 0, reference=INPUTS, threshold=float("inf")),
    "threshold and contrast": lambda fam: fam.attribute(INPUTS, 0, reference=INPUTS, threshold=0.5, contrast=1),
    "all: threshold as a word": lambda fam: fam.attribute_all(INPUTS, reference=INPUTS, threshold="0.5"),
    "all: threshold and contrast": lambda fam: fam.attribute_all(
        INPUTS, reference=INPUTS, threshold=0.5, contrast="rest"
    ),
    "all: contrast of another word": lambda fam: fam.attribute_all(INPUTS, reference=INPUTS, contrast="others"),
    "pair: threshold as a word": lambda fam: fam.attribute_pair(INPUTS, INPUTS, threshold="0.5"),
    "pair: threshold and contrast": lambda fam: fam.attribute_pair(INPUTS, INPUTS, threshold=0.5, contrast="self"),
    "pair: contrast by number": lambda fam: fam.attribute_pair(INPUTS, INPUTS, contrast=1),
    "pair: contrast with the rest": lambda fam: fam.attribute_pair(INPUTS, INPUTS, contrast="rest"),
    "pair: two for three": lambda fam: fam.attribute_pair(INPUTS, INPUTS[:2]),
    "pair: list as reference": lambda fam: fam.attribute_pair(INPUTS, [INPUTS]),
    "pair: reference of two tensors": lambda fam: fam.attribute_pair(INPUTS, (INPUTS, INPUTS)),
}


@pytest.mark.parametrize("call", BEFORE.values(), ids=BEFORE.keys())
@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
def test_what_is_known_to_be_wrong_is_refused_before_the_model_runs(method, call):
    counted = Counted()
    with pytest.raises((ValueError, TypeError)):
        call(method(counted, counted.layer))
    assert counted.calls == 0


# The questions that only some methods and similarities have

OWN = [{"contrast": "self"}, {"threshold": 0.5}]
each_own = pytest.mark.parametrize("question", OWN, ids=str)
QUESTIONS = {
    "attribute": lambda fam, **q: fam.attribute(INPUTS, 1, reference_embedding=REFERENCES, **q),
    "attribute_all": lambda fam, **q: fam.attribute_all(INPUTS, reference_embedding=REFERENCES, **q),
    "attribute_pair": lambda fam, **q: fam.attribute_pair(INPUTS, INPUTS.flip(0), **q),
}
each_question = pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)


@each_own
@each_question
@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition])
def test_a_distance_has_no_contrast_with_itself_and_no_threshold(method, ask, question):
    counted = Counted()
    name = 'contrast="self"' if "contrast" in question else "`threshold`"
    with pytest.raises(ValueError, match=rf'{name}.*"euclidean".*similarity="cosine" or "dot"'):
        ask(method(counted, counted.layer, similarity="euclidean"), **question)
    assert counted.calls == 0


@each_own
@each_question
def test_a_distance_of_one_s_own_has_none_either(ask, question):
    name = "contrast='self'" if "contrast" in question else "`threshold`"
    with pytest.raises(ValueError, match=rf"{name}.*with itself.*0, as for a distance"):
        ask(explainer(similarity=lambda z, s: -(z - s).abs()), **question)


@each_own
@each_question
def test_score_cam_explains_differences_of_scores_so_it_has_none(ask, question):
    counted = Counted()
    name = "contrast='self'" if "contrast" in question else "threshold"
    with pytest.raises(ValueError, match=f"ScoreCam.*{name}.*FeatureActivationMap and SimilarityDecomposition have"):
        ask(ScoreCam(counted, counted.layer), **question)
    assert counted.calls == 0


def test_relax_has_no_contrast_with_itself():
    counted = Counted()
    with pytest.raises(
        ValueError, match=r"Relax.*contrast='self'.*FeatureActivationMap and SimilarityDecomposition have"
    ):
        Relax(counted).attribute(INPUTS, 1, reference_embedding=REFERENCES, contrast="self")
    assert counted.calls == 0


@each_own
def test_classes_have_no_contrast_with_themselves(question):
    classifier = seeded(lambda: HeadEncoder(embedding=5))
    with pytest.raises(ValueError, match=r"ClassActivationMap.*(contrast='self'|threshold).*SimilarityDecomposition"):
        ClassActivationMap(classifier, classifier.layer).attribute(INPUTS, 1, **question)


@pytest.mark.parametrize(
    "method", [FeatureActivationMap, SimilarityDecomposition, ScoreCam, RelevanceCam, lambda encoder, _: Relax(encoder)]
)
@pytest.mark.parametrize("target", [None, 1, [0, 1, 2]])
def test_no_reference_is_an_error_of_every_method_and_says_how_to_explain_a_classifier(method, target):
    counted = Counted()
    with pytest.raises(ValueError, match=r"`reference`, `reference_embedding`.*SimilarityScore\(model, torch.eye\(n\)"):
        method(counted, counted.layer).attribute(INPUTS, target)
    assert counted.calls == 0


def test_a_label_free_map_needs_no_reference():
    assert LabelFreeActivationMap(ENCODER, ENCODER.layer).attribute(INPUTS).shape == (3, 1, 4, 4)


def test_the_model_runs_when_nothing_is_wrong():
    counted, fam = counted_explainer()
    fam.attribute(INPUTS, 2, reference=INPUTS, contrast="rest")
    assert counted.calls == 2


@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
def test_a_reference_without_a_batch_dimension_is_named(call):
    with pytest.raises(ValueError, match=r"`reference` in the form of `inputs`, of 4 .*\(3, 8, 8\).*reference\[None\]"):
        getattr(explainer(), call)(INPUTS, reference=INPUTS[0])


@pytest.mark.parametrize("contrast", [0, [0, 0, 0], "rest"])
def test_a_contrast_needs_two_references(contrast):
    with pytest.raises(ValueError, match=r"`?contrast.* needs at least two references, but there is 1; .*torch\.cat"):
        explainer().attribute(INPUTS, 0, reference_embedding=REFERENCES[:1], contrast=contrast)


@pytest.mark.parametrize(
    ("output", "advice"), [(lambda z: z[:, None], r"z\[:, 0\]"), (lambda z: z[:, :, None, None], r"z\.flatten\(1\)")]
)
def test_tokens_and_maps_in_place_of_embeddings_say_how_to_select(output, advice):
    with pytest.raises(ValueError, match=rf"\(B, D\), but got .*{advice}"):
        explainer(returning(output)).attribute(INPUTS, reference=INPUTS)


class Clips(nn.Module):
    """Embeds images and videos."""

    def __init__(self):
        super().__init__()
        self.encoder, self.layer = ENCODER, ENCODER.layer

    def forward(self, x):
        return self.encoder(x if x.ndim == 4 else x.flatten(0, 1)).unflatten(0, (len(x), -1)).mean(1)


def test_a_reference_may_have_more_dimensions_than_the_inputs():
    maps = explainer(Clips()).attribute(INPUTS, reference=random(1, 4, 3, 8, 8))
    assert maps.shape[:2] == (3, 1)
