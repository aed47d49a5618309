"""What a bug report should say of a machine: versions, devices, plugins and settings; importing it imports no torch."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from longalign.discovery import PREFIX, discover, owner

MISSING = "not installed"
PACKAGES = (
    "longalign", "torch", "transformers", "diffusers", "accelerate", "peft", "open_clip_torch", "safetensors",
    "huggingface_hub", "datasets", "pydantic", "catalogue", "numpy",
)  # fmt: skip
#: settings that change what is loaded and how; their values are no secrets
VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK", "WORLD_SIZE", "LOCAL_RANK",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Names and values in the order they are shown. Imports torch, if it is installed."""
    out = {name: _version(name) for name in PACKAGES}
    out["python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    out["system"] = platform.platform()
    out["processor"] = processor()
    out |= _devices() if out["torch"] != MISSING else {}
    for who, parts in _plugins().items():
        out[f"plugin {who}"] = ", ".join(parts)
    for who, why in discover().malformed:
        out[f"unreadable plugin {who}"] = why
    return out | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def processor() -> str:
    """The processor's model, or what else is known of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def _devices() -> dict[str, str]:
    import torch

    out = {"torch": str(torch.__version__)}  # with what it is built for, which the metadata of its package lacks
    out["cpu"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    out["cuda"] = f"built for {torch.version.cuda}, {torch.cuda.device_count()} devices"
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        major, minor = torch.cuda.get_device_capability(i)
        memory = f"{about.total_memory / 2**30:.1f} GiB"
        out[f"cuda:{i}"] = f"{about.name}, {memory}, compute capability {major}.{minor}"
    if torch.backends.mps.is_available():
        out["mps"] = f"{torch.mps.recommended_max_memory() / 2**30:.1f} GiB"
    return out


def _plugins() -> dict[str, list[str]]:
    """Owner -> kind and name of the parts that other distributions provide."""
    found: dict[str, list[str]] = {}
    for group, names in discover().groups.items():
        for name, entries in names.items():
            for entry in entries:
                if not owner(entry).startswith("longalign "):
                    found.setdefault(owner(entry), []).append(f"{group.removeprefix(PREFIX)}/{name}")
    return {who: sorted(parts) for who, parts in sorted(found.items())}
