"""``captum-fam batch``: many pairs of images, as a job that can be stopped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from captum_fam.cli._common import encoder_options, say
from captum_fam.cli._explain import asked_of
from captum_fam.cli._rows import check_method

SOME_FAILED = 1  # the status, where others were explained


@click.command()
@click.argument("pairs", type=Path, nargs=-1, required=True, metavar="PAIRS...")
@click.option("-o", "--output", type=Path, required=True, help="Folder of Parquet files to write, or to finish.")
@click.option("--root", type=Path, default=Path(), help="Where relative paths start.  [default: the current folder]")
@click.option(
    "--neighbours", type=click.IntRange(1), help="Of a folder, each image with so many that are most similar to it."
)
@click.option(
    "--sides",
    type=click.Choice(["query", "reference", "both"]),
    default="query",
    show_default=True,
    help="Whose maps are made.",
)
@click.option(
    "--method",
    default="FeatureActivationMap",
    show_default=True,
    help="Any that explains similarities, such as SimilarityDecomposition or CorrespondenceMap.",
)
@click.option("--contrast", type=click.Choice(["self"]), help="What a match has beyond the image's match with itself.")
@click.option("--threshold", type=float, help="Why scores lie above or below this one.")
@click.option(
    "--reference-embeddings",
    type=Path,
    help="In place of the references' images: .npy (N, D), whose rows the column reference numbers from 0, or .parquet"
    " with the columns id and embedding.",
)
@click.option("--errors", type=Path, help="CSV file to write, of pairs that failed.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes, each with its own encoder.  [default: one for each CPU, or each GPU with --device cuda]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Images that go through the encoder at once.",
)
@click.option(
    "--part-size",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Pairs in each file: what a stop can cost each worker.",
)
@encoder_options
def batch(pairs: Sequence[Path], output: Path, **options: Any) -> int:
    """
    Explain pairs of images: those of a list, or of a folder.

    PAIRS is a list, Parquet or CSV with the columns query, reference and, if there is one, id. Or it
    is a folder, a pattern or the names of images: each with each other, or with its --neighbours.
    The folder OUTPUT gets a row for each pair: its score and its maps, or the error. Stopped at
    any moment and started again, it finishes what is left. The exit status is 1 if some pairs
    failed, 2 if all did.
    """
    try:
        from captum_fam.batch import explain_pairs
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'captum-fam[batch]'") from error

    asked = asked_of(options["contrast"], options["threshold"], [], [])
    check_method(options["method"], asked, options["similarity"], 1)
    found = explain_pairs(pairs, output, **options)
    if not found.explained:
        raise ValueError(
            f"none of {found.failed} pairs could be explained ({_kinds(found.failures)}), see {output}; the first:"
            f" {found.error}"
        )
    say(f"encoder {options['encoder']}" + (f", layer {found.layer}" if found.layer else ""))
    failed = f" ({_kinds(found.failures)}); the first: {found.error}" if found.failed else ""
    say(f"explained {found.explained} pairs, {found.failed} failed{failed}")
    say(f"wrote {output}")
    return SOME_FAILED if found.failed else 0


def _kinds(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in failures.items())
