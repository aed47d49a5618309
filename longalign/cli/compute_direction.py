"""The command ``longalign compute-direction``: computes a unit vector in a reward's embedding space."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from longalign.cli.images import check_images
from longalign.cli.options import REWARD_HELP, add_device, positive
from longalign.cli.rewards import reward_configs
from longalign.config.checks import check_parts
from longalign.files.lines import read_prompts

EXAMPLES = """
    longalign compute-direction --reward denscore --prompts corpus.txt --output denscore-direction.safetensors
    longalign train run.yaml rewards.0.direction=denscore-direction.safetensors
    longalign compute-direction --reward denscore --images over=out/over reference=out/start --output drift.safetensors
    longalign train run.yaml 'rewards.0.edit={name: measured, file: drift.safetensors}'
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--reward", required=True, metavar="REWARD", help=REWARD_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    about = "the corpus of a common direction of texts: .txt, one prompt per line, or .jsonl"
    source.add_argument("--prompts", metavar="FILE", help=about)
    about = "over=DIR reference=DIR: images that `longalign generate` wrote with an over-optimized model and with its "
    about += "reference model, for the same prompts and seeds"
    source.add_argument("--images", nargs=2, metavar="NAME=DIR", help=about)
    parser.add_argument("--batch", type=positive, default=64, help="prompts or images encoded at a time (64)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .safetensors file to write")
    add_device(parser)


def run(args: Namespace) -> None:
    """Computes a unit vector in the embedding space of a reward, writes the vector to a file and prints a report.

    With ``--prompts``, the vector is the normalized mean of the text embeddings. With ``--images``, it is the
    normalized mean difference of image embeddings: those of an over-optimized model minus those of its reference model.
    """
    (config,) = reward_configs([args.reward]).values()
    prompts = [p for p in read_prompts(args.prompts) if p] if args.prompts else ()
    folders = _folders(args.images) if args.images else None
    check_parts({config.name: config})
    from longalign.directions import compute
    from longalign.runtime import Runtime

    if folders:
        _, over, reference = compute.paired_images(*folders)
        check_images([*over, *reference])
    runtime = Runtime.detect(device=args.device)
    direction = compute.write_direction(
        config, args.output, prompts=prompts, images=folders, runtime=runtime, batch_size=args.batch
    )
    print(direction.report())


def _folders(arguments: Sequence[str]) -> tuple[str, str]:
    found = {name: folder for name, _, folder in (text.partition("=") for text in arguments)}
    if found.keys() != {"over", "reference"} or not all(found.values()):
        raise ValueError(f"expected --images over=DIR reference=DIR, got {' '.join(arguments)}")
    return found["over"], found["reference"]
