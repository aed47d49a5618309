"""``longalign new-plugin``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

EXAMPLES = """
    longalign new-plugin aesthetics --kind reward
    longalign new-plugin clauses --kind segmenter --to plugins
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("name", help="name of the part, in kebab case; the package is longalign-NAME")
    kinds = ("reward", "encoder", "segmenter", "trainer", "data", "backbone")
    parser.add_argument("--kind", choices=kinds, required=True, metavar="KIND", help=", ".join(kinds))
    parser.add_argument("--to", default=".", metavar="DIR", help="folder to write the package into (.)")


def run(args: Namespace) -> None:
    """Writes the package of a new plugin, and prints what to do next."""
    from longalign.testing.new_plugin import new_plugin

    folder = new_plugin(args.name, args.kind, args.to)
    print(f"wrote {folder}\nnext: pip install -e '{folder}[test]' && pytest {folder}")
