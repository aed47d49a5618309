"""Runs the command ``longalign`` as ``python -m longalign``."""

from longalign.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
