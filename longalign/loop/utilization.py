"""Model FLOPs utilization (MFU) of training steps, as in PaLM (arXiv 2204.02311, section 4.1)."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.config.sections import LoopConfig


class Utilization:
    """Measures the model FLOPs utilization of training steps.

    It is the FLOPs of the denoiser's calls, divided by the time of the whole step and by the device's FLOPs per second.
    FLOPs of autoencoder, encoder, rewards, LoRA and optimizer are not counted, but their time is.

    Args:
        backbone: the backbone, whose denoiser calls are counted from now on.
        peak: FLOPs per second that the device reaches; see `measured_peak`.
    """

    def __init__(self, backbone: Backbone, peak: float):
        self.device, self.peak = backbone.device, peak
        self.flops = backbone.count_flops()
        self.steps = 0

    def start(self) -> None:
        """Starts to measure the time and to count the FLOPs of a training step."""
        self.begin, self.before = time.perf_counter(), self.flops.total

    def end(self) -> dict[str, Tensor]:
        """Ends a training step and returns ``{"mfu": tensor ()}``, a fraction from 0 to about 1.

        For the first step, in which kernels may be compiled, the returned dict is empty.
        """
        seconds, operations = time.perf_counter() - self.begin, self.flops.total - self.before
        self.steps += 1
        return {"mfu": torch.tensor(operations / (seconds * self.peak), device=self.device)} if self.steps > 1 else {}


def make_utilization(loop: LoopConfig, backbone: Backbone) -> Utilization | None:
    """Returns a `Utilization` if ``loop.mfu`` is true, or if it is null and the device is a CUDA device; else None."""
    if loop.mfu is False or (loop.mfu is None and backbone.device.type != "cuda"):
        return None
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": backbone.denoiser.dtype}
    return Utilization(backbone, measured_peak(backbone.device, dtypes[loop.precision]))


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOPs per second of a matrix product, as the fastest of five.

    Two square matrices are multiplied, 8192 wide on an accelerator and 1024 wide on a CPU. A
    multiplication and an addition count as two FLOPs.
    """
    side, fastest = 1024 if device.type == "cpu" else 8192, math.inf
    a = torch.rand(side, side, device=device, dtype=dtype)
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest
