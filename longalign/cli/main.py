"""The command ``longalign``. ``--help``, ``list``, ``describe`` and config errors do not import torch."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from textwrap import dedent, fill
from types import ModuleType
from typing import Any

from longalign.cli.parser import Parser, wait_for_first_process

COMMANDS = {
    "train": "train from a config: build its parts, train, write checkpoints",
    "cache": "precompute latents and text states for training",
    "generate": "generate images from prompts with a checkpoint, a config's base model or a stock diffusers pipeline",
    "arrange": "copy generated images to where the official scorer of a prompt set reads them",
    "score": "score images against their prompts with rewards, optionally generating them first",
    "eval": "compare models on the same prompts and seeds, with 95% confidence intervals",
    "ablate": "train and compare variants of a config over several training seeds",
    "report": "write one HTML page of runs, images and tables: curves, intervals, images sentence by sentence",
    "compute-direction": "compute the common direction of a reward's text embeddings over a corpus, and print the "
    "distribution of eta",
    "list": "list available parts: kind, name, providing package and description",
    "describe": "describe a kind, a part and its keys, the keys of a run, or a config with all its defaults",
    "examples": "list the bundled example configs, print one, or copy them",
    "convert": "convert published weights to a checkpoint, and to a LoRA that diffusers loads",
    "export": "export a checkpoint for diffusers, with its adapter and a model card, and optionally upload it",
    "new-plugin": "write the package of a plugin: a part that works, its test, an example config",
    "demo": "train on the synthetic scenes and compare held-out long captions before and after",
    "doctor": "check the installation, and print versions, settings and results for a bug report",
}
"""Name of each command -> summary. Each command is a module of `longalign.cli`, imported when it is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command of ``longalign`` and returns the exit status of the process.

    The status is 0 for success, 1 if a check or a run within the command failed, 2 for an error that the user can fix,
    and 128 plus the signal's number after a signal (130 after Ctrl-C). The message of an error with status 2 is
    printed; other errors are raised.

    Args:
        argv: the arguments after ``longalign``; those of the process if None.
    """
    args = parse(list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_LogHandler()])
    try:
        return command_module(args.command).run(args) or 0
    except BrokenPipeError:  # the reader, e.g. head, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = _user_message(error, args)
        if args.traceback or message is None:
            raise
        wait_for_first_process()
        print(f"longalign {args.command}: {message}", file=sys.stderr)
        return 2


def _user_message(error: Exception, args: argparse.Namespace) -> str | None:
    """Returns the message to print for an error that the user can fix, or None for any other error."""
    from longalign.errors import full_message, is_out_of_memory

    if isinstance(error, (ValueError, OSError)):
        return full_message(error)
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        return f"this command needs the package '{error.name}', which is not installed; install it with pip"
    if is_out_of_memory(error):
        advice = [f"--batch below {args.batch}"] if getattr(args, "batch", 1) > 1 else []
        advice += ["a smaller --size"] if hasattr(args, "size") else []
        advice += ["--dtype bfloat16"] if hasattr(args, "dtype") and args.dtype is None else []
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"out of memory ({reason})" + (f"; try {', '.join(advice)}" if advice else "")
    return None


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the parsed options of a command line. Their attribute ``command`` is the name of the command.

    Exits the process for ``--help``, ``--version`` and invalid calls.
    """
    at = next((i for i, text in enumerate(argv) if not text.startswith("-")), len(argv))
    parser = top_level_parser()
    if at == len(argv):
        parser.parse_args(argv)
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    if argv[at] not in COMMANDS:
        from longalign.errors import suggestion

        hint = suggestion(argv[at], COMMANDS) or f"; available: {', '.join(COMMANDS)}"
        parser.error(f"no command '{argv[at]}'{hint}")
    return command_parser(argv[at]).parse([*argv[:at], *argv[at + 1 :]])


def command_module(name: str) -> ModuleType:
    """Imports and returns the module of a command, with ``EXAMPLES``, ``add_options(parser)`` and ``run(args)``."""
    return import_module(f"longalign.cli.{name.replace('-', '_')}")


def command_parser(name: str) -> Parser:
    """Returns the argument parser of one command, with its summary and examples as help."""
    module, about = command_module(name), COMMANDS[name]
    examples = "\n".join(f"  {line}" for line in dedent(module.EXAMPLES).strip().splitlines())
    parser = Parser(
        prog=f"longalign {name}",
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name)
    module.add_options(parser)
    return parser


def top_level_parser() -> Parser:
    """Returns the argument parser of ``longalign`` without a command, whose help lists the commands."""
    width = max(map(len, COMMANDS))
    lines = [
        fill(about, 100, initial_indent=f"  {name:{width}} ", subsequent_indent=" " * (width + 3))
        for name, about in COMMANDS.items()
    ]
    last = "Run `longalign COMMAND --help` for the options and examples of a command."
    parser = Parser(
        prog="longalign",
        usage="longalign COMMAND ...",
        description="Long-text alignment of text-to-image diffusion models.",
        epilog="\n".join(["commands:", *lines, "", last]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    return parser


class _LogHandler(logging.StreamHandler):
    """Log handler that writes each message to the standard error, on a line of its own above a tqdm progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # not imported without a bar
        with nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(self.stream):
            super().emit(record)


class _Version(argparse.Action):
    """Argparse action that prints the version and exits. The version is only read when the action is called."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        from importlib.metadata import version

        print(f"longalign {version('longalign')}")
        parser.exit()
