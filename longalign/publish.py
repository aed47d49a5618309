"""A checkpoint as a folder to give away: for plain diffusers, with a model card; to the hub and from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from longalign.checkpoint import Weights, denoiser_folder, export_lora, load_weights
from longalign.config import RunConfig, load_config, to_yaml
from longalign.encoders.adapter import TextAdapter
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


def export(
    checkpoint: str | Path,
    output: str | Path,
    metrics: str | Path | None = None,
    license: str | None = None,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Writes what others need to use a checkpoint.

    - ``longalign.safetensors``, the checkpoint itself;
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
        ValueError: if the folder has such files, or ``metrics`` is no table.
    """
    source, output = checkpoint_file(Path(checkpoint)), Path(output)
    table = None if metrics is None else read_table(Path(metrics))
    if source.parent.resolve() == output.resolve():
        raise ValueError(f"{output} is the checkpoint's own folder; choose another folder")
    if not overwrite:
        check_unexported(output)
    config = load_config(source)
    if config.backbone is None:
        return _export_reward(source, output, config, table, license, overwrite)
    weights = load_weights(source)
    output.mkdir(parents=True, exist_ok=True)
    if overwrite:
        _remove_optional_files(output)
    shutil.copyfile(source, output / CHECKPOINT)
    written = [output / CHECKPOINT]
    if weights.denoiser:
        written.append(_save_denoiser(config, weights, output))
    elif weights.stacks:
        written.append(export_lora(source, output))
    for name, adapter in adapters(weights.adapter).items():
        adapter.save(output / name)
        written.append(output / name)
    card = model_card(config, weights, read_metadata(source), table, license)
    (output / CARD).write_text(card, encoding="utf-8")
    return [*written, output / CARD]


def _remove_optional_files(output: Path) -> None:
    """Removes what only some exports consist of, so that none of an earlier one is left."""
    (output / DIFFUSERS_LORA).unlink(missing_ok=True)
    for folder in ("unet", "transformer", *(path.name for path in output.glob("adapter*"))):
        shutil.rmtree(output / folder, ignore_errors=True)


def _export_reward(
    source: Path, output: Path, config: RunConfig, table: MetricTable | None, license: str | None, overwrite: bool
) -> list[Path]:
    folder = source.parent / REWARD
    if not folder.is_dir():
        raise ValueError(f"there is no {folder}, where the trained reward should be; is this an export already?")
    files = sorted(folder.iterdir())
    for file in files:
        if not overwrite and (output / file.name).exists():
            raise ValueError(f"{output / file.name} exists; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    for file in (source, *files):
        shutil.copyfile(file, output / file.name)
    (output / CARD).write_text(reward_card(config, read_metadata(source), table, license), encoding="utf-8")
    return [output / file.name for file in (source, *files)] + [output / CARD]


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
    base = str(getattr(reward, "checkpoint", reward.name))
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"}
    head |= {"base_model": base} if _on_hub(base) else {}
    head |= {"license": license} if license else {}
    head["tags"] = ["clip", "longalign", "preference"]
    versions = json.loads(metadata.get("versions", "{}"))
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {base}, trained on preferences",
        f"A CLIP that says how well people like an image for a text, trained from `{base}` by the trainer "
        f"`{config.trainer and config.trainer.name}` of longalign (the method: arXiv 2410.11817, section 3.2, and "
        f"arXiv 2305.01569) for {metadata.get('step', '?')} steps. Its score is the mean over a text's segments of the "
        "cosine with the image.",
        "## Use\n\nIn the folder of these files:\n\n```python\nfrom longalign.registry import rewards\n\n"
        f'reward = rewards.build({{"name": "{reward.name}", "checkpoint": "."}})\n'
        "scores = reward.score(images, prompts)  # (b, 3, h, w) in [0, 1] and b texts\n```\n\n"
        "transformers' `CLIPModel` loads it too, and then reads 77 tokens.",
        f"## Training\n\nData: {_data(config)}\n\n```yaml\n{to_yaml(config)}```",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "." if versions else "",
        f"## Metrics\n\n{table.markdown().strip()}" if table is not None else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _on_hub(checkpoint: str) -> bool:
    return bool(HUB_ID.fullmatch(checkpoint)) and not Path(checkpoint).exists() and not checkpoint.startswith("mini/")


def _save_denoiser(config: RunConfig, weights: Weights, output: Path) -> Path:
    assert config.backbone is not None
    backbone = config.backbone.build(Runtime())
    backbone.load_full(weights.denoiser)
    backbone.load_lora(weights.stacks)
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


def read_table(path: Path) -> MetricTable:
    """The metrics in a JSON file. Raises ValueError if it holds something else."""
    try:
        return MetricTable.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of metrics; expected what `longalign eval --json` writes") from error


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
    base = str(getattr(config.backbone, "checkpoint", ""))
    on_hub = _on_hub(base)
    loadable = on_hub and not getattr(config.backbone, "subfolder", None)  # by diffusers, of the repository's top
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    head |= {"base_model": base} if on_hub else {}
    head |= {"license": license} if license else {}
    head["tags"] = ["text-to-image", "longalign", *(["lora"] if weights.stacks and not weights.denoiser else [])]
    stages = [f"- `{s.name}`: LoRA of rank {s.config.rank}, scale {s.config.scale:g}" for s in weights.stacks]
    stages += ["- all weights of the denoiser"] if weights.denoiser else []
    stages += [f"- the encoder's {name}" for name in adapters(weights.adapter)]
    rewards = ", ".join(f"`{reward.name}`" for reward in config.rewards)
    trainer = f"by the trainer `{config.trainer.name}`" if config.trainer is not None else "(converted weights)"
    versions = json.loads(metadata.get("versions", "{}"))
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {base or config.backbone.name} for long prompts",
        f"`{base or config.backbone.name}`, trained {trainer} of longalign (the method: arXiv 2410.11817) for "
        f"{metadata.get('step', '?')} steps. Text is encoded by `{config.encoder.name}`; a pipeline's own encoder "
        "gives other images.",
        "What was trained, the first applied first:\n\n" + "\n".join(stages) if stages else "",
        _use(config, weights, base if loadable else "the base model"),
        "## Training",
        f"Data: {_data(config)}" + (f" Rewards: {rewards}." if rewards else ""),
        f"It started from the checkpoint `{config.init_from}`." if config.init_from else "",
        f"```yaml\n{to_yaml(config)}```",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "." if versions else "",
        f"## Metrics\n\n{table.markdown().strip()}" if table is not None else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(config: RunConfig) -> str:
    return (
        "none." if config.data is None else f"`{json.dumps(config.data.model_dump(mode='json'), ensure_ascii=False)}`."
    )


def _use(config: RunConfig, weights: Weights, base: str) -> str:
    text = (
        "## Use\n\nWith longalign, in the folder of these files, or with `owner/name` of this repository for `.`:\n\n"
        '```sh\nlongalign generate --checkpoint . --prompt "A long text." --output out\n```\n\n'
        "```python\nfrom longalign import Model\n\n"
        'model = Model.from_pretrained(".")\nimage = model("A long text.", seeds=0)[0]\n```'
    )
    if weights.denoiser or not weights.stacks:
        return text
    return (
        f"{text}\n\nIn a diffusers pipeline:\n\n```python\n"
        "from diffusers import DiffusionPipeline\n\nfrom longalign import Model, condition\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base}")\n'
        'pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")\n'
        'encoder = Model.from_pretrained(".").encoder\n'
        'image = pipe(**condition(pipe, "A long text.", encoder=encoder)).images[0]\n```'
    )


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
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message, revision=revision)
    except HfHubHTTPError as error:
        raise ValueError(
            f"the hub does not take '{repository}': {error}; are you logged in (hf auth login)?"
        ) from error
    return f"https://huggingface.co/{repository}"
