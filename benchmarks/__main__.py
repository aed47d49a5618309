"""Runs the benchmarks in sequence. Each writes a table next to itself.

Run ``python benchmarks [NAME ...]``, with file names without ``.py``. The default is all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Runs the requested benchmarks; returns 1 if any of them failed."""
    names = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_") and path.stem != "compare")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names)}")
    requested = parser.parse_args().names
    for name in requested:
        if name not in names:
            parser.error(f"no benchmark '{name}'; available: {', '.join(names)}")
    results = {}
    for name in requested or names:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=False).returncode
        results[name] = f"{'done' if status == 0 else f'failed ({status})'} after {time.perf_counter() - start:.0f} s"
    print("\n".join(f"{name}: {result}" for name, result in results.items()))
    return int(any(result.startswith("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
