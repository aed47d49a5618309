"""Collects versions, devices, plugins and settings of this machine, for bug reports."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from longalign.checkpoints.provenance import PACKAGES as RESULT_PACKAGES
from longalign.discovery import PREFIX, discover, owner
from longalign.hub import cache_folder, offline
from longalign.runtime import processor

MISSING = "not installed"
PACKAGES = (*RESULT_PACKAGES, "timm", "safetensors", "huggingface_hub", "datasets", "catalogue", "numpy")
#: environment variables that affect loading; none of them holds a secret
VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK", "WORLD_SIZE", "LOCAL_RANK",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Returns what a bug report shows of this machine: name -> value as text, in display order.

    The names are packages, ``python``, ``system``, ``processor``, devices such as ``cuda:0``, plugins, ``hub``, ``hub
    cache``, and environment variables. Imports torch if it is installed.
    """
    out = {name: _version(name) for name in PACKAGES}
    out["python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    out["system"] = platform.platform()
    out["processor"] = processor()
    out |= _devices() if out["torch"] != MISSING else {}
    for dist, parts in _plugins().items():
        out[f"plugin {dist}"] = ", ".join(parts)
    out["hub"] = f"{'offline' if offline() else 'online'}, token {'set' if _has_token() else 'not set'}"
    out["hub cache"] = str(cache_folder()) + ("" if cache_folder().is_dir() else " (does not exist)")
    return out | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def unmet_requirements() -> list[str]:
    """Returns a text such as ``torch 1.0, expected >=2.4`` for each package that is missing or has a wrong version."""
    from packaging.requirements import Requirement

    problems = []
    try:
        requirements = [Requirement(line) for line in metadata.requires("longalign") or []]
    except metadata.PackageNotFoundError:
        return ["longalign is not installed; run `pip install -e .`"]
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed == MISSING or not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name} {installed}, expected {requirement.specifier}")
    return problems


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def _has_token() -> bool:
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    return Path(os.environ.get("HF_TOKEN_PATH") or cache_folder().parent / "token").is_file()


def _devices() -> dict[str, str]:
    try:
        import torch
    except Exception as error:  # e.g. a missing CUDA library
        return {"torch": f"{_version('torch')}, which cannot be imported: {error}"}
    out = {"torch": str(torch.__version__)}  # includes the build, e.g. +cpu, unlike the package metadata
    out["cpu"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    out["cuda"] = f"built for {torch.version.cuda}, {torch.cuda.device_count()} devices"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        major, minor = torch.cuda.get_device_capability(i)
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        out[f"cuda:{i}"] = f"{properties.name}, {memory}, compute capability {major}.{minor}"
    if torch.backends.mps.is_available():
        out["mps"] = f"{torch.mps.recommended_max_memory() / 2**30:.1f} GiB"
    return out


def _plugins() -> dict[str, list[str]]:
    """Returns the parts (encoders, rewards, ...) of plugins: distribution and version -> ``kind/name`` of each part."""
    plugins: dict[str, list[str]] = {}
    for group, names in discover().groups.items():
        for name, entries in names.items():
            for entry in entries:
                if not owner(entry).startswith("longalign "):
                    plugins.setdefault(owner(entry), []).append(f"{group.removeprefix(PREFIX)}/{name}")
    return {dist: sorted(parts) for dist, parts in sorted(plugins.items())}
