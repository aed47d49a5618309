"""The command ``longalign arrange``: copies generated images for the official scorer of a benchmark."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from longalign.data.prompts.sets import read_prompt_set
from longalign.names import count

EXAMPLES = """
    longalign arrange --images out/dpg --prompts dpg-bench:ELLA/dpg_bench/prompts --output scored/dpg
    longalign arrange --images out/tiif --prompts tiif:TIIF-Bench/data/testmini_prompts --output scored --model ours
"""


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", required=True, metavar="DIR", help="a folder written by `longalign generate`")
    add("--prompts", required=True, metavar="[SET:]PATH", help="the prompt set that the images were generated from")
    add("--output", required=True, metavar="DIR", help="a folder for the copies; several models can share it")
    add("--model", metavar="NAME", help="name of the model in the paths (the name of the images' folder)")


def run(args: Namespace) -> None:
    """Copies images, generated from the prompts of a benchmark, to the paths where the official scorer reads them."""
    prompts = read_prompt_set(args.prompts)
    from longalign.evaluation.layouts import arrange

    written = arrange(args.images, prompts, args.output, args.model or Path(args.images).resolve().name)
    print(f"{count(len(written), 'image')} of {prompts.name} in {args.output}")
