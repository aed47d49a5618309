"""The command ``longalign train``: trains from a config."""

from __future__ import annotations

import signal
from argparse import ArgumentParser, Namespace
from pathlib import Path

from longalign.cli.options import add_device, add_overrides
from longalign.config.changes import override, parse_assignments
from longalign.config.checks import check_files
from longalign.config.parsing import CONFIG_SUFFIXES
from longalign.files.paths import checkpoint_file

EXAMPLES = """
    longalign train examples/mini-align.yaml
    longalign train run.yaml loop.steps=200 output=runs/short
    longalign train run.yaml encoder=clip-truncate trainer.lora.rank=64
    longalign train run.yaml --resume
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("config", help="a .yaml or .json file, or a checkpoint to take the config from")
    add_overrides(parser)
    resuming = parser.add_mutually_exclusive_group()
    about = "resume from the newest checkpoint in the run's output folder"
    resuming.add_argument("--resume", action="store_true", help=about)
    resuming.add_argument("--resume-from", metavar="CHECKPOINT", help="resume from this checkpoint of the run")
    add_device(parser)


def run(args: Namespace) -> int:
    """Trains from a config and prints the last checkpoint.

    Returns 0, or after an interruption, 128 plus the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    config = override(args.config, parse_assignments(args.overrides))
    resume = Path(args.resume_from) if args.resume_from else Path(config.output) if args.resume else None
    from_checkpoint = Path(args.config).suffix not in CONFIG_SUFFIXES
    if resume is not None and (args.resume_from or from_checkpoint):
        checkpoint_file(resume)  # with --resume, a config file without a checkpoint starts a new run
    check_files(config, resumed=resume is not None)  # `fit` checks again, but only after importing torch
    from longalign.loop.fit import fit

    result = fit(config, device=args.device, resume=resume)
    print(f"step {result.step} of {config.loop.steps}: {result.checkpoint}")
    if result.interrupted:
        return 128 + (result.signal or signal.SIGINT)
    if config.backbone is not None:
        options = f"--checkpoint {result.checkpoint} --output {config.output}/images"
        print(f'next: longalign generate {options} --prompt "..."')
    else:
        print(f"next: longalign export {result.checkpoint} {config.output}/model")
    return 0
