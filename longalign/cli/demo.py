"""The command ``longalign demo``: trains and evaluates models of synthetic scenes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from longalign.cli.options import add_device, positive
from longalign.config.run import load_config

EXAMPLES = """
    longalign demo
    longalign demo --output runs/other --prompts 256
    longalign demo --reward my-reward.yaml
"""


def add_options(parser: ArgumentParser) -> None:
    about = "folder for both runs, report.html and tables (runs/demo)"
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help=about)
    parser.add_argument("--align", metavar="FILE", help="config of the align stage (bundled by default)")
    parser.add_argument("--reward", metavar="FILE", help="config of the reward stage (bundled by default)")
    about = "number of held-out captions (128)"
    parser.add_argument("--prompts", type=positive, default=128, metavar="N", help=about)
    add_device(parser)


def run(args: Namespace) -> None:
    """Runs `longalign.demo.run_demo`, which also prints a table of metrics and the paths of report and images."""
    align, reward = (load_config(path) if path else None for path in (args.align, args.reward))
    from longalign.demo import run_demo

    run_demo(args.output, align, reward, args.prompts, device=args.device)
