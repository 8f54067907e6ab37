"""
What the commands take, and say of themselves. Who asks for help does not wait for torch: what a command does is
imported when it is called.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from captum_fam import __version__, _interrupt
from captum_fam.cli._say import say
from captum_fam.methods import DEFAULT


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def command() -> None:
    """Which parts of an image make its embedding similar to another's."""


@command.command()
@click.option("-o", "--output", type=Path, default=Path("captum_fam_demo.png"), show_default=True, help="PNG to write.")
def demo(output: Path) -> None:
    """Explain a collage of photographs with the bundled encoder; needs no network.

    Writes a figure, and beside it a page to explore in a browser, OUTPUT with .html in place of .png.
    """
    from captum_fam.demo import demo_figure, demo_page
    from captum_fam.images import check_output, write_figure

    with _interrupt.raised():
        page = output.with_suffix(".html")
        check_output(output, ".png")
        check_output(page, ".html")
        figure, table = demo_figure()
        write_figure(figure, output)
        demo_page().save(page)
        click.echo("\n".join(table))
        click.echo()
        say(f"wrote {output}")
        say(f"wrote {page}: open it in a browser")


def encoder_options(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """The options of commands that explain images with an encoder."""
    options = [
        click.option(
            "--encoder",
            default="bundled",
            show_default=True,
            help="bundled, torchvision:NAME, timm:NAME, open_clip:NAME/PRETRAINED or open_clip:local-dir:PATH, hf:PATH"
            " or sentence-transformers:PATH (a folder of its library, or a name on huggingface.co) or"
            " module.path:factory, a function without arguments: its code is run, of a module in the current folder"
            " first.",
        ),
        click.option("--weights", type=Path, help="State dict of the encoder, as torch.save writes it."),
        click.option(
            "--layer",
            help="Dotted name.  [default: the last module with a map, or tokens of one, that the embedding depends on]",
        ),
        click.option(
            "--similarity", type=click.Choice(["cosine", "dot", "euclidean"]), default="cosine", show_default=True
        ),
        click.option(
            "--size",
            type=click.IntRange(1, 4096),
            help="Side in pixels that images are resized to.  [default: the encoder's]",
        ),
        click.option("--device", default="cpu", show_default=True, help="A torch device, such as cuda."),
        click.option(
            "--mean", type=float, nargs=3, help="Mean of the RGB channels in [0, 1].  [default: the encoder's]"
        ),
        click.option(
            "--std", type=float, nargs=3, help="Standard deviation of the RGB channels.  [default: the encoder's]"
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@command.command()
@click.argument("pairs", nargs=-1, required=True, metavar="PAIRS...")
@click.option("-o", "--output", type=Path, required=True, help="Folder of Parquet files to write, or to finish.")
@click.option("--root", default=".", metavar="PATH", help="Where relative paths start.  [default: the current folder]")
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
    help="Pairs in each file: what a stop can cost each worker.  [default: 512, of a short list fewer]",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the encoder; maps are computed in float32.  [default: as it is loaded, mostly float32]",
)
@encoder_options
def batch(**options: Any) -> int:
    """
    Explain pairs of images: those of a list, or of a folder.

    PAIRS is a list, Parquet or CSV with the columns query, reference and, if there is one, id. Or it
    is a folder, a pattern or the names of images: each with each other, or with its --neighbours.
    The folder OUTPUT gets a row for each pair: its score and its maps, or the error. Stopped at
    any moment and started again, it finishes what is left. The exit status is 1 if some pairs
    failed, 2 if all did.
    """
    from captum_fam.cli._batch import batch as work

    with _interrupt.raised():
        return work(**options)


@command.command()
@click.argument("query", type=Path)
@click.argument("references", type=Path, nargs=-1, metavar="[REFERENCE]...")
@click.option(
    "-o",
    "--output",
    type=Path,
    help="PNG, PDF or SVG, or HTML for the page that explore makes.  [default: QUERY_fam.png beside the query]",
)
@click.option("--text", "texts", multiple=True, metavar="SENTENCE", help="A reference in words; any number of times.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="A class of captum_fam, a row of the figure; any number of times.  [default: FeatureActivationMap,"
    ' SimilarityDecomposition with "self", CorrespondenceMap]',
)
@click.option(
    "--contrast",
    help='Why each reference rather than another: its number, from 1, or "rest" for the mean; or "self": beyond what'
    " the query has with itself.",
)
@click.option("--threshold", type=float, help="Why each score lies above or below this one.")
@click.option("--json", "as_json", is_flag=True, help="Print scores, layer, encoder and map statistics as JSON.")
@click.option("--json-maps", is_flag=True, help="The same, with all values of the maps.")
@encoder_options
def explain(references: Sequence[Path], texts: Sequence[str], **options: Any) -> int:
    """
    Explain the similarity of the image QUERY to each REFERENCE, and to each --text.

    Writes one figure with the scores: what the query has in common with each reference (FAM),
    what is particular to this match ("self", not for euclidean), which places look alike (less the
    other references, if there are any), and all this on the references. Sentences, which have no
    places, are numbered after the images.
    """
    if not references and not texts:
        raise ValueError("there is nothing to compare with: name an image as REFERENCE, or a sentence with --text")
    if not all(text.strip() for text in texts):
        raise ValueError("--text must be a sentence, but one of them is empty")
    from captum_fam.cli._explain import explain as work

    with _interrupt.raised():
        return work(references=references, texts=texts, **options)


@command.command()
@click.argument("query", type=Path)
@click.argument("references", type=Path, nargs=-1, required=True, metavar="REFERENCE...")
@click.option("-o", "--output", type=Path, help="HTML to write.  [default: QUERY_explore.html beside the query]")
@click.option(
    "--control",
    type=Path,
    help="An image that has nothing to do with the query.  [default: the least similar of the package's photographs]",
)
@encoder_options
def explore(**options: Any) -> int:
    """
    Make a page to explore which places of the image QUERY match those of each REFERENCE.

    The page is one file, which any browser opens without a network. Transformers take a minute or more on a CPU.
    """
    from captum_fam.cli._explore import explore as work

    with _interrupt.raised():
        return work(**options)


@command.command()
@click.argument("query", type=Path)
@click.argument("reference", type=Path)
@click.option(
    "-o", "--output", type=Path, help="PNG, PDF or SVG to write.  [default: QUERY_compare.png beside the query]"
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    help=f"A class of captum_fam or captum.attr, any number of times.  [default: {', '.join(DEFAULT)}]",
)
@encoder_options
def compare(**options: Any) -> None:
    """
    Compare attribution methods on the similarity of the images QUERY and REFERENCE.

    Writes one figure: a row for each of the two images, a column for each method.
    """
    from captum_fam.cli._compare import compare as work

    with _interrupt.raised():
        work(**options)
