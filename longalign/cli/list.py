"""The command ``longalign list``: lists the available parts (encoders, rewards and so on)."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from longalign.config.describe import parts_table

EXAMPLES = """
    longalign list
    longalign list encoders rewards
    longalign list --check
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("kinds", nargs="*", default=[], metavar="KIND", help="the kinds to list (all)")
    about = "like --verbose, but exit with status 1 if a part is broken"
    parser.add_argument("--check", action="store_true", help=about)
    parser.add_argument("--verbose", action="store_true", help="show the module and class of each part's config")


def run(args: Namespace) -> int:
    """Prints a table of the available parts (encoders, rewards and so on), and the errors of parts that fail to load.

    Returns 1 if ``--check`` is given and a part fails to load, else 0.
    """
    table, problems = parts_table(args.kinds, args.check or args.verbose)
    print(table)
    for problem in problems:
        print(f"broken: {problem}", file=sys.stderr)
    return 1 if problems and args.check else 0
