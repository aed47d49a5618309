"""What each command of ``longalign`` does. What is heavy is imported after the user's input has been checked."""

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

from longalign import describe as descriptions
from longalign.checks import check_files, check_parts
from longalign.config import RunConfig, load_config, override, to_yaml
from longalign.data.lines import IMAGE_SUFFIXES, check_seeds, inside, new_index, read_jsonl, read_prompts, text_of
from longalign.errors import redact_url, suggestion
from longalign.files import (
    check_unexported,
    checkpoint_file,
    find_checkpoint,
    parse_assignments,
    parse_value,
    read_mapping,
)
from longalign.registry import PartConfig, rewards
from longalign.runtime import examples_folder
from longalign.segment import check_text

CONFIG_SUFFIXES = (".yaml", ".yml", ".json", ".safetensors")
SEEDS = (0,)


def train(args: Namespace) -> int:
    """Runs a config; 130, 143 or 129, as a shell has it, if Ctrl-C, SIGTERM or SIGHUP stopped it early."""
    config = override(args.config, parse_assignments(args.overrides))
    resume = Path(args.resume_from) if args.resume_from else Path(config.output) if args.resume else None
    from_checkpoint = Path(args.config).suffix not in (".yaml", ".yml", ".json")
    if resume is not None and (args.resume_from or from_checkpoint):
        checkpoint_file(resume)  # a run of a config file is started where it has none yet
    check_files(config, resumed=resume is not None)  # again by `fit`, which cannot do so before torch finds the device
    from longalign.compose import build_from_config
    from longalign.runtime import Runtime

    result = build_from_config(config, Runtime.detect(config.loop.precision, args.device)).fit(resume=resume)
    print(f"step {result.step} of {config.loop.steps}: {result.checkpoint}")
    if result.interrupted:
        return 128 + (result.signal or signal.SIGINT)
    if config.backbone is not None:
        where = f"--checkpoint {result.checkpoint} --output {config.output}/images"
        print(f'next: longalign generate {where} --prompt "..."')
    else:
        print(f"next: longalign export {result.checkpoint} {config.output}/model")
    return 0


def cache(args: Namespace) -> None:
    """Computes what a run's caches lack, with all processes that were distributed_runtime together."""
    config = override(args.config, parse_assignments(args.overrides))
    if config.cache is None:
        raise ValueError("the config has no cache; add to it, for example, cache: {folder: runs/cache}")
    check_files(config, resumed=True, cached=False)
    from longalign import caching
    from longalign.runtime import distributed_runtime

    with distributed_runtime(config.loop.precision, args.device) as runtime:
        made = caching.make_caches(config, runtime, args.batch, progress=True)
    for name, (there, new) in made.items():
        if runtime.rank == 0:
            print(f"{config.cache.folder}/{name}: {there} entries, {new} of them new")


def generate(args: Namespace) -> None:
    """Generates images into a folder."""
    prompts = _prompts_from_args(args)
    try:
        new_index(args.output, args.overwrite)
    except ValueError as error:
        listed = (Path(args.output) / "metadata.jsonl").exists()
        raise ValueError(f"{error}{', or replace them with --overwrite' if listed else ''}") from error
    option = next(key for key in ("checkpoint", "config", "pipeline") if getattr(args, key))
    _check_pipelines(args, option)
    count = len(_draw(args, option, getattr(args, option), prompts, args.output, overwrite=args.overwrite))
    print(f"{_count(count, 'image')} in {args.output}")


def _draw(
    args: Namespace, option: str, source: str, prompts: Sequence[str], output: str | Path, overwrite: bool = False
) -> list[Any]:
    """Samples from what an option names into a folder; returns its rows."""
    height, width = args.size or (None, None)
    settings = {"seeds": _seeds(args), "negative": args.negative, "batch_size": args.batch, "progress": True}
    settings |= {"height": height, "width": width, "overwrite": overwrite}
    settings |= {key: value for key in ("num_steps", "guidance", "solver") if (value := getattr(args, key)) is not None}
    if option == "pipeline":
        from longalign import baselines
        from longalign.runtime import Runtime

        runtime = Runtime.detect(device=args.device).with_dtype(args.dtype)
        settings |= {"revision": args.revision, "variant": args.variant}
        return baselines.generate(source, prompts, output, runtime=runtime, **settings)
    model = find_checkpoint(source).parent if option == "checkpoint" else load_config(source)
    if isinstance(model, RunConfig):
        check_files(model, training=False, sizes={"--size": width, "--size (height)": height})
    from longalign import pipeline

    return pipeline.generate(model, prompts, output, dtype=args.dtype, device=args.device, **settings)


def score(args: Namespace) -> None:
    """Scores images and prints a table."""
    configs = _rewards(args.reward)
    if args.by_sentence and not args.images:
        raise ValueError("--by-sentence scores --images; generate them first, with `longalign generate`")
    if not args.images:
        _score_drawn(args, configs)
        return
    _reject_sampling_options(args)
    paths, prompts = _images(args.images)
    if args.prompt or args.prompts:
        prompts = _prompts_from_args(args)
    if prompts is None:
        raise ValueError("the images come without prompts; give --prompt or --prompts")
    if len(prompts) not in (1, len(paths)):
        raise ValueError(f"expected one prompt, or one for each of {_count(len(paths), 'image')}, got {len(prompts)}")
    _check_images(paths)
    from longalign.evaluate import score_images, score_sentences

    scored_by = score_sentences if args.by_sentence else score_images
    scored_by(_built(configs, args.device), paths, prompts)


def _score_drawn(args: Namespace, configs: Mapping[str, PartConfig]) -> None:
    prompts, option = _prompts_from_args(args), "checkpoint" if args.checkpoint else "pipeline"
    _check_pipelines(args, option)
    with TemporaryDirectory() as temporary:
        folder = Path(args.output or temporary)
        new_index(folder)
        rewards = _built(configs, args.device)  # before the images, which may take hours
        with _offloaded_to_cpu(rewards, args.device):
            _draw(args, option, getattr(args, option), prompts, folder)
        from longalign.evaluate import score_images

        rows = _rows(folder)
        score_images(rewards, [path for path, _, _ in rows], [prompt for _, prompt, _ in rows])


def evaluate(args: Namespace) -> None:
    """Compares models by their images of the same prompts and seeds, which are drawn where they are not there.

    All inputs are checked before sampling starts.
    """
    configs = _rewards(args.reward)
    models = _models(args)
    drawn = [name for name, (option, _) in models.items() if option != "images"]
    if not drawn:
        _reject_sampling_options(args, "prompt", "prompts")
    elif args.output is None:
        raise ValueError("give --output, a folder for what is drawn")
    _check_pipelines(args, *(option for option, _ in models.values()))
    for key in ("json", "markdown"):
        if (file := getattr(args, key)) and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder for --{key} {file}")
    given = _prompts_from_args(args) if drawn else []
    folders = {n: Path(args.output) / n if n in drawn else Path(source) for n, (_, source) in models.items()}
    pairs = {
        name: [(text.strip(), seed) for text in given for seed in _seeds(args)]
        if name in drawn
        else [(prompt, seed) for _, prompt, seed in _rows(folder)]
        for name, folder in folders.items()
    }
    first, *others = pairs
    for name in others:
        if pairs[name] != pairs[first]:
            raise ValueError(f"the images of '{name}' are not of the same prompts and seeds as those of '{first}'")
    for name in drawn:
        _check_source(name, *models[name], folders[name])
    for name, folder in folders.items():
        if name not in drawn:
            _check_images([path for path, _, _ in _rows(folder)])
    from longalign.evaluate import evaluate as measure
    from longalign.evaluate import reward_metrics
    from longalign.image_io import ImageFiles

    rewards, prompts = _built(configs, args.device), [prompt for prompt, _ in pairs[first]]
    metrics = reward_metrics(rewards, prompts)
    with _offloaded_to_cpu(rewards, args.device):
        for name in drawn:
            _draw(args, *models[name], given, folders[name])
    images = {name: ImageFiles([path for path, _, _ in _rows(folder)]) for name, folder in folders.items()}
    seeds = [seed for _, seed in pairs[first] if seed is not None]
    table = measure(images, prompts, metrics, seeds, args.batch)
    print(table.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None), end="")
    if args.json:
        origins = {name: _origin(images[name].paths[0]) for name in images}
        text = json.dumps({**table.to_dict(), "configs": origins}, indent=1)
        Path(args.json).write_text(text, encoding="utf-8")
    if args.markdown:
        Path(args.markdown).write_text(table.markdown(), encoding="utf-8")


def _origin(image: Path | str) -> Any:
    """The config that an image says it was generated with; None if it says nothing."""
    from PIL import Image

    with Image.open(image) as opened:
        try:
            return json.loads(opened.info["config"])
        except (KeyError, TypeError, ValueError):
            return None


def _models(args: Namespace) -> dict[str, tuple[str, str]]:
    """Name -> option and source of each model that is to be compared."""
    models: dict[str, tuple[str, str]] = {}
    for option, item in args.models:
        name, equals, source = item.partition("=")
        if not equals or not name or name in models:
            raise ValueError(f"--{option} takes NAME=... with a name for each model, not '{item}'")
        models[name] = option, source
    if not models:
        raise ValueError("give models to compare, with --images, --checkpoint or --pipeline")
    return models


def _check_source(name: str, option: str, source: str, folder: Path) -> None:
    """Raises an error where a model is not there, or its folder has images already."""
    if option == "checkpoint":
        find_checkpoint(source)
    try:
        new_index(folder)
    except ValueError as error:
        raise ValueError(f"{error}; to compare with these, give --images {name}={folder}, not --{option}") from error


def direction(args: Namespace) -> None:
    """Computes and writes a common direction."""
    (config,) = _rewards([args.reward]).values()
    prompts = [p for p in read_prompts(args.prompts) if p]
    check_parts({config.name: config})
    from longalign.rewards.direction import write_direction
    from longalign.runtime import Runtime

    print(write_direction(config, prompts, args.output, Runtime.detect(device=args.device), args.batch).report())


def list_parts(args: Namespace) -> int:
    """Prints the parts; 1 if some are broken."""
    table, problems = descriptions.list_parts(args.kinds, args.check or args.verbose)
    print(table)
    for problem in problems:
        print(f"broken: {problem}", file=sys.stderr)
    return 1 if problems and args.check else 0


def describe(args: Namespace) -> None:
    """Explains a kind, a part, the keys of a run, or a config."""
    what, more = args.what, args.more
    if Path(what).suffix in CONFIG_SUFFIXES or Path(what).is_dir():
        print(redact_url(to_yaml(override(what, parse_assignments(more)))), end="")
    else:
        print(descriptions.explain([what, *more]))


def convert(args: Namespace) -> None:
    """Converts published weights."""
    from longalign.convert import convert_longsd

    given = {key: value for key in ("backbone", "t5") if (value := getattr(args, key)) is not None}
    print(convert_longsd(args.source, args.output, align_only=args.align_only, **given))


def export(args: Namespace) -> None:
    """Writes a checkpoint for others, and uploads it if asked to."""
    if args.private and not args.push_to_hub:
        raise ValueError("--private belongs to --push-to-hub")
    checkpoint_file(Path(args.checkpoint))  # looked for before what is heavy is imported
    if not args.overwrite:
        check_unexported(Path(args.output))
    from longalign import publish

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
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "__init__.py"}
    if args.name is not None and args.name not in found:
        near = suggestion(args.name, found) or f"; available: {', '.join(found)}"
        raise ValueError(f"no example '{args.name}'{near}")
    chosen = found if args.name is None else {args.name: found[args.name]}
    if args.to is not None:
        _copy(chosen.values(), Path(args.to))
    elif args.name is not None:
        print(found[args.name].read_text(encoding="utf-8"), end="")
    else:
        width = max(map(len, found))
        room = max(40, shutil.get_terminal_size().columns - width - 2)
        for name, path in found.items():
            print(f"{name:{width}}  {shorten(_first_comment(path), room, placeholder=' ...')}".rstrip())


def _copy(files: Iterable[Path], folder: Path) -> None:
    """Copies files into a folder, none if one of them is there with something else in it."""
    targets = {path: folder / path.name for path in files}
    for path, target in targets.items():
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise ValueError(f"{target} exists and differs; choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, target in targets.items():
        shutil.copyfile(path, target)
        print(target)


def _first_comment(path: Path) -> str:
    """The comment that a config starts with, up to the end of its first sentence; what a script or text starts with."""
    if path.suffix != ".yaml":
        return path.read_text(encoding="utf-8").strip('"').partition("\n")[0]
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ").strip() for line in lines).partition(". ")[0].removesuffix(".")


def env(args: Namespace) -> None:
    """Prints what a bug report should say."""
    from longalign.environment import environment

    facts = environment()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _reject_sampling_options(args: Namespace, *more: str) -> None:
    """Raises ValueError for an option that only applies when images are generated."""
    keys = ("output", "negative", "num_steps", "guidance", "solver", "seed", "size", "dtype", "revision", "variant")
    _refuse(args, *keys, *more, why="only applies when generating images")


def _check_pipelines(args: Namespace, *options: str) -> None:
    """Raises ValueError for an option about stock pipelines where there is none."""
    if "pipeline" not in options:
        _refuse(args, "revision", "variant", why="only applies to --pipeline; set it in the config instead")


def _refuse(args: Namespace, *keys: str, why: str) -> None:
    """Raises ValueError for the first of some options that was given."""
    for key in keys:
        if getattr(args, key) is not None:
            raise ValueError(f"--{key.replace('_', '-')} {why}; remove it")


def _seeds(args: Namespace) -> Sequence[int]:
    seeds = args.seed or SEEDS
    check_seeds(seeds)
    return seeds


def _prompts_from_args(args: Namespace) -> list[str]:
    if not args.prompt and not args.prompts:
        raise ValueError("give --prompt or --prompts, to generate images from")
    given = args.prompt or ()
    prompts = [check_text(text, f"--prompt {i}") for i, text in enumerate(given)] or read_prompts(args.prompts)
    if not prompts:
        raise ValueError(f"{args.prompts} holds no prompts")
    return list(prompts)


def _rewards(texts: Sequence[str]) -> dict[str, PartConfig]:
    """Checked configs under the names that their scores are shown by."""
    out: dict[str, PartConfig] = {}
    for text in texts:
        value = read_mapping(Path(text)) if Path(text).suffix in CONFIG_SUFFIXES else parse_value(text)
        config = rewards.validate(value)
        name, number = config.name, 2
        while name in out:
            name, number = f"{config.name}-{number}", number + 1
        out[name] = config
    return out


def _built(configs: Mapping[str, PartConfig], device: str | None) -> dict[str, Any]:
    check_parts(configs)
    from longalign.rewards.base import as_reward
    from longalign.runtime import Runtime

    runtime = Runtime.detect(device=device)
    return {name: as_reward(rewards.construct(config, runtime), name).eval() for name, config in configs.items()}


@contextmanager
def _offloaded_to_cpu(rewards: Mapping[str, Any], device: str | None) -> Iterator[None]:
    """Inside, the rewards are on the CPU and leave the GPU's memory to the sampled model."""
    from longalign.runtime import Runtime

    for reward in rewards.values():
        reward.to("cpu")
    yield
    for reward in rewards.values():
        reward.to(Runtime.detect(device=device).device)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _check_images(paths: Sequence[Path]) -> None:
    """Reads all images, several at a time. Raises ValueError naming those that cannot be read."""
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
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{_count(len(problems), 'image')} cannot be read:\n  " + "\n  ".join(problems[:10]) + more)


def _images(given: Sequence[str]) -> tuple[list[Path], list[str] | None]:
    """Image files, and their prompts where a folder's ``metadata.jsonl`` has them."""
    paths = [Path(path) for path in given]
    if len(paths) == 1 and paths[0].is_dir():
        if (paths[0] / "metadata.jsonl").exists():
            rows = _rows(paths[0])
            return [path for path, _, _ in rows], [prompt for _, prompt, _ in rows]
        paths = sorted(p for p in paths[0].iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise ValueError(f"{given[0]} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no image {path}")
    return paths, None


def _rows(folder: Path) -> list[tuple[Path, str, Any]]:
    """File, prompt and seed of each image of a folder that ``longalign generate`` wrote."""
    out = []
    for where, row in read_jsonl(folder / "metadata.jsonl"):
        if not isinstance(row.get("file_name"), str):
            raise ValueError(f"{where} has no 'file_name'")
        path = inside(folder, row["file_name"], where)
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"the image {path}, which {where} names, {what}")
        out.append((path, text_of(row, where), row.get("seed")))
    if not out:
        raise ValueError(f"{folder / 'metadata.jsonl'} names no images")
    return out
