"""The command ``longalign eval``: compares models on the same prompts and seeds."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longalign.cli.generate import check_size, generate_images
from longalign.cli.images import check_images
from longalign.cli.metrics import build_metrics, judge_config, metric_configs
from longalign.cli.options import (
    add_metrics,
    add_prompts,
    add_sampling,
    check_pipeline_options,
    prompts_of,
    reject_sampling_options,
    seeds_of,
)
from longalign.cli.rewards import offloaded_to_cpu
from longalign.data.prompts.sets import read_prompt_set
from longalign.files.paths import find_checkpoint
from longalign.image_folder import new_index, read_images
from longalign.names import count

EXAMPLES = """
    longalign eval --images base=out/base tuned=out/tuned --reward denscore
    longalign eval --images base=out/base tuned=out/tuned --reward denscore --metric gauges --json table.json
    longalign eval --images base=out/base tuned=out/tuned --metric vqa.yaml --judge judge.yaml
    longalign eval --images base=out/base tuned=out/tuned --reward denscore --prompts dpg-bench:dpg_bench.csv
    longalign eval --images base=out/base --metric '{name: retrieval, reward: hpsv2, component: orthogonal}'
    longalign eval --pipeline sd15=stable-diffusion-v1-5/stable-diffusion-v1-5 --checkpoint ours=runs/reward \\
      --prompts prompts.txt --output out/compared --reward denscore
"""


def add_options(parser: ArgumentParser) -> None:
    about = "folders written by `longalign generate`; each model is compared with the first and the previous one"
    parser.add_argument("--images", nargs="+", action=_AppendModels, metavar="NAME=DIR", help=about)
    about = "checkpoints to sample from"
    parser.add_argument("--checkpoint", nargs="+", action=_AppendModels, metavar="NAME=DIR", help=about)
    about = "stock diffusers pipelines to sample from, Hub ids or folders"
    parser.add_argument("--pipeline", nargs="+", action=_AppendModels, metavar="NAME=MODEL", help=about)
    parser.set_defaults(models=[])
    add_metrics(parser)
    about = "config of a judge that compares each model with the first, as {vlm: ...} or as a .yaml or .json file"
    parser.add_argument("--judge", metavar="JUDGE", help=about)
    about = "images of these prompts are broken down by the labels of the set"
    add_prompts(parser, "a prompt; may be repeated", required=False, more=about)
    add_sampling(parser)
    about = "a folder for the generated images, with a subfolder per model"
    parser.add_argument("--output", metavar="DIR", help=about)
    parser.add_argument("--json", metavar="FILE", help="also write the table, with the values per image, as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="also write the table as Markdown")
    parser.add_argument("--csv", metavar="FILE", help="also write the values per image as CSV")


_SOURCES = {"images": "DIR", "checkpoint": "DIR", "pipeline": "MODEL"}


class _AppendModels(Action):
    """Argparse action of ``--images``, ``--checkpoint`` and ``--pipeline``: collects the models of all three options.

    ``namespace.models`` is a list of ``(option, "NAME=VALUE")`` in the order of the command line.
    """

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        namespace.models = [*namespace.models, *((self.dest, value) for value in values)]


@dataclass(frozen=True)
class _Model:
    """A model to compare, given as ``--<option> <name>=<source>``.

    Attributes:
        name: name in the table.
        option: ``"images"``, ``"checkpoint"`` or ``"pipeline"``.
        source: a folder of images, a checkpoint, or the Hub id or folder of a diffusers pipeline.
        folder: folder of the model's images; the folder need not exist yet if they are generated.
    """

    name: str
    option: str
    source: str
    folder: Path

    @property
    def generated(self) -> bool:
        """Whether ``longalign eval`` generates the images, because a checkpoint or pipeline is given."""
        return self.option != "images"


def run(args: Namespace) -> None:
    """Compares models on the same prompts and seeds, and prints a table of metrics.

    The images of checkpoints and pipelines are generated first, after all inputs have been checked.
    """
    configs = metric_configs(args.metric, args.reward, or_judge=args.judge)
    judge = None if args.judge is None else judge_config(args.judge)
    models = _models(args)
    _check_options(args, models)
    prompts = prompts_of(args) if any(model.generated for model in models) else []
    rows = {model.name: read_images(model.folder) for model in models if not model.generated}
    pairs = _shared_pairs(args, models, prompts, rows)
    texts = [prompt for prompt, _ in pairs]
    labels = _labels(args.prompts, texts, required=not prompts)
    for model in models:
        if model.generated:
            _check_source(model, args)
    for images in rows.values():
        check_images([path for path, _, _ in images])
    from longalign.evaluation.measure import observe, tabulate
    from longalign.image_io import ImageFiles

    metrics = build_metrics(configs, args.device)
    with offloaded_to_cpu(metrics, args.device):
        for model in models:
            if model.generated:
                generate_images(args, model.option, model.source, prompts, model.folder)
    rows |= {model.name: read_images(model.folder) for model in models if model.generated}
    files = {model.name: ImageFiles([path for path, _, _ in rows[model.name]]) for model in models}
    observed = {name: observe(images, texts, metrics, args.batch) for name, images in files.items()}
    table = tabulate(observed, texts, metrics, [seed for _, seed in pairs if seed is not None])
    table = replace(table, labels=labels)
    if judge is not None:
        from longalign.evaluation.judge import Judge, add_win_rates
        from longalign.runtime import Runtime

        table = add_win_rates(table, files, Judge.from_config(judge, Runtime.detect(device=args.device)))
    print(table.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None), end="")
    if args.json:
        from longalign.evaluation.sentences import image_features, measure_sentences, sentence_metrics
        from longalign.evaluation.sources import table_data

        model_configs = {name: _config_of_image(paths.paths[0]) for name, paths in files.items()}
        facts, reward = sentence_metrics(metrics)
        features = image_features(reward, metrics, observed)
        sentences = measure_sentences(files, texts, facts, reward, args.batch, features)
        folders = {model.name: model.folder for model in models}
        data = table_data(table, folders, Path(args.json), sentences, configs=model_configs)
        Path(args.json).write_text(json.dumps(data, indent=1), encoding="utf-8")
    if args.markdown:
        Path(args.markdown).write_text(table.markdown(), encoding="utf-8")
    if args.csv:
        Path(args.csv).write_text(table.csv(), encoding="utf-8")


def _models(args: Namespace) -> list[_Model]:
    """Returns the models to compare, in the order of the command line.

    Raises ValueError if an option is not ``NAME=VALUE``, a name occurs twice, or there are no models.
    """
    models: dict[str, _Model] = {}
    for option, item in args.models:
        name, equals, source = item.partition("=")
        if not (equals and name and source):
            raise ValueError(f"--{option} expects NAME={_SOURCES[option]}, e.g. base={source or name}, got '{item}'")
        if name in models:
            raise ValueError(f"two models are called '{name}'; give each a different name, as NAME={source}")
        folder = Path(source) if option == "images" else Path(args.output or "") / name
        models[name] = _Model(name, option, source, folder)
    if not models:
        raise ValueError("no models to compare; give them with --images, --checkpoint or --pipeline")
    return list(models.values())


def _check_options(args: Namespace, models: Sequence[_Model]) -> None:
    """Raises ValueError for options that do not apply to the models, and for output files that cannot be written."""
    if not any(model.generated for model in models):
        reject_sampling_options(args, "prompt")
    elif args.output is None:
        raise ValueError("--output is missing; give a folder for the generated images")
    if args.judge is not None and len(models) < 2:
        raise ValueError(f"--judge compares models, got only '{models[0].name}'; give at least two")
    check_pipeline_options(args, *(model.option for model in models))
    for key in ("json", "markdown", "csv"):
        if (file := getattr(args, key)) and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of --{key} {file} does not exist; create it")
        if file and Path(file).is_dir():
            raise ValueError(f"--{key} {file} is a folder; give a file")


def _shared_pairs(
    args: Namespace, models: Sequence[_Model], prompts: Sequence[str], rows: Mapping[str, Sequence[Any]]
) -> list[tuple[str, Any]]:
    """Returns ``(prompt, seed)`` for each image of a model, the same for all models.

    Args:
        args: the options; the seeds of generated images are read from ``--seed``.
        models: the models.
        prompts: the prompts of generated images.
        rows: name of each model whose images exist -> the rows of `longalign.image_folder.read_images`.

    Raises:
        ValueError: if the prompts or seeds differ between models.
    """
    seeds = seeds_of(args) if prompts else ()
    pairs = {
        model.name: [(text.strip(), seed) for text in prompts for seed in seeds]
        if model.generated
        else [(prompt, seed) for _, prompt, seed in rows[model.name]]
        for model in models
    }
    base, *others = pairs
    for name in others:
        if pairs[name] != pairs[base]:
            raise ValueError(
                f"the prompts and seeds of '{name}' differ from '{base}': {_difference(pairs[name], pairs[base])}; "
                "generate both with the same prompts and seeds"
            )
    return pairs[base]


def _difference(pairs: Sequence[tuple[str, Any]], others: Sequence[tuple[str, Any]]) -> str:
    """Returns a text that describes how two lists of ``(prompt, seed)`` differ, for a message."""
    missing, more = ([pair for pair in a if pair not in set(b)] for a, b in ((others, pairs), (pairs, others)))
    if not missing and not more:
        return "the order differs" if len(pairs) == len(others) else f"{len(pairs)} against {len(others)} images"
    found = [f"{len(rows)} {text}" for rows, text in ((missing, "missing"), (more, "more")) if rows]
    prompt, seed = (missing or more)[0]
    return f"{' and '.join(found)} of {count(len(others), 'image')}, e.g. {prompt!r:.60} with seed {seed}"


def _labels(source: str | None, texts: Sequence[str], required: bool) -> dict[str, list[tuple[str, ...]]]:
    """Returns the labels, such as the category, of prompts of a prompt set: name of the label -> labels of each prompt.

    Args:
        source: path of the prompt set, as for ``--prompts``; None returns an empty mapping.
        texts: the prompts.
        required: whether the set must have labels.

    Raises:
        ValueError: if a text is not in the set, or the set has no labels but must have some.
    """
    if source is None:
        return {}
    from longalign.evaluation.groups import all_labels

    found = all_labels(read_prompt_set(source), texts)
    if required and not found:
        raise ValueError(f"--prompts adds labels to images that exist, but {source} has none; remove --prompts")
    return found


def _check_source(model: _Model, args: Namespace) -> None:
    """Raises an error if the images of a model cannot be generated.

    Possible reasons: the checkpoint does not exist, it does not support ``--size``, or the folder already lists images.
    """
    if model.option == "checkpoint":
        check_size(args, find_checkpoint(model.source))
    try:
        new_index(model.folder)
    except ValueError as error:
        hint = f"to compare these images, give --images {model.name}={model.folder}, not --{model.option}"
        raise ValueError(f"{error}; {hint}") from error


def _config_of_image(image: Path | str) -> Any:
    """Returns the config in the metadata of an image file, as JSON values; None if there is none."""
    from PIL import Image

    with Image.open(image) as opened:
        try:
            return json.loads(opened.info["config"])
        except (KeyError, TypeError, ValueError):
            return None
