"""Model FLOPs utilization of training steps (mfu, as in PaLM, arXiv 2204.02311)."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.config.sections import LoopConfig


class Utilization:
    """Measures the model FLOPs utilization: the FLOPs of the denoiser's calls as a fraction of the device's peak.

    Operations of autoencoder, encoder, rewards, LoRA and optimizer are not counted, but their time is.

    Args:
        backbone: the backbone, whose calls are counted from now on.
        peak: operations per second of the device.
    """

    def __init__(self, backbone: Backbone, peak: float):
        self.device, self.peak = backbone.device, peak
        self.flops = backbone.count_flops()
        self.steps = 0

    def start(self) -> None:
        """Starts a step."""
        self.begin, self.before = time.perf_counter(), self.flops.total

    def end(self) -> dict[str, Tensor]:
        """Returns ``mfu`` of the step, except for the first one, in which kernels may be compiled."""
        seconds, operations = time.perf_counter() - self.begin, self.flops.total - self.before
        self.steps += 1
        return {"mfu": torch.tensor(operations / (seconds * self.peak), device=self.device)} if self.steps > 1 else {}


def make_utilization(loop: LoopConfig, backbone: Backbone) -> Utilization | None:
    """Returns the `Utilization` if ``loop.mfu`` is true, or null on a CUDA device; else None."""
    if loop.mfu is False or (loop.mfu is None and backbone.device.type != "cuda"):
        return None
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": backbone.denoiser.dtype}
    return Utilization(backbone, measured_peak(backbone.device, dtypes[loop.precision]))


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the operations per second of a square matrix product, 8192 wide on an accelerator and 1024 on a CPU."""
    side, fastest = 1024 if device.type == "cpu" else 8192, math.inf
    a = torch.rand(side, side, device=device, dtype=dtype)
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest
