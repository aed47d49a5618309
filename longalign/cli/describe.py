"""The command ``longalign describe``: describes parts (encoders, rewards and so on), config keys and configs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from longalign.config.changes import override, parse_assignments
from longalign.config.describe import describe, describe_schema
from longalign.config.parsing import SOURCE_SUFFIXES
from longalign.config.run import to_yaml
from longalign.errors import redact_url

EXAMPLES = """
    longalign describe encoders
    longalign describe encoders clip-segment
    longalign describe run
    longalign describe run --json-schema > run.schema.json
    longalign describe run.yaml encoder=t5
    longalign describe runs/align/checkpoint-000500
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("topic", help="a kind, a part, 'run' or a key of it, a config file, or a checkpoint")
    about = "after a kind, the name of a part; after a config, changes to its values"
    parser.add_argument("details", nargs="*", default=[], metavar="NAME|key=value", help=about)
    parser.add_argument("--json-schema", action="store_true", help="with 'run': print its JSON schema, for editors")


def run(args: Namespace) -> None:
    """Prints the description of a kind of parts, a part or keys of a run.

    For a config file or checkpoint, prints the config in YAML, including defaults and the changes on the command line.
    """
    topic, details = args.topic, args.details
    if args.json_schema:
        print(describe_schema([topic, *details]))
    elif Path(topic).suffix in SOURCE_SUFFIXES or Path(topic).is_dir():
        print(redact_url(to_yaml(override(topic, parse_assignments(details)))), end="")
    else:
        print(describe(topic, *details))
