"""The command ``longalign export``: exports a checkpoint for diffusers and the Hub."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from longalign.files.paths import check_unexported, checkpoint_file

EXAMPLES = """
    longalign export runs/reward out/model
    longalign export runs/reward out/model --metrics table.json --license openrail++
    longalign export runs/reward out/model --push-to-hub owner/name --private
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder for its newest checkpoint"
    )
    parser.add_argument("output", metavar="OUT", help="output folder; must not contain a checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in OUT")
    about = "a table written by `longalign eval --json`, for the model card"
    parser.add_argument("--metrics", metavar="FILE", help=about)
    parser.add_argument("--license", metavar="NAME", help="license identifier for the model card, as on the Hub")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="also upload the export to this repository")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def run(args: Namespace) -> None:
    """Exports a checkpoint for diffusers and prints the written files. With ``--push-to-hub``, uploads them too."""
    if args.private and not args.push_to_hub:
        raise ValueError("--private only applies to --push-to-hub; remove it, or add --push-to-hub OWNER/NAME")
    checkpoint_file(Path(args.checkpoint))  # fail before heavy imports
    if not args.overwrite:
        check_unexported(Path(args.output))
    from longalign.checkpoints import publish, upload

    for path in publish.export(args.checkpoint, args.output, args.metrics, args.license, overwrite=args.overwrite):
        print(path)
    if args.push_to_hub:
        print(upload.push_to_hub(args.output, args.push_to_hub, args.private))
