"""A checkpoint as a folder to give away: for plain diffusers, with a model card; to the hub and from it."""

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

from longalign.checkpoint import Weights, denoiser_folder, export_lora, load_weights, read_config
from longalign.config import RunConfig, to_dict
from longalign.encoders.adapter import TextAdapter
from longalign.errors import redact_url
from longalign.files import (
    CARD,
    CHECKPOINT,
    DIFFUSERS_LORA,
    HUB_ID,
    REWARD,
    check_unexported,
    checkpoint_file,
    read_metadata,
)
from longalign.runtime import Runtime
from longalign.table import MetricTable
from longalign.weights import load_tensors, save_tensors

MODEL = "diffusion_pytorch_model"
#: what `export` writes of a model and of a reward, which is all that is uploaded
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
#: keys of a config whose paths are of no use to others; what the model is built from stays in the file
OWN_KEYS = ("output", "init_from", "data", "cache", "validation")


def export(
    checkpoint: str | Path,
    output: str | Path,
    metrics: str | Path | None = None,
    license: str | None = None,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Writes what others need to use a checkpoint.

    - ``longalign.safetensors``, the checkpoint itself, without credentials and without the paths of what it was trained
      on;
    - ``pytorch_lora_weights.safetensors``, for ``load_lora_weights`` of a diffusers pipeline, or, where all weights
      were trained, the denoiser as diffusers saves it, in ``unet/`` or ``transformer/``;
    - ``adapter/``, where the encoder has a LaVi-Bridge adapter, as diffusers saves it;
    - ``README.md``, a model card with the config, the data and the metrics.

    Of a run that trained a reward it is the reward's own folder, a transformers ``CLIPModel``, with the checkpoint's
    file and a card added.

    Args:
        checkpoint: its file, its folder, or a run's folder (the newest one).
        output: a folder without files of these names.
        metrics: a table that ``longalign eval --json`` or the demo wrote.
        license: for the card, e.g. ``"openrail++"``; left out if None.
        overwrite: whether an export that is in the folder is replaced.

    Returns:
        The files and folders written.

    Raises:
        ValueError: if the folder has such files, or ``metrics`` is no table, or is one of other models.
    """
    source, output = checkpoint_file(Path(checkpoint)), Path(output)
    if source.parent.resolve() == output.resolve():
        raise ValueError(f"{output} is the checkpoint's own folder; choose another folder")
    if not overwrite:
        check_unexported(output)
    config = read_config(source)
    table = None if metrics is None else read_table(Path(metrics), config)
    for pattern in REWARD_FILES if config.backbone is None else MODEL_FILES:
        for taken in sorted(output.glob(pattern)):
            if not overwrite:
                raise ValueError(f"{taken} exists; choose another folder, or set overwrite (--overwrite)")
            taken.unlink()
            if taken.parent != output and not any(taken.parent.iterdir()):
                taken.parent.rmdir()
    if config.backbone is None:
        return _export_reward(source, output, config, table, license)
    weights = load_weights(source)
    output.mkdir(parents=True, exist_ok=True)
    written = [_copy(source, output)]
    if weights.denoiser:
        written.append(_save_denoiser(config, weights, output))
    elif weights.loras:
        written.append(export_lora(source, output))
    for name, adapter in adapters(weights.adapter).items():
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
        raise ValueError(f"there is no {folder}, where the trained reward should be; is this an export already?")
    files = sorted(folder.iterdir())
    output.mkdir(parents=True, exist_ok=True)
    _copy(source, output)
    for file in files:
        shutil.copyfile(file, output / file.name)
    (output / CARD).write_text(reward_card(config, read_metadata(source), table, license), encoding="utf-8")
    return [output / file.name for file in (source, *files)] + [output / CARD]


def _copy(source: Path, output: Path) -> Path:
    """The checkpoint's file, without the paths and credentials of the machine that it was trained on."""
    metadata = read_metadata(source)
    tree = json.loads(metadata["config"])
    tree = {key: _without_paths(value) if key in OWN_KEYS else _hidden(value) for key, value in tree.items()}
    save_tensors(output / CHECKPOINT, load_tensors(source), {**metadata, "config": json.dumps(tree)})
    return output / CHECKPOINT


def _hidden(value: Any) -> Any:
    """A plain value without the credentials in its addresses."""
    if isinstance(value, dict):
        return {key: _hidden(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_hidden(v) for v in value]
    return redact_url(value) if isinstance(value, str) else value


def _without_paths(value: Any) -> Any:
    """As `_hidden`; of absolute paths, and of those in a home folder, only the last name is kept."""
    if isinstance(value, dict):
        return {key: _without_paths(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(v) for v in value]
    if isinstance(value, str) and "\n" not in value and "://" not in value:
        for kind in (PurePosixPath, PureWindowsPath):
            path = kind(value)
            if path.is_absolute() or value.startswith("~"):
                return path.name or "data"
    return _hidden(value)


def _public(config: RunConfig) -> Any:
    """A config as it is shown to others."""
    return _without_paths(to_dict(config))


def _text(value: object) -> str:
    """Text from outside as one line of Markdown without markup of its own."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escape(" ".join(str(value).split()), quote=False))


def _code(value: object) -> str:
    """Text from outside as code within a line."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _block(text: str, language: str) -> str:
    """A block of code that nothing in the text can end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _yaml(shown: Mapping[str, Any]) -> str:
    return _block(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=120), "yaml")


def _metrics(table: MetricTable | None) -> str:
    if table is None:
        return ""
    values = {_name(model): {_name(m): v for m, v in metrics.items()} for model, metrics in table.values.items()}
    shown = MetricTable(values, table.prompts, table.seeds).markdown().strip()
    return f"## Metrics\n\n{shown}"


def _name(value: str) -> str:
    """A name from outside, as a cell of a table."""
    return escape(" ".join(value.split()), quote=False).replace("|", "&#124;").replace("`", "&#96;")


def _versions(metadata: Mapping[str, str]) -> str:
    found = json.loads(metadata.get("versions", "{}"))
    return "Versions: " + ", ".join(_text(f"{name} {number}") for name, number in found.items()) + "." if found else ""


def _plugins(metadata: Mapping[str, str]) -> str:
    """The packages that a part of the run comes from, other than longalign itself."""
    found = json.loads(metadata.get("providers", "{}"))
    owners = {owner: path for path, owner in found.items() if owner.split(" ")[0] != "longalign"}
    if not owners:
        return ""
    named = [f"{_code(owner)} (for {_code(path)})" for owner, path in owners.items()]
    return "Parts of the run come from plugins, to be installed beside longalign: " + ", ".join(named) + "."


def _steps(metadata: Mapping[str, str]) -> str:
    step = metadata.get("step", "")
    return "1 step" if step == "1" else f"{step if step.isdecimal() else '?'} steps"


def reward_card(
    config: RunConfig, metadata: Mapping[str, str], table: MetricTable | None = None, license: str | None = None
) -> str:
    """As `model_card`, of a run that trained a reward.

    Args:
        config: of the run.
        metadata: of the checkpoint's file.
        table: metrics.
        license: as the hub spells it; left out if None.
    """
    (reward,) = config.rewards
    shown = _public(config)
    base = str(shown["rewards"][0].get("checkpoint", reward.name))
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"}
    head |= {"base_model": base} if _on_hub(base) else {}
    head |= {"license": license} if license else {}
    head["tags"] = ["clip", "longalign", "preference"]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_text(base)}, trained on preferences",
        f"A CLIP that scores how well people like an image for a text, trained from {_code(base)} by the trainer "
        f"{_code(config.trainer and config.trainer.name)} of longalign (the method: arXiv 2410.11817, section 3.2, and "
        f"arXiv 2305.01569) for {_steps(metadata)}. Its score is the mean over a text's segments of the cosine with "
        "the image.",
        "## Use\n\nIn the folder of these files:\n\n```python\nfrom longalign.registry import rewards\n\n"
        f'reward = rewards.build({{"name": "{reward.name}", "checkpoint": "."}})\n'
        "scores = reward.score(images, prompts)  # (b, 3, h, w) in [0, 1] and b texts\n```\n\n"
        "transformers' `CLIPModel` loads it too, and then reads 77 tokens.",
        _metrics(table),
        f"## Training\n\nData: {_data(shown)}\n\n{_yaml(shown)}",
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


def adapters(state: Mapping[str, Tensor]) -> dict[str, TextAdapter]:
    """LaVi-Bridge adapters among an encoder's weights, as ``adapter``, ``adapter-2``...; other weights are left out."""
    found: dict[str, TextAdapter] = {}
    for key in state:
        if not key.endswith("norm1.weight"):
            continue
        prefix = key.removesuffix("norm1.weight")
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if {"norm2.weight", "ff1.net.2.weight", "ff2.net.2.weight"} <= set(own):
            adapter = TextAdapter(len(own["norm1.weight"]), len(own["norm2.weight"]), len(own["ff2.net.2.weight"]))
            adapter.load_state_dict(own)
            found[f"adapter-{len(found) + 1}" if found else "adapter"] = adapter
    return found


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config is the same in a run's checkpoint and in its export."""
    return {key: value for key, value in config.items() if key not in OWN_KEYS}


def read_table(path: Path, config: RunConfig | None = None) -> MetricTable:
    """The metrics in a JSON file.

    Args:
        path: of the file.
        config: of a run, which one of the table's models must be of if the table says what each is of.

    Raises:
        ValueError: if the file holds something else, or the table is of other models.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        table = MetricTable.from_dict(data)
        known = {name: about for name, about in (data.get("configs") or {}).items() if about is not None}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of metrics; expected what `longalign eval --json` writes") from error
    if (
        config is not None
        and len(known) == len(table.models)
        and _own(to_dict(config)) not in map(_own, known.values())
    ):
        raise ValueError(
            f"{path} is a table of other models, {', '.join(known)}: none of them has the config of this checkpoint; "
            "expected what `longalign eval --json` writes for images of it"
        )
    return table


def model_card(
    config: RunConfig,
    weights: Weights,
    metadata: Mapping[str, str],
    table: MetricTable | None = None,
    license: str | None = None,
) -> str:
    """A model card in the hub's format: what it is, how to use it, how it was trained, what it reached.

    Args:
        config: of the run.
        weights: what the checkpoint holds.
        metadata: of its file.
        table: metrics, the base model's first.
        license: as the hub spells it; left out if None.
    """
    assert config.backbone is not None and config.encoder is not None
    shown = _public(config)
    source = str(getattr(config.backbone, "checkpoint", ""))
    on_hub = _on_hub(source)
    base = source if on_hub or source.startswith("mini/") else str(shown["backbone"].get("checkpoint") or "")
    loadable = on_hub and not getattr(config.backbone, "subfolder", None)  # by diffusers, of the repository's top
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    head |= {"base_model": source} if on_hub else {}
    head |= {"license": license} if license else {}
    head["tags"] = ["text-to-image", "longalign", *(["lora"] if weights.loras and not weights.denoiser else [])]
    stages = [f"- {_code(s.name)}: LoRA of rank {s.config.rank}, scale {s.config.scale:g}" for s in weights.loras]
    stages += ["- all weights of the denoiser"] if weights.denoiser else []
    stages += [f"- the encoder's {name}" for name in adapters(weights.adapter)]
    rewards = ", ".join(_code(reward.name) for reward in config.rewards)
    trainer = f"by the trainer {_code(config.trainer.name)}" if config.trainer is not None else "(converted weights)"
    named = base or config.backbone.name
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_text(named)} for long prompts",
        f"{_code(named)}, trained {trainer} of longalign (the method: arXiv 2410.11817) for {_steps(metadata)}. "
        f"Text is encoded by {_code(config.encoder.name)}; a pipeline's own encoder gives other images.",
        "What was trained, the first applied first:\n\n" + "\n".join(stages) if stages else "",
        _use(weights, base, loadable),
        _plugins(metadata),
        _metrics(table),
        "## Training",
        f"Data: {_data(shown)}" + (f" Rewards: {rewards}." if rewards else ""),
        f"It started from the checkpoint {_code(shown['init_from'])}." if config.init_from else "",
        _yaml(shown),
        _versions(metadata),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(shown: Mapping[str, Any]) -> str:
    return "none." if shown["data"] is None else f"{_code(json.dumps(shown['data'], ensure_ascii=False))}."


def _use(weights: Weights, base: str, loadable: bool) -> str:
    text = (
        "## Use\n\nWith longalign, in the folder of these files, or with `owner/name` of this repository for `.`:\n\n"
        '```sh\nlongalign generate --checkpoint . --prompt "A long text." --output out\n```\n\n'
        "```python\nfrom longalign import Model\n\n"
        'model = Model.from_pretrained(".")\nimage = model("A long text.", seeds=0)[0]\n```'
    )
    if weights.denoiser or not weights.loras:
        return text
    note = "" if loadable else "  # the base model, as a folder or hub id that diffusers loads"
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
    """Uploads an exported folder to a repository of the hub, which is made if it is not there; returns its address.

    Only files of the kinds that `export` writes are uploaded, whatever else is in the folder.

    Args:
        folder: what `export` wrote.
        repository: ``owner/name``.
        private: whether a new repository is private.
        token: of the hub; the one you are logged in with if None.
        revision: branch to upload to, made if it is not there; the main one if None.
        message: of the commit.

    Raises:
        ValueError: if the folder is no export, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not (Path(folder) / CHECKPOINT).is_file():
        raise ValueError(f"{folder} holds no {CHECKPOINT}; export a checkpoint into it first")
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
            f"the hub does not take '{repository}': {error}; are you logged in (hf auth login)?"
        ) from error
    return f"https://huggingface.co/{repository}"
