"""Texts of model cards (README.md) in the Hub's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from longalign.checkpoints.checkpoint import Weights
from longalign.checkpoints.diffusers_files import build_adapters
from longalign.checkpoints.markdown import block, code, escape_text, table_cell, yaml_block
from longalign.checkpoints.redaction import public_config, redact_path, redacted
from longalign.config.run import RunConfig
from longalign.evaluation.table import MetricTable
from longalign.hub import HUB_ID


def reward_card(
    config: RunConfig, metadata: Mapping[str, str], table: MetricTable | None = None, license: str | None = None
) -> str:
    """Returns the text of the model card of a run that trained a reward, in the Hub's format.

    Args:
        config: config of the run.
        metadata: metadata of the run's ``longalign.safetensors``.
        table: metric table to include; None: none.
        license: id of a license on the Hub, e.g. ``"mit"``; None: none.
    """
    (reward,) = config.rewards
    public = public_config(config)
    base = str(public["rewards"][0].get("checkpoint", reward.name))
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"}
    head |= {"base_model": base} if _on_hub(base) else {}
    head |= {"license": license} if license else {}
    head["tags"] = ["clip", "longalign", "preference"]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {escape_text(base)}, trained on preferences",
        f"A CLIP preference model, fine-tuned from {code(base)} with longalign's trainer "
        f"{code(config.trainer and config.trainer.name)} (method: arXiv 2410.11817, section 3.2, and arXiv "
        f"2305.01569) for {_steps(metadata)}. The score is the cosine similarity of image and text, averaged over the "
        "text's segments.",
        "## Usage\n\nIn the folder of these files:\n\n```python\nfrom longalign.registry import rewards\n\n"
        f'reward = rewards.build({{"name": "{reward.name}", "checkpoint": "."}})\n'
        "scores = reward.score(images, prompts)  # (b, 3, h, w) in [0, 1] and b texts\n```\n\n"
        "It also loads with transformers' `CLIPModel`, limited to 77 tokens.",
        _metrics(table),
        f"## Training\n\nData: {_data(public)}\n\n{yaml_block(public)}",
        _plugins(metadata, ("rewards",)),
        _versions(metadata),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def model_card(
    config: RunConfig,
    weights: Weights,
    metadata: Mapping[str, str],
    table: MetricTable | None = None,
    license: str | None = None,
) -> str:
    """Returns the text of the model card of a trained diffusion model, in the Hub's format.

    It contains description, usage, metrics and training.

    Args:
        config: config of the run.
        weights: weights of the checkpoint.
        metadata: metadata of the checkpoint's ``longalign.safetensors``.
        table: metric table to include, with the base model as its first model; None: none.
        license: id of a license on the Hub, e.g. ``"openrail++"``; None: none.
    """
    assert config.backbone is not None and config.encoder is not None
    # the stored config has all parts; those whose plugins are not installed here are not in `config`
    public = redacted(json.loads(metadata["config"]), redact_path) if "config" in metadata else public_config(config)
    source = str(getattr(config.backbone, "checkpoint", ""))
    on_hub = _on_hub(source)
    base = source if on_hub or source.startswith("mini/") else str(public["backbone"].get("checkpoint") or "")
    loadable = on_hub and not getattr(config.backbone, "subfolder", None)  # diffusers pipelines have no subfolder
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    head |= {"base_model": source} if on_hub else {}
    head |= {"license": license} if license else {}
    head["tags"] = ["text-to-image", "longalign", *(["lora"] if weights.loras and not weights.denoiser else [])]
    stages = [f"- {code(s.name)}: LoRA of rank {s.config.rank}, scale {s.config.scale:g}" for s in weights.loras]
    stages += ["- all weights of the denoiser"] if weights.denoiser else []
    stages += [f"- the encoder's {name}" for name in build_adapters(weights.adapter)]
    rewards = ", ".join(code(reward["name"]) for reward in public["rewards"])
    trainer = public["trainer"]
    source_text = f"with longalign's trainer {code(trainer['name'])}" if trainer else "and converted to longalign"
    model_name = base or config.backbone.name
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {escape_text(model_name)} for long prompts",
        f"{code(model_name)}, fine-tuned for {_steps(metadata)} {source_text} (method: arXiv 2410.11817). "
        f"Its text encoder is {code(config.encoder.name)}; a pipeline's own text encoder gives different images.",
        "Trained weights, in the order of application:\n\n" + "\n".join(stages) if stages else "",
        _use(weights, base, loadable),
        _plugins(metadata, ("backbone", "encoder")),
        _metrics(table),
        "## Training",
        f"Data: {_data(public)}" + (f" Rewards: {rewards}." if rewards else ""),
        f"Initialized from the checkpoint {code(public['init_from'])}." if config.init_from else "",
        yaml_block(public),
        _versions(metadata),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(config: Mapping[str, Any]) -> str:
    return "none." if config["data"] is None else f"{code(json.dumps(config['data'], ensure_ascii=False))}."


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
    python = (
        "from diffusers import DiffusionPipeline\n\nfrom longalign import Model, condition\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base or 'the base model')}){note}\n"
        'pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")\n'
        'encoder = Model.from_pretrained(".").encoder\n'
        'image = pipe(**condition(pipe, "A long text.", encoder=encoder)).images[0]'
    )
    return f"{text}\n\nIn a diffusers pipeline:\n\n{block(python, 'python')}"


def _metrics(table: MetricTable | None) -> str:
    if table is None:
        return ""
    values, sets = (
        {table_cell(model): {table_cell(metric): row for metric, row in rows.items()} for model, rows in models.items()}
        for models in (table.values, table.sets)
    )
    units = {table_cell(metric): replace(value, unit=table_cell(value.unit)) for metric, value in table.units.items()}
    markdown = MetricTable(values, table.prompts, table.seeds, units, sets).markdown().strip()
    return f"## Metrics\n\n{markdown}"


def _versions(metadata: Mapping[str, str]) -> str:
    versions = json.loads(metadata.get("versions", "{}"))
    texts = [escape_text(f"{name} {version}") for name, version in versions.items()]
    return f"Versions: {', '.join(texts)}." if texts else ""


def _plugins(metadata: Mapping[str, str], needed: Sequence[str]) -> str:
    """Lists the plugins that provide parts of the run, separated into required ones and those for training only.

    Args:
        metadata: metadata of the run's ``longalign.safetensors``.
        needed: config keys, e.g. ``backbone``, whose parts are required to use the model.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for path, package in json.loads(metadata.get("providers", "{}")).items():
        if package.split(" ")[0] != "longalign":
            required = path.split(".")[0] in needed
            use = "Required plugins, in addition to longalign" if required else "Used in training only"
            groups.setdefault(use, {}).setdefault(package, []).append(code(path))
    texts = []
    for use, packages in sorted(groups.items()):
        listed = [f"{code(package)} (for {', '.join(paths)})" for package, paths in packages.items()]
        texts.append(f"{use}: {', '.join(listed)}.")
    return "\n\n".join(texts)


def _steps(metadata: Mapping[str, str]) -> str:
    step = metadata.get("step", "")
    return "1 step" if step == "1" else f"{step if step.isdecimal() else '?'} steps"


def _on_hub(checkpoint: str) -> bool:
    return bool(HUB_ID.fullmatch(checkpoint)) and not Path(checkpoint).exists() and not checkpoint.startswith("mini/")
