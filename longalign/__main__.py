"""``python -m longalign``: the same as the command ``longalign``."""

from longalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
