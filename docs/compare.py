"""Makes docs/compare.jpg: methods on the similarity of a collage to two of its photographs, bundled encoder."""

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    SimilarityScore,
    compare_attributions,
    visualize_comparison,
)
from captum_fam.bundled import bundled_encoder
from captum_fam.demo import another_view, collage, photographs
from captum_fam.images import to_tensor


def main() -> None:
    encoder = bundled_encoder()
    photos = dict(list(photographs().items())[:4])
    query = collage(list(photos.values()), 2)
    views = torch.stack([to_tensor(another_view(p), encoder.size, encoder.mean, encoder.std) for p in photos.values()])
    with torch.no_grad():
        score = SimilarityScore(encoder, encoder(views))
    x = to_tensor(query, 2 * encoder.size, encoder.mean, encoder.std).expand(2, -1, -1, -1)
    target = [list(photos).index(name) for name in ("cat", "coffee")]

    layer = encoder.features
    fam, alike = FeatureActivationMap(score, layer), CorrespondenceMap(score, layer)
    methods = {
        "FAM": fam,
        "FAM, contrast to the rest": lambda x, target: fam.attribute(x, target, contrast="rest"),
        "IntegratedDecomposition": "IntegratedDecomposition",
        "CorrespondenceMap\nless the rest": lambda x, target: alike.attribute(
            x, target, reference=views, contrast="rest"
        ),
        "LabelFreeActivationMap": "LabelFreeActivationMap",
        "LayerGradCam": "LayerGradCam",
        "Relax": "Relax",
    }
    maps = compare_attributions(score, layer, x, target, methods)
    titles = ["compared with the cat", "compared with the coffee"]
    figure, _ = visualize_comparison([query, query], maps, titles=titles, use_pyplot=False)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=70)
    Image.open(content).convert("RGB").save(Path(__file__).parent / "compare.jpg", quality=88)


if __name__ == "__main__":
    main()
