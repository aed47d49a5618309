"""LaVi-Bridge's adapter (arXiv 2403.07860), which maps a language model's states to the width of a denoiser."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from longalign.encoders.adapter import Adapter
from longalign.encoders.t5.config import AdapterConfig
from longalign.files.paths import join_subfolder
from longalign.files.weights import load_pickle, load_tensors, save_tensors
from longalign.hub import find_checkpoint_file
from longalign.runtime import Runtime, resolve_checkpoint

_WEIGHTS = "diffusion_pytorch_model"


class GEGLU(nn.Module):
    """Maps x ``(..., in_dim)`` to ``(x W1 + b1) * gelu(x W2 + b2)``, ``(..., out_dim)`` (GEGLU, arXiv 2002.05202).

    ``proj`` is the linear layer of both matrices and biases.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Maps ``(..., in_dim)`` to ``(..., out_dim)``: `GEGLU` to width ``mult * in_dim``, dropout, and a linear layer.

    ``dropout`` is the probability that an element is dropped in training mode.
    """

    def __init__(self, in_dim: int, out_dim: int, mult: int = 4, dropout: float = 0.1):
        super().__init__()
        self.net = nn.Sequential(GEGLU(in_dim, mult * in_dim), nn.Dropout(dropout), nn.Linear(mult * in_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TextAdapter(Adapter):
    """LaVi-Bridge's adapter: LayerNorm, `FeedForward`, LayerNorm and `FeedForward`, at each position separately.

    State-dict keys match the published weights: ``norm1``, ``ff1.net.*``, ``norm2``, ``ff2.net.*``.

    Args:
        in_dim: width of the text model's states; 1024 for T5-large.
        int_dim: width between the two feed-forward blocks; 896 in the published weights.
        out_dim: width that the denoiser expects; 768 for Stable Diffusion 1.5.
    """

    def __init__(self, in_dim: int, int_dim: int, out_dim: int):
        super().__init__()
        self.in_dim, self.int_dim, self.out_dim = in_dim, int_dim, out_dim
        self.norm1 = nn.LayerNorm(in_dim)
        self.ff1 = FeedForward(in_dim, int_dim)
        self.norm2 = nn.LayerNorm(int_dim)
        self.ff2 = FeedForward(int_dim, out_dim)

    def forward(self, states: Tensor) -> Tensor:
        """Maps states ``(b, n, in_dim)`` to ``(b, n, out_dim)``."""
        return self.ff2(self.norm2(self.ff1(self.norm1(states))))

    @classmethod
    def from_config(cls, config: AdapterConfig, runtime: Runtime) -> TextAdapter:
        """Loads the adapter of ``config.checkpoint``; if it is None, initializes one. The weights are float32.

        Raises:
            ValueError: if the adapter cannot be loaded; see `load`.
        """
        if config.checkpoint is not None:
            adapter = cls.load(resolve_checkpoint(config.checkpoint), config.subfolder, config.revision)
        else:
            adapter = cls(config.in_dim, config.int_dim, config.out_dim)  # type: ignore[arg-type]
        return adapter.requires_grad_(config.trainable).to(runtime.device)

    @classmethod
    def load(cls, checkpoint: str, subfolder: str | None = None, revision: str | None = None) -> TextAdapter:
        """Loads an adapter in diffusers layout: config.json and diffusion_pytorch_model.safetensors or .bin.

        Args:
            checkpoint: Hub id or local folder.
            subfolder: folder of both files in the checkpoint; None for the top level.
            revision: branch, tag or commit on the Hub; None for the default branch.

        Raises:
            ValueError: if a file or a width in config.json is missing, or the weights do not match the widths.
        """
        prefix = join_subfolder(subfolder, "")
        config = find_checkpoint_file(checkpoint, f"{prefix}config.json", revision)
        weights = find_checkpoint_file(checkpoint, f"{prefix}{_WEIGHTS}.safetensors", revision) or find_checkpoint_file(
            checkpoint, f"{prefix}{_WEIGHTS}.bin", revision
        )
        if config is None or weights is None:
            raise ValueError(
                f"no adapter in '{checkpoint}/{prefix}'; expected config.json and {_WEIGHTS}.safetensors or .bin. Set "
                "the adapter's 'checkpoint' and 'subfolder'"
            )
        values = json.loads(config.read_text())
        missing = [key for key in ("in_dim", "int_dim", "out_dim") if key not in values]
        if missing:
            raise ValueError(
                f"{config}: missing {', '.join(missing)}; expected the config.json of a LaVi-Bridge text adapter. Set "
                "the adapter's 'subfolder'"
            )
        adapter = cls(values["in_dim"], values["int_dim"], values["out_dim"])
        state = load_tensors(weights) if weights.suffix == ".safetensors" else load_pickle(weights)
        try:
            adapter.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{weights}: expected weights that match the widths in config.json; use the files of one adapter: "
                f"{error}"
            ) from error
        return adapter

    def save(self, folder: str | Path) -> None:
        """Writes config.json and the weights to ``folder``, in the layout that `load` and diffusers read."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        values = {"_class_name": "TextAdapter", "in_dim": self.in_dim, "int_dim": self.int_dim, "out_dim": self.out_dim}
        (path / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        save_tensors(path / f"{_WEIGHTS}.safetensors", state, {"format": "pt"})
