"""The command ``longalign new-plugin``: writes an installable package with a new reward, metric or other part."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from longalign.testing.new_plugin import KINDS, new_plugin

EXAMPLES = """
    longalign new-plugin aesthetics --kind reward
    longalign new-plugin clauses --kind segmenter --to plugins
    longalign new-plugin symmetry --kind metric
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("name", help="name of the part, in kebab case; the package is longalign-NAME")
    parser.add_argument(
        "--kind", choices=[*KINDS, *KINDS.values()], required=True, metavar="KIND", help=", ".join(KINDS)
    )
    parser.add_argument("--to", default=".", metavar="DIR", help="folder to write the package into (.)")


def run(args: Namespace) -> None:
    """Writes an installable package with a new reward, metric or other part, and prints how to install and test it."""
    folder = new_plugin(args.name, args.kind, args.to)
    print(f"wrote {folder}\nnext: pip install -e '{folder}[test]' && pytest {folder}")
