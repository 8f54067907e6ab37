"""
The options of the commands and their help. Help does not wait for torch: the code of a command is imported when it is
called.
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
    """Show which parts of an image make its embedding similar to another's."""


@command.command()
@click.option("-o", "--output", type=Path, default=Path("captum_fam_demo.png"), show_default=True, help="PNG to write.")
def demo(output: Path) -> None:
    """
    Explain a collage of photographs, without a network.

    Uses the bundled encoder. Writes a figure, and beside it a page to explore in a browser: OUTPUT with .html
    instead of .png.
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
            help="bundled; torchvision:NAME; timm:NAME; open_clip:NAME/PRETRAINED or open_clip:local-dir:PATH; hf:PATH"
            " or sentence-transformers:PATH (a folder of the library, or a name on huggingface.co); or"
            " module.path:factory, your own function without arguments that returns a module: its code is run, and a"
            " module in the current folder comes first.",
        ),
        click.option("--weights", type=Path, help="State dict for the encoder, a file of torch.save."),
        click.option(
            "--layer",
            help="Dotted name of the layer to explain.  [default: the last module with a map, or tokens of one, that"
            " the embedding depends on]",
        ),
        click.option(
            "--similarity",
            type=click.Choice(["cosine", "dot", "euclidean"]),
            default="cosine",
            show_default=True,
            help="How embeddings are compared.",
        ),
        click.option(
            "--size",
            type=click.IntRange(1, 4096),
            help="Height and width in pixels that images are resized to.  [default: the encoder's]",
        ),
        click.option("--device", default="cpu", show_default=True, help="A torch device, such as cuda."),
        click.option(
            "--mean",
            type=float,
            nargs=3,
            help="Mean of the RGB channels in [0, 1].  [default: the encoder's; ImageNet's for your own]",
        ),
        click.option(
            "--std",
            type=float,
            nargs=3,
            help="Standard deviation of the RGB channels.  [default: the encoder's; ImageNet's for your own]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@command.command()
@click.argument("pairs", nargs=-1, required=True, metavar="PAIRS...")
@click.option("-o", "--output", type=Path, required=True, help="Folder of Parquet files to write, or to continue.")
@click.option("--root", default=".", metavar="PATH", help="Where relative paths start.  [default: the current folder]")
@click.option(
    "--neighbours",
    type=click.IntRange(1),
    help="Instead of all pairs of the images: pair each with this many others, the most similar ones.",
)
@click.option(
    "--sides",
    type=click.Choice(["query", "reference", "both"]),
    default="query",
    show_default=True,
    help="Which images get maps.",
)
@click.option(
    "--method",
    default="FeatureActivationMap",
    show_default=True,
    help="A method that explains similarities, such as SimilarityDecomposition or CorrespondenceMap.",
)
@click.option(
    "--contrast",
    type=click.Choice(["self"]),
    help="self: explain what a match has beyond the match of the image with itself.",
)
@click.option("--threshold", type=float, help="Explain why scores lie above or below this number.")
@click.option(
    "--reference-embeddings",
    type=Path,
    help="Embeddings instead of the references' images: a .npy file (N, D), and the column reference has numbers of"
    " rows, from 0; a .parquet file with the columns id and embedding, and the column reference has ids; or an index"
    " of faiss that ends in .index or .faiss.",
)
@click.option("--errors", type=Path, help="CSV file to write, with the pairs that failed.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where the job runs: on this machine, or on a Ray cluster whose nodes all see the files.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="How many processes, each with its own encoder.  [default: one for each CPU, or each GPU with --device cuda]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="How many images go through the encoder at a time.",
)
@click.option(
    "--part-size",
    type=click.IntRange(1),
    help="Pairs in each file; a stop loses at most one unfinished file of each worker.  [default: 512, fewer for a"
    " short list]",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the encoder; maps are computed in float32.  [default: as it is loaded, usually float32]",
)
@encoder_options
def batch(**options: Any) -> int:
    """
    Explain many pairs of images, as a job.

    PAIRS is a list of pairs: a Parquet or CSV file with the columns query, reference and, if you like, id. Or it is
    images: a folder, a pattern or their names; then each image is paired with each other, or with its --neighbours.

    The folder OUTPUT gets a row for each pair, with its score and its maps, or with the error. You can stop the job at
    any moment; started again, it finishes what is left. The exit status is 1 if some pairs failed, 2 if all did.
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
    help="Figure to write: PNG, PDF or SVG; or HTML, for the page that explore makes.  [default: QUERY_fam.png beside"
    " the query]",
)
@click.option(
    "--text", "texts", multiple=True, metavar="SENTENCE", help="A sentence to compare with; any number of times."
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="A class of captum_fam, for one row of the figure; any number of times.  [default: FeatureActivationMap,"
    ' SimilarityDecomposition with "self", CorrespondenceMap]',
)
@click.option(
    "--contrast",
    help="What to compare each reference with: the number of another reference, from 1; rest, the mean of the others;"
    " or self, the match of the query with itself.",
)
@click.option("--threshold", type=float, help="Explain why each score lies above or below this number.")
@click.option("--json", "as_json", is_flag=True, help="Print scores, layer, encoder and map statistics as JSON.")
@click.option("--json-maps", is_flag=True, help="Print the same, with all values of the maps.")
@encoder_options
def explain(references: Sequence[Path], texts: Sequence[str], **options: Any) -> int:
    """
    Explain why an image is similar to others.

    Compares the image QUERY with each REFERENCE and each --text, and writes one figure with the scores. Its rows show
    what the query has in common with each reference (FAM); what is particular to this match ("self", not for
    euclidean); and which places look alike (more than with the other references, if there are any). Below are the same
    maps of the references. Sentences have no maps of their own, and are numbered after the images.
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
@click.option("-o", "--output", type=Path, help="HTML file to write.  [default: QUERY_explore.html beside the query]")
@click.option(
    "--control",
    type=Path,
    help="An image that has nothing to do with the query.  [default: the least similar of the package's photographs]",
)
@encoder_options
def explore(**options: Any) -> int:
    """
    Make a page to explore matching places.

    Point at a place of the image QUERY to see which places of a REFERENCE match it. The page is one file, which any
    browser opens without a network. Transformers take a minute or more on a CPU.
    """
    from captum_fam.cli._explore import explore as work

    with _interrupt.raised():
        return work(**options)


@command.command()
@click.argument("query", type=Path)
@click.argument("reference", type=Path)
@click.option(
    "-o", "--output", type=Path, help="Figure to write: PNG, PDF or SVG.  [default: QUERY_compare.png beside the query]"
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    help=f"A class of captum_fam or captum.attr, for one column; any number of times.  [default: {', '.join(DEFAULT)}]",
)
@encoder_options
def compare(**options: Any) -> None:
    """
    Compare attribution methods on two images.

    Explains the similarity of the images QUERY and REFERENCE. Writes one figure: a row for each of the two images, a
    column for each method.
    """
    from captum_fam.cli._compare import compare as work

    with _interrupt.raised():
        work(**options)
