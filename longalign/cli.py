"""The command ``longalign``; ``--help``, ``list``, ``describe`` and config errors need no torch."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from textwrap import dedent
from typing import Any

OVERRIDES = "changes to the config, as dotted path and value, e.g. encoder=t5 rewards.0.omega=0.0 loop.lr=1e-4"
PIPELINE = "a stock diffusers pipeline, hub id or folder, drawn with by its own text encoders and settings"
REWARD = "a reward's name, or its config as {name: ..., key: value} or as a .yaml or .json file; may be repeated"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, or 2 where what the user gave cannot be used."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from longalign import commands

    try:
        return getattr(commands, args.run)(args) or 0
    except BrokenPipeError:  # the reader, e.g. head, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"longalign {args.command}: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="longalign",
        description="Long-text alignment of text-to-image diffusion models.",
        epilog="`longalign COMMAND --help` shows a command's options and examples.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands_of = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: str, about: str, examples: str) -> argparse.ArgumentParser:
        text = "\n".join(f"  {line}" for line in dedent(examples).strip().splitlines())
        command = commands_of.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:].replace("%%", "%") + ".",
            epilog=f"examples:\n{text}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    _train(add)
    _cache(add)
    _generate(add)
    _score(add)
    _eval(add)
    _direction(add)
    _list(add)
    _describe(add)
    _convert(add)
    _export(add)
    _demo(add)
    return parser


def _train(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "train",
        "train",
        "run a config: build its parts, train, write checkpoints",
        """
        longalign train examples/mini-align.yaml
        longalign train run.yaml loop.steps=200 output=runs/short
        longalign train run.yaml encoder=clip-truncate trainer.lora.rank=64
        longalign train run.yaml --resume
        """,
    )
    command.add_argument("config", help="a .yaml or .json file, or a checkpoint whose config is run again")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in the run's output folder"
    )
    which.add_argument("--resume-from", metavar="CHECKPOINT", help="go on from this checkpoint of the run")


def _cache(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "cache",
        "cache",
        "compute once what training reads instead of running the autoencoder and the text models",
        """
        longalign cache run.yaml 'cache={folder: runs/cache}'
        torchrun --nproc_per_node 8 -m longalign cache run.yaml 'cache={folder: runs/cache}'
        longalign train run.yaml 'cache={folder: runs/cache}'
        """,
    )
    command.add_argument("config", help="a .yaml or .json file whose 'cache' says what is cached and where")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    command.add_argument("--batch", type=_positive, default=16, help="images, or prompts, encoded at a time (16)")


def _generate(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "generate",
        "generate",
        "draw images from prompts with a checkpoint, an untrained config or a stock diffusers pipeline",
        """
        longalign generate --checkpoint runs/align --prompt "A red circle at the top. It is large." --output out
        longalign generate --checkpoint runs/align/checkpoint-000500 --prompts prompts.txt --seed 0 1 2 --output out
        longalign generate --config run.yaml --prompts prompts.jsonl --steps 50 --scheduler ddim --output out
        longalign generate --pipeline PixArt-alpha/PixArt-XL-2-512x512 --prompts prompts.txt --output out/pixart
        """,
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", metavar="DIR", help="a checkpoint, a run's folder for its newest one, or OWNER/NAME"
    )
    source.add_argument(
        "--config", metavar="FILE", help="a .yaml or .json config, whose backbone is drawn with as it is"
    )
    source.add_argument("--pipeline", metavar="NAME", help=PIPELINE)
    _prompts(command, "a prompt; may be repeated")
    _sampling(command)
    command.add_argument("--output", required=True, metavar="DIR", help="an empty or new folder for the images")


def _sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--negative", metavar="TEXT", help="what to stay away from")
    own = "of a stock pipeline its own"
    command.add_argument("--steps", type=_positive, help=f"sampling steps (25; {own})")
    about = f"scale of classifier-free guidance; 1 is none (7.5; {own})"
    command.add_argument("--guidance", type=float, help=about)
    names = ("unipc", "ddim", "dpm++", "lcm")
    command.add_argument("--scheduler", choices=names, metavar="NAME", help=f"unipc, ddim, dpm++ or lcm (unipc; {own})")
    command.add_argument("--seed", type=int, nargs="+", help="each prompt is drawn once for each seed (0)")
    command.add_argument("--size", type=_size, metavar="N|WxH", help="pixels (the backbone's own resolution)")
    command.add_argument("--batch", type=_positive, default=8, help="images drawn, or compared, at a time (8)")
    dtypes = ("float32", "bfloat16", "float16")
    about = "float32, bfloat16 or float16, for all weights (by loop.precision; of a stock pipeline float32)"
    command.add_argument("--dtype", choices=dtypes, metavar="DTYPE", help=about)
    command.add_argument("--revision", help="branch, tag or commit on the hub, of stock pipelines")
    command.add_argument("--variant", help="which of the weights, e.g. fp16, of stock pipelines")


def _score(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "score",
        "score",
        "score images against their prompts with rewards; those of a model are drawn first",
        """
        longalign score --reward denscore --images out
        longalign score --reward clip --reward pickscore --images a.png b.png --prompt "A red fox."
        longalign score --reward '{name: clip, checkpoint: mini/clip, text: segments}' --images out
        longalign score --reward denscore --pipeline PixArt-alpha/PixArt-XL-2-512x512 --prompts prompts.txt
        """,
    )
    command.add_argument("--reward", action="append", required=True, metavar="REWARD", help=REWARD)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", nargs="+", metavar="PATH", help="image files, or one folder of them")
    source.add_argument("--checkpoint", metavar="DIR", help="a checkpoint to draw with")
    source.add_argument("--pipeline", metavar="NAME", help=PIPELINE)
    _prompts(command, "one prompt for all images, or one for each; may be repeated", required=False)
    _sampling(command)
    command.add_argument("--output", metavar="DIR", help="a folder to keep the drawn images in (none are kept)")


def _eval(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "eval",
        "evaluate",
        "compare models by their images of the same prompts and seeds, with 95%% intervals",
        """
        longalign eval --images base=out/base tuned=out/tuned --reward denscore
        longalign eval --images base=out/base tuned=out/tuned --reward denscore --reward hpsv2 --json table.json
        longalign eval --pipeline sd15=stable-diffusion-v1-5/stable-diffusion-v1-5 --checkpoint ours=runs/reward \\
          --prompts prompts.txt --output out/compared --reward denscore
        """,
    )
    about = "folders that `longalign generate` wrote; differences are to the first model given and to the one before"
    command.add_argument("--images", nargs="+", action=_Model, metavar="NAME=DIR", help=about)
    about = "checkpoints to draw with"
    command.add_argument("--checkpoint", nargs="+", action=_Model, metavar="NAME=DIR", help=about)
    about = "stock diffusers pipelines to draw with, hub ids or folders"
    command.add_argument("--pipeline", nargs="+", action=_Model, metavar="NAME=MODEL", help=about)
    command.set_defaults(models=[])
    command.add_argument("--reward", action="append", required=True, metavar="REWARD", help=REWARD)
    _prompts(command, "a prompt to draw; may be repeated", required=False)
    _sampling(command)
    command.add_argument("--output", metavar="DIR", help="a folder for what is drawn, in it one for each model")
    command.add_argument("--json", metavar="FILE", help="also write the table, with each image's values, as JSON")
    command.add_argument("--markdown", metavar="FILE", help="also write the table as Markdown")


def _direction(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "direction",
        "direction",
        "compute the common direction of a reward's text embeddings over a corpus, and show how eta is distributed",
        """
        longalign direction --reward denscore --prompts corpus.txt --output denscore-direction.safetensors
        longalign train run.yaml rewards.0.direction=denscore-direction.safetensors
        """,
    )
    command.add_argument("--reward", required=True, metavar="REWARD", help=REWARD.removesuffix("; may be repeated"))
    command.add_argument("--prompts", required=True, metavar="FILE", help="the corpus: .txt, one per line, or .jsonl")
    command.add_argument("--batch", type=_positive, default=64, help="prompts encoded at a time (64)")
    command.add_argument("--output", required=True, metavar="FILE", help="where to write the direction, .safetensors")


def _list(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "list",
        "list_parts",
        "list the parts there are: kind, name, who provides it, and where it is",
        """
        longalign list
        longalign list encoders rewards
        longalign list --check
        """,
    )
    command.add_argument("kinds", nargs="*", metavar="KIND", help="only these kinds")
    command.add_argument("--check", action="store_true", help="as --verbose, with status 1 if a part is broken")
    command.add_argument("--verbose", action="store_true", help="show where each part's config is")


def _describe(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "describe",
        "describe",
        "explain a kind, a part and its keys, the keys of a run, or a whole config with all defaults filled in",
        """
        longalign describe encoders
        longalign describe encoders clip-segment
        longalign describe run
        longalign describe run.yaml encoder=t5
        longalign describe runs/align/checkpoint-000500
        """,
    )
    command.add_argument("what", help="a kind, a part, 'run' or a key of it, a config file, or a checkpoint")
    command.add_argument(
        "more", nargs="*", metavar="NAME|key=value", help="a part's name after a kind, or changes to a config"
    )


def _convert(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "convert",
        "convert",
        "turn published weights into a checkpoint, and into a LoRA that plain diffusers loads",
        """
        hf download luping-liu/LongSD --local-dir LongSD
        longalign convert longsd LongSD runs/longsd
        longalign convert longsd LongSD runs/longsd-align --align-only
        longalign generate --checkpoint runs/longsd --prompts prompts.txt --output out
        """,
    )
    command.add_argument("what", choices=["longsd"], help="longsd: the files of luping-liu/LongSD")
    command.add_argument("source", metavar="DIR", help="the folder of the published files")
    command.add_argument("output", metavar="OUT", help="a folder without a checkpoint, for the new files")
    command.add_argument("--align-only", action="store_true", help="leave the reward stage out")
    about = "hub id or folder of the base model (stable-diffusion-v1-5/stable-diffusion-v1-5)"
    command.add_argument("--backbone", metavar="CHECKPOINT", help=about)
    command.add_argument("--t5", metavar="CHECKPOINT", help="hub id or folder of T5 (google-t5/t5-large)")


def _export(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "export",
        "export",
        "write a checkpoint for plain diffusers, with its adapter and a model card, and upload it if asked to",
        """
        longalign export runs/reward out/model
        longalign export runs/reward out/model --metrics table.json --license openrail++
        longalign export runs/reward out/model --push-to-hub owner/name --private
        """,
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder for its newest one")
    command.add_argument("output", metavar="OUT", help="a folder without a checkpoint, for the new files")
    about = "a table that `longalign eval --json` wrote, for the model card"
    command.add_argument("--metrics", metavar="FILE", help=about)
    command.add_argument("--license", metavar="NAME", help="for the model card, as the hub spells it")
    command.add_argument("--push-to-hub", metavar="OWNER/NAME", help="also upload it to this repository")
    command.add_argument("--private", action="store_true", help="make a new repository private")


def _demo(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "demo",
        "demo",
        "train on the bundled small world and compare held-out long captions before and after",
        """
        longalign demo
        longalign demo --output runs/other --prompts 256
        longalign demo --reward my-reward.yaml
        """,
    )
    about = "folder for both runs, report.html and tables (runs/demo)"
    command.add_argument("--output", default="runs/demo", metavar="DIR", help=about)
    command.add_argument("--align", metavar="FILE", help="config of the first stage (the bundled one)")
    command.add_argument("--reward", metavar="FILE", help="config of the second stage (the bundled one)")
    about = "number of held-out captions (128)"
    command.add_argument("--prompts", type=_positive, default=128, metavar="N", help=about)


class _Model(argparse.Action):
    """Gathers the models of several options in ``models``, as ``(option, NAME=...)``, in the order they are given."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.models = [*namespace.models, *((self.dest, value) for value in values)]


def _prompts(command: argparse.ArgumentParser, about: str, required: bool = True) -> None:
    prompts = command.add_mutually_exclusive_group(required=required)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help=about)
    prompts.add_argument("--prompts", metavar="FILE", help="a .txt file, one per line, or a .jsonl file with 'prompt'")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    try:
        return _positive(height if cross else width), _positive(width)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected pixels as 512 or as width and height, 768x512; got '{text}'"
        ) from None
