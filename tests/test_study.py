"""The study's own methods and its bookkeeping; the study itself needs data and an hour."""

import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam, LayerGradientXActivation
from encoders import FlatEncoder, HeadEncoder, PooledEncoder, random, seeded
from helpers import close

from benchmarks import faithfulness, pairs, report, study
from benchmarks.faithfulness import Cell, Settings, is_finished, right_object
from captum_fam import FeatureActivationMap, LabelFreeActivationMap, Relax, SimilarityScore


@pytest.fixture(params=[PooledEncoder, HeadEncoder, FlatEncoder])
def question(request):
    net = seeded(request.param)
    if request.param is HeadEncoder:  # without a bias, the places add up to the embedding
        torch.nn.init.zeros_(net.head.bias)
    encoder = study.Encoder("small", net, net, net.layer, 16, "none")
    return study.Question.of(encoder, random(3, 3, 16, 16), random(3, 3, 16, 16, seed=2))


def scaled(maps):
    return maps / maps.abs().amax((1, 2, 3), keepdim=True)


def gradient_times_activation(question):
    """Captum's, of the cosine."""
    score = SimilarityScore(question.encoder.net, question.s)
    terms = LayerGradientXActivation(score, question.encoder.layer).attribute(question.images, target=[0, 1, 2])
    return terms.sum(1, keepdim=True).detach()


def test_grad_cam_is_captums(question):
    score = SimilarityScore(question.encoder.net, question.s)
    expected = LayerGradCam(score, question.encoder.layer).attribute(question.images, target=[0, 1, 2]).detach()
    close(scaled(study.METHODS["Grad-CAM"](question)), scaled(expected))


def test_a_residual_of_one_is_the_gradient_of_the_cosine_by_place_but_for_a_positive_factor(question):
    expected = scaled(gradient_times_activation(question))
    close(scaled(study.decomposition(dimension_weights=study.residual(1))(question)), expected)
    close(scaled(study.METHODS["decomposition self"](question)), expected)


def test_a_residual_of_zero_is_the_similarity_decomposition_but_for_a_positive_factor(question):
    expected = scaled(study.METHODS["SimilarityDecomposition"](question))
    close(scaled(study.decomposition(dimension_weights=study.residual(0))(question)), expected)


def test_fam_of_the_dot_product_is_fam_of_the_cosine(question):
    dot = FeatureActivationMap(question.encoder.net, question.encoder.layer, similarity="dot")
    expected = dot.attribute(question.images, reference_embedding=question.s)
    close(study.METHODS["FAM cosine"](question), expected)


def test_relax_from_stored_embeddings_is_that_of_the_package(question):
    mean = question.images.mean((0, 2, 3))[:, None, None]
    masks, z = study.masked_embeddings(question, 30)
    cosines = F.cosine_similarity(z, question.s[:, None], dim=2)

    def shifted(images):
        return question.encoder.net(images + mean)

    method = Relax(SimilarityScore(shifted, question.s), n_samples=30)
    torch.testing.assert_close(study.relax(masks, cosines), method.attribute(question.images - mean))


def test_the_distance_explainer_is_the_mean_of_the_nearest_fifth_less_that_of_the_farthest():
    masks = torch.eye(10).reshape(10, 2, 5)
    cosines = torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.0]])
    expected = torch.tensor([[[[0.5, 0.5, -0.5, 0, 0], [0, 0, 0, 0, -0.5]]]])
    torch.testing.assert_close(study.distance_explainer(masks, cosines), expected)


def test_the_best_match_of_an_image_with_itself_is_one_wherever_the_layer_is_active(question):
    question.references = question.images
    lafam = LabelFreeActivationMap(question.encoder.net, question.encoder.layer)
    active = lafam.attribute(question.images) > 0
    torch.testing.assert_close(study.best_match(question), active.double())


def test_the_match_less_others_takes_away_the_mean_of_the_next_dozen(question):
    best = study.CorrespondenceMap(question.encoder.net, question.encoder.layer).attribute_all(
        question.images, reference=question.references
    )
    n = len(best)
    assert n < 13  # so that all others are taken away
    expected = torch.stack([best[i, i] - best[i, [k for k in range(n) if k != i]].mean(0) for i in range(n)])
    close(study.match_less_others(question)[:, 0], expected)


def test_the_best_match_by_hand(question):
    layer = {}
    handle = question.encoder.layer.register_forward_hook(lambda m, i, o: layer.update(A=o.detach()))
    question.encoder.net(question.images)
    A = layer["A"]
    question.encoder.net(question.references)
    R = layer["A"]
    handle.remove()
    one, other = A[1, :, 0, 1], R[1].flatten(1)
    cosines = [float(one @ other[:, j] / one.norm() / other[:, j].norm()) for j in range(other.shape[1])]
    assert study.best_match(question)[1, 0, 0, 1].item() == pytest.approx(max(cosines))


def test_a_swapped_question_has_the_references_of_these_numbers(question):
    other = question.swapped(torch.tensor([2, 0, 1]))
    assert torch.equal(other.s, question.s[[2, 0, 1]])
    assert torch.equal(other.references, question.references[[2, 0, 1]])
    assert torch.equal(other.images, question.images)


def test_another_reference_has_no_shared_class_and_as_few_others_as_can_be():
    images, references = [{1, 2}, {1, 3}, {4, 5}], [{1, 6}, {1, 7}, {4, 2}]
    assert pairs._least_alike(images, references, [{1}, {1}, {4}]).tolist() == [2, 2, 0]


def test_the_right_object_is_the_one_with_the_largest_mean_and_ties_count_in_part():
    objects = torch.tensor([[[1, 1, 2, 3]]]).expand(3, 1, 4)
    maps = torch.tensor([[1.0, 5, 2, 2], [1, 1, 9, 0], [1, 1, 1, 0]]).reshape(3, 1, 1, 4)
    assert right_object(maps, objects, 3).tolist() == [1, 0, 0.5]
    assert right_object(maps, objects, 3, torch.tensor([0, 1, 1])).tolist() == [1, 1, 0.5]


def test_a_map_is_asked_for_the_shared_object_and_for_the_one_that_the_encoder_uses():
    objects = torch.zeros(2, 16, 16, dtype=torch.uint8)
    objects[:, :8, :8], objects[:, 8:, 8:] = 1, 2  # the shared one, and another
    maps = torch.zeros(2, 1, 16, 16)
    maps[0, :, :8, :8], maps[1, :, 8:, 8:] = 1, 1
    scenes = SimpleNamespace(objects=objects)
    asked = pairs.Pairs(None, None, (objects == 1)[:, None], None, scenes)
    effects = torch.tensor([[0.1, 0.5], [0.1, 0.5]])  # the encoder uses the other one
    found = faithfulness.localisation(maps, asked, effects)
    assert found["right object"].tolist() == [1, 0]
    assert found["used object"].tolist() == [0, 1]
    assert "right object" not in faithfulness.localisation(maps, asked)


def test_weights_are_forgotten_without_changing_their_shapes():
    layer = torch.nn.Conv2d(3, 4, 3)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        study._forget(layer, "shuffled")
    assert torch.equal(layer.weight.flatten().sort().values, before.flatten().sort().values)
    assert not torch.equal(layer.weight, before)
    with torch.no_grad():
        study._forget(layer, "untrained")
    assert not layer.bias.any()
    assert layer.weight.std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.3)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_vision_transformer_behind_convolutions_is_forgotten_in_whole_and_still_tells_images_apart(pool):
    timm = pytest.importorskip("timm")
    net = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU6()),
        timm.models.vision_transformer.VisionTransformer(
            img_size=8, patch_size=2, in_chans=8, num_classes=0, embed_dim=24, depth=2, num_heads=3,
            global_pool=pool, class_token=pool == "token", init_values=0.5, weight_init="skip",
        ),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(3 + torch.rand_like(parameter))
        before = {name: p.clone() for name, p in net.named_parameters()}
        for module in net.modules():
            study._forget(module, "untrained")
        assert [name for name, p in net.named_parameters() if torch.equal(p, before[name])] == []
        assert max(p.abs().max().item() for p in net.parameters()) < 3
        z = net(torch.rand(4, 3, 16, 16))
    cosines = F.cosine_similarity(z[:, None], z[None], dim=2)
    assert cosines.isfinite().all()
    assert cosines.fill_diagonal_(0).max() < 1 - 1e-5


@pytest.mark.parametrize("name", study.STUDENTS)
def test_a_vision_transformer_of_the_study_is_loaded_and_embeds_alike_in_both_ways(name):
    pytest.importorskip("timm")
    students = pytest.importorskip("benchmarks.train_students")
    if not (students.FOLDER / f"{name}.pt").exists():
        pytest.skip(f"{name} has no weights")
    encoder = study.encoder(name, None)
    images = torch.rand(2, 3, encoder.size, encoder.size)
    assert encoder.fast is not encoder.net
    torch.testing.assert_close(encoder.fast(images), encoder.net(images).detach(), rtol=1e-4, atol=1e-4)


def test_what_maps_cost_is_counted_in_passes_of_one_image():
    net = seeded(PooledEncoder).float()
    encoder = study.Encoder("small", net, net, net.layer, 16, "none", net.early)
    costs = study.costs(encoder, *(random(8, 3, 16, 16, seed=seed).float() for seed in (1, 2)))
    first, second = 2 * 16 * 16 * 5 * 3 * 9, 2 * 8 * 8 * 6 * 5 * 9  # of the convolutions, 16 x 16 and 8 x 8 places
    weighted, compared = 2 * 64 * 6, 2 * 64 * 64 * 6  # of channels at all places, and of places with places
    one = first + second
    assert costs["FAM cosine"] == pytest.approx((2 + weighted / one, 2 + weighted / one, 0))
    assert costs["LaFAM"] == pytest.approx((1 + weighted / one, 1 + weighted / one, 0))
    assert costs["random"] == (0, 0, 0)
    assert costs["best match"][0] == pytest.approx(2 + compared / one)
    # The image, its reference, and from the first layer on ten steps forth and at least eight back.
    part = second / one
    assert 2 + 8 * part <= costs["integrated"][0] <= 2 + 10 * part
    assert 8 * part <= costs["integrated"][1] - costs["integrated"][0] <= 10 * part


def test_what_is_embedded_fast_is_the_same():
    net = seeded(PooledEncoder).float()
    images = random(3, 3, 16, 16).float()
    fast = study.Encoder("bundled", net, net, net.layer, 16, "none").fast
    assert fast is not net
    torch.testing.assert_close(fast(images), net(images))
    assert not fast(images).requires_grad
    assert study.Encoder("small", net, net, net.layer, 16, "none").fast is net


def test_places_are_asked_on_both_sides_and_chance_is_the_share_of_the_masks(question):
    scenes = SimpleNamespace(masks=torch.zeros(3, 1, 16, 16, dtype=torch.bool))
    scenes.reference_masks = scenes.masks.clone()
    scenes.masks[:, :, :8] = True
    scenes.reference_masks[:, :, :, 12:] = True
    found = faithfulness.places(question, pairs.Pairs(None, None, None, None, scenes))
    (n,) = {P.shape[1] for P in study.matrices(question).values()}
    side = int(n**0.5)
    middles = [(2 * i + 1) * 16 // (2 * side) for i in range(side)]
    here, there = sum(m < 8 for m in middles) / side, sum(m >= 12 for m in middles) / side
    assert 0 < here < 1
    assert 0 < there < 1
    chance = {k: v[0].item() for k, v in found["chance"].items()}
    assert chance["strongest pair"] == pytest.approx(here * there)
    assert chance["found in the reference"] == pytest.approx(there)
    assert chance["found in the image"] == pytest.approx(here)


def test_what_is_known_of_scenes_is_a_map_of_both_images():
    scenes = SimpleNamespace(
        objects=torch.tensor([[[0, 1], [2, 3]]]), reference_objects=torch.tensor([[[4, 0], [0, 1]]])
    )
    scenes.masks, scenes.reference_masks = ((o == 1)[:, None] for o in (scenes.objects, scenes.reference_objects))
    shared, every = (faithfulness.known_maps(scenes)[name] for name in report.KNOWN)
    assert [m.tolist() for m in shared] == [[[[[0.0, 1], [0, 0]]]], [[[[0, 0], [0, 1]]]]]
    assert [m.tolist() for m in every] == [[[[[0.0, 1], [1, 1]]]], [[[[1, 0], [0, 1]]]]]


def test_masks_explain_the_first_pairs_for_every_reference_alike(question):
    other = question.s.flip(0)
    one, two = study.masked_maps(question[:2], [question.s, other], 20)
    masks, z = study.masked_embeddings(question[:2], 20)
    assert set(one) == {*study.MASKS, "RELAX less others", "Distance Explainer less others"}
    close(two["RELAX"], study.relax(masks, F.cosine_similarity(z, other[:2, None], dim=2)))
    assert not torch.equal(one["RELAX"], two["RELAX"])


def test_less_others_is_of_the_cosine_less_the_mean_of_those_of_the_next_pairs(question):
    (found,) = study.masked_maps(question[:2], [question.s], 20)
    masks, z = study.masked_embeddings(question[:2], 20)
    for i in range(2):
        own, next_one, last = (F.cosine_similarity(z[i], question.s[(i + step) % 3][None], dim=1) for step in range(3))
        left = (own - (next_one + last) / 2)[None]
        for name, method in study.MASKS.items():
            close(found[f"{name} less others"][i : i + 1], method(masks, left))


def test_norms_that_have_forgotten_take_the_statistics_of_images():
    norm = torch.nn.BatchNorm2d(3)
    net = torch.nn.Sequential(norm, torch.nn.Dropout(0.5))
    norm.running_mean.fill_(7)
    images = random(32, 3, 4, 4).float()
    study.settle(study.Encoder("small", net.eval(), net, norm, 4, "none"), images)
    torch.testing.assert_close(norm.running_mean, images.mean((0, 2, 3)))
    assert not any(m.training for m in net.modules())


def test_a_cell_is_finished_if_its_file_was_made_with_the_same_settings(tmp_path):
    cell, settings = Cell("simclr", "trained", "hard"), Settings()
    assert not is_finished(cell, settings, tmp_path)
    (tmp_path / f"{cell.name}.part").write_text("{")  # what an interruption leaves
    assert not is_finished(cell, settings, tmp_path)
    (tmp_path / f"{cell.name}.json").write_text(json.dumps({"settings": asdict(settings)}))
    assert is_finished(cell, settings, tmp_path)
    assert not is_finished(cell, Settings(pairs=41), tmp_path)


def test_the_mean_over_encoders_counts_each_the_same_and_leaves_out_what_does_not_count():
    one, two = np.array([0.0, 1, np.nan, np.nan]), np.array([1.0, 1, 1, 1])
    mean, low, high = report.mean_over([one, two])
    assert mean == 0.75
    assert low <= mean <= high


def test_an_encoder_with_fewer_pairs_that_count_weighs_the_same_in_the_interval():
    few, all_of_them = np.array([0.0] * 20 + [np.nan] * 20), np.ones(40)
    assert report.mean_over([few, all_of_them]) == (0.5, 0.5, 0.5)


def test_the_interval_of_encoders_that_see_the_same_pairs_is_that_of_one_of_them():
    values = np.random.default_rng(0).random(40)
    assert report.mean_over([values] * 10) == pytest.approx(report.mean_over([values]))


@pytest.mark.skipif(not os.environ.get("CAPTUM_FAM_DATA"), reason="CAPTUM_FAM_DATA is not set")
def test_the_halves_of_the_pictures_have_nothing_in_common():
    data = faithfulness.Path(os.environ["CAPTUM_FAM_DATA"])
    for name in ("coco", "cifar"):
        one, other = ({p.tobytes() for p in pairs.pictures(data, name, half)[0]} for half in (0, 1))
        assert one
        assert not one & other
    photos = [pairs.pairs(data, "photos", "", 32, half, 24) for half in (0, 1)]
    one, other = (torch.cat([p.images, p.references]) for p in photos)
    assert not any(torch.equal(a, b) for a in one for b in other)
