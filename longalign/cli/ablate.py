"""The command ``longalign ablate``: trains and compares variants of a config."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from longalign.ablation.cells import parse_vary, read_cells
from longalign.ablation.run import ablate
from longalign.cli.metrics import metric_configs
from longalign.cli.options import PROMPTS_HELP, add_device, add_metrics, add_overrides, finite, positive
from longalign.config.changes import override, parse_assignments
from longalign.config.solvers import SOLVERS

EXAMPLES = """
    longalign ablate examples/mini-align.yaml --vary encoder.sot=all,first --metric facts --output runs/sot
    longalign ablate run.yaml --vary rewards.0.omega=0,0.3,1 --vary loop.lr=1e-4,3e-4 --seeds 5 \\
      --prompts prompts.txt --reward pickscore --output runs/omega
    longalign ablate run.yaml --cells cells.yaml --metric facts --jobs 2 --output runs/cells
    longalign ablate run.yaml --vary encoder.eot=last,all --no-train --metric facts --output runs/untrained
"""


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("config", help="the base config, a .yaml or .json file or a checkpoint")
    add_overrides(parser)
    grid = parser.add_mutually_exclusive_group(required=True)
    about = "a config path and its values; may be repeated, the cells are the product"
    grid.add_argument("--vary", action="append", metavar="PATH=VALUE,VALUE", help=about)
    about = "a .yaml or .json file with `vary` (path: values) or `cells` (name: changes, or a list of changes)"
    grid.add_argument("--cells", metavar="FILE", help=about)
    add("--seeds", type=positive, default=3, help="training seeds, counted from the config's seed (3)")
    add("--no-train", action="store_true", help="measure the base model of each cell, without training")
    add_metrics(parser)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", metavar="[SET:]PATH", help=f"{PROMPTS_HELP} (held-out prompts of the data)")
    prompts.add_argument("--num-prompts", type=positive, default=64, help="number of held-out prompts (64)")
    add("--images", type=positive, default=1, help="images per prompt, from the same noise in every cell (1)")
    add("--num-steps", type=positive, default=25, help="sampling steps (25)")
    add("--guidance", type=finite, default=7.5, help="classifier-free guidance scale (7.5)")
    add("--solver", choices=SOLVERS, default="unipc", metavar="NAME", help=f"one of {', '.join(SOLVERS)} (unipc)")
    add("--batch", type=positive, default=8, help="images sampled or measured at a time (8)")
    add("--jobs", type=positive, help="runs at a time, each in its own process (the number of GPUs, at least 1)")
    add_device(parser)
    add("--output", required=True, metavar="DIR", help="folder of the ablation; the same command continues in it")


def run(args: Namespace) -> int:
    """Trains and measures the variants of a config, and prints a table that compares them.

    Returns 130 after an interruption, 1 if the training or measuring of a variant failed, else 0.
    """
    grid: dict[str, Any] = read_cells(args.cells) if args.cells else {"vary": parse_vary(args.vary)}
    result = ablate(
        override(args.config, parse_assignments(args.overrides)),
        **grid,
        metrics=metric_configs(args.metric, args.reward),
        output=args.output,
        seeds=args.seeds,
        prompts=args.prompts,
        num_prompts=args.num_prompts,
        images=args.images,
        num_steps=args.num_steps,
        guidance=args.guidance,
        solver=args.solver,
        batch_size=args.batch,
        train=not args.no_train,
        jobs=args.jobs,
        device=args.device,
    )
    if result.table is not None:
        print(result.table.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None), end="")
        print(f"\nreport: {result.output / 'report.html'}")
    for name, error in result.failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if result.interrupted:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 1 if result.failed else 0
