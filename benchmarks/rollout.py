"""Cost of sampling in a reward step: the text's keys and values computed once, the LoRA merged, less guidance.

CPU seconds of the UNet of the synthetic scenes with a LoRA of rank 32: sampling of 8 images with guidance, without
gradient, on one thread. The methods run alternately in one process, and the smallest of their times is reported, which
depends least on other programs. Operations of Stable Diffusion 1.5 and XL are counted on meta tensors.

Run ``python benchmarks/rollout.py [--rounds 3]``. It writes a table next to itself and takes five minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _stages import SD, SDXL, Setting, backbone
from diffusers import DDIMScheduler
from reward_step import table
from torch.utils.flop_counter import FlopCounterMode

from longalign.backbones.config import LoraConfig
from longalign.backbones.lora import lora_layers
from longalign.compose import build_from_config
from longalign.config.changes import override
from longalign.config.run import load_config
from longalign.encoders.base import Conditioning
from longalign.evaluation.record import machine_text
from longalign.functional.diffusion import NoiseLevels, guided_steps
from longalign.functional.rollout_gradient import rollout
from longalign.functional.solvers import trailing_timesteps
from longalign.runtime import Runtime, examples_folder

TOKENS, BATCH, STEPS = (77, 240, 480, 1300), 8, 4


def cpu_seconds(rounds: int, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Smallest CPU seconds of each call over rounds in which the calls alternate."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name] += [time.process_time() - start] if i else []
    return {name: min(values) for name, values in times.items()}


def make_trainer(**changes: Any) -> Any:
    """The reward trainer of the example, with a LoRA that is not zero."""
    config = override(load_config(examples_folder() / "mini-reward.yaml"), {"init_from": None, **changes})
    trainer = build_from_config(config, Runtime()).trainer.train()
    torch.manual_seed(0)
    for name, parameter in trainer.backbone.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return trainer


def sampler(trainer: Any, conditioning: Conditioning, noise: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Returns a function that samples."""

    def sample() -> torch.Tensor:
        predict = trainer.predictions(conditioning, slice(0, len(noise)), trainer.solver)
        return rollout(predict, noise, trainer.solver)[0]

    return sample


@contextmanager
def text_in_every_call(network: Any) -> Iterator[None]:
    """Disables the reuse of the text's keys and values."""
    with patch.object(network, "project_text", lambda conditioning: conditioning):
        yield


def text(rounds: int) -> list[str]:
    """Keys and values computed once or in every call, by the number of text states."""
    trainer, width = make_trainer(**{"trainer.num_steps": STEPS}), 128
    rows = []
    for tokens in TOKENS:
        torch.manual_seed(0)
        sample = sampler(trainer, Conditioning(torch.randn(BATCH + 1, tokens, width)), trainer.noise(BATCH))

        def in_every_call(sample: Callable[[], torch.Tensor] = sample) -> torch.Tensor:
            with text_in_every_call(trainer.backbone):
                return sample()

        difference = relative(sample(), in_every_call())
        times = cpu_seconds(rounds, {"once": sample, "every": in_every_call})
        once, every = times["once"], times["every"]
        rows.append([str(tokens), f"{every:.2f}", f"{once:.2f}", f"{once / every:.2f}", f"{difference:.0e}"])
    head = ["text states", "in every call", "once", "ratio", "relative difference"]
    intro = f"CPU seconds of sampling with {STEPS} calls, keys and values of the text computed in every call or once:"
    return [intro, "", *table(head, rows), *text_operations()]


def text_operations() -> list[str]:
    """Operations of one call of the published models with and without the keys and values of the text."""
    rows = []
    for model, width, pooled in ((SD, 768, None), (SDXL, 2048, 1280)):
        network = backbone(Setting(model, "generate"))
        latents = torch.empty(1, *network.latent_shape(), device="meta")
        for tokens in TOKENS:
            states = torch.empty(1, tokens, width, dtype=torch.bfloat16, device="meta")
            conditioning = Conditioning(states, pooled=None if pooled is None else states[:, 0, :pooled])
            with torch.no_grad():
                projected = network.project_text(conditioning)
                plain, once = (operations(network, latents, c) for c in (conditioning, projected))
            size = sum(tensor.nbytes for pair in projected.keys_values.values() for tensor in pair)  # type: ignore[attr-defined]
            rows.append([model, str(tokens), f"{plain / 1e12:.3f}", f"{once / 1e12:.3f}", f"{1 - once / plain:.1%}",
                         f"{size / 2**20:.0f}"])  # fmt: skip
    head = ["model", "text states", "TFLOP", "with keys and values", "saved", "MiB in bf16"]
    intro = "One call of the UNet without LoRA, one image and one branch, at the native resolution:"
    return [intro, "", *table(head, rows)]


def lora(rounds: int) -> list[str]:
    """LoRA merged for sampling or computed separately."""
    trainer = make_trainer(**{"trainer.num_steps": STEPS})
    sample = sampler(trainer, Conditioning(torch.randn(BATCH + 1, 240, 128)), trainer.noise(BATCH))

    def merged() -> torch.Tensor:
        with trainer.backbone.merged_lora():
            return sample()

    def merge() -> None:
        with trainer.backbone.merged_lora():
            pass

    difference = relative(merged(), sample())
    times = cpu_seconds(rounds, {"separate": sample, "merged": merged, "merge": merge})
    ratio = times["merged"] / times["separate"]
    rows = [[f"{times['separate']:.2f}", f"{times['merged']:.2f}", f"{ratio:.2f}", f"{times['merge']:.3f}",
             f"{difference:.0e}"]]  # fmt: skip
    head = ["separate", "merged, with the merge", "ratio", "the merge alone", "relative difference"]
    intro = f"CPU seconds of sampling with {STEPS} calls and 240 text states, LoRA of rank 32 separate or merged:"
    return [intro, "", *table(head, rows), *lora_operations(), *rounding()]


def lora_operations() -> list[str]:
    """Operations of a separate LoRA."""
    rows = []
    for model, width, pooled in ((SD, 768, None), (SDXL, 2048, 1280)):
        network = backbone(Setting(model, "generate"))
        states = torch.empty(1, 480, width, dtype=torch.bfloat16, device="meta")
        conditioning = Conditioning(states, pooled=None if pooled is None else states[:, 0, :pooled])
        latents, counts = torch.empty(1, *network.latent_shape(), device="meta"), []
        with torch.no_grad():
            counts.append(operations(network, latents, conditioning))
            with torch.device("meta"):
                network.add_lora(LoraConfig(rank=32, dropout=0.0), "x")
            counts.append(operations(network, latents, conditioning))
        layers = [layer.get_base_layer().weight for _, layer in lora_layers(network.denoiser, "x")]
        size = sum(weight.nbytes for weight in layers)
        rows.append([model, *(f"{count / 1e12:.3f}" for count in counts), f"{counts[1] / counts[0] - 1:.1%}",
                     str(len(layers)), f"{size / 2**30:.2f}"])  # fmt: skip
    head = ["model", "TFLOP", "with a LoRA of rank 32", "more", "layers with LoRA", "GiB of their weights in bf16"]
    return ["One call of the UNet at 480 text states:", "", *table(head, rows)]


@torch.no_grad()
def rounding() -> list[str]:
    """Error of predictions with a merged or separate LoRA, by the size of its update."""
    network = make_trainer().backbone.eval()
    layers = [layer for _, layer in lora_layers(network.denoiser, "reward")]
    weights, ups = [m.get_base_layer().weight for m in layers], [m.lora_B["reward"].weight for m in layers]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, *network.latent_shape(), generator=generator)
    conditioning = Conditioning(torch.randn(4, 240, 128, generator=generator))

    def set_size(size: float) -> None:
        for layer, weight, up in zip(layers, weights, ups, strict=True):
            up.normal_(generator=generator.manual_seed(0))
            up *= size * weight.float().norm() / layer.get_delta_weight("reward").norm()

    def predict(
        autocast: Callable[[], Any] = nullcontext, merged: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        for layer, weight in zip(layers, merged or [None] * len(layers), strict=True):
            layer.merged_weight = weight
        with autocast():
            outputs = [network.predict(latents, torch.full((4,), t), conditioning) for t in (999, 700, 400, 100)]
        return torch.cat(outputs).float()

    def merged(autocast: Callable[[], Any]) -> list[torch.Tensor]:
        network.wrap_denoiser(network.denoiser, autocast)
        with network.merged_lora():
            return [layer.merged_weight for layer in layers]

    def kept(rounded: Sequence[torch.Tensor]) -> str:
        """Share of the update in rounded weights: the change of the weights, projected on the update."""
        updates = [layer.get_delta_weight("reward") for layer in layers]
        changes = [rounded_.float() - weight for rounded_, weight in zip(rounded, weights, strict=True)]
        inner = sum(float((u * c).sum()) for u, c in zip(updates, changes, strict=True))
        return f"{inner / sum(float(u.square().sum()) for u in updates):.2f}"

    def round_weights(dtype: torch.dtype) -> None:
        for weight in weights:
            weight.data = weight.data.bfloat16().to(dtype)

    rows = []
    for name, arithmetic in (("float32", "float32"), ("float32", "bf16"), ("bf16", "bf16")):
        autocast = partial(torch.autocast, "cpu", torch.bfloat16) if arithmetic == "bf16" else nullcontext
        if name == "bf16":
            round_weights(torch.float32)
        set_size(0.0)
        base = predict()
        for size in (1e-4, 1e-3, 1e-2):
            set_size(size)
            exact = predict()
            nearest = [(m.get_base_layer().weight + m.get_delta_weight("reward")).bfloat16() for m in layers]
            if name == "bf16":
                round_weights(torch.bfloat16)
            copies, separate = merged(autocast), predict(autocast)
            together = predict(autocast, copies)
            if name == "bf16":
                round_weights(torch.float32)
            errors = [relative(exact, base), *(relative(p, exact) for p in (separate, together))]
            shares = [kept(nearest), kept(copies)] if name == "bf16" else ["", ""]
            rows.append([name, arithmetic, f"{size:.0e}", *(f"{error:.1e}" for error in errors), *shares])
    head = ["weights", "arithmetic", "size of the update", "its effect", "error if separate", "error if merged",
            "update kept, rounding to nearest", "update kept"]  # fmt: skip
    return [
        "Relative changes of the prediction, by the size of the update relative to each weight. The effect is the "
        "change by the LoRA in float32; errors are those to float32 arithmetic with a separate LoRA. The last columns "
        "have the share of the update that remains in the merged bf16 weights:", "",
        *table(head, rows),
    ]  # fmt: skip


def guidance(rounds: int) -> list[str]:
    """Guidance in all steps or in an interval of noise levels."""
    interval, measured, rows = (0.28, 5.42), 8, []
    keys = {"trainer.num_steps": measured}
    trainers = {str(i): make_trainer(**keys, **{"trainer.guidance_interval": i}) for i in (None, interval)}
    conditioning, noise = Conditioning(torch.randn(BATCH + 1, 240, 128)), trainers["None"].noise(BATCH)
    times = cpu_seconds(rounds, {name: sampler(trainer, conditioning, noise) for name, trainer in trainers.items()})
    without, with_ = times.values()
    published: Any = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for steps in (measured, 25, 50):
        levels = NoiseLevels.from_alphas_cumprod(published.alphas_cumprod)
        if steps == measured:
            levels = trainers["None"].backbone.noise_levels
        guided = sum(guided_steps(levels, trailing_timesteps(steps), interval))
        saved = f"{(steps - guided) / (2 * steps):.0%}"
        seconds = [f"{without:.2f}", f"{with_:.2f}", f"{with_ / without:.2f}"] if steps == measured else ["", "", ""]
        model = "the synthetic scenes" if steps == measured else "Stable Diffusion 1.x, XL"
        rows.append([model, str(steps), str(guided), str(2 * steps), str(steps + guided), saved, *seconds])
    head = ["noise levels", "steps", "with guidance", "branches", "branches with the interval", "saved", "CPU seconds",
            "with the interval", "ratio"]  # fmt: skip
    intro = f"Guidance at noise levels from {interval[0]} to {interval[1]}:"
    return [intro, "", *table(head, rows)]


def operations(network: Any, latents: torch.Tensor, conditioning: Conditioning) -> int:
    """Floating-point operations of a call; a multiplication with an addition counts as two."""
    with FlopCounterMode(display=False) as counter:
        network.predict(latents, torch.zeros(1, dtype=torch.long, device="meta"), conditioning)
    return counter.get_total_flops()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="file for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["# Sampling in a reward step", "", "`python benchmarks/rollout.py`", ""]
    parts = {"Text": text, "LoRA": lora, "Guidance in an interval": guidance}
    for title, part in parts.items():
        lines += [f"## {title}", "", *part(options.rounds)]
        print("\n".join(lines[-8:]), flush=True)
    options.output.write_text("\n".join([*lines, f"Machine: {machine_text()}; one thread.", ""]))


if __name__ == "__main__":
    main()
