"""SigLIP and SigLIP 2 as a reward of longalign, loaded with transformers."""

from __future__ import annotations

import math
from typing import Any

from longalign import Runtime
from longalign.functional import ImagePreprocessor
from longalign.rewards import ImageInput, TowerReward, check_tokenizer, image_processor_config
from longalign.runtime import resolve_checkpoint

from longalign_siglip.config import SiglipConfig
from longalign_siglip.naflex import NaflexPreprocessor
from longalign_siglip.towers import NaflexTowers, SiglipTowers

HALF = (0.5, 0.5, 0.5)
#: values of ``resample`` in the settings of an image processor -> interpolation
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


class SiglipReward(TowerReward):
    """Scores an image by the cosine similarity of SigLIP's image and text embeddings; see `TowerReward`."""

    @classmethod
    def from_config(cls, config: SiglipConfig, runtime: Runtime) -> SiglipReward:
        """Loads the reward from a Hub id or a local folder in transformers layout.

        The ``model_type`` in the checkpoint's config selects the model. ``"siglip"`` is a ``SiglipModel``: SigLIP, or
        SigLIP 2 of fixed resolution. ``"siglip2"`` is a ``Siglip2Model``: SigLIP 2 of flexible resolution (NaFlex).

        Raises:
            ValueError: if the checkpoint has a different type, lacks weights, or its tokenizer does not fit the model.
        """
        import transformers
        from transformers import AutoConfig, AutoTokenizer

        checkpoint = resolve_checkpoint(config.checkpoint)
        source: dict[str, Any] = {"revision": config.revision}
        model_type = AutoConfig.from_pretrained(checkpoint, **source).model_type
        _check_model_type(model_type, config)
        model_class: Any = transformers.Siglip2Model if model_type == "siglip2" else transformers.SiglipModel
        loaded: Any = model_class.from_pretrained(checkpoint, output_loading_info=True, **source)
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"'{checkpoint}' is not a complete {model_class.__name__}: {len(info['missing_keys'])} weights are "
                f"missing, e.g. {sorted(info['missing_keys'])[0]}; expected a checkpoint with both towers"
            )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **source)
        check_tokenizer(len(tokenizer), model.config.text_config.vocab_size, checkpoint, checkpoint)
        settings = image_processor_config(checkpoint, config.revision)
        towers = NaflexTowers(model, tokenizer) if model_type == "siglip2" else SiglipTowers(model, tokenizer)
        return cls.from_towers(towers, _image(model, settings, config), config, runtime)


def _check_model_type(model_type: str, config: SiglipConfig) -> None:
    if model_type not in ("siglip", "siglip2"):
        raise ValueError(
            f"'{config.checkpoint}' is a checkpoint of type '{model_type}'; expected 'siglip' or 'siglip2', with both "
            "towers"
        )
    if model_type == "siglip" and config.max_num_patches is not None:
        raise ValueError(
            f"`max_num_patches` only applies to NaFlex checkpoints, but '{config.checkpoint}' has a fixed resolution; "
            "remove it"
        )


def _image(model: Any, settings: Any, config: SiglipConfig) -> ImageInput | ImagePreprocessor:
    """Returns the preprocessing of images for a checkpoint.

    Args:
        model: a ``SiglipModel`` or ``Siglip2Model``.
        settings: settings of the checkpoint's image processor. Missing ones have the values of the published
            processors.
        config: config of the reward, whose keys take precedence.
    """
    vision = model.config.vision_config
    mean, std = (tuple(settings.get(key, HALF)) for key in ("image_mean", "image_std"))
    naflex = model.config.model_type == "siglip2"
    interpolation = INTERPOLATIONS.get(settings.get("resample"), "bilinear" if naflex else "bicubic")
    if not naflex:
        return ImageInput(vision.image_size, mean, std, interpolation)
    max_num_patches = config.max_num_patches or settings.get("max_num_patches", 256)
    side = math.isqrt(max_num_patches) * vision.patch_size
    return NaflexPreprocessor(
        (side, side),
        mean,
        std,
        aspect=config.aspect,
        crop=config.crop,
        interpolation=config.interpolation or interpolation,
        crop_position=config.crop_position,
        patch_size=vision.patch_size,
        max_num_patches=max_num_patches,
    )
