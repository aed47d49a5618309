"""The command ``longalign score``: scores images against their prompts with rewards."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from longalign.cli.generate import generate_images
from longalign.cli.images import check_images, images_and_prompts
from longalign.cli.options import (
    PIPELINE_HELP,
    add_prompts,
    add_rewards,
    add_sampling,
    check_pipeline_options,
    prompts_of,
    reject_sampling_options,
)
from longalign.cli.rewards import build_rewards, offloaded_to_cpu, reward_configs
from longalign.image_folder import new_index, read_images
from longalign.names import count
from longalign.registry import PartConfig

EXAMPLES = """
    longalign score --reward denscore --images out
    longalign score --reward clip --reward pickscore --images a.png b.png --prompt "A red fox."
    longalign score --reward '{name: clip, checkpoint: mini/clip, text: segments}' --images out
    longalign score --reward denscore --images out --by-sentence
    longalign score --reward denscore --pipeline PixArt-alpha/PixArt-XL-2-512x512 --prompts prompts.txt
"""


def add_options(parser: ArgumentParser) -> None:
    add_rewards(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", nargs="+", metavar="PATH", help="image files, or one folder of them")
    source.add_argument("--checkpoint", metavar="DIR", help="a checkpoint to sample from")
    source.add_argument("--pipeline", metavar="NAME", help=PIPELINE_HELP)
    parser.add_argument("--by-sentence", action="store_true", help="score each sentence of a prompt separately")
    add_prompts(parser, "one prompt for all images, or one for each; may be repeated", required=False)
    add_sampling(parser)
    parser.add_argument(
        "--output", metavar="DIR", help="a folder for the generated images (by default they are not kept)"
    )


def run(args: Namespace) -> None:
    """Scores images against their prompts and prints a table.

    With ``--checkpoint`` or ``--pipeline``, the images are generated first.
    """
    configs = reward_configs(args.reward)
    if args.by_sentence and not args.images:
        raise ValueError("--by-sentence scores --images; generate them first, with `longalign generate`")
    if not args.images:
        _generate_and_score(args, configs)
        return
    reject_sampling_options(args)
    paths, prompts = images_and_prompts(args.images)
    if args.prompt or args.prompts:
        prompts = prompts_of(args)
    if prompts is None:
        raise ValueError("the images have no prompts; give --prompt or --prompts")
    if len(prompts) not in (1, len(paths)):
        raise ValueError(f"expected one prompt, or one for each of {count(len(paths), 'image')}, got {len(prompts)}")
    check_images(paths)
    from longalign.evaluation import scoring

    score = scoring.score_sentences if args.by_sentence else scoring.score_images
    score(build_rewards(configs, args.device), paths, prompts)


def _generate_and_score(args: Namespace, configs: Mapping[str, PartConfig]) -> None:
    prompts, option = prompts_of(args), "checkpoint" if args.checkpoint else "pipeline"
    check_pipeline_options(args, option)
    with TemporaryDirectory() as temporary:
        folder = Path(args.output or temporary)
        new_index(folder)
        rewards = build_rewards(configs, args.device)  # fail before generating, which may take hours
        with offloaded_to_cpu(rewards.values(), args.device):
            generate_images(args, option, getattr(args, option), prompts, folder)
        from longalign.evaluation import scoring

        rows = read_images(folder)
        scoring.score_images(rewards, [path for path, _, _ in rows], [prompt for _, prompt, _ in rows])
