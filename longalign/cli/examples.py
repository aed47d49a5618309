"""The command ``longalign examples``: lists, prints or copies the bundled examples."""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from textwrap import shorten

from longalign.errors import suggestion
from longalign.runtime import examples_folder

EXAMPLES = """
    longalign examples
    longalign examples mini-align.yaml
    longalign examples mini-align.yaml --to .
    longalign examples --to examples
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default=None, metavar="NAME", help="one of the examples")
    parser.add_argument("--to", metavar="FOLDER", help="copy the example, or all of them, into this folder")


def run(args: Namespace) -> None:
    """Lists the bundled examples (configs, scripts, notebooks), prints one, or copies one or all into a folder."""
    folder = examples_folder()
    paths = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "__init__.py"}
    if args.name is not None and args.name not in paths:
        hint = suggestion(args.name, paths) or f"; available: {', '.join(paths)}"
        raise ValueError(f"no example '{args.name}'{hint}")
    if args.to is not None:
        _copy(paths.values() if args.name is None else [paths[args.name]], Path(args.to))
    elif args.name is not None:
        print(paths[args.name].read_text(encoding="utf-8"), end="")
    else:
        width = max(map(len, paths))
        summary_width = max(40, shutil.get_terminal_size().columns - width - 2)
        for name, path in paths.items():
            print(f"{name:{width}}  {shorten(_summary(path), summary_width, placeholder=' ...')}".rstrip())


def _copy(files: Iterable[Path], folder: Path) -> None:
    """Copies files into a folder, created if needed, and prints the new paths.

    Raises ValueError, before anything is copied, if the folder has a different file of the same name.
    """
    targets = {path: folder / path.name for path in files}
    for path, target in targets.items():
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise ValueError(
                f"{target} exists and differs from the example; choose a different folder, or remove this file"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for path, target in targets.items():
        shutil.copyfile(path, target)
        print(target)


def _summary(path: Path) -> str:
    """Returns a one-line summary of an example.

    It is the first sentence of the leading comment of a config or shell script, the title of a notebook, or the first
    line of any other file.
    """
    if path.suffix == ".ipynb":
        title = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        return "".join(title).partition("\n")[0].lstrip("# ")
    if path.suffix not in (".yaml", ".sh"):
        return path.read_text(encoding="utf-8").strip('"').partition("\n")[0]
    lines = path.read_text(encoding="utf-8").removeprefix("#!/bin/sh\n").splitlines()
    lines = takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ").strip() for line in lines).partition(". ")[0].removesuffix(".")
