"""ELLA's timestep-aware resampler (arXiv 2403.05135, section 3.1); its modules have the names of published weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from longalign import Runtime
from longalign.encoders import Adapter, Conditioning
from longalign.hub import find_checkpoint_file
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from longalign_ella.config import ResamplerConfig

SIZES = {"in_dim", "width", "layers", "heads", "queries", "time_channels", "time_dim"}


class Resampler(Adapter):
    """Maps T5's states and a timestep to the resampled states of a prompt, one for each learned query.

    The queries attend to themselves and to T5's states in each block. The timestep shifts the queries, and scales and
    shifts the input of every layer. All prompts get the same number of states, whatever their length.

    Args:
        in_dim: width of T5's states.
        width: width of the queries and of the resampled states.
        layers: number of attention blocks.
        heads: number of attention heads.
        queries: number of learned queries.
        time_channels: number of sine and cosine features of a timestep; even.
        time_dim: width of the timestep embedding.
    """

    def __init__(
        self,
        in_dim: int = 2048,
        width: int = 768,
        layers: int = 6,
        heads: int = 8,
        queries: int = 64,
        time_channels: int = 320,
        time_dim: int = 768,
    ):
        super().__init__()
        self.in_dim, self.out_dim, self.time_channels = in_dim, width, time_channels
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(time_channels, time_dim), "linear_2": nn.Linear(time_dim, time_dim)}
        )
        self.connector = Connector(in_dim, width, layers, heads, queries, time_dim)

    @classmethod
    def from_config(cls, config: ResamplerConfig, runtime: Runtime) -> Resampler:
        """Loads the weights in ``config.checkpoint``, or initializes new ones without it, in float32.

        Raises:
            ValueError: if the file is missing or unreadable, or its weights do not match the sizes of the config.
        """
        sizes = config.model_dump(
            include={"in_dim", "width", "layers", "heads", "queries", "time_channels", "time_dim"}
        )
        resampler = cls(**sizes)
        if config.checkpoint is not None:
            path = find_checkpoint_file(config.checkpoint, config.file, config.revision)
            if path is None:
                raise ValueError(f"'{config.checkpoint}' does not contain {config.file}; set 'checkpoint' and 'file'")
            try:
                resampler.load_state_dict(load_file(path))
            except (RuntimeError, SafetensorError) as error:
                raise ValueError(
                    f"{path}: expected the weights of ELLA's resampler with the sizes {sizes}; set these keys to the "
                    f"sizes of the file: {error}"
                ) from error
        return resampler.float().requires_grad_(config.trainable).to(runtime.device)

    def adapt(self, conditioning: Conditioning) -> Conditioning:
        """Returns an `EllaConditioning` of T5's states, which this resampler will resample for each timestep."""
        return EllaConditioning(
            conditioning.states, conditioning.mask, conditioning.pooled, conditioning.reports, resampler=self
        )

    def resample(self, states: Tensor, mask: Tensor | None, timesteps: Tensor) -> Tensor:
        """Maps T5's states to ``(b, queries, width)``.

        Args:
            states: ``(b, n, in_dim)`` states.
            mask: ``(b, n)`` bool, True for states to attend to; None to attend to all.
            timesteps: ``(b,)`` timesteps, from 0 to 999.
        """
        weight = self.connector.latents
        features = sinusoids(timesteps, self.time_channels).to(weight)
        embedding = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](features)))
        return self.connector(states.to(weight), mask, embedding)


@dataclass(frozen=True)
class EllaConditioning(Conditioning):
    """Conditioning with T5's states, which `at` maps to the denoiser's states for given timesteps.

    Attributes:
        resampler: the resampler, which maps T5's states and the timestep to the states for the denoiser.
    """

    resampler: Resampler = field(kw_only=True)

    def at(self, timestep: Tensor) -> Conditioning:
        states = self.resampler.resample(self.states, self.mask, timestep)
        return Conditioning(states, None, self.pooled, self.reports)


class Connector(nn.Module):
    """The learned queries and the blocks in which they attend to T5's states; see `Resampler` for the arguments."""

    def __init__(self, in_dim: int, width: int, layers: int, heads: int, queries: int, time_dim: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.time_aware_linear = nn.Linear(time_dim, width)
        self.proj_in = nn.Linear(in_dim, width)
        self.perceiver_blocks = nn.ModuleList([Block(width, heads, time_dim) for _ in range(layers)])

    def forward(self, states: Tensor, mask: Tensor | None, embedding: Tensor) -> Tensor:
        """Maps T5's states ``(b, n, in_dim)`` and timestep embeddings ``(b, time_dim)`` to ``(b, queries, width)``.

        ``mask`` ``(b, n)`` is True for states to attend to; None attends to all.
        """
        queries = self.latents + self.time_aware_linear(F.silu(embedding))[:, None]
        text, ignored = self.proj_in(states), None
        if mask is not None:  # attention to the queries themselves is never masked
            ignored = F.pad(~mask, (queries.shape[1], 0), value=False)
        for block in self.perceiver_blocks:
            queries = block(queries, text, ignored, embedding)
        return queries


class Block(nn.Module):
    """Attention of the queries to themselves and to T5's states, then a feed-forward layer with squared ReLU.

    Args:
        width: width of queries and projected states.
        heads: number of attention heads.
        time_dim: width of the timestep embedding.
    """

    def __init__(self, width: int, heads: int, time_dim: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "act": SquaredReLU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_1, self.ln_2, self.ln_ff = (TimeNorm(width, time_dim) for _ in range(3))

    def forward(self, queries: Tensor, text: Tensor, ignored: Tensor | None, embedding: Tensor) -> Tensor:
        """Returns updated queries ``(b, q, width)``.

        Args:
            queries: ``(b, q, width)``.
            text: ``(b, n, width)`` projected states of T5.
            ignored: ``(b, q + n)`` bool, True for inputs that are not attended to: q queries, then n states. None
                attends to all.
            embedding: ``(b, time_dim)`` timestep embeddings.
        """
        normed = self.ln_1(queries, embedding)
        keys = torch.cat([normed, self.ln_2(text, embedding)], dim=1)
        queries = queries + self.attn(normed, keys, keys, key_padding_mask=ignored, need_weights=False)[0]
        return queries + self.mlp(self.ln_ff(queries, embedding))


class SquaredReLU(nn.Module):
    """Computes ``relu(x)^2``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class TimeNorm(nn.Module):
    """Layer normalization, then a scale and a shift computed from the timestep embedding, initially 1 and 0.

    Args:
        width: width of the input ``(b, n, width)``.
        time_dim: width of the timestep embedding ``(b, time_dim)``.
    """

    def __init__(self, width: int, time_dim: int):
        super().__init__()
        self.linear = nn.Linear(time_dim, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(embedding))[:, None].chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def sinusoids(timesteps: Tensor, channels: int) -> Tensor:
    """Returns features ``(b, channels)`` of timesteps ``(b,)``: cosines, then sines, at ``channels / 2`` frequencies.

    The frequencies fall geometrically from 1 to about 1/10000.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
