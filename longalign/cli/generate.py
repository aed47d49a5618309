"""The command ``longalign generate``: generates images from prompts."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longalign.cli.options import (
    PIPELINE_HELP,
    add_prompts,
    add_sampling,
    check_pipeline_options,
    prompts_of,
    seeds_of,
)
from longalign.config.checks import check_files, size_problems
from longalign.config.run import RunConfig, load_config
from longalign.errors import ConfigError
from longalign.files.paths import find_checkpoint
from longalign.hub import CHECKPOINT
from longalign.image_folder import INDEX, new_index
from longalign.names import count

EXAMPLES = """
    longalign generate --checkpoint runs/align --prompt "A red circle at the top. It is large." --output out
    longalign generate --checkpoint runs/align/checkpoint-000500 --prompts prompts.txt --seed 0 1 2 --output out
    longalign generate --config run.yaml --prompts prompts.jsonl --num-steps 50 --solver ddim --output out
    longalign generate --checkpoint runs/align --prompts dpg-bench:ELLA/dpg_bench/prompts --seed 0 1 2 3 --output out
    longalign generate --pipeline PixArt-alpha/PixArt-XL-2-512x512 --prompts prompts.txt --output out/pixart
"""


def add_options(parser: ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    about = "a checkpoint, a run's folder for its newest checkpoint, or OWNER/NAME"
    source.add_argument("--checkpoint", metavar="DIR", help=about)
    about = "a .yaml or .json config; sample from its base model, without training"
    source.add_argument("--config", metavar="FILE", help=about)
    source.add_argument("--pipeline", metavar="NAME", help=PIPELINE_HELP)
    add_prompts(parser, "a prompt; may be repeated")
    add_sampling(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="an empty or new folder for the images")
    parser.add_argument("--overwrite", action="store_true", help="replace the images in the folder")


def run(args: Namespace) -> None:
    """Generates an image for each prompt and seed into the folder ``--output``."""
    prompts = prompts_of(args)
    try:
        new_index(args.output, args.overwrite)
    except ValueError as error:
        replaceable = (Path(args.output) / INDEX).exists()
        raise ValueError(f"{error}{', or replace them with --overwrite' if replaceable else ''}") from error
    option = next(key for key in ("checkpoint", "config", "pipeline") if getattr(args, key))
    check_pipeline_options(args, option)
    rows = generate_images(args, option, getattr(args, option), prompts, args.output, overwrite=args.overwrite)
    print(f"{count(len(rows), 'image')} in {args.output}")


def generate_images(
    args: Namespace, option: str, source: str, prompts: Sequence[str], output: str | Path, overwrite: bool = False
) -> list[Any]:
    """Generates an image for each prompt and seed into a folder.

    Args:
        args: the options that `longalign.cli.options.add_sampling` declares, parsed.
        option: name of the option that gives ``source``: ``"checkpoint"``, ``"config"`` or ``"pipeline"``.
        source: a checkpoint, a config file, or the Hub id or folder of a diffusers pipeline.
        prompts: the prompts.
        output: folder for the images.
        overwrite: whether to replace the images that the folder's ``metadata.jsonl`` lists.

    Returns:
        The rows of ``metadata.jsonl``, one per image.
    """
    height, width = args.size or (None, None)
    settings = {"seeds": seeds_of(args), "negative": args.negative, "batch_size": args.batch, "progress": True}
    settings |= {"height": height, "width": width, "overwrite": overwrite}
    keys = ("num_steps", "guidance", "guidance_interval", "solver")
    settings |= {key: value for key in keys if (value := getattr(args, key)) is not None}
    if option == "pipeline":
        from longalign.inference import baselines
        from longalign.runtime import Runtime

        runtime = Runtime.detect(device=args.device).with_dtype(args.dtype)
        settings |= {"revision": args.revision, "variant": args.variant}
        return baselines.generate(source, prompts, output, runtime=runtime, **settings)
    model = find_checkpoint(source).parent if option == "checkpoint" else load_config(source)
    if isinstance(model, RunConfig):
        check_files(model, training=False, sizes={} if args.size is None else {"--size": [args.size]})
    else:
        check_size(args, model / CHECKPOINT)
    from longalign.inference import sampling

    return sampling.generate(model, prompts, output, dtype=args.dtype, device=args.device, **settings)


def check_size(args: Namespace, checkpoint: Path) -> None:
    """Raises `ConfigError` if the backbone of a checkpoint cannot sample images of the size given as ``--size``."""
    if args.size is not None and (problems := size_problems(load_config(checkpoint), {"--size": [args.size]})):
        raise ConfigError(problems)
