"""The command ``longalign cache``: precomputes image latents and text states for training."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from longalign.cli.options import add_device, add_overrides, positive
from longalign.config.changes import override, parse_assignments
from longalign.config.checks import check_files

EXAMPLES = """
    longalign cache run.yaml 'cache={folder: runs/cache}'
    torchrun --nproc_per_node 8 -m longalign cache run.yaml 'cache={folder: runs/cache}'
    longalign train run.yaml 'cache={folder: runs/cache}'
"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("config", help="a .yaml or .json file with a 'cache' section")
    add_overrides(parser)
    parser.add_argument("--batch", type=positive, default=16, help="images, or prompts, encoded at a time (16)")
    add_device(parser)


def run(args: Namespace) -> None:
    """Computes the latents and encoded prompts that are not in the run's cache yet, and prints the numbers of entries.

    All processes of a launcher such as torchrun share the work.
    """
    config = override(args.config, parse_assignments(args.overrides))
    if config.cache is None:
        raise ValueError("the config has no cache; add to it, for example, cache: {folder: runs/cache}")
    check_files(config, resumed=True, cached=False)
    from longalign.caching import precompute
    from longalign.runtime import distributed_runtime

    with distributed_runtime(config.loop.precision, args.device) as runtime:
        counts = precompute.make_caches(config, runtime, args.batch, progress=True)
    for name, (total, new) in counts.items():
        if runtime.rank == 0:
            print(f"{config.cache.folder}/{name}: {total} entries, {new} of them new")
