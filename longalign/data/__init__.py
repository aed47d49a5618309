"""Training data: synthetic scenes, captioned images in folders, tables and tar files, preference pairs, and prompts.

Public names are loaded on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.data.base import Data as Data
    from longalign.data.base import check_index as check_index
    from longalign.data.config import DataConfig as DataConfig
    from longalign.data.config import ImagesConfig as ImagesConfig
    from longalign.data.images.base import ImageDataset as ImageDataset
    from longalign.data.images.captions import LongAlignCaptions as LongAlignCaptions
    from longalign.data.images.config import FolderConfig as FolderConfig
    from longalign.data.images.config import LongAlignCaptionsConfig as LongAlignCaptionsConfig
    from longalign.data.images.config import WebDatasetConfig as WebDatasetConfig
    from longalign.data.images.folder import Folder as Folder
    from longalign.data.images.webdataset import WebDataset as WebDataset
    from longalign.data.pairs.base import Pairs as Pairs
    from longalign.data.pairs.config import HubPairsConfig as HubPairsConfig
    from longalign.data.pairs.config import PairedImagesConfig as PairedImagesConfig
    from longalign.data.pairs.config import PairsConfig as PairsConfig
    from longalign.data.pairs.folder import FolderPairs as FolderPairs
    from longalign.data.pairs.table import HubPairs as HubPairs
    from longalign.data.prompts.config import PromptsConfig as PromptsConfig
    from longalign.data.prompts.prompts import Prompts as Prompts
    from longalign.data.scenes.config import ScenePairsConfig as ScenePairsConfig
    from longalign.data.scenes.config import ScenesConfig as ScenesConfig
    from longalign.data.scenes.pairs import ScenePairs as ScenePairs
    from longalign.data.scenes.scenes import Scenes as Scenes
    from longalign.data.stream import Record as Record
    from longalign.data.stream import Stream as Stream
    from longalign.data.tables.config import HubConfig as HubConfig
    from longalign.data.tables.hf import HubTable as HubTable

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Data": "base",
        "DataConfig": "config",
        "Folder": "images.folder",
        "FolderConfig": "images.config",
        "FolderPairs": "pairs.folder",
        "HubConfig": "tables.config",
        "HubPairs": "pairs.table",
        "HubPairsConfig": "pairs.config",
        "HubTable": "tables.hf",
        "ImageDataset": "images.base",
        "ImagesConfig": "config",
        "LongAlignCaptions": "images.captions",
        "LongAlignCaptionsConfig": "images.config",
        "PairedImagesConfig": "pairs.config",
        "Pairs": "pairs.base",
        "PairsConfig": "pairs.config",
        "Prompts": "prompts.prompts",
        "PromptsConfig": "prompts.config",
        "Record": "stream",
        "ScenePairs": "scenes.pairs",
        "ScenePairsConfig": "scenes.config",
        "Scenes": "scenes.scenes",
        "ScenesConfig": "scenes.config",
        "Stream": "stream",
        "WebDataset": "images.webdataset",
        "WebDatasetConfig": "images.config",
        "check_index": "base",
    },
)
