"""Implementations of the ``longalign`` commands. Heavy modules are imported after the input has been checked."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

from longalign.config import describe as descriptions
from longalign.config.changes import override, parse_assignments
from longalign.config.checks import check_files, check_parts
from longalign.config.files import check_unexported, checkpoint_file, find_checkpoint
from longalign.config.parsing import parse_value, read_mapping
from longalign.config.run import RunConfig, load_config, to_yaml
from longalign.data.lines import read_prompts
from longalign.errors import redact_url, suggestion
from longalign.image_folder import IMAGE_SUFFIXES, INDEX, check_seeds, new_index, read_images
from longalign.names import unique_name
from longalign.registry import PartConfig, rewards
from longalign.runtime import examples_folder
from longalign.segmenters import check_text

CONFIG_SUFFIXES = (".yaml", ".yml", ".json", ".safetensors")
SEEDS = (0,)


def train(args: Namespace) -> int:
    """Trains from a config. Returns 0, or 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP."""
    config = override(args.config, parse_assignments(args.overrides))
    resume = Path(args.resume_from) if args.resume_from else Path(config.output) if args.resume else None
    from_checkpoint = Path(args.config).suffix not in (".yaml", ".yml", ".json")
    if resume is not None and (args.resume_from or from_checkpoint):
        checkpoint_file(resume)  # with --resume, a config file without a checkpoint starts a new run
    check_files(config, resumed=resume is not None)  # `fit` checks again, but only after importing torch
    from longalign.loop.fit import fit

    result = fit(config, device=args.device, resume=resume)
    print(f"step {result.step} of {config.loop.steps}: {result.checkpoint}")
    if result.interrupted:
        return 128 + (result.signal or signal.SIGINT)
    if config.backbone is not None:
        options = f"--checkpoint {result.checkpoint} --output {config.output}/images"
        print(f'next: longalign generate {options} --prompt "..."')
    else:
        print(f"next: longalign export {result.checkpoint} {config.output}/model")
    return 0


def cache(args: Namespace) -> None:
    """Computes missing cache entries, on all processes of the launch."""
    config = override(args.config, parse_assignments(args.overrides))
    if config.cache is None:
        raise ValueError("the config has no cache; add to it, for example, cache: {folder: runs/cache}")
    check_files(config, resumed=True, cached=False)
    from longalign.caching import precompute as caching
    from longalign.runtime import distributed_runtime

    with distributed_runtime(config.loop.precision, args.device) as runtime:
        counts = caching.make_caches(config, runtime, args.batch, progress=True)
    for name, (total, new) in counts.items():
        if runtime.rank == 0:
            print(f"{config.cache.folder}/{name}: {total} entries, {new} of them new")


def generate(args: Namespace) -> None:
    """Generates images into a folder."""
    prompts = _prompts_from_args(args)
    try:
        new_index(args.output, args.overwrite)
    except ValueError as error:
        replaceable = (Path(args.output) / INDEX).exists()
        raise ValueError(f"{error}{', or replace them with --overwrite' if replaceable else ''}") from error
    option = next(key for key in ("checkpoint", "config", "pipeline") if getattr(args, key))
    _check_pipelines(args, option)
    count = len(_generate(args, option, getattr(args, option), prompts, args.output, overwrite=args.overwrite))
    print(f"{_count(count, 'image')} in {args.output}")


def _generate(
    args: Namespace, option: str, source: str, prompts: Sequence[str], output: str | Path, overwrite: bool = False
) -> list[Any]:
    """Generates images into a folder with the model of ``option``; returns the metadata rows."""
    height, width = args.size or (None, None)
    settings = {"seeds": _seeds(args), "negative": args.negative, "batch_size": args.batch, "progress": True}
    settings |= {"height": height, "width": width, "overwrite": overwrite}
    settings |= {key: value for key in ("num_steps", "guidance", "solver") if (value := getattr(args, key)) is not None}
    if option == "pipeline":
        from longalign.inference import baselines
        from longalign.runtime import Runtime

        runtime = Runtime.detect(device=args.device).with_dtype(args.dtype)
        settings |= {"revision": args.revision, "variant": args.variant}
        return baselines.generate(source, prompts, output, runtime=runtime, **settings)
    model = find_checkpoint(source).parent if option == "checkpoint" else load_config(source)
    if isinstance(model, RunConfig):
        check_files(model, training=False, sizes={"--size": width, "--size (height)": height})
    from longalign.inference import sampling as pipeline

    return pipeline.generate(model, prompts, output, dtype=args.dtype, device=args.device, **settings)


def score(args: Namespace) -> None:
    """Scores images and prints a table."""
    configs = _rewards(args.reward)
    if args.by_sentence and not args.images:
        raise ValueError("--by-sentence scores --images; generate them first, with `longalign generate`")
    if not args.images:
        _generate_and_score(args, configs)
        return
    _reject_sampling_options(args)
    paths, prompts = _images(args.images)
    if args.prompt or args.prompts:
        prompts = _prompts_from_args(args)
    if prompts is None:
        raise ValueError("the images have no prompts; give --prompt or --prompts")
    if len(prompts) not in (1, len(paths)):
        raise ValueError(f"expected one prompt, or one for each of {_count(len(paths), 'image')}, got {len(prompts)}")
    _check_images(paths)
    from longalign.evaluation.metrics import score_images, score_sentences

    score_function = score_sentences if args.by_sentence else score_images
    score_function(_build_rewards(configs, args.device), paths, prompts)


def _generate_and_score(args: Namespace, configs: Mapping[str, PartConfig]) -> None:
    prompts, option = _prompts_from_args(args), "checkpoint" if args.checkpoint else "pipeline"
    _check_pipelines(args, option)
    with TemporaryDirectory() as temporary:
        folder = Path(args.output or temporary)
        new_index(folder)
        rewards = _build_rewards(configs, args.device)  # fail before generating, which may take hours
        with _offloaded_to_cpu(rewards, args.device):
            _generate(args, option, getattr(args, option), prompts, folder)
        from longalign.evaluation.metrics import score_images

        rows = read_images(folder)
        score_images(rewards, [path for path, _, _ in rows], [prompt for _, prompt, _ in rows])


def evaluate(args: Namespace) -> None:
    """Compares models on the same prompts and seeds, generating missing images.

    All inputs are checked before generation starts.
    """
    configs = _rewards(args.reward)
    models = _models(args)
    generated = [name for name, (option, _) in models.items() if option != "images"]
    if not generated:
        _reject_sampling_options(args, "prompt", "prompts")
    elif args.output is None:
        raise ValueError("give --output, a folder for the generated images")
    _check_pipelines(args, *(option for option, _ in models.values()))
    for key in ("json", "markdown"):
        if (file := getattr(args, key)) and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder for --{key} {file}")
    new_prompts = _prompts_from_args(args) if generated else []
    folders = {n: Path(args.output) / n if n in generated else Path(source) for n, (_, source) in models.items()}
    pairs = {
        name: [(text.strip(), seed) for text in new_prompts for seed in _seeds(args)]
        if name in generated
        else [(prompt, seed) for _, prompt, seed in read_images(folder)]
        for name, folder in folders.items()
    }
    base, *others = pairs
    for name in others:
        if pairs[name] != pairs[base]:
            raise ValueError(f"the prompts and seeds of '{name}' differ from those of '{base}'")
    for name in generated:
        _check_source(name, *models[name], folders[name])
    for name, folder in folders.items():
        if name not in generated:
            _check_images([path for path, _, _ in read_images(folder)])
    from longalign.evaluation.metrics import evaluate as compare
    from longalign.evaluation.metrics import reward_metrics
    from longalign.image_io import ImageFiles

    rewards, prompts = _build_rewards(configs, args.device), [prompt for prompt, _ in pairs[base]]
    metrics = reward_metrics(rewards, prompts)
    with _offloaded_to_cpu(rewards, args.device):
        for name in generated:
            _generate(args, *models[name], new_prompts, folders[name])
    images = {name: ImageFiles([path for path, _, _ in read_images(folder)]) for name, folder in folders.items()}
    seeds = [seed for _, seed in pairs[base] if seed is not None]
    table = compare(images, prompts, metrics, seeds, args.batch)
    print(table.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None), end="")
    if args.json:
        model_configs = {name: _config_of_image(images[name].paths[0]) for name in images}
        text = json.dumps({**table.to_dict(), "configs": model_configs}, indent=1)
        Path(args.json).write_text(text, encoding="utf-8")
    if args.markdown:
        Path(args.markdown).write_text(table.markdown(), encoding="utf-8")


def _config_of_image(image: Path | str) -> Any:
    """Config stored in an image's metadata; None if there is none."""
    from PIL import Image

    with Image.open(image) as opened:
        try:
            return json.loads(opened.info["config"])
        except (KeyError, TypeError, ValueError):
            return None


def _models(args: Namespace) -> dict[str, tuple[str, str]]:
    """Name -> option and source of each model to compare."""
    models: dict[str, tuple[str, str]] = {}
    for option, item in args.models:
        name, equals, source = item.partition("=")
        if not equals or not name or name in models:
            raise ValueError(f"--{option} takes NAME=... with a unique name for each model, got '{item}'")
        models[name] = option, source
    if not models:
        raise ValueError("give models to compare, with --images, --checkpoint or --pipeline")
    return models


def _check_source(name: str, option: str, source: str, folder: Path) -> None:
    """Raises an error if a model does not exist, or its folder already has images."""
    if option == "checkpoint":
        find_checkpoint(source)
    try:
        new_index(folder)
    except ValueError as error:
        raise ValueError(f"{error}; to compare these images, give --images {name}={folder}, not --{option}") from error


def direction(args: Namespace) -> None:
    """Computes and writes a common direction."""
    (config,) = _rewards([args.reward]).values()
    prompts = [p for p in read_prompts(args.prompts) if p]
    check_parts({config.name: config})
    from longalign.rewards.reweighted.direction import write_direction
    from longalign.runtime import Runtime

    print(write_direction(config, prompts, args.output, Runtime.detect(device=args.device), args.batch).report())


def list_parts(args: Namespace) -> int:
    """Prints the available parts. With ``--check``, returns 1 if any part is broken."""
    table, problems = descriptions.parts_table(args.kinds, args.check or args.verbose)
    print(table)
    for problem in problems:
        print(f"broken: {problem}", file=sys.stderr)
    return 1 if problems and args.check else 0


def describe(args: Namespace) -> None:
    """Describes a kind, a part, the keys of a run, or a config."""
    topic, details = args.topic, args.details
    if args.json_schema:
        print(descriptions.describe_schema([topic, *details]))
    elif Path(topic).suffix in CONFIG_SUFFIXES or Path(topic).is_dir():
        print(redact_url(to_yaml(override(topic, parse_assignments(details)))), end="")
    else:
        print(descriptions.describe_topic([topic, *details]))


def convert(args: Namespace) -> None:
    """Converts published weights."""
    from longalign.checkpoints.convert import convert_longsd

    checkpoints = {key: value for key in ("backbone", "t5") if (value := getattr(args, key)) is not None}
    print(convert_longsd(args.source, args.output, align_only=args.align_only, **checkpoints))


def export(args: Namespace) -> None:
    """Exports a checkpoint for diffusers, and uploads it with ``--push-to-hub``."""
    if args.private and not args.push_to_hub:
        raise ValueError("--private only applies to --push-to-hub; remove it, or add --push-to-hub OWNER/NAME")
    checkpoint_file(Path(args.checkpoint))  # fail before heavy imports
    if not args.overwrite:
        check_unexported(Path(args.output))
    from longalign.checkpoints import publish

    for path in publish.export(args.checkpoint, args.output, args.metrics, args.license, overwrite=args.overwrite):
        print(path)
    if args.push_to_hub:
        print(publish.push_to_hub(args.output, args.push_to_hub, args.private))


def demo(args: Namespace) -> None:
    """Runs the demo."""
    align, reward = (load_config(path) if path else None for path in (args.align, args.reward))
    from longalign.demo import run_demo

    run_demo(args.output, align, reward, args.prompts, device=args.device)


def examples(args: Namespace) -> None:
    """Lists the bundled example configs, prints one, or copies one or all."""
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
    """Copies files into a folder; copies none if a different file of the same name exists."""
    targets = {path: folder / path.name for path in files}
    for path, target in targets.items():
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise ValueError(f"{target} exists and differs; choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, target in targets.items():
        shutil.copyfile(path, target)
        print(target)


def _summary(path: Path) -> str:
    """First sentence of a config's leading comment; first line of a script or text."""
    if path.suffix != ".yaml":
        return path.read_text(encoding="utf-8").strip('"').partition("\n")[0]
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ").strip() for line in lines).partition(". ")[0].removesuffix(".")


def env(args: Namespace) -> None:
    """Prints the environment, for bug reports."""
    from longalign.cli.environment import environment

    facts = environment()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _reject_sampling_options(args: Namespace, *extra_keys: str) -> None:
    """Raises ValueError for an option that only applies when generating images."""
    keys = ("output", "negative", "num_steps", "guidance", "solver", "seed", "size", "dtype", "revision", "variant")
    _reject_options(args, *keys, *extra_keys, reason="only applies when generating images")


def _check_pipelines(args: Namespace, *options: str) -> None:
    """Raises ValueError for an option that only applies to stock pipelines if no pipeline is given."""
    if "pipeline" not in options:
        _reject_options(args, "revision", "variant", reason="only applies to --pipeline; set it in the config instead")


def _reject_options(args: Namespace, *keys: str, reason: str) -> None:
    """Raises ValueError if any of the options is given."""
    for key in keys:
        if getattr(args, key) is not None:
            raise ValueError(f"--{key.replace('_', '-')} {reason}; remove it")


def _seeds(args: Namespace) -> Sequence[int]:
    seeds = args.seed or SEEDS
    check_seeds(seeds)
    return seeds


def _prompts_from_args(args: Namespace) -> list[str]:
    if not args.prompt and not args.prompts:
        raise ValueError("give --prompt or --prompts, to generate images from")
    texts = args.prompt or ()
    prompts = [check_text(text, f"--prompt {i}") for i, text in enumerate(texts)] or read_prompts(args.prompts)
    if not prompts:
        raise ValueError(f"{args.prompts} contains no prompts")
    return list(prompts)


def _rewards(texts: Sequence[str]) -> dict[str, PartConfig]:
    """Validated reward configs by display name; repeated names get a number."""
    out: dict[str, PartConfig] = {}
    for text in texts:
        value = read_mapping(Path(text)) if Path(text).suffix in CONFIG_SUFFIXES else parse_value(text)
        config = rewards.validate(value)
        out[unique_name(config.name, out)] = config
    return out


def _build_rewards(configs: Mapping[str, PartConfig], device: str | None) -> dict[str, Any]:
    check_parts(configs)
    from longalign.rewards.base import as_reward
    from longalign.runtime import Runtime

    runtime = Runtime.detect(device=device)
    return {name: as_reward(rewards.construct(config, runtime), name).eval() for name, config in configs.items()}


@contextmanager
def _offloaded_to_cpu(rewards: Mapping[str, Any], device: str | None) -> Iterator[None]:
    """Context manager: moves rewards to the CPU, to free GPU memory for generation."""
    from longalign.runtime import Runtime

    for reward in rewards.values():
        reward.to("cpu")
    yield
    for reward in rewards.values():
        reward.to(Runtime.detect(device=device).device)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _check_images(paths: Sequence[Path]) -> None:
    """Reads all images in parallel. Raises ValueError that lists the unreadable ones."""
    from longalign.image_io import load_image

    def problem(path: Path) -> str | None:
        try:
            load_image(path)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = [text for text in pool.map(problem, paths) if text]
    if problems:
        rest = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{_count(len(problems), 'image')} cannot be read:\n  " + "\n  ".join(problems[:10]) + rest)


def _images(arguments: Sequence[str]) -> tuple[list[Path], list[str] | None]:
    """Image files, with their prompts if the folder has a ``metadata.jsonl``, else None."""
    paths = [Path(path) for path in arguments]
    if len(paths) == 1 and paths[0].is_dir():
        if (paths[0] / INDEX).exists():
            rows = read_images(paths[0])
            return [path for path, _, _ in rows], [prompt for _, prompt, _ in rows]
        paths = sorted(p for p in paths[0].iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise ValueError(f"{arguments[0]} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no image {path}")
    return paths, None
