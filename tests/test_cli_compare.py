"""captum-fam compare, in process."""

import re

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image
from test_cli import BAD_ENCODERS, is_png, photos, run  # noqa: F401

from captum_fam import FeatureActivationMap, SimilarityScore
from captum_fam.bundled import bundled_encoder
from captum_fam.cli import _compare
from captum_fam.comparison import DEFAULT
from captum_fam.images import read_image, to_tensor

ODD_ENCODERS = (
    BAD_ENCODERS
    + """
def halved():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).half()

def loud():
    print("loading")
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
)
SMALL = ("--size", 32, "--method", "FeatureActivationMap")


@pytest.fixture
def two(photos):  # noqa: F811
    return photos / "query.png", photos / "cat.jpg"


@pytest.fixture
def drawn(monkeypatch):
    """What visualize_comparison was given."""
    calls, draw = [], _compare.visualize_comparison

    def spy(images, attributions, **options):
        calls.append((images, attributions, options))
        return draw(images, attributions, **options)

    monkeypatch.setattr(_compare, "visualize_comparison", spy)
    return calls


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A current folder with encoders."""
    (tmp_path / "odd_encoders.py").write_text(ODD_ENCODERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors(paths, size=32):
    encoder = bundled_encoder()
    return encoder, torch.stack([to_tensor(read_image(p), size, encoder.mean, encoder.std) for p in paths])


def test_it_writes_the_grid_and_prints_score_layer_and_methods(run, two, tmp_path):  # noqa: F811
    output = tmp_path / "out.png"
    methods = ("--method", "LayerGradCam", "--method", "SimilarityDecomposition")
    status, out, err = run("compare", *two, *SMALL, *methods, "-o", output)
    encoder, x = tensors(two)
    z, s = encoder(x)
    assert (status, err) == (0, "")
    first, second, third = out.splitlines()
    assert first == "encoder bundled, layer features (Sequential), the last with a map"
    assert second.startswith("cosine ")
    assert float(second.split()[1]) == pytest.approx(torch.cosine_similarity(z, s, 0).item(), abs=1e-4)
    assert second.endswith("FeatureActivationMap, LayerGradCam, SimilarityDecomposition")
    assert third == f"wrote {output}"
    assert is_png(output)
    with Image.open(output) as image:
        assert image.width > 4 * 200
        assert image.height > 2 * 200
        assert np.asarray(image.convert("L")).std() > 20  # something is in it


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_each_image_is_explained_for_the_other(run, two, tmp_path, drawn, similarity):  # noqa: F811
    arguments = ("--method", "LayerGradCam", "--similarity", similarity, "-o", tmp_path / "out.png")
    assert run("compare", *two, *SMALL, *arguments)[0] == 0
    encoder, x = tensors(two)
    references = encoder(x).detach()
    ((images, maps, options),) = drawn
    assert list(maps) == ["FeatureActivationMap", "LayerGradCam"]
    for row, other in ((0, 1), (1, 0)):
        score = SimilarityScore(encoder, references[other : other + 1], similarity)
        for name, method in (("FeatureActivationMap", FeatureActivationMap), ("LayerGradCam", LayerGradCam)):
            attributions = method(score, encoder.features).attribute(x[row : row + 1], target=0).detach()
            expected = torch.nn.functional.interpolate(attributions, (32, 32), mode="bilinear")[0]
            torch.testing.assert_close(maps[name][row], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
        assert np.array_equal(np.asarray(images[row]), np.asarray(read_image(two[row])))
    score = SimilarityScore(encoder, references[1:], similarity)(x[:1]).item()
    assert "query.png" in options["titles"][0]
    assert f"{similarity} {score:.3f}" in options["titles"][0]
    assert "cat.jpg" in options["titles"][1]


def test_the_default_methods_are_those_of_compare_attributions(run, two, tmp_path, monkeypatch):  # noqa: F811
    seen, compare = [], _compare.compare_attributions

    def spy(score, layer, inputs, target, methods=None, **options):
        seen.append((target, methods, options["show_progress"]))
        return compare(score, layer, inputs, target, ["LayerGradCam"], **options)

    monkeypatch.setattr(_compare, "compare_attributions", spy)
    assert run("compare", *two, "--size", 32, "-o", tmp_path / "out.png")[0] == 0
    assert seen == [([1, 0], None, False)]
    assert all(name in run("compare", "--help")[1].replace("\n", " ") for name in DEFAULT)


def test_the_figure_is_written_beside_the_query_unless_named(run, two):  # noqa: F811
    status, out, _ = run("compare", *two, *SMALL)
    written = two[0].with_name("query_compare.png")
    assert status == 0
    assert out.endswith(f"wrote {written}\n")
    assert is_png(written)
    written.unlink()


def test_a_method_named_twice_is_drawn_twice(run, two, tmp_path, drawn):  # noqa: F811
    status, out, _ = run("compare", *two, *SMALL, *SMALL[2:], "-o", tmp_path / "out.png")
    assert status == 0
    assert "FeatureActivationMap, FeatureActivationMap 2\n" in out


def test_an_image_is_like_itself(run, two, tmp_path, drawn):  # noqa: F811
    status, out, _ = run("compare", two[0], two[0], *SMALL, "-o", tmp_path / "out.png")
    assert status == 0
    assert "cosine  1.0000" in out
    values = drawn[0][1]["FeatureActivationMap"]
    torch.testing.assert_close(values[0], values[1])


def test_the_layer_that_the_integrated_decomposition_finds_is_printed(run, two, tmp_path):  # noqa: F811
    status, out, _ = run("compare", *two, "--method", "IntegratedDecomposition", "-o", tmp_path / "out.png")
    assert status == 0
    # The end of the last stage of at least 14 by 14 places.
    assert re.search(r"^IntegratedDecomposition: layer features.5, which it found$", out, re.M)
    encoder, x = tensors(two, bundled_encoder().size)
    assert [tuple(encoder.features[:n](x).shape[2:]) for n in (6, 7)] == [(20, 20), (10, 10)]
    _, out, _ = run("compare", *two, "--method", "FeatureActivationMap", "-o", tmp_path / "out.png")
    assert "Integrated" not in out


def test_a_layer_may_be_named(run, two, tmp_path):  # noqa: F811
    status, out, _ = run("compare", *two, *SMALL, "--layer", "features.6", "-o", tmp_path / "out.png")
    assert status == 0
    assert out.startswith("encoder bundled, layer features.6 (")
    assert "the last with a map" not in out


def test_a_method_that_fails_is_a_warning_and_the_figure_says_so_too(run, two, tmp_path, drawn):  # noqa: F811
    methods = ("--method", "LRP", "--method", "GradientShap")
    status, out, err = run("compare", *two, *methods, *SMALL, "-o", tmp_path / "out.png")
    assert status == 0
    assert is_png(tmp_path / "out.png")
    lrp, shap = err.splitlines()
    assert lrp.startswith("captum-fam: warning: LRP has no map: ")
    assert shap.startswith("captum-fam: warning: GradientShap has no map: ")
    assert "LRP" not in out
    assert "FeatureActivationMap\n" in out
    assert list(drawn[0][1].failures) == ["LRP", "GradientShap"]


@pytest.mark.parametrize("method", ["Saliency", "InputXGradient", "GuidedGradCam", "DeepLift"])
def test_a_method_that_works_warns_of_nothing(run, two, tmp_path, method):  # noqa: F811
    status, out, err = run("compare", *two, "--size", 32, "--method", method, "-o", tmp_path / "out.png")
    assert (status, err) == (0, "")
    assert method in out


MISTAKES = {
    "an unknown method": (["{query}", "{cat}", "--method", "LayerGradcam"], "LayerGradCam"),
    "an unknown method after a known one": (["{query}", "{cat}", "--method", "Relax", "--method", "x"], "'x'"),
    "methods that all fail": (["{query}", "{cat}", "--method", "LRP", "--method", "GradientShap"], "baselines"),
    "a missing query": (["{tmp}/nope.png", "{cat}"], "nope.png"),
    "a missing reference": (["{query}", "{tmp}/nope.png"], "nope.png"),
    "a query that is no image": (["{text}", "{cat}"], "text.txt"),
    "a reference that is no image": (["{query}", "{text}"], "text.txt"),
    "a folder": (["{query}", "{tmp}"], "as an image"),
    "no reference": (["{query}"], "REFERENCE"),
    "two references": (["{query}", "{cat}", "{cat}"], "unexpected extra argument"),
    "an output that is no PNG": (["{query}", "{cat}", "-o", "{tmp}/out.gif"], ".png"),
    "an output that is the query": (["{query}", "{cat}", "-o", "{query}"], "another file"),
    "an output that is the reference": (["{query}", "{png}", "-o", "{png}"], "another file"),
    "an output without a folder": (["{query}", "{cat}", "-o", "{tmp}/no/folder.png"], "-o"),
    "an unknown layer": (["{query}", "{cat}", "--layer", "feature"], "features"),
    "an unknown encoder": (["{query}", "{cat}", "--encoder", "resnet50"], "torchvision:resnet50"),
    "an unknown similarity": (["{query}", "{cat}", "--similarity", "cosin"], "cosine"),
    "a contrast": (["{query}", "{cat}", "--contrast", "rest"], "--contrast"),
    "an encoder that fails": (["{query}", "{cat}", "--encoder", "odd_encoders:failing"], "--size"),
    "an encoder of dicts": (["{query}", "{cat}", "--encoder", "odd_encoders:dicts"], "let the factory return"),
    "a layer without a map": (["{query}", "{cat}", "--encoder", "odd_encoders:flat"], "--layer"),
}


@pytest.mark.parametrize(("arguments", "advice"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_file(run, photos, odd, arguments, advice):  # noqa: F811
    (odd / "text.txt").write_text("no image")
    names = {"query": photos / "query.png", "cat": photos / "cat.jpg", "png": photos / "coffee.png"}

    def files():
        return {p: p.read_bytes() for folder in (odd, photos) for p in folder.iterdir() if p.is_file()}

    before = files()
    size = [] if "--size" in advice else ["--size", 32]
    arguments = [a.format(tmp=odd, text=odd / "text.txt", **names) for a in arguments]
    status, out, err = run("compare", *arguments, *size)
    assert (status, out) == (2, "")
    assert advice in err
    assert err.startswith("captum-fam: ")
    assert err.count("\n") == 1
    assert files() == before


def test_an_encoder_of_tokens_is_explained_at_its_patches(run, two, odd):  # noqa: F811
    arguments = ("--encoder", "odd_encoders:tokens", "--layer", "patches", "--size", 64, "-o", "out.png")
    status, out, _ = run("compare", *two, *arguments, "--method", "FeatureActivationMap", "--method", "LayerGradCam")
    assert status == 0
    assert out.startswith("encoder odd_encoders:tokens, layer patches (Conv2d)\n")
    assert "FeatureActivationMap, LayerGradCam" in out
    assert is_png(odd / "out.png")


def test_methods_that_need_no_map_explain_a_layer_of_tokens(run, two, odd):  # noqa: F811
    arguments = ("--encoder", "odd_encoders:tokens", "--layer", "norm", "--size", 32, "-o", "out.png")
    status, out, err = run("compare", *two, *arguments, "--method", "LayerGradCam", "--method", "Occlusion")
    assert status == 0
    assert "warning: LayerGradCam has no map" in err
    assert out.splitlines()[1].endswith("  Occlusion")
    assert is_png(odd / "out.png")


@pytest.mark.parametrize("factory", ["halved", "loud"])
def test_an_encoder_in_half_precision_or_one_that_prints_is_explained(run, two, odd, factory):  # noqa: F811
    status, out, err = run("compare", *two, *SMALL, "--encoder", f"odd_encoders:{factory}", "-o", "out.png")
    assert status == 0
    assert "loading" not in out
    assert ("loading" in err) == (factory == "loud")
    assert is_png(odd / "out.png")


@pytest.mark.parametrize("name", [r"$\frac{$.png", "x" * 120 + ".png", "two words_^.PNG", "日本.png"])
def test_any_file_name_is_drawn(run, two, tmp_path, name):  # noqa: F811
    for index, path in enumerate(two):
        read_image(path).resize((30, 20)).save(tmp_path / f"{index}{name}")
    status, _, err = run("compare", tmp_path / f"0{name}", tmp_path / f"1{name}", *SMALL, "-o", tmp_path / "out.png")
    assert status == 0
    assert err == "" or not name.isascii()  # a font may lack its glyphs
    assert is_png(tmp_path / "out.png")


@pytest.mark.parametrize("size", [(1, 1), (300, 2), (2, 300)], ids=str)
def test_images_of_any_size_and_mode_are_compared(run, two, tmp_path, size):  # noqa: F811
    for mode in ("L", "RGBA", "1", "P"):
        Image.new("RGB", size, (200, 100, 50)).convert(mode).save(tmp_path / f"{mode}.png")
        status, _, err = run("compare", tmp_path / f"{mode}.png", two[1], *SMALL, "-o", tmp_path / "out.png")
        assert (status, err) == (0, "")
        assert is_png(tmp_path / "out.png")


def test_a_figure_that_cannot_be_written_leaves_nothing_behind(run, two, tmp_path, monkeypatch):  # noqa: F811
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    status, _, err = run("compare", *two, *SMALL, "-o", tmp_path / "out.png")
    assert status == 2
    assert "No space left on device" in err
    assert not list(tmp_path.iterdir())


def test_the_command_is_listed_and_says_what_it_writes(run):  # noqa: F811
    assert "compare" in run("--help")[1]
    status, out, _ = run("compare", "--help")
    assert status == 0
    assert "QUERY_compare.png" in " ".join(out.split())
