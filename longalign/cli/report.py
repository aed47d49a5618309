"""The command ``longalign report``: writes an HTML page about runs, images and tables."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from longalign.cli.options import positive
from longalign.names import count

EXAMPLES = """
    longalign report runs/reward --output report.html
    longalign report eta-0=runs/a eta-1=runs/b --output report.html
    longalign report table.json --output report.html
    longalign report runs/demo --output report.html
"""


def add_options(parser: ArgumentParser) -> None:
    about = (
        "a run, images of `longalign generate`, the --json of `longalign eval`, a demo or an ablation; NAME=SOURCE "
        "names a run or a model"
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=about)
    parser.add_argument("--output", required=True, metavar="FILE", help="the .html file to write")
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument("--examples", type=positive, metavar="N", help="prompts to show with images (all)")
    about = "megabytes of all images together; they are compressed to fit (8)"
    parser.add_argument("--megabytes", type=positive, default=8, metavar="N", help=about)


def run(args: Namespace) -> None:
    """Writes an HTML page about runs, images and tables, and prints its number of prompts and its file size."""
    output = Path(args.output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output expects an .html file, got '{output}'")
    from longalign.evaluation.report import write_report
    from longalign.evaluation.sources import read_sources

    contents = read_sources(args.sources, args.examples)
    if args.title:
        contents["title"] = args.title
    write_report(output, **contents, budget=args.megabytes * 1_000_000)
    print(f"{output}: {count(len(contents['examples']), 'prompt')}, {output.stat().st_size / 1e6:.1f} MB")
