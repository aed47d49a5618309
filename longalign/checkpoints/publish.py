"""Exports a checkpoint for sharing: files for longalign and diffusers, a model card, upload to the Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from html import escape
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from torch import Tensor

from longalign.checkpoints.checkpoint import Weights, denoiser_folder, export_lora, load_weights, read_config, redacted
from longalign.checkpoints.weights import load_tensors, save_tensors
from longalign.config.files import (
    CARD,
    CHECKPOINT,
    DIFFUSERS_LORA,
    HUB_ID,
    REWARD,
    check_unexported,
    checkpoint_file,
    read_metadata,
)
from longalign.config.run import RunConfig, to_dict
from longalign.encoders.t5.adapter import TextAdapter
from longalign.evaluation.table import MetricTable
from longalign.runtime import Runtime

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
#: config keys with local paths of training; the paths are removed from an export
PRIVATE_KEYS = ("output", "init_from", "data", "cache", "validation")


def export(
    checkpoint: str | Path,
    output: str | Path,
    metrics: str | Path | None = None,
    license: str | None = None,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Exports a checkpoint as a folder.

    - ``longalign.safetensors``: the checkpoint, without credentials and local paths of the training data;
    - ``pytorch_lora_weights.safetensors``, for ``load_lora_weights`` of a diffusers pipeline. After full fine-tuning,
      the denoiser in diffusers format in ``unet/`` or ``transformer/`` instead;
    - ``adapter/``: the encoder's LaVi-Bridge adapter, if any, in diffusers format;
    - ``README.md``: a model card with the config, the data and the metrics.

    For a run that trained a reward: the reward's folder, a transformers ``CLIPModel``, with the checkpoint file and a
    model card.

    Args:
        checkpoint: the checkpoint's file or folder, or a run's folder (the newest checkpoint).
        output: a folder without files of these names.
        metrics: a table written by ``longalign eval --json`` or the demo.
        license: license for the model card, e.g. ``"openrail++"``; omitted if None.
        overwrite: whether to replace an existing export.

    Returns:
        The files and folders written.

    Raises:
        ValueError: if the folder has such files, or ``metrics`` is no metric table or of different models.
    """
    source, output = checkpoint_file(Path(checkpoint)), Path(output)
    if source.parent.resolve() == output.resolve():
        raise ValueError(f"{output} is the checkpoint's own folder; choose a different folder")
    if not overwrite:
        check_unexported(output)
    config = read_config(source)
    table = None if metrics is None else read_table(Path(metrics), config)
    for pattern in REWARD_FILES if config.backbone is None else MODEL_FILES:
        for path in sorted(output.glob(pattern)):
            if not overwrite:
                raise ValueError(f"{path} exists; choose a different folder, or set overwrite (--overwrite)")
            path.unlink()
            if path.parent != output and not any(path.parent.iterdir()):
                path.parent.rmdir()
    if config.backbone is None:
        return _export_reward(source, output, config, table, license)
    weights = load_weights(source)
    output.mkdir(parents=True, exist_ok=True)
    written = [_copy_checkpoint(source, output)]
    if weights.denoiser:
        written.append(_save_denoiser(config, weights, output))
    elif weights.loras:
        written.append(export_lora(source, output))
    for name, adapter in build_adapters(weights.adapter).items():
        adapter.save(output / name)
        written.append(output / name)
    card = model_card(config, weights, read_metadata(source), table, license)
    (output / CARD).write_text(card, encoding="utf-8")
    return [*written, output / CARD]


def _export_reward(
    source: Path, output: Path, config: RunConfig, table: MetricTable | None, license: str | None
) -> list[Path]:
    folder = source.parent / REWARD
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} with the trained reward is missing; is this an export already?")
    files = sorted(folder.iterdir())
    output.mkdir(parents=True, exist_ok=True)
    _copy_checkpoint(source, output)
    for file in files:
        shutil.copyfile(file, output / file.name)
    (output / CARD).write_text(reward_card(config, read_metadata(source), table, license), encoding="utf-8")
    return [output / file.name for file in (source, *files)] + [output / CARD]


def _copy_checkpoint(source: Path, output: Path) -> Path:
    """Copies the checkpoint file without local paths and credentials."""
    metadata = read_metadata(source)
    tree = json.loads(metadata["config"])
    tree = {key: _redact_paths(value) if key in PRIVATE_KEYS else redacted(value) for key, value in tree.items()}
    save_tensors(output / CHECKPOINT, load_tensors(source), {**metadata, "config": json.dumps(tree)})
    return output / CHECKPOINT


def _redact_paths(value: Any) -> Any:
    """As `redacted`; absolute paths and paths in a home folder are also shortened to their last part."""
    if isinstance(value, dict):
        return {key: _redact_paths(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_redact_paths(v) for v in value]
    if isinstance(value, str) and "\n" not in value and "://" not in value:
        for path_class in (PurePosixPath, PureWindowsPath):
            path = path_class(value)
            if path.is_absolute() or value.startswith("~"):
                return path.name or "data"
    return redacted(value)


def _public_config(config: RunConfig) -> Any:
    """A config without credentials and local paths."""
    return _redact_paths(to_dict(config))


def _escape_text(value: object) -> str:
    """Untrusted text as one line of escaped Markdown."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escape(" ".join(str(value).split()), quote=False))


def _code(value: object) -> str:
    """Untrusted text as inline code."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _block(text: str, language: str) -> str:
    """A code block; its fence is longer than any in the text."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _yaml(config: Mapping[str, Any]) -> str:
    return _block(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120), "yaml")


def _metrics(table: MetricTable | None) -> str:
    if table is None:
        return ""
    values = {_cell(model): {_cell(m): v for m, v in metrics.items()} for model, metrics in table.values.items()}
    markdown = MetricTable(values, table.prompts, table.seeds).markdown().strip()
    return f"## Metrics\n\n{markdown}"


def _cell(value: str) -> str:
    """An untrusted name as a table cell."""
    return escape(" ".join(value.split()), quote=False).replace("|", "&#124;").replace("`", "&#96;")


def _versions(metadata: Mapping[str, str]) -> str:
    versions = json.loads(metadata.get("versions", "{}"))
    texts = [_escape_text(f"{name} {version}") for name, version in versions.items()]
    return f"Versions: {', '.join(texts)}." if texts else ""


def _plugins(metadata: Mapping[str, str]) -> str:
    """The packages other than longalign that provide parts of the run."""
    providers = json.loads(metadata.get("providers", "{}"))
    packages = {package: path for path, package in providers.items() if package.split(" ")[0] != "longalign"}
    if not packages:
        return ""
    texts = [f"{_code(package)} (for {_code(path)})" for package, path in packages.items()]
    return f"Required plugins, in addition to longalign: {', '.join(texts)}."


def _steps(metadata: Mapping[str, str]) -> str:
    step = metadata.get("step", "")
    return "1 step" if step == "1" else f"{step if step.isdecimal() else '?'} steps"


def reward_card(
    config: RunConfig, metadata: Mapping[str, str], table: MetricTable | None = None, license: str | None = None
) -> str:
    """As `model_card`, for a run that trained a reward.

    Args:
        config: config of the run.
        metadata: metadata of the checkpoint file.
        table: metrics.
        license: the Hub's license id; omitted if None.
    """
    (reward,) = config.rewards
    public_config = _public_config(config)
    base = str(public_config["rewards"][0].get("checkpoint", reward.name))
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"}
    head |= {"base_model": base} if _on_hub(base) else {}
    head |= {"license": license} if license else {}
    head["tags"] = ["clip", "longalign", "preference"]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_escape_text(base)}, trained on preferences",
        f"A CLIP preference model, fine-tuned from {_code(base)} with longalign's trainer "
        f"{_code(config.trainer and config.trainer.name)} (method: arXiv 2410.11817, section 3.2, and arXiv "
        f"2305.01569) for {_steps(metadata)}. The score is the cosine similarity of image and text, averaged over the "
        "text's segments.",
        "## Usage\n\nIn the folder of these files:\n\n```python\nfrom longalign.registry import rewards\n\n"
        f'reward = rewards.build({{"name": "{reward.name}", "checkpoint": "."}})\n'
        "scores = reward.score(images, prompts)  # (b, 3, h, w) in [0, 1] and b texts\n```\n\n"
        "It also loads with transformers' `CLIPModel`, limited to 77 tokens.",
        _metrics(table),
        f"## Training\n\nData: {_data(public_config)}\n\n{_yaml(public_config)}",
        _plugins(metadata),
        _versions(metadata),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _on_hub(checkpoint: str) -> bool:
    return bool(HUB_ID.fullmatch(checkpoint)) and not Path(checkpoint).exists() and not checkpoint.startswith("mini/")


def _save_denoiser(config: RunConfig, weights: Weights, output: Path) -> Path:
    assert config.backbone is not None
    backbone = config.backbone.build(Runtime())
    backbone.load_full(weights.denoiser)
    backbone.load_lora(weights.loras)
    backbone.merge_lora()
    folder = output / denoiser_folder(config)
    backbone.denoiser.save_pretrained(folder)
    return folder


def build_adapters(state: Mapping[str, Tensor]) -> dict[str, TextAdapter]:
    """LaVi-Bridge adapters from an encoder's weights, named ``adapter``, ``adapter-2``...; skips other weights."""
    adapters: dict[str, TextAdapter] = {}
    for key in state:
        if not key.endswith("norm1.weight"):
            continue
        prefix = key.removesuffix("norm1.weight")
        weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if {"norm2.weight", "ff1.net.2.weight", "ff2.net.2.weight"} <= set(weights):
            widths = (len(weights[key]) for key in ("norm1.weight", "norm2.weight", "ff2.net.2.weight"))
            adapter = TextAdapter(*widths)
            adapter.load_state_dict(weights)
            adapters[f"adapter-{len(adapters) + 1}" if adapters else "adapter"] = adapter
    return adapters


def _exported_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that is identical in a checkpoint and in its export."""
    return {key: value for key, value in config.items() if key not in PRIVATE_KEYS}


def read_table(path: Path, config: RunConfig | None = None) -> MetricTable:
    """Reads the metrics in a JSON file.

    Args:
        path: path of the file.
        config: config of a run. If the table holds the configs of all its models, one of them must match.

    Raises:
        ValueError: if the file is no metric table, or none of its models matches ``config``.
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
        and _exported_keys(to_dict(config)) not in map(_exported_keys, configs.values())
    ):
        raise ValueError(
            f"{path} is a table of different models, {', '.join(configs)}: none has the config of this checkpoint; "
            "expected the output of `longalign eval --json` for its images"
        )
    return table


def model_card(
    config: RunConfig,
    weights: Weights,
    metadata: Mapping[str, str],
    table: MetricTable | None = None,
    license: str | None = None,
) -> str:
    """A model card in the Hub's format: description, usage, metrics and training.

    Args:
        config: config of the run.
        weights: weights of the checkpoint.
        metadata: metadata of the checkpoint file.
        table: metrics, the base model's first.
        license: the Hub's license id; omitted if None.
    """
    assert config.backbone is not None and config.encoder is not None
    public_config = _public_config(config)
    source = str(getattr(config.backbone, "checkpoint", ""))
    on_hub = _on_hub(source)
    base = source if on_hub or source.startswith("mini/") else str(public_config["backbone"].get("checkpoint") or "")
    loadable = on_hub and not getattr(config.backbone, "subfolder", None)  # diffusers pipelines have no subfolder
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    head |= {"base_model": source} if on_hub else {}
    head |= {"license": license} if license else {}
    head["tags"] = ["text-to-image", "longalign", *(["lora"] if weights.loras and not weights.denoiser else [])]
    stages = [f"- {_code(s.name)}: LoRA of rank {s.config.rank}, scale {s.config.scale:g}" for s in weights.loras]
    stages += ["- all weights of the denoiser"] if weights.denoiser else []
    stages += [f"- the encoder's {name}" for name in build_adapters(weights.adapter)]
    rewards = ", ".join(_code(reward.name) for reward in config.rewards)
    trainer = config.trainer
    source_text = f"with longalign's trainer {_code(trainer.name)}" if trainer else "and converted to longalign"
    model_name = base or config.backbone.name
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_escape_text(model_name)} for long prompts",
        f"{_code(model_name)}, fine-tuned for {_steps(metadata)} {source_text} (method: arXiv 2410.11817). "
        f"Its text encoder is {_code(config.encoder.name)}; a pipeline's own text encoder gives different images.",
        "Trained weights, in the order of application:\n\n" + "\n".join(stages) if stages else "",
        _use(weights, base, loadable),
        _plugins(metadata),
        _metrics(table),
        "## Training",
        f"Data: {_data(public_config)}" + (f" Rewards: {rewards}." if rewards else ""),
        f"Initialised from the checkpoint {_code(public_config['init_from'])}." if config.init_from else "",
        _yaml(public_config),
        _versions(metadata),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(config: Mapping[str, Any]) -> str:
    return "none." if config["data"] is None else f"{_code(json.dumps(config['data'], ensure_ascii=False))}."


def _use(weights: Weights, base: str, loadable: bool) -> str:
    text = (
        "## Usage\n\nWith longalign, in the folder of these files. Use `owner/name` for `.` to load from the Hub:\n\n"
        '```sh\nlongalign generate --checkpoint . --prompt "A long text." --output out\n```\n\n'
        "```python\nfrom longalign import Model\n\n"
        'model = Model.from_pretrained(".")\nimage = model("A long text.", seeds=0)[0]\n```'
    )
    if weights.denoiser or not weights.loras:
        return text
    note = "" if loadable else "  # the base model: a folder or Hub id in diffusers layout"
    code = (
        "from diffusers import DiffusionPipeline\n\nfrom longalign import Model, condition\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base or 'the base model')}){note}\n"
        'pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")\n'
        'encoder = Model.from_pretrained(".").encoder\n'
        'image = pipe(**condition(pipe, "A long text.", encoder=encoder)).images[0]'
    )
    return f"{text}\n\nIn a diffusers pipeline:\n\n{_block(code, 'python')}"


def push_to_hub(
    folder: str | Path,
    repository: str,
    private: bool = False,
    *,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a longalign checkpoint",
) -> str:
    """Uploads an exported folder to a Hub repository; returns its URL. Creates the repository if needed.

    Only files that `export` writes are uploaded; other files in the folder are skipped.

    Args:
        folder: a folder written by `export`.
        repository: ``owner/name``.
        private: whether a new repository is private.
        token: Hub token; that of the login if None.
        revision: branch to upload to, created if needed; the main branch if None.
        message: commit message.

    Raises:
        ValueError: if the folder is no export, or the Hub rejects the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not (Path(folder) / CHECKPOINT).is_file():
        raise ValueError(f"{folder} has no {CHECKPOINT}; export a checkpoint to it first")
    patterns = REWARD_FILES if read_config(Path(folder) / CHECKPOINT).backbone is None else MODEL_FILES
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            allow_patterns=list(patterns),
            commit_message=message,
            revision=revision,
        )
    except HfHubHTTPError as error:
        raise ValueError(
            f"upload to '{repository}' was rejected: {error}; are you logged in (hf auth login)?"
        ) from error
    return f"https://huggingface.co/{repository}"
