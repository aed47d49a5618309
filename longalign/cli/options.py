"""Declares, checks and reads the command-line options that several commands share."""

from __future__ import annotations

import math
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence

from longalign.config.solvers import SOLVERS
from longalign.data.prompts.sets import SETS, read_prompt_set
from longalign.image_folder import check_seeds
from longalign.segmenters import check_text
from longalign.sizes import Size, parse_size

SEEDS = (0,)
DTYPES = ("float32", "bfloat16", "float16")
PIPELINE_HELP = "a stock diffusers pipeline, Hub id or folder, run with its own text encoders and settings"
PROMPTS_HELP = f"prompts, one per line (.txt) or with 'prompt' (.jsonl), or a prompt set: {', '.join(SETS[1:])}"
REWARD_HELP = "a reward's name, or its config as {name: ..., key: value} or as a .yaml or .json file"


def add_overrides(parser: ArgumentParser) -> None:
    about = "changes to the config, as dotted path and value, e.g. encoder=t5 rewards.0.omega=0.0 loop.lr=1e-4"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=about)


def add_device(parser: ArgumentParser) -> None:
    about = "cpu, cuda, cuda:1 or mps (the fastest one available)"
    parser.add_argument("--device", type=device_name, metavar="DEVICE", help=about)


def add_rewards(parser: ArgumentParser) -> None:
    about = f"{REWARD_HELP}; may be repeated"
    parser.add_argument("--reward", action="append", required=True, metavar="REWARD", help=about)


def add_metrics(parser: ArgumentParser) -> None:
    about = "a metric's name, or its config as {name: ..., key: value} or as a .yaml or .json file; may be repeated"
    parser.add_argument("--metric", action="append", default=[], metavar="METRIC", help=about)
    about = f"short for the metric `reward`: {REWARD_HELP}; may be repeated"
    parser.add_argument("--reward", action="append", default=[], metavar="REWARD", help=about)


def add_prompts(parser: ArgumentParser, about: str, required: bool = True, more: str = "") -> None:
    prompts = parser.add_mutually_exclusive_group(required=required)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help=about)
    prompts.add_argument("--prompts", metavar="[SET:]PATH", help="; ".join(filter(None, (PROMPTS_HELP, more))))


def add_sampling(parser: ArgumentParser) -> None:
    """Adds the options of image generation, which `longalign.cli.generate.generate_images` reads, to a parser."""
    add = parser.add_argument
    add("--negative", metavar="TEXT", help="negative prompt")
    add("--num-steps", type=positive, help="sampling steps (25, or the pipeline's own with --pipeline)")
    about = "classifier-free guidance scale; 1 disables it (7.5, or the pipeline's own with --pipeline)"
    add("--guidance", type=finite, help=about)
    about = "guidance only at ratios of noise to signal above LOW and up to HIGH (all steps; not with --pipeline)"
    add("--guidance-interval", type=finite, nargs=2, metavar=("LOW", "HIGH"), help=about)
    about = f"{_alternatives(SOLVERS)} (unipc, or the pipeline's own with --pipeline)"
    add("--solver", choices=SOLVERS, metavar="NAME", help=about)
    add("--seed", type=seed, nargs="+", help="one image for each prompt and seed (0)")
    add("--size", type=size, metavar="N|WxH", help="pixels (the backbone's native resolution)")
    add("--batch", type=positive, default=8, help="images sampled, or compared, at a time (8)")
    about = f"{_alternatives(DTYPES)}, for all weights (set by loop.precision; float32 with --pipeline)"
    add("--dtype", choices=DTYPES, metavar="DTYPE", help=about)
    add_device(parser)
    add("--revision", help="branch, tag or commit on the Hub (only with --pipeline)")
    add("--variant", help="weight variant, e.g. fp16 (only with --pipeline)")


def _alternatives(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def reject_sampling_options(args: Namespace, *extra_keys: str) -> None:
    """Raises ValueError if an option is given that only applies when generating images.

    ``extra_keys`` are further attributes of ``args`` to reject, e.g. ``"prompt"``.
    """
    keys = ("output", "negative", "num_steps", "guidance", "guidance_interval", "solver", "seed", "size", "dtype")
    keys += ("revision", "variant")
    _reject_options(args, *keys, *extra_keys, reason="only applies when generating images")


def check_pipeline_options(args: Namespace, *options: str) -> None:
    """Raises ValueError if an option of `add_sampling` is given that does not apply to the sources of the images.

    ``options`` are the names of the options that give the sources: ``"pipeline"`` (an unmodified diffusers pipeline),
    ``"checkpoint"``, ``"config"`` or ``"images"``.
    """
    if "pipeline" in options:
        _reject_options(args, "guidance_interval", reason="does not apply to --pipeline")
    if "pipeline" not in options:
        _reject_options(
            args,
            "revision",
            "variant",
            reason="only applies to --pipeline",
            advice="remove it and set '{}' in the config",
        )


def _reject_options(args: Namespace, *keys: str, reason: str, advice: str = "remove it") -> None:
    for key in keys:
        if getattr(args, key) is not None:
            raise ValueError(f"--{key.replace('_', '-')} {reason}; {advice.format(key)}")


def seeds_of(args: Namespace) -> Sequence[int]:
    """Returns the seeds of ``--seed``, or ``(0,)`` without the option. Raises ValueError if one occurs twice."""
    seeds = args.seed or SEEDS
    check_seeds(seeds)
    return seeds


def prompts_of(args: Namespace) -> list[str]:
    """Returns the prompts given as ``--prompt TEXT``, or those in the file or folder given as ``--prompts PATH``.

    Raises ValueError if there are no prompts or a prompt is invalid, and FileNotFoundError if the path does not exist.
    """
    if not args.prompt and not args.prompts:
        raise ValueError("no prompts to generate images from; give --prompt or --prompts")
    if args.prompts:
        return read_prompt_set(args.prompts).texts
    return [check_text(text, f"--prompt {i}") for i, text in enumerate(args.prompt)]


# Types of options: functions of the text, which raise ArgumentTypeError


def device_name(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise ArgumentTypeError(f"expected cpu, cuda, cuda:1 or mps, got '{text}'")
    return text


def finite(text: str) -> float:
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise ArgumentTypeError(f"expected a finite number, got '{text}'")


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise ArgumentTypeError(f"expected an integer from 0 to 2^64 - 1, got '{text}'")
    return int(text)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"expected an integer of at least 1, got '{text}'")
    return int(text)


def size(text: str) -> Size:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
