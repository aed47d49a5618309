"""The published checkpoints that the library can load, and which of their files are on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longalign.encoders.clip.config import ClipSegmentConfig, LongClipConfig
from longalign.encoders.t5.config import T5Config
from longalign.hub import local_file
from longalign.rewards.clip.config import ClipConfig, DenscoreConfig, PickScoreConfig
from longalign.rewards.hpsv2.config import Hpsv2Config

LAVI_BRIDGE = ("shihaozhao/LaVi-Bridge", "t5_unet/adapter")
LONGSD = "luping-liu/LongSD"
_MODEL = "model.safetensors|model.safetensors.index.json|pytorch_model.bin|pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Published:
    """A published checkpoint that the library can load.

    Attributes:
        name: short name, in lower case with hyphens, e.g. ``"hpsv2.1"``.
        checkpoint: ``owner/name`` on the Hub, or a local folder.
        files: paths of the required files in the checkpoint. Of paths joined by ``|``, one suffices.
    """

    name: str
    checkpoint: str
    files: tuple[str, ...]

    @property
    def key(self) -> str:
        """``name`` up to the first dot: ``"hpsv2"`` for ``"hpsv2.1"``. Equal keys mean the same repository."""
        return self.name.partition(".")[0]

    def missing(self, folder: str = "") -> list[str]:
        """Returns the entries of ``files`` that are not on this machine, as in ``files``. Nothing is downloaded.

        Args:
            folder: a folder to search besides the local copy of ``checkpoint``; empty for none.
        """
        sources = [source for source in (folder, self.checkpoint) if source]
        return [file for file in self.files if not any(_has(source, file) for source in sources)]


def _has(source: str, alternatives: str) -> bool:
    return any(local_file(source, file) for file in alternatives.split("|"))


def _model(folder: str, weights: str) -> tuple[str, str]:
    return f"{folder}/config.json", "|".join(f"{folder}/{weights}{kind}" for kind in (".safetensors", ".bin"))


PUBLISHED = (
    Published("denscore", DenscoreConfig().checkpoint, ("config.json", _MODEL)),
    Published("pickscore", PickScoreConfig().checkpoint, ("config.json", _MODEL)),
    Published("clip-h", ClipConfig().checkpoint, ("config.json", _MODEL)),
    Published("hpsv2", Hpsv2Config().checkpoint, ("HPS_v2_compressed.pt",)),
    Published("hpsv2.1", Hpsv2Config().checkpoint, ("HPS_v2.1_compressed.pt",)),
    Published("longclip", LongClipConfig().checkpoint, ("longclip-L.pt",)),
    Published(
        "sd15",
        ClipSegmentConfig().checkpoint,
        (
            *_model("unet", "diffusion_pytorch_model"),
            *_model("vae", "diffusion_pytorch_model"),
            "text_encoder/config.json",
            "text_encoder/model.safetensors|text_encoder/pytorch_model.bin",
            "tokenizer/tokenizer_config.json",
            "scheduler/scheduler_config.json",
        ),
    ),
    Published("t5", T5Config().checkpoint, ("config.json", _MODEL, "tokenizer.json|spiece.model")),
    Published("lavi-bridge", LAVI_BRIDGE[0], _model(LAVI_BRIDGE[1], "diffusion_pytorch_model")),
    Published("longsd", LONGSD, ("s28750_adapter/config.json", "s28750_lora_vis.pt", "sd15-reward-3750.pt")),
)


def local_status() -> dict[str, str]:
    """Returns which published checkpoints are on this machine: ``"name (Hub id)"`` -> status.

    The status is ``"found"``, ``"not found"``, or ``"incomplete: ... missing"`` with the missing files. LongAlign's own
    weights, longSD, are also looked up in the folder ``LongSD`` of the working directory.
    """
    out = {}
    for entry in PUBLISHED:
        missing = entry.missing("LongSD" if entry.name == "longsd" and Path("LongSD").is_dir() else "")
        status = "found" if not missing else f"incomplete: {', '.join(missing)} missing"
        out[f"{entry.name} ({entry.checkpoint})"] = "not found" if len(missing) == len(entry.files) else status
    return out
