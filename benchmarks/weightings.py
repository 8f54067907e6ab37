"""Chooses a weighting on half of the pictures (half 0), which faithfulness.py then measures on the other half.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.weightings

Candidates need one forward pass and no second reference: residuals with different shares (see study.residual), "self",
and the best match of places. The table goes to ``benchmarks/faithfulness/weightings.md``.
"""

import os
import warnings
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from benchmarks import study
from benchmarks.faithfulness import COMMAND, FOLDER, Settings, localisation
from benchmarks.pairs import pairs as pairs_of

HALF = 0
SHARES = (0.0, 0.5, 0.8, 0.9, 0.95, 1.0)
CANDIDATES = {
    **{
        name: study.METHODS[name]
        for name in (
            "FAM cosine",
            "FAM self",
            "SimilarityDecomposition",
            "decomposition self",
            "Grad-CAM",
            "LaFAM",
            "integrated",
            "best match",
            "match less others",
            "contrast with the rest",
        )
    },
    **{f"residual {share}": study.decomposition(dimension_weights=study.residual(share)) for share in SHARES},
}
COLUMNS = (
    ("medium", "right object"),
    ("medium", "rank accuracy"),
    ("photos", "pointing game"),
    ("photos", "rank accuracy"),
)


@click.command()
def main() -> None:
    """Print and write the mean over encoders for each candidate."""
    if not os.environ.get("CAPTUM_FAM_DATA"):
        raise click.ClickException("CAPTUM_FAM_DATA is not set: name the folder with encoders.py and photos/")
    data, settings = Path(os.environ["CAPTUM_FAM_DATA"]), Settings()
    warnings.filterwarnings("ignore")
    found: dict[tuple[str, str, str], list[float]] = {}
    names = [*dict.fromkeys([*study.GROUPS["weak"], "bundled"])]
    for name in tqdm(names, desc="encoders"):
        encoder = study.encoder(name, data)
        for source in ("medium",) if name == "protonet_omniglot" else ("medium", "photos"):
            count = settings.photos if source == "photos" else settings.pairs
            pairs = pairs_of(data, source, encoder.pictures, encoder.size, HALF, count)
            q = study.Question.of(encoder, pairs.images, pairs.references)
            for candidate, method in CANDIDATES.items():
                for metric, values in localisation(method(q), pairs).items():
                    found.setdefault((candidate, source, metric), []).append(values.mean().item())
    lines = [
        "# Candidate weightings",
        "",
        f"Made by `{COMMAND.replace('faithfulness', 'weightings')}` on half {HALF} of the pictures: means over"
        f" {len(names)} encoders (photos: {len(names) - 1}).",
        "",
        "From these numbers we chose what [the study](README.md) judges on the other half. The study explains methods",
        "and metrics. *residual r* takes r times what the image has with itself from the decomposition. With 0, it is",
        "`SimilarityDecomposition`; with 1, it is *decomposition self*.",
        "",
        f"| weighting | {' | '.join(f'{metric}, {source}' for source, metric in COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(
            f"| {candidate} | {' | '.join(f'{np.mean(found[(candidate, *column)]):.3f}' for column in COLUMNS)} |"
            for candidate in CANDIDATES
        ),
    ]
    (FOLDER / "weightings.md").write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
