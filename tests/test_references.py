"""Which reference explains which input: where references come from, and the forms of target and contrast."""

import re

import numpy as np
import pytest
import reference as oracle
import torch
from encoders import HeadEncoder, PooledEncoder, TwoInputEncoder, random, seeded
from helpers import close
from torch import nn

from captum_fam import (
    FeatureActivationMap,
    LabelFreeActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
)

ENCODER = seeded(PooledEncoder)
INPUTS = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)


def explainer(encoder=ENCODER, **options):
    return FeatureActivationMap(encoder, encoder.layer, **options)


def expected(
    own, other=None, similarity="cosine", inputs=INPUTS, references=REFERENCES, encoder=ENCODER, threshold=None
):
    """The oracle's maps of an aligned encoder, for the own (and the other) reference of each input."""
    with torch.no_grad():
        A, z = encoder.features(inputs).numpy(), encoder(inputs).numpy()
    others = [other] * len(own) if other in (None, "rest", "self") else other
    weights = [
        oracle.pair_weights(z[i], references.numpy(), k, similarity, contrast=others[i], threshold=threshold)
        for i, k in enumerate(own)
    ]
    return torch.from_numpy(np.stack([oracle.aligned_map(f, a) for f, a in zip(weights, A)]))[:, None]


FORMS = [
    pytest.param(0, [0, 0, 0], id="zero"),
    pytest.param(2, [2, 2, 2], id="int"),
    pytest.param(-1, [3, 3, 3], id="negative int"),
    pytest.param(-4, [0, 0, 0], id="lowest int"),
    pytest.param(np.int64(2), [2, 2, 2], id="numpy int"),
    pytest.param((1,), [1, 1, 1], id="1-tuple"),
    pytest.param([0, 3, 1], [0, 3, 1], id="list"),
    pytest.param([-1, 0, -2], [3, 0, 2], id="list of negative ints"),
    pytest.param([np.int32(0), np.int32(3), np.int32(1)], [0, 3, 1], id="list of numpy ints"),
    pytest.param([(0,), (3,), (1,)], [0, 3, 1], id="list of 1-tuples"),
    pytest.param(torch.tensor([0, 3, 1]), [0, 3, 1], id="1-D tensor"),
    pytest.param(torch.tensor([0, -1, 1], dtype=torch.int32), [0, 3, 1], id="1-D int32 tensor"),
    pytest.param(torch.tensor([0, 3, 1], dtype=torch.uint8), [0, 3, 1], id="1-D uint8 tensor"),
    pytest.param(torch.tensor(2), [2, 2, 2], id="0-d tensor"),
    pytest.param(torch.tensor([2]), [2, 2, 2], id="1-element tensor"),
    pytest.param(torch.tensor([-2]), [2, 2, 2], id="1-element negative tensor"),
]
WRONG_VALUES = [
    pytest.param(4, id="too large"),
    pytest.param(-5, id="too small"),
    pytest.param([0, 1, 4], id="one of the list too large"),
    pytest.param(torch.tensor([-5, 0, 0]), id="one of the tensor too small"),
    pytest.param([0, 1], id="too few"),
    pytest.param([2], id="list of one for three"),
    pytest.param([], id="empty list"),
    pytest.param([0, 1, 2, 3], id="too many"),
    pytest.param(torch.tensor([0, 1]), id="tensor of two for three"),
    pytest.param(torch.tensor([[0], [1], [2]]), id="2-D tensor"),
]
WRONG_TYPES = [
    pytest.param(1.0, id="float"),
    pytest.param(True, id="bool"),
    pytest.param([0.0, 1.0, 2.0], id="list of floats"),
    pytest.param([True, False, True], id="list of bools"),
    pytest.param(torch.tensor([0.0, 1.0, 2.0]), id="float tensor"),
    pytest.param(torch.tensor([True, False, True]), id="bool tensor"),
    pytest.param((0, 1), id="tuple of two"),
    pytest.param({0: 1}, id="dict"),
]


@pytest.mark.parametrize(("target", "own"), FORMS)
def test_each_input_takes_the_reference_that_its_target_picks(target, own):
    maps = explainer().attribute(INPUTS, target, reference_embedding=REFERENCES)
    close(maps, expected(own))


@pytest.mark.parametrize(("contrast", "other"), FORMS)
def test_contrast_takes_the_forms_of_target(contrast, other):
    maps = explainer().attribute(INPUTS, [1, 0, 2], reference_embedding=REFERENCES, contrast=contrast)
    close(maps, expected([1, 0, 2], other))


@pytest.mark.parametrize("target", WRONG_VALUES)
def test_a_target_that_picks_no_reference_is_an_error_that_names_it(target):
    with pytest.raises(ValueError, match="`target`"):
        explainer().attribute(INPUTS, target, reference_embedding=REFERENCES)


@pytest.mark.parametrize("contrast", WRONG_VALUES)
def test_a_contrast_that_picks_no_reference_is_an_error_that_names_it(contrast):
    with pytest.raises(ValueError, match="`contrast`"):
        explainer().attribute(INPUTS, 0, reference_embedding=REFERENCES, contrast=contrast)


@pytest.mark.parametrize("target", [*WRONG_TYPES, pytest.param("0", id="str")])
def test_a_target_that_is_no_integer_is_a_type_error_that_names_it(target):
    with pytest.raises(TypeError, match="`target`"):
        explainer().attribute(INPUTS, target, reference_embedding=REFERENCES)


@pytest.mark.parametrize("contrast", WRONG_TYPES)
def test_a_contrast_that_is_no_integer_is_a_type_error_that_names_it(contrast):
    with pytest.raises(TypeError, match="`contrast`"):
        explainer().attribute(INPUTS, 0, reference_embedding=REFERENCES, contrast=contrast)


@pytest.mark.parametrize("target", [4, -5])
def test_a_target_out_of_range_is_told_the_range(target):
    with pytest.raises(ValueError, match=rf"4 references.*0 to 3.*{target}"):
        explainer().attribute(INPUTS, target, reference_embedding=REFERENCES)


def test_the_only_reference_is_shared_without_a_target():
    maps = explainer().attribute(INPUTS, reference_embedding=REFERENCES[2:3])
    close(maps, expected([2, 2, 2]))


def test_as_many_references_as_inputs_are_paired_without_a_target():
    maps = explainer().attribute(INPUTS, reference_embedding=REFERENCES[1:])
    close(maps, expected([1, 2, 3]))


@pytest.mark.parametrize("K", [0, 2, 4])
def test_other_numbers_of_references_without_a_target_are_an_error_that_names_it(K):
    with pytest.raises(ValueError, match=f"`target`.*{K} references.*3 inputs"):
        explainer().attribute(INPUTS, reference_embedding=REFERENCES[:K])


@pytest.mark.parametrize("encoder", [ENCODER, seeded(HeadEncoder)], ids=["aligned", "jacobian"])
def test_a_shared_reference_equals_one_call_per_input(encoder):
    fam, shared = explainer(encoder), random(1, 3, 10, 10, seed=3)
    together = fam.attribute(INPUTS, reference=shared)
    close(together, torch.cat([fam.attribute(INPUTS[i : i + 1], reference=shared) for i in range(3)]))


@pytest.mark.parametrize("encoder", [ENCODER, seeded(HeadEncoder)], ids=["aligned", "jacobian"])
def test_paired_references_equal_one_call_per_pair(encoder):
    fam, paired = explainer(encoder), random(3, 3, 10, 10, seed=3)
    together = fam.attribute(INPUTS, reference=paired)
    alone = [fam.attribute(INPUTS[i : i + 1], reference=paired[i : i + 1]) for i in range(3)]
    close(together, torch.cat(alone))


def test_rest_contrasts_with_the_mean_over_all_the_others():
    maps = explainer().attribute(INPUTS, [1, 0, 3], reference_embedding=REFERENCES, contrast="rest")
    close(maps, expected([1, 0, 3], "rest"))


@pytest.mark.parametrize(("contrast", "threshold"), [("self", None), (None, 0.4), (None, 1)])
def test_self_and_threshold_need_one_reference_for_each_input_and_no_others(contrast, threshold):
    asked = {"contrast": contrast, "threshold": threshold}
    fam, wanted = explainer(), {"other": contrast, "threshold": threshold}
    close(fam.attribute(INPUTS, [1, 0, 3], reference_embedding=REFERENCES, **asked), expected([1, 0, 3], **wanted))
    close(fam.attribute(INPUTS, reference_embedding=REFERENCES[2:3], **asked), expected([2, 2, 2], **wanted))
    every = torch.cat([expected([k, k, k], **wanted) for k in range(4)], 1)
    close(fam.attribute_all(INPUTS, reference_embedding=REFERENCES, **asked), every)
    close(fam.attribute_all(INPUTS, reference_embedding=REFERENCES[:1], **asked), every[:, :1])


def test_rest_of_two_references_is_the_other_one():
    fam = explainer()
    rest = fam.attribute(INPUTS, 1, reference_embedding=REFERENCES[:2], contrast="rest")
    close(rest, fam.attribute(INPUTS, 1, reference_embedding=REFERENCES[:2], contrast=0))


def test_rest_of_a_single_reference_is_an_error():
    with pytest.raises(ValueError, match=r"contrast.*rest.*two references"):
        explainer().attribute(INPUTS, reference_embedding=REFERENCES[:1], contrast="rest")
    with pytest.raises(ValueError, match=r"contrast.*rest.*two references"):
        explainer().attribute_all(INPUTS, reference_embedding=REFERENCES[:1], contrast="rest")


def test_contrast_with_another_word_is_an_error_that_names_rest():
    with pytest.raises(ValueError, match=r'`contrast`.*"rest".*others'):
        explainer().attribute(INPUTS, 0, reference_embedding=REFERENCES, contrast="others")


def test_contrast_of_a_reference_with_itself_is_a_zero_map():
    maps = explainer().attribute(INPUTS, 2, reference_embedding=REFERENCES, contrast=[2, 2, 0])
    assert not maps[:2].any()
    assert maps[2].any()


@pytest.mark.parametrize("contrast", [None, "rest"])
@pytest.mark.parametrize("encoder", [ENCODER, seeded(HeadEncoder)], ids=["aligned", "jacobian"])
def test_attribute_all_equals_one_call_for_each_target(encoder, contrast):
    fam, references = explainer(encoder), random(4, 3, 10, 10, seed=3)
    maps = fam.attribute_all(INPUTS, reference=references, contrast=contrast)
    each = [fam.attribute(INPUTS, k, reference=references, contrast=contrast) for k in range(4)]
    close(maps, torch.cat(each, 1))


def test_attribute_all_never_pairs_inputs_with_as_many_references():
    maps = explainer().attribute_all(INPUTS, reference_embedding=REFERENCES[:3])
    close(maps, torch.cat([expected([k, k, k]) for k in range(3)], 1))


@pytest.mark.parametrize("contrast", [0, 1, [0, 1, 2], torch.tensor(0), torch.tensor([0, 1, 2]), "others", True])
def test_attribute_all_takes_no_contrast_but_rest_and_self(contrast):
    with pytest.raises((ValueError, TypeError), match=r'`contrast` to be "rest", "self" or None'):
        explainer().attribute_all(INPUTS, reference_embedding=REFERENCES, contrast=contrast)


def test_attribute_all_without_any_reference_is_an_error():
    with pytest.raises(ValueError, match="at least one reference"):
        explainer().attribute_all(INPUTS, reference_embedding=REFERENCES[:0])


@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
def test_no_reference_is_an_error_that_names_the_three_sources(call):
    with pytest.raises(ValueError, match=r"`reference`, `reference_embedding`.*SimilarityScore.*none"):
        getattr(explainer(), call)(INPUTS)


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("method", [SimilarityDecomposition, ScoreCam, RelevanceCam, Relax])
def test_no_method_takes_a_target_without_references_for_a_dimension_of_the_embedding(method, target):
    explainer = method(ENCODER) if method is Relax else method(ENCODER, ENCODER.layer)
    with pytest.raises(ValueError, match=r"`reference`, `reference_embedding`.*SimilarityScore.*none.*torch\.eye\(n\)"):
        explainer.attribute(INPUTS, target)


def test_the_label_free_map_alone_needs_no_reference():
    assert LabelFreeActivationMap(ENCODER, ENCODER.layer).attribute(INPUTS).any()


@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
def test_two_sources_of_references_are_an_error_that_names_both(call):
    with pytest.raises(ValueError, match=r"exactly one.*got reference and reference_embedding"):
        getattr(explainer(), call)(INPUTS, reference=INPUTS, reference_embedding=REFERENCES)


@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
@pytest.mark.parametrize("source", ["reference", "reference_embedding"])
def test_references_beside_those_of_a_similarity_score_are_an_error_that_names_both(call, source):
    fam = FeatureActivationMap(SimilarityScore(ENCODER, REFERENCES), ENCODER.layer)
    given = {"reference": INPUTS, "reference_embedding": REFERENCES}[source]
    with pytest.raises(ValueError, match=f"exactly one.*got {source} and the references of the SimilarityScore"):
        getattr(fam, call)(INPUTS, **{source: given})


class HookSpy(nn.Module):
    """An encoder that notes, at each call, how many inputs came and whether any module has a hook."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.layer, self.calls = encoder, encoder.layer, []

    def forward(self, x):
        hooked = any(hooks for m in self.modules() for name, hooks in vars(m).items() if name.endswith("_hooks"))
        self.calls.append((len(x), hooked))
        return self.encoder(x)


@pytest.mark.parametrize("channel_weights", ["aligned", "jacobian"])
@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
def test_a_reference_is_embedded_before_any_hook_is_set(call, channel_weights):
    spy = HookSpy(ENCODER)
    getattr(explainer(spy, channel_weights=channel_weights), call)(INPUTS, reference=INPUTS[:1])
    assert spy.calls == [(1, False), (3, True)]


@pytest.mark.parametrize("channel_weights", ["aligned", "jacobian"])
def test_the_layer_call_of_the_reference_is_not_taken_for_that_of_the_inputs(channel_weights):
    fam, references = explainer(channel_weights=channel_weights), random(3, 3, 12, 14, seed=3)
    close(fam.attribute(INPUTS, reference=references), expected([0, 1, 2], references=fam.embed(references)))


def test_attribute_pair_explains_both_sides_each_with_its_own_activations():
    here, there = INPUTS, random(3, 3, 12, 14, seed=3)
    one, two = explainer().attribute_pair(here, there)
    close(one, expected([0, 1, 2], references=ENCODER(there).detach()))
    close(two, expected([0, 1, 2], inputs=there, references=ENCODER(here).detach()))


@pytest.mark.parametrize("encoder", [ENCODER, seeded(HeadEncoder)], ids=["aligned", "jacobian"])
def test_attribute_pair_maps_a_shared_reference_once_for_each_input(encoder):
    shared = random(1, 3, 12, 14, seed=3)
    one, two = explainer(encoder).attribute_pair(INPUTS, shared)
    pairs = [explainer(encoder).attribute_pair(INPUTS[i : i + 1], shared) for i in range(3)]
    close(one, torch.cat([here for here, _ in pairs]))
    close(two, torch.cat([there for _, there in pairs]))


@pytest.mark.parametrize("K", [2, 4])
def test_attribute_pair_takes_one_reference_or_one_for_each_input(K):
    with pytest.raises(ValueError, match=f"`reference`.*3.*{K}"):
        explainer().attribute_pair(INPUTS, random(K, 3, 8, 8))


def test_the_reference_of_a_tuple_of_inputs_is_a_tuple():
    encoder = seeded(TwoInputEncoder)
    inputs = (random(2, 3, 6, 6), random(2, 1, 7, 7))
    references = (random(2, 3, 9, 9, seed=3), random(2, 1, 8, 8, seed=4))
    by_input = explainer(encoder).attribute(inputs, reference=references)
    by_embedding = explainer(encoder).attribute(inputs, reference_embedding=encoder(*references))
    assert len(by_input) == 2
    for a, b in zip(by_input, by_embedding, strict=True):
        close(a, b)


@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
def test_a_reference_of_another_number_of_tensors_is_an_error_that_names_it(call):
    encoder = seeded(TwoInputEncoder)
    inputs = (random(2, 3, 6, 6), random(2, 1, 7, 7))
    with pytest.raises(ValueError, match=r"`reference`.*2 tensors.*1"):
        getattr(explainer(encoder), call)(inputs, reference=inputs[0])
    with pytest.raises(ValueError, match=r"`reference`.*1 tensors?.*2"):
        getattr(explainer(), call)(INPUTS, reference=(INPUTS, INPUTS))


@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
@pytest.mark.parametrize("reference", [[INPUTS, INPUTS], INPUTS.numpy(), (INPUTS.numpy(),), "cat.png", ()])
def test_a_reference_that_is_no_tensor_is_a_type_error_that_names_it(call, reference):
    with pytest.raises(TypeError, match=r"`reference`.*tensor"):
        getattr(explainer(), call)(INPUTS, reference=reference)


def test_additional_forward_args_are_given_to_the_reference_too():
    encoder = seeded(PooledEncoder)

    class Scaled(nn.Module):
        layer = encoder.layer

        def forward(self, x, power):
            return encoder(x) ** power

    fam = explainer(Scaled(), similarity="dot", channel_weights="aligned")
    maps = fam.attribute(INPUTS, None, (2,), reference=INPUTS.flip(0))
    close(maps, fam.attribute(INPUTS, None, (2,), reference_embedding=encoder(INPUTS.flip(0)).detach() ** 2))


@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
@pytest.mark.parametrize("scored", [False, True], ids=["reference_embedding", "SimilarityScore"])
def test_references_of_another_dimension_are_an_error_that_names_both_dimensions(call, scored):
    references = random(1, 5)
    fam = explainer()
    if scored:
        fam = FeatureActivationMap(SimilarityScore(ENCODER, references), ENCODER.layer)
    with pytest.raises(ValueError, match=r"reference embeddings have 5 dimensions.*`inputs` have 6"):
        getattr(fam, call)(INPUTS, **({} if scored else {"reference_embedding": references}))


@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), ()])
def test_a_reference_embedding_that_is_not_a_matrix_is_an_error_that_names_its_shape(call, shape):
    with pytest.raises(ValueError, match=rf"`reference_embedding`.*\(K, D\).*{re.escape(str(shape))}"):
        getattr(explainer(), call)(INPUTS, reference_embedding=torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("value", [REFERENCES.numpy(), REFERENCES.tolist(), torch.ones(1, 6, dtype=torch.long), 3])
def test_a_reference_embedding_that_is_no_floating_point_tensor_is_a_type_error(value):
    with pytest.raises(TypeError, match=r"`reference_embedding`.*floating-point tensor"):
        explainer().attribute(INPUTS, 0, reference_embedding=value)


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_without_a_similarity_that_of_the_score_is_taken(similarity):
    fam = FeatureActivationMap(SimilarityScore(ENCODER, REFERENCES, similarity), ENCODER.layer)
    close(fam.attribute(INPUTS, 2), expected([2, 2, 2], similarity=similarity))


def test_without_a_similarity_or_a_score_cosine_is_taken():
    close(explainer().attribute(INPUTS, 2, reference_embedding=REFERENCES), expected([2, 2, 2], similarity="cosine"))


def test_an_explicit_similarity_overrides_that_of_the_score():
    score = SimilarityScore(ENCODER, REFERENCES, "euclidean")
    fam = FeatureActivationMap(score, ENCODER.layer, similarity="cosine")
    close(fam.attribute(INPUTS, 2), expected([2, 2, 2], similarity="cosine"))


def test_the_output_selector_of_the_score_is_taken_unless_there_is_an_explicit_one():
    class Twofold(nn.Module):
        encoder, layer = ENCODER, ENCODER.layer

        def forward(self, x):
            return {"z": ENCODER(x), "minus": -ENCODER(x)}

    score = SimilarityScore(Twofold(), REFERENCES, output_selector=lambda output: output["z"])
    close(FeatureActivationMap(score, ENCODER.layer).embed(INPUTS), ENCODER(INPUTS).detach())
    explicit = FeatureActivationMap(score, ENCODER.layer, output_selector=lambda output: output["minus"])
    close(explicit.embed(INPUTS), -ENCODER(INPUTS).detach())


def test_a_score_and_its_encoder_with_its_references_give_the_same_maps():
    scored = FeatureActivationMap(SimilarityScore(ENCODER, REFERENCES), ENCODER.layer)
    close(scored.attribute(INPUTS, [3, 1, 0]), explainer().attribute(INPUTS, [3, 1, 0], reference_embedding=REFERENCES))
    close(scored.attribute_all(INPUTS), explainer().attribute_all(INPUTS, reference_embedding=REFERENCES))


def test_arguments_with_a_row_for_each_input_are_refused_for_another_number_of_references():
    calls = []

    def forward(x, scale):
        calls.append(len(x))
        return encoder(x) * scale[:, None]

    encoder, x = seeded(PooledEncoder), random(3, 3, 8, 8)
    fam, scale = FeatureActivationMap(forward, encoder.layer), torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`additional_forward_args`.*3 inputs.*1 of `reference`.*fam.embed"):
        fam.attribute(x, None, scale, reference=x[:1])
    assert not calls
    close(
        fam.attribute(x, None, scale, reference=x),
        FeatureActivationMap(encoder, encoder.layer).attribute(x, reference=x),
    )
