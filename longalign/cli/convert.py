"""The command ``longalign convert``: converts published weights to a checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

EXAMPLES = """
    hf download luping-liu/LongSD --local-dir LongSD
    longalign convert longsd LongSD runs/longsd
    longalign convert longsd LongSD runs/longsd-align --align-only
    longalign generate --checkpoint runs/longsd --prompts prompts.txt --output out
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("model", choices=["longsd"], help="longsd: the files of luping-liu/LongSD")
    parser.add_argument("source", metavar="DIR", help="the folder of the published files")
    parser.add_argument("output", metavar="OUT", help="output folder; must not contain a checkpoint")
    parser.add_argument("--align-only", action="store_true", help="omit the reward stage")
    about = "Hub id or local folder of the base model (stable-diffusion-v1-5/stable-diffusion-v1-5)"
    parser.add_argument("--backbone", metavar="CHECKPOINT", help=about)
    parser.add_argument("--t5", metavar="CHECKPOINT", help="Hub id or local folder of T5 (google-t5/t5-large)")


def run(args: Namespace) -> None:
    """Converts LongAlign's published weights to a checkpoint of this library, and prints the path of the new file."""
    from longalign.checkpoints.convert import convert_longsd

    checkpoints = {key: value for key in ("backbone", "t5") if (value := getattr(args, key)) is not None}
    print(convert_longsd(args.source, args.output, align_only=args.align_only, **checkpoints))
