"""Runs the few-shot, contrastive, retrieval and text paths on real or trained encoders.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.tasks

For each path it prints how far its scores are from the library's own, and, where the right place is known, the mean
share of the positive map in it: images are collages of two, side by side, and the reference shows, or names, one of
them. Chance is 0.5; untrained encoders are the control.
"""

import io
import os
import random
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import torch
import torch.nn.functional as F
from easyfsl.methods import PrototypicalNetworks
from lightly.utils.benchmarking import knn_predict
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks import train_contrastive as trained
from benchmarks.study import LAYERS, Embedding, pretrained
from captum_fam import (
    FeatureActivationMap,
    SimilarityDecomposition,
    explain_episode,
    explain_retrieval,
    nearest_references,
)

SEED = 0


def left_share(maps: Tensor) -> Tensor:
    """The share of the positive part of maps (..., h, w) in their left half."""
    positive = maps.float().clamp(min=0)
    return positive[..., : maps.shape[-1] // 2].sum((-2, -1)) / positive.sum((-2, -1)).clamp(min=1e-12)


def right_place(left: Tensor, right: Tensor) -> float:
    """Mean share in the right half, of maps for what is on the left and maps for what is on the right."""
    return torch.cat([left_share(left), 1 - left_share(right)]).mean().item()


def collages(images: Tensor) -> Tensor:
    """The middle halves of two images (B, 2, C, H, W), side by side."""
    middle = images[..., images.shape[-1] // 4 : images.shape[-1] * 3 // 4]
    return torch.cat([middle[:, 0], middle[:, 1]], -1)


def pairs_of_classes(labels: Tensor, count: int) -> Tensor:
    """Numbers (count, 2) of images of two classes."""
    random_pairs = torch.randint(len(labels), (4 * count, 2), generator=torch.Generator().manual_seed(SEED))
    return random_pairs[labels[random_pairs[:, 0]] != labels[random_pairs[:, 1]]][:count]


def few_shot(data: Path, load: Callable[[str], Any], episodes: int) -> list[str]:
    """Episodes of five classes with the ProtoNets and their photos."""
    lines = ["| encoder | images | shots | accuracy | largest difference from easyfsl |", "|---|---|---|---|---|"]
    for name, archive, layer in (
        ("protonet_omniglot", "omniglot_small1", "features.3.2"),
        ("protonet_miniimagenet", "clothing", "features.3"),
        ("protonet_orobix", "clothing", "features.3"),
    ):
        encoder = load(name)
        with zipfile.ZipFile(data / "photos" / f"{archive}.zip") as photos:
            classes: dict[str, list[str]] = {}
            for file in sorted(n for n in photos.namelist() if n.endswith((".png", ".jpg")) and "train/" not in n):
                classes.setdefault(file.rpartition("/")[0], []).append(file)
            classes = {c: files for c, files in classes.items() if "validation/" not in c}

            def read(file: str, photos: zipfile.ZipFile = photos, encoder: Any = encoder) -> Tensor:
                return encoder.transform(Image.open(io.BytesIO(photos.read(file))))

            for shots in (1, 5):
                rng, right, furthest = random.Random(SEED), 0.0, 0.0
                classifier = PrototypicalNetworks(encoder.net).eval()
                for _ in tqdm(range(episodes), desc=f"{name}, {shots} shots"):
                    files = [rng.sample(classes[c], shots + 3) for c in rng.sample(sorted(classes), 5)]
                    support = torch.stack([read(f) for row in files for f in row[:shots]])
                    query = torch.stack([read(f) for row in files for f in row[shots:]])
                    labels = torch.arange(5).repeat_interleave(shots)
                    episode = explain_episode(classifier, encoder.net.get_submodule(layer), query, support, labels)
                    classifier.process_support_set(support, labels)
                    with torch.no_grad():
                        furthest = max(furthest, (classifier(query) - episode.scores).abs().max().item())
                    right += (episode.predicted == torch.arange(5).repeat_interleave(3)).float().mean().item()
                lines.append(f"| {name} | {archive} | {shots} | {right / episodes:.3f} | {furthest:.1e} |")
    return lines


def contrastive(data: Path, count: int) -> list[str]:
    """Neighbours and collages with the encoders that train_contrastive made."""
    bank, labels = trained.read(data / "photos" / "cifar10.zip", "train")
    test, classes = trained.read(data / "photos" / "cifar10.zip", "test")
    chosen = pairs_of_classes(classes, count)
    images = trained.normalise(test[chosen.flatten()]).unflatten(0, (-1, 2))
    lines = [
        "| encoder | layer's route | same decision as lightly | FAM | its contrast | decomposition | its contrast |"
        " FAM of the neighbours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in tqdm(LAYERS, desc="contrastive"):
        for title, model in ((name, trained.load(name)), (f"{name}, untrained", _untrained(name))):
            fam = FeatureActivationMap(Embedding(model), LAYERS[name](model))
            with torch.no_grad():
                stored, z = trained.embeddings(model, bank), trained.embeddings(model, test)
            nearest = nearest_references(z, stored, labels, trained.NEIGHBOURS, trained.TEMPERATURE)
            theirs = knn_predict(z, stored.T, labels, 10, trained.NEIGHBOURS, trained.TEMPERATURE)[:, 0]
            both = collages(images)
            left, right = fam.embed(images[:, 0]), fam.embed(images[:, 1])
            references = torch.cat([left, right])
            numbers = torch.arange(len(both))
            shares = [
                right_place(
                    method.attribute(both, numbers, reference_embedding=references, contrast=a),
                    method.attribute(both, numbers + len(both), reference_embedding=references, contrast=b),
                )
                for method in (fam, SimilarityDecomposition(Embedding(model), LAYERS[name](model)))
                for a, b in ((None, None), (numbers + len(both), numbers))
            ]
            near = nearest.reference_embedding[chosen]
            same = (nearest.predicted == theirs).float().mean().item()
            route = fam.route(both[:2])
            shares.append(right_place(*(fam.attribute(both, reference_embedding=near[:, i]) for i in (0, 1))))
            lines.append(f"| {title} | {route} | {same:.4f} | {_row(shares)} |")
    return lines


def sentences(data: Path, count: int) -> list[str]:
    """Collages of two classes, and CLIP's sentences about them."""
    test, classes = trained.read(data / "photos" / "cifar10.zip", "test")
    chosen = pairs_of_classes(classes, count)
    both = collages(trained.normalise(test[chosen.flatten()]).unflatten(0, (-1, 2)))
    tokens = trained.tokenize([f"a photo of a {name}" for name in trained.CLASSES])
    lines = [
        "| CLIP | largest difference from its logits | FAM | its contrast | decomposition | its contrast |",
        "|---|---|---|---|---|---|",
    ]
    for title, model in (("trained", trained.load("clip")), ("untrained", _untrained("clip"))):
        methods = [
            kind(model.get_image_features, LAYERS["clip"](model), output_selector=lambda output: output.pooler_output)
            for kind in (FeatureActivationMap, SimilarityDecomposition)
        ]
        with torch.no_grad():
            text = model.get_text_features(tokens).pooler_output
            logits = model(input_ids=tokens, pixel_values=both).logits_per_image / model.logit_scale.exp()
        scores = F.normalize(methods[0].embed(both)) @ F.normalize(text).T
        names, others = classes[chosen], classes[chosen].flip(1)
        shares = [
            right_place(
                *(
                    method.attribute(both, names[:, i], reference_embedding=text, contrast=other)
                    for i, other in enumerate(others.unbind(1) if contrast else (None, None))
                )
            )
            for method in methods
            for contrast in (False, True)
        ]
        lines.append(f"| {title} | {(scores - logits).abs().max():.1e} | {_row(shares)} |")
    return lines


def retrieval(data: Path, load: Callable[[str], Any], count: int) -> list[str]:
    """A search for collages of two photos of clothing among the photos."""
    encoder = load("mobilenet_v2_imagenet")
    with zipfile.ZipFile(data / "photos" / "clothing.zip") as photos:
        files = sorted(n for n in photos.namelist() if "test/" in n and n.endswith(".jpg"))
        labels = torch.tensor([sorted({f.split("/")[-2] for f in files}).index(f.split("/")[-2]) for f in files])
        gallery = torch.stack(
            [encoder.transform(Image.open(io.BytesIO(photos.read(f)))) for f in tqdm(files, desc="photos")]
        )
    with torch.no_grad():
        vectors = torch.cat([encoder.net(batch) for batch in gallery.split(32)])
    both = collages(gallery[pairs_of_classes(labels, count)])
    lines = [
        "| index | largest difference from faiss | route | queries with both photos in 10 hits | FAM | contrast |",
        "|---|---|---|---|---|---|",
    ]
    D = vectors.shape[1]
    for title, index, similarity in (
        ("IndexFlatIP, cosine", faiss.IndexFlatIP(D), "cosine"),
        ("IndexFlatL2", faiss.IndexFlatL2(D), None),
        ("IndexHNSWFlat, L2", faiss.IndexHNSWFlat(D, 32), None),
    ):
        stored = F.normalize(vectors) if similarity else vectors
        index.add(stored.numpy())
        found = explain_retrieval(both, index, encoder.net, encoder.layer, k=10, similarity=similarity)
        with torch.no_grad():
            z = encoder.net(both)
        scores, _ = index.search((F.normalize(z) if similarity else z).numpy(), 10)
        differ = np.abs(found.scores.numpy() - scores).max()
        plain, signed = [], []
        for row, pair in enumerate(pairs_of_classes(labels, count).tolist()):
            ranks = [(found.indices[row] == number).nonzero().flatten().tolist() for number in pair]
            if all(ranks):
                (a,), (b,) = ranks
                plain.append(right_place(found.maps[row, a][None], found.maps[row, b][None]))
                signed.append(
                    right_place(
                        found.contrast(a, b)[row],
                        found.contrast(b, a)[row],
                    )
                )
        lines.append(
            f"| {title} | {differ:.1e} | {found.route} | {len(plain)} of {len(both)} | {np.mean(plain):.3f} |"
            f" {np.mean(signed):.3f} |"
        )
    return lines


def _row(shares: list[float]) -> str:
    return " | ".join(f"{share:.3f}" for share in shares)


def _untrained(name: str) -> Any:
    torch.manual_seed(SEED)
    return trained.build(name).eval()


@click.command()
@click.option("--episodes", default=50, show_default=True, help="Few-shot episodes of each kind.")
@click.option("--count", default=200, show_default=True, help="Collages.")
def main(episodes: int, count: int) -> None:
    """Print what the four paths measure on the data in CAPTUM_FAM_DATA."""
    if not os.environ.get("CAPTUM_FAM_DATA"):
        raise click.ClickException("CAPTUM_FAM_DATA is not set: name the folder with encoders.py and photos/")
    data = Path(os.environ["CAPTUM_FAM_DATA"])
    load = partial(pretrained, data)
    for title, lines in (
        ("Few-shot", few_shot(data, load, episodes)),
        ("Contrastive", contrastive(data, count)),
        ("Retrieval", retrieval(data, load, count // 4)),
        ("Sentences", sentences(data, count)),
    ):
        click.echo("\n".join([f"\n{title}\n", *lines]))


if __name__ == "__main__":
    main()
