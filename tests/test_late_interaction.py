"""Late interaction: each number against loops in NumPy and against the libraries that score so."""

import base64
import io
import re
import warnings
from itertools import product
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from captum_fam import explore_pair
from captum_fam.tasks.late_interaction import MaxSimExplanation, explain_maxsim

PAGE = Path(__file__).parent.parent / "docs" / "late_interaction.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
SPECIAL = ["<unk>", "<pad>", "<bos>", "<eos>", "<image>"]
WORDS = [*SPECIAL, "a", "red", "shoe", "Describe", "the", "image", ".", "Question:", "<end>", "<vision>", "</vision>"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_loops(q, p, q_mask, p_mask, numbers):
    """Of a query (T, D) and a page (P, D): tokens' scores, their maps (T, places), and what is at no place."""
    T = len(q)
    scores, maps, rest = np.zeros(T), np.zeros((T, len(numbers))), np.zeros(T)
    for t in range(T):
        if not q_mask[t]:
            continue
        best, at = -np.inf, None
        for j in range(len(p)):
            value = sum(float(a) * float(b) for a, b in zip(q[t], p[j]))
            if p_mask[j] and value > best:
                best, at = value, j
        scores[t] = best
        if at in numbers:
            maps[t, numbers.index(at)] = best
        else:
            rest[t] = best
    return scores, maps, rest


def close(found, wanted, atol=1e-5):
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=0, atol=atol)


def test_by_hand():
    query = torch.tensor([[1.0, 0], [0, 1], [-1, -1]])
    page = torch.tensor([[0.0, 3], [2, 0], [1, 1], [4, -1]])
    found = explain_maxsim(query, page, (1, 3), patches=torch.tensor([False, True, True, True]))
    close(found.token_scores, [4, 3, -2])  # -2 of patches 0 and 1; the third has -3, the prompt -3
    close(found.similarities, [[[2, 1, 4]], [[0, 1, -1]], [[-2, -2, -3]]])
    close(found.matches, [[[0, 0, 1]], [[0, 0, 0]], [[0.5, 0.5, 0]]])
    close(found.unplaced, [0, 1, 0])
    close(found.token_maps, [[[0, 0, 4]], [[0, 0, 0]], [[-1, -1, 0]]])
    close(found.map, [[-1, -1, 4]])
    assert (found.score, found.rest) == (5, 3)
    assert repr(found) == "MaxSimExplanation(token_maps=(3, 1, 3))"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", ["first", "last", "any"])
@pytest.mark.parametrize("unit", [False, True])
def test_each_query_and_page_is_what_loops_find(seed, order, unit):
    q, p = normal(2, 5, 4, seed=seed), normal(3, 11, 4, seed=seed + 10)
    if unit:
        q, p = F.normalize(q, dim=-1), F.normalize(p, dim=-1)
    rng = np.random.default_rng(seed)
    q_mask, p_mask = rng.random((2, 5)) < 0.7, rng.random((3, 11)) < 0.7
    q_mask[:, 0] = p_mask[:, 0] = True
    numbers = {"first": np.tile(np.arange(6), (3, 1)), "last": np.tile(np.arange(5, 11), (3, 1))}.get(order)
    if numbers is None:
        numbers = np.stack([rng.permutation(11)[:6] for _ in range(3)])
        patches = torch.from_numpy(numbers).reshape(3, 2, 3)
    else:
        patches = torch.zeros(3, 11, dtype=torch.bool).scatter(1, torch.from_numpy(numbers), True)
    masks = {"query_mask": torch.from_numpy(q_mask).long(), "page_mask": torch.from_numpy(p_mask)}
    found = explain_maxsim(q, p, (2, 3), patches=patches, **masks)
    assert found.token_maps.shape == (2, 3, 5, 2, 3)
    for b, k in product(range(2), range(3)):
        scores, maps, rest = by_loops(q[b], p[k], q_mask[b], p_mask[k], numbers[k].tolist())
        one = found[b][k]
        close(one.token_scores, scores)
        close(one.token_maps.flatten(1), maps)
        close(one.token_scores * one.unplaced, rest)
        close(one.score, scores.sum())
        close(one.map.flatten(), maps.sum(0))
        close(one.rest, rest.sum())
        close(one.map.sum() + one.rest, scores.sum())
        q_counted = np.where(q_mask[b][:, None], q[b], 0)
        close(one.similarities.flatten(1), q_counted @ p[k].numpy()[numbers[k]].T)


def test_what_is_equal_shares_and_what_is_not_does_not():
    query = torch.eye(2)
    page = torch.tensor([[5.0, 1], [5, 7], [5, 7], [1, 7 - 1e-4]])
    found = explain_maxsim(query, page, (1, 2), patches=torch.tensor([True, True, False, False]))
    third = 1 / 3
    close(found.matches, [[[third, third]], [[0, 0.5]]])
    close(found.unplaced, [third, 0.5])
    close(found.map, [[5 * third, 5 * third + 3.5]])
    close(found.rest, 5 * third + 3.5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("patches", [7, 65])
def test_patches_of_one_embedding_share_wherever_rounding_makes_them_differ(patches, scale):
    one = normal(128, seed=4) * scale
    for seed in range(20):
        found = explain_maxsim(normal(3, 128, seed=seed), one.expand(patches, 128), (1, patches))
        close(found.matches, np.full((3, 1, patches), 1 / patches), 1e-7)


def test_a_masked_page_token_that_is_long_makes_no_ties():
    query, page = torch.tensor([[1.0, 1]]), torch.tensor([[1.0, 1], [1, 0.999], [1e9, -1e9]])
    found = explain_maxsim(query, page[:, :], (1, 2), page_mask=[1, 1, 0], patches=[True, True, False])
    close(found.matches, [[[1, 0]]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    q, p = F.normalize(normal(6, 32), dim=-1).to(dtype), F.normalize(normal(20, 32, seed=1), dim=-1).to(dtype)
    found = explain_maxsim(q, p, (4, 5))
    assert found.score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(found.score, by_loops(q.double(), p.double(), [1] * 6, [1] * 20, list(range(20)))[0].sum())
    mixed = explain_maxsim(q, p.double(), (4, 5))
    assert mixed.score.dtype == torch.float64


@pytest.mark.parametrize("form", ["numpy", "lists", "inference", "gradient", "read-only", "batch of one"])
def test_forms_in_which_libraries_and_stores_give_embeddings(form):
    q, p = normal(3, 4), normal(6, 4, seed=1)
    wanted = explain_maxsim(q, p, (2, 3))
    if form == "numpy":
        given = q.numpy(), p.numpy()[::-1].copy()[::-1]
    elif form == "lists":
        given = q.tolist(), p.tolist()
    elif form == "inference":
        with torch.inference_mode():
            given = q * 1, p * 1
    elif form == "gradient":
        given = q.clone().requires_grad_(), p.clone().requires_grad_()
    elif form == "read-only":
        given = q.numpy().copy(), p.numpy().copy()
        for array in given:
            array.flags.writeable = False
    else:
        given = q[None], [p]
    found = explain_maxsim(*given, (2, 3))
    if form == "batch of one":
        assert found.score.shape == (1, 1)
        found = found[0][0]
    assert not found.score.requires_grad
    close(found.map, wanted.map)


def test_lists_of_other_lengths_are_padded_and_padding_counts_for_nothing():
    queries, pages = [normal(3, 4), normal(5, 4, seed=1)], [normal(8, 4, seed=2) - 3, normal(6, 4, seed=3) - 3]
    queries = [q.abs() for q in queries]  # so that all similarities of the second page are below zero
    marks = [torch.tensor([False] * n + [True] * 6) for n in (2, 0)]
    found = explain_maxsim(queries, pages, (2, 3), patches=marks)
    assert found.score.shape == (2, 2)
    assert (found.score < 0).all()
    for b, k in product(range(2), range(2)):
        one = explain_maxsim(queries[b], pages[k], (2, 3), patches=marks[k])
        close(found[b][k].score, one.score)
        close(found[b][k].map, one.map)
        close(found[b][k].rest, one.rest)
        close(found[b][k].token_scores[len(queries[b]) :], np.zeros(5 - len(queries[b])))
    as_lists = explain_maxsim([q.tolist() for q in queries], [p.tolist() for p in pages], (2, 3), patches=marks)
    assert torch.equal(as_lists.token_maps, found.token_maps)
    masks = [[1, 1, 0], [1, 0, 1, 1, 1]]
    for given in (masks, [torch.tensor(mask) for mask in masks]):
        found = explain_maxsim(queries, pages, (2, 3), patches=marks, query_mask=given)
        close(found[0][1].score, explain_maxsim(queries[0][:2], pages[1], (2, 3)).score)


def test_a_mask_for_one_is_that_of_all():
    q, p = normal(2, 3, 4), normal(2, 6, 4, seed=1)
    masks = {"query_mask": torch.tensor([1, 0, 1]), "page_mask": torch.tensor([1, 1, 1, 1, 0, 1])}
    patches = torch.tensor([True, True, False, True, False, True])
    found = explain_maxsim(q, p, (2, 2), **masks, patches=patches)
    both = {name: mask.expand(2, -1) for name, mask in masks.items()}
    close(found.map, explain_maxsim(q, p, (2, 2), **both, patches=patches.expand(2, -1)).map)


def test_a_token_that_does_not_count_has_no_match():
    page = torch.tensor([[2.0, 1], [0, 0], [1, 2]])
    found = explain_maxsim(
        torch.eye(2), page, (1, 2), query_mask=[1, 0], patches=[True, True, False]
    )  # nothing is said
    close(found.matches, [[[1, 0]], [[0, 0]]])
    close(found.unplaced, [0, 0])
    close(found.token_scores, [2, 0])
    close(found.similarities[1], [[0, 0]])


def test_what_is_no_number_is_left_out_by_a_mask():
    q, p = normal(3, 4), normal(5, 4, seed=1)
    q[2], p[1], p[4] = torch.nan, torch.nan, torch.inf
    marks = torch.tensor([True, True, True, True, False])  # a patch is left out, too, and a word
    found = explain_maxsim(q, p, (2, 2), query_mask=[1, 1, 0], page_mask=[1, 0, 1, 1, 0], patches=marks)
    wanted = explain_maxsim(q[:2], p[[0, 2, 3]], (1, 3))
    close(found.map.flatten(), np.insert(wanted.map.flatten().numpy(), 1, 0))
    assert found.similarities.isfinite().all()


def test_autocast_changes_no_digit():
    q, p = normal(3, 64), normal(6, 64, seed=1)
    wanted = explain_maxsim(q, p, (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = explain_maxsim(q, p, (2, 3))
    assert torch.equal(found.map, wanted.map)


# Libraries


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_scores_are_those_of_sentence_transformers(dtype):
    library = pytest.importorskip("sentence_transformers.util.similarity")
    if not hasattr(library, "maxsim"):
        pytest.skip("sentence-transformers before 6")
    q, p = normal(2, 5, 16).to(dtype), normal(3, 12, 16, seed=1).to(dtype)
    atol = 5e-2 if dtype == torch.float16 else 1e-5
    masks = {"query_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), "page_mask": torch.ones(3, 12)}
    masks["page_mask"][1, 7:] = 0
    theirs = {"a_mask": masks["query_mask"], "b_mask": masks["page_mask"]}
    close(explain_maxsim(q, p, (3, 4)).score, library.maxsim(q, p), atol)
    close(explain_maxsim(q, p, (3, 4), **masks).score, library.maxsim(q, p, **theirs), atol)
    for options in ({}, masks):
        found = explain_maxsim(q, p, (3, 4), length_normalize=True, **options)
        close(found.score, library.mean_maxsim(q, p, **(theirs if options else {})), atol)
        close(found.map.sum((-1, -2)) + found.rest, found.score.double(), 1e-5)
        close(found.similarities.flatten(-2).amax(-1)[1, 0], found.token_scores[1, 0].double())
    ragged = [q[0, :3], q[1]], [p[0], p[1, :7], p[2]]
    marks = torch.zeros(3, 12, dtype=torch.bool)
    marks[:, :4] = True
    for normalize in (False, True):
        found = explain_maxsim(*ragged, (2, 2), patches=marks, length_normalize=normalize)
        close(found.score, library.maxsim(*ragged, length_normalize=normalize), atol)
    padded = F.pad(q, (0, 0, 0, 2))  # rows of zeros are no tokens
    close(explain_maxsim(padded, p, (3, 4), length_normalize=True).score, library.mean_maxsim(padded, p), atol)


def test_rows_of_zeros_count_in_a_page_as_transformers_has_it_and_it_is_said():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ColPaliProcessor"):
        pytest.skip("transformers without ColPali")
    score = transformers.ColPaliProcessor.score_retrieval
    query, page = torch.eye(2), F.pad(torch.tensor([[3.0, -1], [2, -2]]), (0, 0, 0, 1))
    patches = torch.tensor([True, True, False])
    with pytest.warns(UserWarning, match="Rows of zeros in `page_embeddings` are the best matches") as caught:
        found = explain_maxsim(query, page, (1, 2), patches=patches)
    assert caught[0].filename == __file__
    close(found.score, score(None, query[None], page[None])[0, 0])
    close(found.token_scores, [3, 0])
    close(found.unplaced, [0, 1])
    above = F.pad(torch.tensor([[3.0, 1], [2, 2]]), (0, 0, 0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(explain_maxsim(query, page, (1, 2), patches=patches, page_mask=[1, 1, 0]).token_scores, [3, -1])
        explain_maxsim(query, page, (1, 2), patches=patches, page_mask=[1, 1, 1])  # it was said by the mask
        close(explain_maxsim(query, above, (1, 2), patches=patches).token_scores, [3, 2])


@pytest.mark.parametrize("distance", ["DOT", "COSINE"])
def test_hits_of_qdrant_as_they_come(distance):
    models = pytest.importorskip("qdrant_client").models
    client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
    late = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    params = models.VectorParams(size=8, distance=models.Distance[distance], multivector_config=late)
    client.create_collection("pages", vectors_config=params)
    pages = [normal(n, 8, seed=n) for n in (12, 14, 13)]
    points = [models.PointStruct(id=k, vector=page.tolist()) for k, page in enumerate(pages)]
    client.upsert("pages", points)
    query = normal(4, 8)
    hits = client.query_points("pages", query=query.tolist(), with_vectors=True).points
    query = F.normalize(query, dim=-1) if distance == "COSINE" else query
    patches = [torch.arange(len(hit.vector)) < 12 for hit in hits]
    found = explain_maxsim(query, [hit.vector for hit in hits], (3, 4), patches=patches)
    close(found.score, [hit.score for hit in hits])


def tokenizer():
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>")
    plain = tokenizers.Tokenizer(words)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"},
    )
    made.add_special_tokens({"additional_special_tokens": ["<image>", "<end>", "<vision>", "</vision>"]})
    return made


def image(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def colpali():
    """A ColPali of random weights that has 2 x 2 patches, then four words, and its processor."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ColPaliForRetrieval"):
        pytest.skip("transformers without ColPali")
    resize = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    resize.image_seq_length = 4
    processor = transformers.ColPaliProcessor(resize, tokenizer())
    tower = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.GemmaConfig(
        hidden_size=32,
        vocab_size=len(processor.tokenizer),
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        **tower,
    )
    vision = transformers.SiglipVisionConfig(hidden_size=16, image_size=28, patch_size=14, projection_dim=32, **tower)
    whole = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=4, projection_dim=32, hidden_size=32
    )
    torch.manual_seed(0)
    config = transformers.ColPaliConfig(vlm_config=whole, embedding_dim=8)
    return transformers.ColPaliForRetrieval(config).eval(), processor


@pytest.fixture(scope="module")
def colqwen():
    """A ColQwen2 of random weights, whose patches are as many as the image is large, and its processor."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ColQwen2ForRetrieval"):
        pytest.skip("transformers without ColQwen2")
    resize = transformers.Qwen2VLImageProcessor(min_pixels=28**2, max_pixels=20 * 28**2)
    prompt = "<bos> <vision> <image> </vision> Describe the image <end>"
    processor = transformers.ColQwen2Processor(resize, tokenizer(), visual_prompt_prefix=prompt)
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(processor.tokenizer),
        "bos_token_id": 2,
        "eos_token_id": 3,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 1, "hidden_size": 32, "mlp_ratio": 1}
    ids = dict(zip(("image_token_id", "vision_start_token_id", "vision_end_token_id"), (4, 14, 15)))
    whole = {"model_type": "qwen2_vl", "text_config": text, "vision_config": vision, **ids}
    torch.manual_seed(0)
    config = transformers.ColQwen2Config(vlm_config=whole, embedding_dim=8)
    return transformers.ColQwen2ForRetrieval(config).eval(), processor


def embedded(model, inputs):
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}).embeddings


def test_colpali_of_transformers(colpali):
    model, processor = colpali
    images = processor.process_images([image(40, 40), image(30, 50, seed=1)])
    queries = processor.process_queries(["a red shoe", "red"])
    p, q = embedded(model, images), embedded(model, queries)
    found = explain_maxsim(q, p, (2, 2), patches=images["input_ids"] == processor.image_token_id)
    close(found.score, processor.score_retrieval(q, p))
    assert images["input_ids"].shape == (2, 8)  # four patches and four words
    for b, k in product(range(2), range(2)):
        scores, maps, rest = by_loops(q[b], p[k], queries["attention_mask"][b], [1] * 8, [0, 1, 2, 3])
        close(found[b][k].token_scores, scores)
        close(found[b][k].map.flatten(), maps.sum(0))
        close(found[b][k].rest, rest.sum())
    assert (found.rest != 0).any()
    assert (found.map != 0).any()


def test_colqwen2_pages_of_two_sizes_in_contrast(colqwen):
    model, processor = colqwen
    images = processor.process_images([image(84, 56), image(56, 112, seed=1)])
    grids = [(3, 2), (2, 4)]
    assert (images["image_grid_thw"][:, 1:] // 2).tolist() == [list(grid) for grid in grids]
    queries = processor.process_queries(["a red shoe"])
    p, q = embedded(model, images), embedded(model, queries)[0]
    marks = images["input_ids"] == processor.image_token_id
    a, b = (
        explain_maxsim(q, p[k], grids[k], page_mask=images["attention_mask"][k], patches=marks[k]) for k in range(2)
    )
    wanted = processor.score_retrieval([q], [p[k][images["attention_mask"][k] > 0] for k in range(2)])[0]
    close(torch.stack([a.score, b.score]), wanted)
    for one, other, grid, sign in ((a, b, grids[0], 1), (b, a, grids[1], -1)):
        contrast = one.contrast(other)
        assert contrast.map.shape == grid
        close(contrast.score, sign * (wanted[0] - wanted[1]))
        close(contrast.map.sum() + contrast.rest, contrast.score.double())


@pytest.mark.filterwarnings("ignore:`photos`")
def test_the_page_of_the_documentation_runs_with_both_libraries(colpali, tmp_path, monkeypatch):
    library = pytest.importorskip("sentence_transformers")
    if not hasattr(library, "MultiVectorEncoder"):
        pytest.skip("sentence-transformers before 6")
    model, processor = colpali
    model.save_pretrained(tmp_path / "colpali")
    processor.save_pretrained(tmp_path / "colpali")
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    first, second, third = BLOCKS
    one, other = image(40, 40), image(30, 50, seed=1)

    names = {"image": one}
    exec(first.replace("vidore/colpali-v1.3-hf", "colpali"), names)
    encoder, found = names["model"], names["found"]
    wanted = encoder.similarity(encoder.encode_query("a red shoe"), encoder.encode_document(one))
    close(found.score, wanted[0, 0])
    close(found.map.sum() + found.rest, wanted[0, 0])
    assert names["tokens"][2:5] == ["a", "red", "shoe"]
    assert len(names["axes"]) == 2 + len(names["tokens"])
    assert (tmp_path / "why.html").stat().st_size > 10_000

    names = {"torch": torch, "model": model, "processor": processor, "images": [one, other]}
    exec(second.replace("(32, 32)", "(2, 2)"), {**names, "explain_maxsim": explain_maxsim}, names)
    close(names["found"].score, processor.score_retrieval(names["query"], names["pages"])[0])
    close(names["why"].score, (names["found"].score[0] - names["found"].score[1]).double())

    # Two rows of three tiles of 2 x 2 patches, each after a word, and a whole of 2 x 2 at the end.
    ids = torch.tensor(([7] + [4] * 4) * 7)
    tiles = torch.arange(4 * 6).reshape(2, 2, 3, 2).transpose(1, 2).reshape(6, 4)  # the place of each token
    q, p = normal(3, 8), normal(35, 8, seed=1)
    names = {"input_ids": ids, "image_token_id": 4, "query": q, "page": p, "r": 2, "c": 3, "n": 2}
    exec(third, {"explain_maxsim": explain_maxsim}, names)
    for tile, within in product(range(6), range(4)):
        token = 5 * tile + 1 + within
        place = names["found"].similarities.flatten(1)[:, tiles[tile, within]]
        close(place, (q @ p[token]).double())


# Contrast


def test_contrast_by_hand():
    query = torch.eye(3)
    a = explain_maxsim(query, torch.tensor([[3.0, 0, 0], [0, 2, 0], [0, 0, 1]]), (1, 2), patches=[True, True, False])
    b = explain_maxsim(query, torch.tensor([[1.0, 5, 0.5]]), (1, 1))
    close(a.contrast(b).token_scores, [2, -3, 0.5])
    close(a.contrast(b).map, [[2, -3]])
    close(a.contrast(b).rest, 0.5)
    close(a.contrast(b).score, -0.5)
    close(b.contrast(a).map, [[0.5]])
    close(a.contrast(b).similarities, a.similarities)
    assert (a.explains, a.contrast(b).explains) == ("score", "difference")


def test_contrast_of_batches_is_that_of_each():
    queries, pages, others = normal(2, 3, 4), normal(3, 4, 4, seed=1), normal(3, 6, 4, seed=2)
    a, b = explain_maxsim(queries, pages, (2, 2)), explain_maxsim(queries, others, (2, 3))
    both = a.contrast(b)
    for n, k in product(range(2), range(3)):
        close(both[n][k].map, a[n][k].contrast(b[n][k]).map)
        assert both[n][k].explains == "difference"
    assert [one.score.item() for one in a[0]] == a.score[0].tolist()
    assert a[0][1:].token_maps.shape == (2, 3, 2, 2)


def test_contrast_is_of_one_query():
    q, p = normal(3, 4), normal(4, 4, seed=1)
    found = explain_maxsim(q, p, (2, 2))
    for other in (
        explain_maxsim(normal(3, 4, seed=5), p, (2, 2)),
        explain_maxsim(q, p, (2, 2), query_mask=[1, 1, 0]),
        explain_maxsim(q, p, (2, 2), length_normalize=True),
        explain_maxsim(q, p[None], (2, 2)),
    ):
        with pytest.raises(ValueError, match="to explain the same query"):
            found.contrast(other)
    with pytest.raises(TypeError, match="Expected `other` to be a MaxSimExplanation, but got 3"):
        found.contrast(3)


# Pictures


def values(stored):
    """A matrix that is stored whole, as its page reads it."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    count, top = stored["digits"], (64 ** stored["digits"] - 2) / 2
    digits = np.array([alphabet.index(letter) for letter in stored["text"]]).reshape(-1, count)
    shares = (digits @ (64.0 ** np.arange(count)[::-1]) - top) / top
    return stored["largest"] * shares * abs(shares)


def test_the_explorer_shows_pages_with_what_tokens_add_and_their_similarities():
    q, p = normal(3, 4), normal(2, 7, 4, seed=1)
    patches = torch.tensor([False] + [True] * 6)
    found = explain_maxsim(q, p, (3, 2), patches=patches)
    data = found.explore([image(60, 40), image(60, 40, 1)], ["a", "red", "<b>"])._data
    assert data["names"] == ["adds to the score", "similarity"]
    for k, page in enumerate(data["references"]):
        rest = found.rest[k].item()
        said = f"page {k + 1}, score {found.score[k].item():.4g}" + (f", of it {rest:.3g} at no patch" if rest else "")
        assert page["name"] == said
        for name, matrix in (("adds to the score", found.token_maps[k]), ("similarity", found.similarities[k])):
            mode = page["modes"][name]
            assert (mode["query"], mode["reference"]) == ([3, 1], [3, 2])
            close(torch.from_numpy(values(mode["whole"])), matrix.flatten().double(), 0.01)
            assert mode["sums"]["pairs"] == pytest.approx(matrix.sum().item(), abs=1e-5)
    assert any("at no patch" in page["name"] for page in data["references"])
    words = Image.open(io.BytesIO(base64.b64decode(data["query"]["picture"].partition(",")[2])))
    lines = (np.asarray(words.convert("L")) < 128).any(1).reshape(3, -1)
    assert lines.any(1).all()  # something is written in each line
    assert not lines[:, [0, -1]].any()  # and nothing across two of them


def test_the_explorer_of_an_image_that_is_the_query():
    q, p = normal(6, 4), normal(4, 4, seed=1)
    found = explain_maxsim(q, p, (2, 2))
    pictures = image(40, 60), image(50, 50, 1)
    page = found.explore(pictures[1], query=pictures[0], query_grid=(2, 3), titles=["a", "b"])
    matrices = {"adds to the score": found.token_maps, "similarity": found.similarities}
    shaped = {name: matrix.reshape(1, 2, 3, 2, 2) for name, matrix in matrices.items()}
    assert page.html == explore_pair(*pictures, shaped, titles=["a", "b"]).html
    found.explore(pictures[1], query=pictures[0], query_grid=(1, 6))  # fits no way: as it is said
    for grid, message in (
        ((2, 2), "of the 6 tokens of the query, but got 2 x 2"),
        ((3, 2), "lies across an image of 40"),
    ):
        with pytest.raises(ValueError, match=f"Expected `query_grid` .*{message}"):
            found.explore(pictures[1], query=pictures[0], query_grid=grid)
    with pytest.raises(ValueError, match="Expected `query` and `query_grid` together"):
        found.explore(pictures[1], query_grid=(2, 3))


@pytest.mark.parametrize("token", ["\n", "\r\t", "", "\u2581red", "\u200b", "<0x0A>", None])
def test_a_token_of_any_letters_is_written(token):
    found = explain_maxsim(normal(2, 4), normal(6, 4, seed=1), (2, 3))
    _, axes = found.visualize(image(40, 60), [token, "b"], use_pyplot=False)
    assert "\n" not in axes[2].get_title()
    assert axes[2].get_title() == {"\n": "\\n", "\r\t": "\\r\\t", "\u200b": "\\u200b"}.get(token, str(token))
    query = found.explore(image(40, 60), [token, "b"])._data["query"]
    assert query["height"] == 64


def test_each_page_has_a_picture_of_its_own_in_the_explorer_and_all_have_one_query():
    q, p, pictures = normal(2, 3, 4), normal(2, 6, 4, seed=1), [image(40, 60), image(40, 60, 1)]
    with pytest.raises(ValueError, match="Expected `page` to be 2 pictures, one for each page, but got 1"):
        explain_maxsim(q[0], p, (2, 3)).explore(pictures[0])
    with pytest.raises(ValueError, match="Expected `page` to be 1 pictures, one for each page, but got 2"):
        explain_maxsim(q[0], p[0], (2, 3)).explore(pictures)
    with pytest.raises(ValueError, match="Expected one query, but this explains several; choose one, as found"):
        explain_maxsim(q, p[0], (2, 3)).explore(pictures)
    explain_maxsim(q[:1], p[0], (2, 3)).explore(pictures[:1])
    explain_maxsim(q[0], p, (2, 3)).explore(torch.rand(2, 3, 40, 60))


def test_the_figure_has_the_map_of_the_score_and_each_token_that_counts():
    query = torch.tensor([[1.0, 0], [0, 1], [5, 5], [0, 0], [0.5, 1], [-1, -1]])
    page = torch.tensor([[0.0, 3], [2, 0], [1, 1], [0, 0], [2, 0]])
    patches = torch.tensor([False, True, True, True, True])
    found = explain_maxsim(query, page, (2, 2), query_mask=[1, 1, 0, 1, 1, 1], page_mask=[1] * 5, patches=patches)
    figure, axes = found.visualize(image(40, 40), ["a", "$red", "off", "<pad>", "e", "f"], use_pyplot=False)
    figure.draw_without_rendering()
    assert [axis.get_title() for axis in axes] == ["", "the score", "a", "$red", "e", "f"]
    assert [axis.get_xlabel() for axis in axes] == [
        "page",
        "8, of it 6 at no patch\n(the map has 2 x 2 locations)",
        "+2\n(the map has 2 x 2 locations)",
        "+3\nat no patch\n(the map has 2 x 2 locations)",
        "+3\nat no patch\n(the map has 2 x 2 locations)",
        "+0\n(the map has 2 x 2 locations)",
    ]
    side = axes[1].images[0].get_array().shape[0] / 2
    boxes = [[box.get_xy() for box in axis.patches] for axis in axes]
    tied = [(-0.5, -0.5), (side - 0.5, side - 0.5)]  # of "a", patches 0 and 3
    lower = (-0.5, side - 0.5)  # of "f", patch 2
    assert boxes == [[], [tied[0], lower, tied[1]], tied, [], [], [lower]]
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert labels == ["adds to the score", "similarity"]


def test_the_figure_of_a_contrast_says_so():
    q, p = normal(7, 4), normal(2, 6, 4, seed=1)
    found = explain_maxsim(q, p, (2, 3))
    why = found[0].contrast(found[1])
    _, axes = why.visualize(image(40, 60), use_pyplot=False)
    assert [axis.get_title() for axis in axes[1:]] == ["the difference", *(f"token {t}" for t in range(1, 8))]
    assert axes[1].get_xlabel().splitlines()[0] == f"{why.score.item():.4g}"
    assert "adds to the difference" in why.explore(image(40, 60))._data["names"]
    with pytest.raises(ValueError, match=r"one query and one page, but this has \(2,\); choose one, as found\[0\]"):
        found.visualize(image(40, 60))
    with pytest.raises(ValueError, match=r"one query and one page, but this has \(1, 2\)"):
        explain_maxsim(q[None], p, (2, 3)).explore(image(40, 60))


def test_a_grid_that_lies_across_its_page_is_refused():
    found = explain_maxsim(normal(2, 4), normal(12, 4, seed=1), (3, 4))
    for show in (found.visualize, found.explore):
        with pytest.raises(ValueError, match=r"3 x 4 lies across an image of 80 x 60 pixels, which 4 x 3 fits"):
            show(image(80, 60))
    found.visualize(image(60, 80), use_pyplot=False)
    found.visualize(image(60, 60), use_pyplot=False)  # an encoder of squares: both ways are as good
    found.explore(image(300, 60))  # and where neither fits, it is taken as it is


# Errors

Q, P = normal(3, 4), normal(6, 4, seed=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_embeddings": normal(4)}, ValueError, "`query_embeddings` to be numbers .tokens, dimensions."),
        ({"query_embeddings": "red"}, TypeError, "`query_embeddings` to be a tensor, or a list of tensors"),
        ({"page_embeddings": None}, TypeError, "`page_embeddings` to be a tensor"),
        ({"page_embeddings": [P, normal(6, 3)]}, TypeError, "`page_embeddings` to be a tensor, or a list of tensors"),
        (
            {"query_embeddings": [[1.0, 2, 3, 4], [1.0, 2, 3]]},
            ValueError,
            "`query_embeddings` of one number of dimensions",
        ),
        ({"page_embeddings": normal(0, 4)}, ValueError, "`page_embeddings` to be numbers"),
        ({"page_embeddings": P > 0}, ValueError, "`page_embeddings` to be numbers .* got a bool tensor"),
        ({"page_embeddings": normal(6, 5)}, ValueError, "of the 4 dimensions of `query_embeddings`, but got 5"),
        (
            {"grid": (2, 2)},
            ValueError,
            "4 patches of a page, for a grid of 2 x 2, but got 6 of 6 tokens; pass patches=",
        ),
        ({"grid": (-2, -3)}, ValueError, "`grid` of at least one row and column, but got -2 x -3"),
        ({"grid": (2.5, 3)}, TypeError, "`grid` to be two numbers, rows and columns, but got"),
        ({"grid": (1, 2, 3)}, TypeError, "`grid` to be two numbers, rows and columns, but got"),
        ({"grid": 6}, TypeError, "`grid` to be two numbers, rows and columns, but got 6"),
        ({"query_mask": [1, 1]}, ValueError, "`query_mask` to be a mask of ones and zeros"),
        ({"query_mask": [0.5, 1, 1]}, ValueError, "`query_mask` to be a mask of ones and zeros"),
        ({"page_mask": torch.ones(2, 6)}, ValueError, r"of `page_embeddings`, \(1, 6\), but got"),
        (
            {"query_mask": [0, 0, 0]},
            ValueError,
            "counts in each of `query_embeddings`, but all tokens of number",
        ),
        ({"page_mask": [0] * 6}, ValueError, "counts in each of `page_embeddings`"),
        ({"query_embeddings": 0 * Q, "query_mask": [1] * 3}, ValueError, "counts in each of `query_embeddings`"),
        (
            {"page_embeddings": P.clone().fill_diagonal_(torch.nan)},
            ValueError,
            r"to be finite, but the tokens \[0, 1, 2, 3\] are not",
        ),
        ({"patches": torch.ones(5) > 0}, ValueError, r"`patches` to be a mask of shape \(1, 6\) or \(6,\)"),
        (
            {"patches": torch.arange(6) > 0},
            ValueError,
            "6 patches of a page, for a grid of 2 x 3, but got 5 of 6 tokens",
        ),
        ({"patches": torch.ones(6)}, ValueError, "`patches` to be a bool mask of the tokens, or their numbers"),
        (
            {"patches": torch.ones(6).long()},
            ValueError,
            r"`patches` to number each token once, .* pass patches.bool\(\)",
        ),
        ({"patches": torch.arange(6) + 1}, ValueError, "`patches` to number each token once, from 0 to 5"),
        ({"patches": torch.arange(6) - 1}, ValueError, "`patches` to number each token once, from 0 to 5"),
        ({"patches": torch.arange(5)}, ValueError, "`patches` to be a bool mask"),
    ],
)
def test_errors_name_the_argument_and_what_came(change, error, message):
    arguments = {"query_embeddings": Q, "page_embeddings": P, "grid": (2, 3)}
    explain_maxsim(**{**arguments, "grid": torch.tensor([2, 3])})
    with pytest.raises(error, match=message):
        explain_maxsim(**{**arguments, **change})


def test_errors_of_what_is_asked_of_an_explanation():
    found = explain_maxsim(Q, P, (2, 3))
    for tokens in (["a"], "abc"):
        with pytest.raises(ValueError, match="Expected `tokens` to be a list of 3, one for each row of the query, but"):
            found.visualize(image(40, 60), tokens)
    with pytest.raises(TypeError, match="Expected the number of one of several pages or queries, but"):
        found[0]
    with pytest.raises(TypeError, match=r"got \(0, 0\) for MaxSimExplanation"):
        explain_maxsim(Q[None], P[None], (2, 3))[0, 0]
    assert isinstance(explain_maxsim(Q[None], P[None], (2, 3))[0][-1], MaxSimExplanation)
    with pytest.raises(IndexError):
        explain_maxsim(Q, P[None], (2, 3))[1]
