"""The command ``longalign``. ``--help``, ``list``, ``describe`` and config errors do not import torch."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from textwrap import dedent, fill
from typing import Any

REPORT_DELAY = 10
"""Seconds that other processes wait for the first one on the machine to report an error."""

OVERRIDES_HELP = "changes to the config, as dotted path and value, e.g. encoder=t5 rewards.0.omega=0.0 loop.lr=1e-4"
PIPELINE_HELP = "a stock diffusers pipeline, Hub id or folder, run with its own text encoders and settings"
REWARD_HELP = "a reward's name, or its config as {name: ..., key: value} or as a .yaml or .json file; may be repeated"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, or 2 for invalid input."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from longalign.cli import commands

    try:
        return getattr(commands, args.run)(args) or 0
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
        _wait_for_first_process()
        print(f"longalign {args.command}: {message}", file=sys.stderr)
        return 2


def _user_message(error: Exception, args: argparse.Namespace) -> str | None:
    """Message for an error that the user can fix; None for a bug."""
    from longalign.errors import is_out_of_memory, redact_url

    if isinstance(error, (ValueError, OSError)):
        return redact_url("\n".join([str(error), *getattr(error, "__notes__", ())]))
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        return f"this command needs the package '{error.name}', which is not installed"
    if is_out_of_memory(error):
        advice = [f"--batch below {args.batch}"] if getattr(args, "batch", 1) > 1 else []
        advice += ["a smaller --size"] if hasattr(args, "size") else []
        advice += ["--dtype bfloat16"] if hasattr(args, "dtype") and args.dtype is None else []
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"out of memory ({reason})" + (f"; try {', '.join(advice)}" if advice else "")
    return None


def _wait_for_first_process() -> None:
    """Delays the error report of all processes but the first one on the machine.

    Before the process group is initialized, all processes usually fail with the same error. The first one reports it,
    and the launcher then ends the others. A process that survives the delay has an error of its own.
    """
    initialized = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
    if not initialized and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(REPORT_DELAY)


class _Parser(argparse.ArgumentParser):
    """Parser with suggestions for unknown or misspelt options."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.add_argument("--traceback", action="store_true", help="show the traceback of an error")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parses options and positional arguments in any order."""
        for text in takewhile(lambda text: text != "--", argv):
            name = text.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in self._option_string_actions):
                self.error(self._unknown_option(name))  # checked before missing options: one may be misspelt
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> Any:
        _wait_for_first_process()
        super().error(message)

    def _unknown_option(self, name: str) -> str:
        from longalign.errors import suggestion

        takes_keys = any(action.dest == "overrides" for action in self._actions)
        if takes_keys and (path := _config_path(name.lstrip("-"))):
            return f"no option {name}; set config keys as path=value, here {path}=..."
        hint = suggestion(name, self._option_string_actions)
        return f"no option {name}{hint or f'; {self.prog} --help lists the available options'}"


def _config_path(key: str) -> str | None:
    """Dotted path of a config key, given in full or by its last step; None if there is no such key."""
    from longalign.config.run import RunConfig

    key = key.replace("-", "_")
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        if key == name or key.startswith(f"{name}.") or key in inner:
            return f"{name}.{key}" if key in inner else key
    return None


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line. Exits for --help, --version and invalid calls."""
    parser = build_parser()
    commands = parser.commands
    at = next((i for i, text in enumerate(argv) if not text.startswith("-")), len(argv))
    if at == len(argv):
        parser.parse_args(argv)
        parser.error(f"expected a command: {', '.join(commands)}")
    if argv[at] not in commands:
        from longalign.errors import suggestion

        hint = suggestion(argv[at], commands) or f"; available: {', '.join(commands)}"
        parser.error(f"no command '{argv[at]}'{hint}")
    return commands[argv[at]].parse([*argv[:at], *argv[at + 1 :]])


class _Version(argparse.Action):
    """Prints the version and exits; the version is only read here."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        from importlib.metadata import version

        print(f"longalign {version('longalign')}")
        parser.exit()


class _Commands(_Parser):
    """Top-level parser; ``commands`` maps each command to its own parser."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.add_argument("--version", action=_Version, nargs=0, help="show the version")
        self.commands: dict[str, _Parser] = {}


def build_parser() -> _Commands:
    """Builds the parsers of all commands."""
    parser = _Commands(
        prog="longalign",
        usage="longalign COMMAND ...",
        description="Long-text alignment of text-to-image diffusion models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    summaries: dict[str, str] = {}

    def add(name: str, run: str, about: str, examples: str) -> argparse.ArgumentParser:
        text = "\n".join(f"  {line}" for line in dedent(examples).strip().splitlines())
        command = _Parser(
            prog=f"longalign {name}",
            description=about[0].upper() + about[1:].replace("%%", "%") + ".",
            epilog=f"examples:\n{text}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run, command=name)
        parser.commands[name], summaries[name] = command, about.replace("%%", "%")
        return command

    for define in (_train, _cache, _generate, _score, _eval, _direction, _list, _describe, _examples, _convert,
                   _export, _demo, _env):  # fmt: skip
        define(add)
    lines = [fill(about, 100, initial_indent=f"  {name:10} ", subsequent_indent=" " * 13)
             for name, about in summaries.items()]  # fmt: skip
    parser.epilog = "\n".join(
        ["commands:", *lines, "", "Run `longalign COMMAND --help` for the options and examples of a command."]
    )
    return parser


def _train(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "train",
        "train",
        "train from a config: build its parts, train, write checkpoints",
        """
        longalign train examples/mini-align.yaml
        longalign train run.yaml loop.steps=200 output=runs/short
        longalign train run.yaml encoder=clip-truncate trainer.lora.rank=64
        longalign train run.yaml --resume
        """,
    )
    command.add_argument("config", help="a .yaml or .json file, or a checkpoint to take the config from")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES_HELP)
    resuming = command.add_mutually_exclusive_group()
    resuming.add_argument(
        "--resume", action="store_true", help="resume from the newest checkpoint in the run's output folder"
    )
    resuming.add_argument("--resume-from", metavar="CHECKPOINT", help="resume from this checkpoint of the run")
    _device(command)


def _cache(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "cache",
        "cache",
        "precompute latents and text states for training",
        """
        longalign cache run.yaml 'cache={folder: runs/cache}'
        torchrun --nproc_per_node 8 -m longalign cache run.yaml 'cache={folder: runs/cache}'
        longalign train run.yaml 'cache={folder: runs/cache}'
        """,
    )
    command.add_argument("config", help="a .yaml or .json file with a 'cache' section")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES_HELP)
    command.add_argument("--batch", type=_positive, default=16, help="images, or prompts, encoded at a time (16)")
    _device(command)


def _generate(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "generate",
        "generate",
        "generate images from prompts with a checkpoint, an untrained config or a stock diffusers pipeline",
        """
        longalign generate --checkpoint runs/align --prompt "A red circle at the top. It is large." --output out
        longalign generate --checkpoint runs/align/checkpoint-000500 --prompts prompts.txt --seed 0 1 2 --output out
        longalign generate --config run.yaml --prompts prompts.jsonl --num-steps 50 --solver ddim --output out
        longalign generate --pipeline PixArt-alpha/PixArt-XL-2-512x512 --prompts prompts.txt --output out/pixart
        """,
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", metavar="DIR", help="a checkpoint, a run's folder for its newest one, or OWNER/NAME"
    )
    source.add_argument(
        "--config", metavar="FILE", help="a .yaml or .json config, to sample from its model without training"
    )
    source.add_argument("--pipeline", metavar="NAME", help=PIPELINE_HELP)
    _prompts(command, "a prompt; may be repeated")
    _sampling(command)
    command.add_argument("--output", required=True, metavar="DIR", help="an empty or new folder for the images")
    command.add_argument("--overwrite", action="store_true", help="replace the images in the folder")


def _sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--negative", metavar="TEXT", help="negative prompt")
    command.add_argument(
        "--num-steps", type=_positive, help="sampling steps (25, or the pipeline's own with --pipeline)"
    )
    about = "classifier-free guidance scale; 1 disables it (7.5, or the pipeline's own with --pipeline)"
    command.add_argument("--guidance", type=_finite, help=about)
    names = ("unipc", "ddim", "dpm++", "lcm")
    about = "unipc, ddim, dpm++ or lcm (unipc, or the pipeline's own with --pipeline)"
    command.add_argument("--solver", choices=names, metavar="NAME", help=about)
    command.add_argument("--seed", type=_seed, nargs="+", help="one image for each prompt and seed (0)")
    command.add_argument("--size", type=_size, metavar="N|WxH", help="pixels (the backbone's native resolution)")
    command.add_argument("--batch", type=_positive, default=8, help="images sampled, or compared, at a time (8)")
    dtypes = ("float32", "bfloat16", "float16")
    about = "float32, bfloat16 or float16, for all weights (set by loop.precision; float32 with --pipeline)"
    command.add_argument("--dtype", choices=dtypes, metavar="DTYPE", help=about)
    _device(command)
    command.add_argument("--revision", help="branch, tag or commit on the Hub (only with --pipeline)")
    command.add_argument("--variant", help="weight variant, e.g. fp16 (only with --pipeline)")


def _device(command: argparse.ArgumentParser) -> None:
    about = "cpu, cuda, cuda:1 or mps (the best one available)"
    command.add_argument("--device", type=_device_name, metavar="DEVICE", help=about)


def _score(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "score",
        "score",
        "score images against their prompts with rewards, optionally generating them first",
        """
        longalign score --reward denscore --images out
        longalign score --reward clip --reward pickscore --images a.png b.png --prompt "A red fox."
        longalign score --reward '{name: clip, checkpoint: mini/clip, text: segments}' --images out
        longalign score --reward denscore --images out --by-sentence
        longalign score --reward denscore --pipeline PixArt-alpha/PixArt-XL-2-512x512 --prompts prompts.txt
        """,
    )
    command.add_argument("--reward", action="append", required=True, metavar="REWARD", help=REWARD_HELP)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", nargs="+", metavar="PATH", help="image files, or one folder of them")
    source.add_argument("--checkpoint", metavar="DIR", help="a checkpoint to sample from")
    source.add_argument("--pipeline", metavar="NAME", help=PIPELINE_HELP)
    command.add_argument("--by-sentence", action="store_true", help="score each sentence of a prompt separately")
    _prompts(command, "one prompt for all images, or one for each; may be repeated", required=False)
    _sampling(command)
    command.add_argument("--output", metavar="DIR", help="a folder for the generated images (not kept by default)")


def _eval(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "eval",
        "evaluate",
        "compare models on the same prompts and seeds, with 95%% confidence intervals",
        """
        longalign eval --images base=out/base tuned=out/tuned --reward denscore
        longalign eval --images base=out/base tuned=out/tuned --reward denscore --reward hpsv2 --json table.json
        longalign eval --pipeline sd15=stable-diffusion-v1-5/stable-diffusion-v1-5 --checkpoint ours=runs/reward \\
          --prompts prompts.txt --output out/compared --reward denscore
        """,
    )
    about = "folders written by `longalign generate`; each model is compared with the first and the previous one"
    command.add_argument("--images", nargs="+", action=_Model, metavar="NAME=DIR", help=about)
    about = "checkpoints to sample from"
    command.add_argument("--checkpoint", nargs="+", action=_Model, metavar="NAME=DIR", help=about)
    about = "stock diffusers pipelines to sample from, Hub ids or folders"
    command.add_argument("--pipeline", nargs="+", action=_Model, metavar="NAME=MODEL", help=about)
    command.set_defaults(models=[])
    command.add_argument("--reward", action="append", required=True, metavar="REWARD", help=REWARD_HELP)
    _prompts(command, "a prompt; may be repeated", required=False)
    _sampling(command)
    command.add_argument(
        "--output", metavar="DIR", help="a folder for the generated images, with a subfolder per model"
    )
    command.add_argument("--json", metavar="FILE", help="also write the table, with the values per image, as JSON")
    command.add_argument("--markdown", metavar="FILE", help="also write the table as Markdown")


def _direction(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "direction",
        "direction",
        "compute the common direction of a reward's text embeddings over a corpus, and print the distribution of eta",
        """
        longalign direction --reward denscore --prompts corpus.txt --output denscore-direction.safetensors
        longalign train run.yaml rewards.0.direction=denscore-direction.safetensors
        """,
    )
    command.add_argument(
        "--reward", required=True, metavar="REWARD", help=REWARD_HELP.removesuffix("; may be repeated")
    )
    command.add_argument("--prompts", required=True, metavar="FILE", help="the corpus: .txt, one per line, or .jsonl")
    command.add_argument("--batch", type=_positive, default=64, help="prompts encoded at a time (64)")
    command.add_argument("--output", required=True, metavar="FILE", help="the .safetensors file to write")
    _device(command)


def _list(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "list",
        "list_parts",
        "list available parts: kind, name, providing package and description",
        """
        longalign list
        longalign list encoders rewards
        longalign list --check
        """,
    )
    command.add_argument("kinds", nargs="*", default=[], metavar="KIND", help="only these kinds")
    command.add_argument(
        "--check", action="store_true", help="like --verbose, but exit with status 1 if a part is broken"
    )
    command.add_argument("--verbose", action="store_true", help="show the module and class of each part's config")


def _describe(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "describe",
        "describe",
        "describe a kind, a part and its keys, the keys of a run, or a config with all its defaults",
        """
        longalign describe encoders
        longalign describe encoders clip-segment
        longalign describe run
        longalign describe run --json-schema > run.schema.json
        longalign describe run.yaml encoder=t5
        longalign describe runs/align/checkpoint-000500
        """,
    )
    command.add_argument("topic", help="a kind, a part, 'run' or a key of it, a config file, or a checkpoint")
    command.add_argument(
        "details",
        nargs="*",
        default=[],
        metavar="NAME|key=value",
        help="a part's name after a kind, or changes to a config",
    )
    command.add_argument("--json-schema", action="store_true", help="with 'run': print its JSON schema, for editors")


def _convert(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "convert",
        "convert",
        "convert published weights to a checkpoint, and to a LoRA that diffusers loads",
        """
        hf download luping-liu/LongSD --local-dir LongSD
        longalign convert longsd LongSD runs/longsd
        longalign convert longsd LongSD runs/longsd-align --align-only
        longalign generate --checkpoint runs/longsd --prompts prompts.txt --output out
        """,
    )
    command.add_argument("model", choices=["longsd"], help="longsd: the files of luping-liu/LongSD")
    command.add_argument("source", metavar="DIR", help="the folder of the published files")
    command.add_argument("output", metavar="OUT", help="a folder without a checkpoint, for the new files")
    command.add_argument("--align-only", action="store_true", help="omit the reward stage")
    about = "Hub id or folder of the base model (stable-diffusion-v1-5/stable-diffusion-v1-5)"
    command.add_argument("--backbone", metavar="CHECKPOINT", help=about)
    command.add_argument("--t5", metavar="CHECKPOINT", help="Hub id or folder of T5 (google-t5/t5-large)")


def _export(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "export",
        "export",
        "export a checkpoint for diffusers, with its adapter and a model card, and optionally upload it",
        """
        longalign export runs/reward out/model
        longalign export runs/reward out/model --metrics table.json --license openrail++
        longalign export runs/reward out/model --push-to-hub owner/name --private
        """,
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder for its newest one")
    command.add_argument("output", metavar="OUT", help="a folder without a checkpoint, for the new files")
    command.add_argument("--overwrite", action="store_true", help="replace the checkpoint in OUT")
    about = "a table written by `longalign eval --json`, for the model card"
    command.add_argument("--metrics", metavar="FILE", help=about)
    command.add_argument("--license", metavar="NAME", help="license identifier for the model card, as on the Hub")
    command.add_argument("--push-to-hub", metavar="OWNER/NAME", help="also upload it to this repository")
    command.add_argument("--private", action="store_true", help="make a new repository private")


def _demo(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "demo",
        "demo",
        "train on the synthetic scenes and compare held-out long captions before and after",
        """
        longalign demo
        longalign demo --output runs/other --prompts 256
        longalign demo --reward my-reward.yaml
        """,
    )
    about = "folder for both runs, report.html and tables (runs/demo)"
    command.add_argument("--output", default="runs/demo", metavar="DIR", help=about)
    command.add_argument("--align", metavar="FILE", help="config of the first stage (bundled by default)")
    command.add_argument("--reward", metavar="FILE", help="config of the second stage (bundled by default)")
    about = "number of held-out captions (128)"
    command.add_argument("--prompts", type=_positive, default=128, metavar="N", help=about)
    _device(command)


def _examples(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "examples",
        "examples",
        "list the bundled example configs, print one, or copy them",
        """
        longalign examples
        longalign examples mini-align.yaml
        longalign examples mini-align.yaml --to .
        longalign examples --to examples
        """,
    )
    command.add_argument("name", nargs="?", default=None, metavar="NAME", help="one of the examples")
    command.add_argument("--to", metavar="FOLDER", help="copy the example, or all of them, into this folder")


def _env(add: Callable[..., argparse.ArgumentParser]) -> None:
    add(
        "env",
        "env",
        "show versions, devices and settings, for bug reports",
        """
        longalign env
        """,
    )


class _Model(argparse.Action):
    """Collects the models of several options in ``models``, as ``(option, NAME=...)``, in their order."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.models = [*namespace.models, *((self.dest, value) for value in values)]


def _prompts(command: argparse.ArgumentParser, about: str, required: bool = True) -> None:
    prompts = command.add_mutually_exclusive_group(required=required)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help=about)
    prompts.add_argument("--prompts", metavar="FILE", help="a .txt file, one per line, or a .jsonl file with 'prompt'")


def _device_name(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:1 or mps, got '{text}'")
    return text


def _finite(text: str) -> float:
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number, got '{text}'")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^64 - 1, got '{text}'")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got '{text}'")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    try:
        return _positive(height if cross else width), _positive(width)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected pixels, as 512 or as width x height, 768x512, got '{text}'"
        ) from None
