"""``longalign compute-direction``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from longalign.cli.options import REWARD_HELP, add_device, positive
from longalign.cli.rewards import reward_configs
from longalign.config.checks import check_parts
from longalign.data.lines import read_prompts

EXAMPLES = """
    longalign compute-direction --reward denscore --prompts corpus.txt --output denscore-direction.safetensors
    longalign train run.yaml rewards.0.direction=denscore-direction.safetensors
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--reward", required=True, metavar="REWARD", help=REWARD_HELP)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="the corpus: .txt, one per line, or .jsonl")
    parser.add_argument("--batch", type=positive, default=64, help="prompts encoded at a time (64)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .safetensors file to write")
    add_device(parser)


def run(args: Namespace) -> None:
    """Computes and writes a common direction."""
    (config,) = reward_configs([args.reward]).values()
    prompts = [p for p in read_prompts(args.prompts) if p]
    check_parts({config.name: config})
    from longalign.rewards.reweighted import direction
    from longalign.runtime import Runtime

    runtime = Runtime.detect(device=args.device)
    print(direction.write_direction(config, prompts, args.output, runtime, args.batch).report())
