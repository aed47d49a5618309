"""The command ``longalign doctor``: checks the installation and prints a report for bug reports."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from longalign.checkpoints.redaction import redact_report, redacted
from longalign.cli.options import add_device
from longalign.diagnostics.checks import failed
from longalign.diagnostics.environment import environment
from longalign.diagnostics.installation import check_installation
from longalign.diagnostics.published import local_status

EXAMPLES = """
    longalign doctor
    longalign doctor --no-run
    longalign doctor --device cpu --json
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--no-run", action="store_true", help="do not run the bundled models")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_device(parser)


def run(args: Namespace) -> int:
    """Prints versions, settings, which published checkpoints are on this machine, and the results of checks.

    Returns 1 if a check failed, else 0.
    """
    facts, published = environment(), local_status()
    rows = check_installation(args.device, run_models=not args.no_run)
    report = {"environment": facts, "published files": published, "checks": [row.as_dict() for row in rows]}
    report = redacted(report, redact_report)
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 1 if failed(rows) else 0


def as_text(report: dict[str, Any]) -> str:
    """Returns the report as lines of text. ``report`` has the keys of the output of ``longalign doctor --json``."""
    lines = []
    for title in ("environment", "published files"):
        width = max(map(len, report[title]))
        lines += [title, *(f"  {name:{width}}  {value}" for name, value in report[title].items())]
    lines.append("checks")
    for row in report["checks"]:
        seconds = f", {row['seconds']:.1f} s" if row["seconds"] >= 0.05 else ""
        expected = f" (expected: {row['expected']})" if row["status"] == "failed" and row["expected"] else ""
        lines.append(f"  {row['status']:6}  {row['check']}: {row['result']}{expected}{seconds}")
    return "\n".join(lines)
