"""Runs the benchmarks one after another, each of which writes a table beside itself.

Run ``python benchmarks [NAME ...]``, with names of files without ``.py``; all of them if none is given.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Runs what is asked for; returns 1 if one of them failed."""
    names = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names)}")
    asked = parser.parse_args().names
    for name in asked:
        if name not in names:
            parser.error(f"there is no benchmark '{name}'; there is {', '.join(names)}")
    ended = {}
    for name in asked or names:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        status = subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=False).returncode
        ended[name] = f"{'done' if status == 0 else f'failed ({status})'} after {time.perf_counter() - began:.0f} s"
    print("\n".join(f"{name}: {how}" for name, how in ended.items()))
    return int(any(how.startswith("failed") for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
