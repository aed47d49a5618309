"""Exports a checkpoint for sharing: files for longalign and diffusers, and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from longalign.checkpoints.cards import model_card, reward_card
from longalign.checkpoints.checkpoint import load_weights, read_config
from longalign.checkpoints.diffusers_files import build_adapters, save_denoiser, save_lora
from longalign.checkpoints.redaction import exported_keys, exported_tree
from longalign.config.run import RunConfig, to_dict
from longalign.evaluation.table import MetricTable
from longalign.files.paths import (
    CARD,
    DIFFUSERS_LORA,
    REWARD,
    check_unexported,
    checkpoint_file,
    read_metadata,
)
from longalign.files.weights import load_tensors, save_tensors
from longalign.hub import CHECKPOINT

MODEL = "diffusion_pytorch_model"
#: files that `export` writes for a model and for a reward; only these are uploaded
MODEL_FILES = (
    CHECKPOINT,
    CARD,
    DIFFUSERS_LORA,
    *(f"{folder}/{name}" for folder in ("unet", "transformer", "adapter", "adapter-*")
      for name in ("config.json", f"{MODEL}*.safetensors", f"{MODEL}.safetensors.index.json")),
)  # fmt: skip
REWARD_FILES = (
    CHECKPOINT, CARD, "config.json", "model*.safetensors", "model.safetensors.index.json", "preprocessor_config.json",
    "processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip


def export(
    checkpoint: str | Path,
    output: str | Path,
    metrics: str | Path | None = None,
    license: str | None = None,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Exports a checkpoint as a folder for sharing.

    The folder contains:

    - ``longalign.safetensors``: the checkpoint, without credentials and local paths of the training data;
    - ``pytorch_lora_weights.safetensors``: all LoRAs as one, for ``load_lora_weights`` of a diffusers pipeline. After
      full fine-tuning, the denoiser in diffusers format in ``unet/`` or ``transformer/`` instead;
    - ``adapter/``: the encoder's LaVi-Bridge adapter, if any, in diffusers format;
    - ``README.md``: a model card with the config, the data and the metrics.

    If the run trained a reward, the folder contains instead the reward as a transformers ``CLIPModel``, the checkpoint
    file and a model card.

    Args:
        checkpoint: the checkpoint's file or folder, or the output folder of a run, of which the newest checkpoint is
            exported.
        output: output folder, created if needed. It must not contain any of the files listed above unless ``overwrite``
            is set.
        metrics: path of a metric table for the model card, written by ``longalign eval --json`` or ``longalign demo``;
            None: none.
        license: id of a license on the Hub for the model card, e.g. ``"openrail++"``; None: none.
        overwrite: whether to replace an existing export.

    Returns:
        The paths of the written files and folders.

    Raises:
        FileNotFoundError: if the checkpoint does not exist.
        ValueError: if ``output`` contains files listed above or is the checkpoint's own folder. Also if ``metrics`` is
            not a metric table, or was measured on other models.
    """
    source, output = checkpoint_file(Path(checkpoint)), Path(output)
    if source.parent.resolve() == output.resolve():
        raise ValueError(f"{output} is the checkpoint's own folder; choose a different folder")
    if not overwrite:
        check_unexported(output)
    config = read_config(source)
    table = None if metrics is None else read_table(Path(metrics), config)
    _remove_export(output, exported_files(config), overwrite)
    if config.backbone is None:
        return _export_reward(source, output, config, table, license)
    weights = load_weights(source)
    output.mkdir(parents=True, exist_ok=True)
    written = [_copy_checkpoint(source, output)]
    if weights.denoiser:
        written.append(save_denoiser(config, weights, output))
    elif weights.loras:
        written.append(save_lora(config, weights, output))
    for name, adapter in build_adapters(weights.adapter).items():
        adapter.save(output / name)
        written.append(output / name)
    card = model_card(config, weights, read_metadata(source), table, license)
    (output / CARD).write_text(card, encoding="utf-8")
    return [*written, output / CARD]


def exported_files(config: RunConfig) -> tuple[str, ...]:
    """Returns glob patterns, relative to the output folder, of the files that `export` writes for a config."""
    return REWARD_FILES if config.backbone is None else MODEL_FILES


def _remove_export(output: Path, patterns: Sequence[str], overwrite: bool) -> None:
    """Removes the files of an earlier export from ``output``.

    Raises:
        ValueError: if such files exist and ``overwrite`` is False.
    """
    for pattern in patterns:
        for path in sorted(output.glob(pattern)):
            if not overwrite:
                raise ValueError(f"{path} exists; choose a different folder, or set overwrite (--overwrite)")
            path.unlink()
            if path.parent != output and not any(path.parent.iterdir()):
                path.parent.rmdir()


def _export_reward(
    source: Path, output: Path, config: RunConfig, table: MetricTable | None, license: str | None
) -> list[Path]:
    folder = source.parent / REWARD
    if not folder.is_dir():
        raise ValueError(
            f"the folder {folder} with the trained reward is missing; export the checkpoint of the run, not an "
            "earlier export"
        )
    files = sorted(folder.iterdir())
    output.mkdir(parents=True, exist_ok=True)
    _copy_checkpoint(source, output)
    for file in files:
        shutil.copyfile(file, output / file.name)
    (output / CARD).write_text(reward_card(config, read_metadata(source), table, license), encoding="utf-8")
    return [output / file.name for file in (source, *files)] + [output / CARD]


def _copy_checkpoint(source: Path, output: Path) -> Path:
    """Copies the checkpoint file, without local paths and credentials in its config; returns the path of the copy."""
    metadata = read_metadata(source)
    tree = exported_tree(json.loads(metadata["config"]))
    save_tensors(output / CHECKPOINT, load_tensors(source), {**metadata, "config": json.dumps(tree)})
    return output / CHECKPOINT


def read_table(path: Path, config: RunConfig | None = None) -> MetricTable:
    """Reads a metric table from a file written by ``longalign eval --json``.

    Args:
        path: path of the file.
        config: config of the run whose metrics are expected; None: not checked. If the file contains the configs of all
            its models, one of them must equal this config, apart from local paths.

    Raises:
        ValueError: if the file is not a metric table, or none of its models has this config.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        table = MetricTable.from_dict(data)
        configs = {name: value for name, value in (data.get("configs") or {}).items() if value is not None}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a metric table; expected the output of `longalign eval --json`") from error
    if (
        config is not None
        and len(configs) == len(table.models)
        and exported_keys(to_dict(config)) not in map(exported_keys, configs.values())
    ):
        raise ValueError(
            f"{path} has the models {', '.join(configs)}: none has the config of this checkpoint; "
            "pass the output of `longalign eval --json` for images of this checkpoint"
        )
    return table
