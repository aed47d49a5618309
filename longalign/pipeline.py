"""From prompts to images: sampling with a backbone and an encoder, and conditioning for stock diffusers pipelines."""

from __future__ import annotations

import inspect
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from longalign.conditioning import condition, per_prompt, truncation_messages
from longalign.config import override
from longalign.data.lines import check_seeds, new_index, remove_listed
from longalign.diffusion import NoiseLevels, check_prediction, trailing_timesteps
from longalign.encoders.base import Encoder, TruncationWarning
from longalign.image_io import write_png
from longalign.runtime import Runtime

if TYPE_CHECKING:
    from longalign.backbones.base import Backbone

log = logging.getLogger("longalign")

__all__ = [
    "SOLVERS",
    "condition",
    "generate",
    "load_model",
    "make_scheduler",
    "sample",
    "truncation_messages",
    "write_images",
]

SOLVERS = ("unipc", "ddim", "dpm++", "lcm")


def make_scheduler(name: str, levels: NoiseLevels, prediction: str, num_steps: int) -> Any:
    """A diffusers scheduler with a backbone's own noise levels, its timesteps set.

    Args:
        name: one of ``unipc``, ``ddim`` (timesteps 999, 979, ..., 19 for 50 steps; Euler's method for a flow),
            ``dpm++`` (not for flows) and ``lcm`` (999, 749, 499, 249 for 4 steps).
        levels: signal and noise at each of the T timesteps.
        prediction: what the denoiser predicts, ``epsilon``, ``v_prediction`` or ``flow``.
        num_steps: number of sampling steps, 1 to T.
    """
    import diffusers

    library: Any = diffusers  # its classes are made on demand, which type checkers cannot see
    if name not in SOLVERS:
        raise ValueError(f"no solver '{name}'; available: {', '.join(SOLVERS)}")
    check_prediction(prediction)
    length = len(levels)
    if not 1 <= num_steps <= length:
        raise ValueError(f"steps must be between 1 and {length}, got {num_steps}")
    if prediction == "flow":
        return _flow_scheduler(library, name, levels, num_steps)
    # no signal at all at the last timestep has no finite sigma; this is the smallest that the solvers can hold
    kept = levels.signal.square().clamp(min=2.0**-24)
    betas = (1 - kept / torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])).tolist()
    common = {"num_train_timesteps": length, "trained_betas": betas, "prediction_type": prediction}
    if name == "unipc":
        scheduler = library.UniPCMultistepScheduler(**common)
    elif name == "dpm++":
        scheduler = library.DPMSolverMultistepScheduler(**common)
    elif name == "ddim":
        scheduler = library.DDIMScheduler(**common, timestep_spacing="trailing", clip_sample=False)
    else:
        scheduler = library.LCMScheduler(**common)
        timesteps = [round(length * (num_steps - i) / num_steps) - 1 for i in range(num_steps)]
        scheduler.set_timesteps(timesteps=timesteps, original_inference_steps=length)
        return scheduler
    with warnings.catch_warnings():
        # diffusers hands torch tensors to numpy in a way that numpy 2 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(num_steps)
    return scheduler


def _flow_scheduler(library: Any, name: str, levels: NoiseLevels, num_steps: int) -> Any:
    """A scheduler whose own timesteps are ``T`` times the noise, as the networks of flows are told them."""
    length = len(levels)
    if name == "ddim":
        scheduler = library.FlowMatchEulerDiscreteScheduler(length)
    elif name == "unipc":
        scheduler = library.UniPCMultistepScheduler(length, use_flow_sigmas=True, prediction_type="flow_prediction")
    elif name == "lcm":
        scheduler = library.FlowMatchLCMScheduler(length)
    else:
        raise ValueError(f"'{name}' does not sample flows; expected unipc, ddim (which is Euler's method) or lcm")
    scheduler.set_timesteps(sigmas=levels.noise[list(trailing_timesteps(num_steps, length))].numpy())
    return scheduler


@torch.no_grad()
def sample(
    backbone: Backbone,
    encoder: Encoder,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative: str | Sequence[str] | None = None,
    num_steps: int = 25,
    guidance: float = 7.5,
    solver: str = "unipc",
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Tensor:
    """Draws one image per prompt; the image depends on its prompt and seed, not on the batch that it is drawn in.

    Args:
        backbone: denoiser, autoencoder and noise levels.
        encoder: turns prompts, negative ones included, into the denoiser's conditioning.
        prompts: one per image.
        seeds: one per image.
        negative: what to stay away from, one text for all or one per image; the empty prompt if None.
        num_steps: number of solver steps.
        guidance: scale of classifier-free guidance; 1 draws without, with one denoiser call a step instead of two.
        solver: see `make_scheduler`.
        height: pixels; the backbone's own resolution if None.
        width: pixels; the backbone's own resolution if None.
        batch_size: images drawn at a time.
        progress: whether to show a bar.

    Returns:
        Images ``(b, 3, h, w)`` in [0, 1], float32 on the CPU.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"expected one seed per prompt, got {len(seeds)} seeds and {len(prompts)} prompts")
    if not math.isfinite(guidance):
        raise ValueError(f"expected a finite guidance, got {guidance}")
    if negative is not None and guidance == 1:
        raise ValueError("a negative prompt does nothing at guidance 1; raise the guidance or leave the prompt out")
    negatives = per_prompt(negative, len(prompts))
    batches = range(0, len(prompts), batch_size)
    out = []
    training = [m for m in (backbone, encoder) if m.training]
    for module in training:
        module.eval()
    try:
        with tqdm(total=len(batches) * num_steps, desc="drawing", disable=not progress) as bar:
            for start in batches:
                rows = slice(start, start + batch_size)
                scheduler = make_scheduler(solver, backbone.noise_levels, backbone.prediction, num_steps)
                shape = backbone.latent_shape(height, width)
                out.append(
                    _draw(
                        backbone, encoder, prompts[rows], negatives[rows], seeds[rows], scheduler, guidance, shape, bar
                    )
                )
    finally:
        for module in training:
            module.train()
    return torch.cat(out)


def _draw(
    backbone: Backbone,
    encoder: Encoder,
    prompts: Sequence[str],
    negatives: Sequence[str],
    seeds: Sequence[int],
    solver: Any,
    guidance: float,
    shape: tuple[int, int, int],
    bar: tqdm,
) -> Tensor:
    device = backbone.device
    guided = guidance != 1
    # one call for both branches, so that both have the same length
    conditioning = encoder.encode([*prompts, *negatives] if guided else list(prompts))
    # noise is drawn on the CPU, one generator an image, so that it is the same on every device and in every batch
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    takes_generator = "generator" in inspect.signature(solver.step).parameters
    extra = {"generator": generators} if takes_generator else {}
    places = solver.timesteps
    if backbone.prediction == "flow":
        places = torch.tensor(trailing_timesteps(len(places), len(backbone.noise_levels)))
    for t, place in zip(solver.timesteps, places, strict=True):
        x = torch.cat([latents, latents]) if guided else latents
        predicted = backbone.predict(x, place.to(device).expand(len(x)), conditioning).float()
        if guided:
            wanted, unwanted = predicted.chunk(2)
            predicted = unwanted + guidance * (wanted - unwanted)
        latents = solver.step(predicted, t, latents, **extra, return_dict=False)[0]
        bar.update()
    # one at a time, for the autoencoder takes more memory than the denoiser
    return torch.cat([backbone.decode(latent).float().cpu() for latent in latents.split(1)])


def load_model(source: Any, dtype: str | None = None, device: str | None = None) -> tuple[Any, Backbone, Encoder]:
    """Config, backbone and encoder of a checkpoint folder, or of a config (mapping, file or `RunConfig`), untrained.

    Args:
        source: the checkpoint or the config.
        dtype: "float32", "bfloat16" or "float16", of all weights but an adapter's; if None that of ``loop.precision``,
            and of a config's denoiser ``backbone.dtype``.
        device: a torch device; the best of this machine if None.
    """
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        from longalign.checkpoint import load_for_sampling

        return load_for_sampling(source, device=device, dtype=dtype)
    from longalign.compose import build_from_config

    config = override(source, {"cache": None})  # any prompt may be sampled
    runtime = Runtime.detect(config.loop.precision, device).with_dtype(dtype)
    composition = build_from_config(config, runtime)
    backbone, encoder = composition.backbone, composition.encoder
    if dtype is not None:
        backbone.merge_lora()  # in full precision, as of a checkpoint
        backbone.cast(runtime.torch_dtype)
    return composition.config, backbone, encoder


def generate(
    source: Any,
    prompts: Sequence[str],
    output: Path | str,
    *,
    seeds: Sequence[int] = (0,),
    negative: str | None = None,
    batch_size: int = 8,
    progress: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Draws every prompt with every seed into PNG files that say in their text metadata how they were made.

    Beside them ``metadata.jsonl`` makes the folder an image folder, which ``longalign score`` and the data kind
    ``folder`` read. What the encoder leaves out of a prompt is logged and stands in the rows. A run that draws no image
    leaves nothing.

    Args:
        source: a checkpoint folder, a config, or a ready ``(config, backbone, encoder)``.
        prompts: the prompts.
        output: folder for the files; one whose ``metadata.jsonl`` lists images already is refused.
        seeds: each prompt is drawn once for each seed.
        negative: what to stay away from.
        batch_size: images drawn at a time.
        progress: whether to show a bar over the images.
        dtype: see `load_model`; None for what is ready.
        device: see `load_model`; None for what is ready.
        overwrite: whether the images that the folder's ``metadata.jsonl`` lists are replaced instead of rejected.
        **settings: ``steps``, ``guidance``, ``scheduler``, ``height``, ``width`` of `sample`.

    Returns:
        The rows of ``metadata.jsonl``: ``file_name, prompt, seed, negative_prompt, truncated``.
    """
    new_index(output, overwrite)  # before weights are loaded
    if isinstance(source, tuple) and (dtype is not None or device is not None):
        raise ValueError("dtype and device only apply to a model that is loaded here; omit them for a ready one")
    config, backbone, encoder = source if isinstance(source, tuple) else load_model(source, dtype, device)
    reports = encoder.report(list(prompts))
    for text in truncation_messages(reports):
        log.warning(text)

    def draw(texts: list[str], numbers: list[int]) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # said above, prompt by prompt
            return sample(backbone, encoder, texts, seeds=numbers, negative=negative, batch_size=batch_size, **settings)

    return write_images(
        output,
        prompts,
        draw,
        seeds=seeds,
        negative=negative,
        cuts=[report.truncated for report in reports],
        config=config,
        settings={**_defaults(), **settings, "dtype": dtype},
        batch_size=batch_size,
        progress=progress,
        overwrite=overwrite,
    )


def write_images(
    output: Path | str,
    prompts: Sequence[str],
    draw: Callable[[list[str], list[int]], Tensor],
    *,
    seeds: Sequence[int],
    negative: str | None,
    config: Any,
    settings: Mapping[str, Any],
    cuts: Sequence[str | None] = (),
    batch_size: int = 8,
    progress: bool = False,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Draws every prompt with every seed into a folder; for the files and the rows see `generate`.

    Args:
        output: folder for the files; one whose ``metadata.jsonl`` lists images already is refused.
        prompts: the prompts.
        draw: takes texts and as many seeds; returns images ``(b, 3, h, w)`` in [0, 1].
        seeds: each prompt is drawn once for each seed.
        negative: what is stayed away from; only written down here.
        config: what draws, a `RunConfig` or a mapping.
        settings: how.
        cuts: what is not read of each prompt; None for all of them if that is not known.
        batch_size: images drawn at a time.
        progress: whether to show a bar over the images.
        overwrite: whether the images that the folder's ``metadata.jsonl`` lists are replaced, once the first of the new
            ones are there.
    """
    check_seeds(seeds)
    output, index = Path(output), new_index(output, overwrite)
    jobs = [(i, seed) for i in range(len(prompts)) for seed in seeds]
    common = {"config": _config_text(config), "settings": json.dumps(settings), "software": _version()}
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(jobs), desc="images", disable=not progress) as bar:
        for batch in _chunks(jobs, batch_size):
            images = draw([prompts[i] for i, _ in batch], [seed for _, seed in batch])
            output.mkdir(parents=True, exist_ok=True)  # only now, so that a run that cannot draw leaves nothing
            if not rows:
                remove_listed(index)
            new: list[dict[str, Any]] = []
            for (i, seed), image in zip(batch, images, strict=True):
                row = {
                    "file_name": f"{i:05d}-{seed}.png",
                    "prompt": prompts[i],
                    "seed": seed,
                    "negative_prompt": negative or "",
                    "truncated": cuts[i] if cuts else None,
                }
                conditioning = {key: str(row[key]) for key in ("prompt", "negative_prompt", "seed", "truncated")}
                write_png(output / row["file_name"], image, {**conditioning, **common})
                new.append(row)
            with index.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
            rows += new
            bar.update(len(batch))
    return rows


def _defaults() -> dict[str, Any]:
    names = ("num_steps", "guidance", "solver", "height", "width")
    return {name: inspect.signature(sample).parameters[name].default for name in names}


def _config_text(config: Any) -> str:
    return config.model_dump_json() if hasattr(config, "model_dump_json") else json.dumps(config)


def _version() -> str:
    from importlib.metadata import version

    return f"longalign {version('longalign')}"


def _chunks(items: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
