"""Samples images with a backbone (denoiser and autoencoder) and an encoder of prompts."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longalign.backbones.base import Backbone
from longalign.config.changes import override
from longalign.config.solvers import check_negative
from longalign.encoders.base import Encoder, TruncationWarning
from longalign.functional.diffusion import check_guidance_interval, guided_steps, predict_guided
from longalign.functional.solvers import sampling_timesteps
from longalign.image_folder import new_index, write_images
from longalign.inference.diffusers import per_prompt, truncation_messages
from longalign.inference.schedulers import make_scheduler
from longalign.runtime import Runtime
from longalign.trainers.diffusion import evaluating

log = logging.getLogger("longalign")


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
    guidance_interval: tuple[float, float] | None = None,
    solver: str = "unipc",
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Tensor:
    """Samples one image per prompt. An image depends on the prompt and seed, not on other images of the batch.

    Args:
        backbone: denoiser, autoencoder and noise levels.
        encoder: encodes prompts and negative prompts into the denoiser's conditioning.
        prompts: b prompts, one for each image.
        seeds: b seeds, one for each image.
        negative: negative prompt, one for all images or one for each; None: the empty prompt.
        num_steps: number of solver steps, at least 1.
        guidance: scale of classifier-free guidance. 1 disables guidance, which halves the denoiser calls.
        guidance_interval: guidance is applied only at steps whose noise level is above the first and at most the second
            number (arXiv 2404.07724). The noise level is the ratio of noise to signal, `NoiseLevels.sigma`. None: at
            all steps.
        solver: ``"unipc"``, ``"ddim"``, ``"dpm++"`` or ``"lcm"``; see `longalign.inference.schedulers.make_scheduler`.
        height: height in pixels; None: the backbone's native resolution.
        width: width in pixels; None: the backbone's native resolution.
        batch_size: number of images sampled at a time.
        progress: whether to show a progress bar.

    Returns:
        Images ``(b, 3, h, w)`` in [0, 1], float32 on the CPU.

    Raises:
        ValueError: if the numbers of prompts, negative prompts and seeds do not match, a setting is out of range or has
            no effect, or the model does not support the solver or the image size.
    """
    if len(seeds) != len(prompts):
        raise ValueError(
            f"expected one seed per prompt, got {len(seeds)} seeds and {len(prompts)} prompts; pass equal numbers"
        )
    if not math.isfinite(guidance):
        raise ValueError(f"expected a finite number as guidance, got {guidance}; choose a number such as 7.5")
    check_negative(negative, guidance)
    if guidance_interval is not None and guidance == 1:
        raise ValueError(
            "guidance_interval has no effect at guidance 1; remove guidance_interval, or raise the guidance"
        )
    negatives = per_prompt(negative, len(prompts))
    batches = range(0, len(prompts), batch_size)
    images = []
    bar = tqdm(total=len(batches) * num_steps, desc="sampling", disable=not progress)
    with evaluating(backbone), evaluating(encoder), backbone.merged_lora(), bar:
        for start in batches:
            rows = slice(start, start + batch_size)
            shape = backbone.latent_shape(height, width)
            scheduler = make_scheduler(solver, backbone.levels_at(shape), backbone.prediction, num_steps)
            images.append(
                _sample_batch(
                    backbone,
                    encoder,
                    prompts[rows],
                    negatives[rows],
                    seeds[rows],
                    scheduler,
                    solver,
                    guidance,
                    guidance_interval,
                    shape,
                    bar,
                )
            )
    return torch.cat(images)


def _sample_batch(
    backbone: Backbone,
    encoder: Encoder,
    prompts: Sequence[str],
    negatives: Sequence[str],
    seeds: Sequence[int],
    scheduler: Any,
    solver: str,
    guidance: float,
    guidance_interval: tuple[float, float] | None,
    shape: tuple[int, int, int],
    bar: tqdm,
) -> Tensor:
    device = backbone.device
    guided = guidance != 1
    # one call, so that conditional and unconditional states have the same length
    conditioning = backbone.project_text(encoder.encode([*prompts, *negatives] if guided else list(prompts)))
    # sample noise on the CPU with one generator per image: the same on every device and in every batch
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generator else {}

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        return backbone.predict(latents, timesteps, conditioning[: len(latents)]).float()

    # indices into the backbone's noise levels; a flow scheduler's own timesteps are noise levels instead
    indices, levels = scheduler.timesteps, backbone.levels_at(shape)
    if backbone.prediction == "flow":
        indices = torch.tensor(sampling_timesteps(solver, levels, len(indices)))
    steps = indices.long().tolist()
    if guidance_interval is not None:
        check_guidance_interval(levels, steps, guidance_interval)
    in_interval = guided_steps(levels, steps, guidance_interval)
    for t, index, is_guided in zip(scheduler.timesteps, indices, in_interval, strict=True):
        timesteps = index.to(device).expand(len(latents))
        if guided and is_guided:
            prediction = predict_guided(predict, latents, timesteps, guidance, backbone.guide)
        else:
            prediction = predict(latents, timesteps)
        latents = scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
        bar.update()
    # one image at a time: the autoencoder needs more memory than the denoiser
    return torch.cat([backbone.decode(latent).float().cpu() for latent in latents.split(1)])


def load_model(source: Any, dtype: str | None = None, device: str | None = None) -> tuple[Any, Backbone, Encoder]:
    """Loads the model of a checkpoint folder, or builds the untrained model of a config. It is frozen and in eval mode.

    Args:
        source: a checkpoint folder, or the config of a run: mapping, path of a YAML or JSON file, or `RunConfig`.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, for all weights except those of the encoder's adapter.
            None: the dtype of ``loop.precision`` in the config, and for a config's denoiser that of ``backbone.dtype``.
        device: a torch device, e.g. ``"cuda"``; None: the fastest available one.

    Returns:
        ``(config, backbone, encoder)``.

    Raises:
        ValueError: if the checkpoint or config is invalid or has no backbone, or the device is not available.
    """
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        from longalign.checkpoints.checkpoint import load_for_sampling

        return load_for_sampling(source, device=device, dtype=dtype)
    from longalign.compose import build_from_config

    config = override(source, {"cache": None})  # prompts need not be cached
    runtime = Runtime.detect(config.loop.precision, device).with_dtype(dtype)
    composition = build_from_config(config, runtime)
    backbone, encoder = composition.backbone, composition.encoder
    if dtype is not None:
        backbone.merge_lora()  # merge in full precision before the cast, as for a checkpoint
        backbone.cast(runtime.torch_dtype)
    for part in (backbone, encoder):
        part.requires_grad_(False).eval()
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
    """Generates an image for every prompt and seed, and writes PNG files.

    The text metadata of a PNG file contain prompt, seed, config and settings. The file ``metadata.jsonl`` in the folder
    lists the images, so that ``longalign score`` and the training data ``{name: folder}`` can read them. Text that was
    dropped from a prompt by truncation is logged and listed there. Nothing is written if no image was generated.

    Args:
        source: a checkpoint folder, the config of a run, or ``(config, backbone, encoder)`` from `load_model`.
        prompts: the prompts.
        output: folder for the files. Its ``metadata.jsonl`` must not list images, unless ``overwrite`` is set.
        seeds: different seeds; one image is generated per prompt and seed.
        negative: negative prompt for all images; None: the empty prompt.
        batch_size: number of images sampled at a time.
        progress: whether to show a progress bar.
        dtype: dtype of the weights, as of `load_model`. Must be None for a loaded model.
        device: torch device, as of `load_model`. Must be None for a loaded model.
        overwrite: whether to replace the images that ``metadata.jsonl`` lists.
        **settings: ``num_steps``, ``guidance``, ``guidance_interval``, ``solver``, ``height``, ``width`` of `sample`.

    Returns:
        The rows of ``metadata.jsonl``: ``file_name``, ``prompt``, ``seed``, ``negative_prompt`` and ``truncated``, the
        dropped text.

    Raises:
        ValueError: if the folder already lists images, a seed occurs twice, or ``dtype`` or ``device`` is given for a
            loaded model. Also in the cases of `load_model` and `sample`.
    """
    new_index(output, overwrite)  # fail before weights are loaded
    if isinstance(source, tuple) and (dtype is not None or device is not None):
        raise ValueError("dtype and device do not apply to a loaded (config, backbone, encoder); omit them")
    config, backbone, encoder = source if isinstance(source, tuple) else load_model(source, dtype, device)
    reports = encoder.report(list(prompts))
    for message in truncation_messages(reports):
        log.warning(message)

    def sample_batch(texts: list[str], seeds: list[int]) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # logged above, per prompt
            return sample(backbone, encoder, texts, seeds=seeds, negative=negative, batch_size=batch_size, **settings)

    return write_images(
        output,
        prompts,
        sample_batch,
        seeds=seeds,
        negative=negative,
        truncated=[report.truncated for report in reports],
        config=config,
        settings={**_defaults(), **settings, "dtype": dtype},
        batch_size=batch_size,
        progress=progress,
        overwrite=overwrite,
    )


def _defaults() -> dict[str, Any]:
    names = ("num_steps", "guidance", "guidance_interval", "solver", "height", "width")
    return {name: inspect.signature(sample).parameters[name].default for name in names}
