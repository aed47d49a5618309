"""Builders of tiny random checkpoints in the published formats, for the tests of this library and of plugins.

``tiny_*(folder, ...)`` writes a checkpoint to ``folder`` and returns this folder. Sizes of images are in pixels. Each
checkpoint is built once per process and settings; later calls copy it, so tests may modify it.
"""

# The annotations of diffusers' and transformers' constructors are narrower than the values that their configs accept.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import atexit
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

__all__ = [
    "tiny_adapter",
    "tiny_clip",
    "tiny_clip_text",
    "tiny_flux",
    "tiny_hpsv2",
    "tiny_hpsv3",
    "tiny_imagereward",
    "tiny_longclip_file",
    "tiny_pixart",
    "tiny_qwen2_vl",
    "tiny_sd",
    "tiny_sd3",
    "tiny_sd15",
    "tiny_sdxl",
    "tiny_t5",
    "tiny_vlm",
]

Builder = Callable[..., Path]


@cache
def _built() -> Path:
    """Returns the temporary folder of the checkpoints built by this process; it is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def once(build: Builder) -> Builder:
    """Decorator of builders: calls ``build`` once per process and settings, and copies the files to each ``folder``.

    Args:
        build: ``build(folder, ...)`` writes files to ``folder``; all its other arguments are settings.
    """
    built: dict[str, Path] = {}

    @wraps(build)
    def build_or_copy(folder: Path, *args, **settings) -> Path:
        arguments = inspect.signature(build).bind(folder, *args, **settings)
        arguments.apply_defaults()
        key = repr([(name, value) for name, value in arguments.arguments.items() if name != "folder"])
        if key not in built:
            original = _built() / f"{build.__name__}-{len(built)}"
            with torch.random.fork_rng(devices=[]):
                build(original, *args, **settings)
            built[key] = original
        shutil.copytree(built[key], folder, dirs_exist_ok=True)
        return folder

    return build_or_copy


def parts_folder(folder: Path) -> Path:
    """Returns the path ``<folder>-parts``, where parts of the model in ``folder`` are written before it is built."""
    return folder.with_name(f"{folder.name}-parts")


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file by name, as copies that do not change if it is overwritten."""
    return load(file.read_bytes())


#: texts from whose words the vocabularies of the tiny tokenizers are made
WORDS = ("A red fox sleeps on a wall. The sky is green.",)


@once
def tiny_clip(folder: Path, seed: int = 0, tokenizer: bool = True, width: int = 16) -> Path:
    """Writes a transformers ``CLIPModel`` for 32x32 images.

    Args:
        folder: the folder to write to.
        seed: seed of the random weights.
        tokenizer: whether to write the tokenizer and the processor's settings too.
        width: width of the embeddings.
    """
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    from longalign.mini.tokenizers import write_clip_tokenizer

    write_clip_tokenizer(folder, WORDS)
    tokens = AutoTokenizer.from_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **ends, "vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id},
            vision_config={**tower, "image_size": 32, "patch_size": 16},
            projection_dim=width,
        )
    )
    model.save_pretrained(folder)
    if tokenizer:
        processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": {"shortest_edge": 32}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
            (folder / name).unlink(missing_ok=True)
    return folder


@once
def tiny_hpsv2(folder: Path, name: str = "HPS_v2.1_compressed.pt") -> Path:
    """Writes an HPSv2 for 32x32 images: the file ``name``, open_clip's config and vocabulary. Returns ``folder``."""
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer

    from longalign.mini.tokenizers import write_open_clip_bpe

    bpe = write_open_clip_bpe(folder, WORDS)
    tower = {"layers": 1, "width": 16}
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 16, "head_width": 8},
        "text_cfg": {**tower, "context_length": 77, "vocab_size": SimpleTokenizer(str(bpe)).vocab_size, "heads": 2},
    }
    torch.manual_seed(0)
    torch.save({"state_dict": CLIP(**model_cfg).state_dict()}, folder / name)
    settings = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


@once
def tiny_imagereward(folder: Path) -> Path:
    """Writes an ImageReward for 32x32 images, with the published names of files and weights, and a BERT tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS[0].lower().replace(".", "").split()]
    vocabulary = list(dict.fromkeys(words))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    vision, text, hidden, layers = 16, 8, 24, 2
    med = {
        "hidden_size": text, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 2,
        "max_position_embeddings": 40, "vocab_size": len(vocabulary) + 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "pad_token_id": 0, "encoder_width": text, "add_cross_attention": True,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(med))
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, vision), "visual_encoder.pos_embed": (1, 5, vision),
        "visual_encoder.patch_embed.proj": (vision, 3, 16, 16), "visual_encoder.norm": (vision,),
        "vision_proj": (4, vision), "text_proj": (4, text),
        "text_encoder.embeddings.word_embeddings.weight": (med["vocab_size"], text),
        "text_encoder.embeddings.position_embeddings.weight": (40, text),
        "text_encoder.embeddings.LayerNorm": (text,),
    }  # fmt: skip
    for i in range(layers):
        block, layer = f"visual_encoder.blocks.{i}", f"text_encoder.encoder.layer.{i}"
        shapes |= {
            f"{block}.norm1": (vision,), f"{block}.attn.qkv": (3 * vision, vision),
            f"{block}.attn.proj": (vision, vision), f"{block}.norm2": (vision,),
            f"{block}.mlp.fc1": (hidden, vision), f"{block}.mlp.fc2": (vision, hidden),
            f"{layer}.intermediate.dense": (hidden, text), f"{layer}.output.dense": (text, hidden),
            f"{layer}.output.LayerNorm": (text,),
        }  # fmt: skip
        for attention, source in (("attention", text), ("crossattention", vision)):
            shapes |= {
                f"{layer}.{attention}.self.query": (text, text), f"{layer}.{attention}.self.key": (text, source),
                f"{layer}.{attention}.self.value": (text, source), f"{layer}.{attention}.output.dense": (text, text),
                f"{layer}.{attention}.output.LayerNorm": (text,),
            }  # fmt: skip
    widths = {0: (1024, text), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    torch.manual_seed(0)
    state = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    for name, shape in {
        **{f"blip.{k}": v for k, v in shapes.items()},
        **{f"mlp.layers.{i}": v for i, v in widths.items()},
    }.items():
        if name.rsplit(".", 1)[-1] in ("cls_token", "pos_embed", "weight"):
            state[name] = 0.3 * torch.randn(shape)
        else:  # a layer, with weight and bias; a shape of one number is a layer norm
            state[f"{name}.weight"] = (
                torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.1 * torch.randn(shape)
            )
            state[f"{name}.bias"] = 0.1 * torch.randn(shape[0])
    torch.save(state, folder / "ImageReward.pt")
    return folder


@once
def tiny_clip_text(folder: Path, layout: str = "diffusers", positions: int = 77, width: int = 16) -> Path:
    """Writes a CLIP text model with its tokenizer.

    Args:
        folder: the folder to write to.
        layout: ``"diffusers"`` writes the folders ``text_encoder`` and ``tokenizer``; any other value writes a
            transformers ``CLIPModel``.
        positions: maximum number of tokens of a text, including special tokens.
        width: width of the hidden states.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

    from longalign.mini.tokenizers import write_clip_tokenizer

    diffusers = layout == "diffusers"
    write_clip_tokenizer(folder / "tokenizer" if diffusers else folder, WORDS, positions)
    text = {
        "vocab_size": _clip_vocabulary(folder / "tokenizer" if diffusers else folder), "hidden_size": width,
        "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": positions, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    if diffusers:
        noisy(CLIPTextModel(CLIPTextConfig(**text))).save_pretrained(folder / "text_encoder")
    else:
        vision = {
            "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8,
        }  # fmt: skip
        noisy(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))).save_pretrained(folder)
    return folder


@once
def tiny_t5(folder: Path, width: int = 16) -> Path:
    """Writes a T5 encoder with hidden states of ``width`` and its tokenizer, in transformers layout."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    from longalign.mini.tokenizers import write_t5_tokenizer

    write_t5_tokenizer(folder, WORDS)
    config = T5Config(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2,
        num_heads=2, feed_forward_proj="relu", dropout_rate=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    noisy(T5EncoderModel(config)).save_pretrained(folder)
    return folder


def tiny_longclip_file(path: Path, vocab_size: int, width: int = 64, positions: int = 248) -> Path:
    """Writes the file ``path`` like LongCLIP's ``longclip-L.pt``, a state dict with OpenAI's keys, and returns it.

    Args:
        path: the file to write.
        vocab_size: number of tokens of the vocabulary.
        width: width of the text model's hidden states.
        positions: maximum number of tokens of a text, including special tokens.
    """
    torch.manual_seed(0)
    state = {
        "logit_scale": torch.tensor(4.6),
        "visual.proj": torch.randn(4, 4),
        "text_projection": torch.randn(width, 8),
        "positional_embedding": torch.randn(positions, width),
        "positional_embedding_res": torch.randn(positions, width),
        "token_embedding.weight": torch.randn(vocab_size, width),
        "ln_final.weight": torch.randn(width),
        "ln_final.bias": torch.randn(width),
    }
    for layer in range(2):
        shapes = {
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        for name, shape in shapes.items():
            state[f"transformer.resblocks.{layer}.{name}"] = 0.1 * torch.randn(shape)
    torch.save(state, path)
    return path


def _clip_vocabulary(folder: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder))


def noisy(model: torch.nn.Module):
    """Overwrites a model's weights, except those of norms, with larger random ones, and returns the model.

    Its states then differ clearly between tokens and positions.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model


@once
def tiny_sd(folder: Path, width: int = 16) -> Path:
    """Writes a Stable Diffusion for 64x64 images in diffusers layout, with a VAE that reduces sides to 1/8.

    ``width`` is the width of the CLIP text model's hidden states.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizerFast

    text = tiny_clip_text(parts_folder(folder), width=width)
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    unet = UNet2DConditionModel(
        **blocks, cross_attention_dim=width, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder"),
        tokenizer=CLIPTokenizerFast.from_pretrained(text / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.copytree(text / "tokenizer", folder / "tokenizer")
    pipe.save_pretrained(folder)
    return folder


def tiny_unet(width: int = 8, channels: int = 4, size: int = 4, **settings: Any) -> Any:
    """Returns a random UNet of Stable Diffusion's type, in eval mode.

    Args:
        width: width of the text states for cross-attention.
        channels: number of latent channels.
        size: height and width of the latents, in latent pixels.
        **settings: further arguments of ``UNet2DConditionModel``.
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=channels, out_channels=channels, sample_size=size, block_out_channels=(8,), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=width, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        **settings,
    ).eval()  # fmt: skip


def tiny_backbone(prediction: str = "epsilon", width: int = 8, **vae_settings: Any):
    """Returns a randomly initialized `SDBackbone` for images of 8 by 8 pixels and latents of shape ``(4, 4, 4)``.

    Args:
        prediction: prediction type, ``"epsilon"`` or ``"v_prediction"``.
        width: width of the text states.
        **vae_settings: further arguments of ``AutoencoderKL``.
    """
    from diffusers import AutoencoderKL, DDIMScheduler

    from longalign.backbones.stable_diffusion.sd import SDBackbone

    unet = tiny_unet(width)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **vae_settings,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return SDBackbone(unet, vae, scheduler.alphas_cumprod, prediction)


SD15_NARROW = {
    "block_out_channels": (8, 16, 24, 24), "norm_num_groups": 4, "attention_head_dim": 2, "sample_size": 8,
    "cross_attention_dim": 16,
}  # fmt: skip
"""Arguments of ``UNet2DConditionModel``: Stable Diffusion 1.5's blocks, the default, with few channels."""


@once
def tiny_sd15(folder: Path) -> Path:
    """Writes the model of `tiny_sd`, but with as many UNet blocks and layers as Stable Diffusion 1.5."""
    from diffusers import UNet2DConditionModel

    tiny_sd(folder)
    torch.manual_seed(1)
    UNet2DConditionModel(**SD15_NARROW).save_pretrained(folder / "unet")
    return folder


@once
def tiny_adapter(folder: Path, in_dim: int = 16, int_dim: int = 12, out_dim: int = 16) -> Path:
    """Writes a random adapter of LaVi-Bridge in diffusers format, and returns ``folder``.

    The adapter is a network that maps T5's states of width ``in_dim`` to the width ``out_dim`` of the denoiser's text
    states, with a hidden width of ``int_dim``.
    """
    from longalign.encoders.t5.adapter import TextAdapter

    torch.manual_seed(2)
    TextAdapter(in_dim, int_dim, out_dim).save(folder)
    return folder


@once
def tiny_sdxl(folder: Path) -> Path:
    """Writes a Stable Diffusion XL for 64x64 images in its Hub layout, with CLIP text models of widths 16 and 24."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

    clip = tiny_clip_text(parts_folder(folder))
    first = CLIPTokenizerFast.from_pretrained(clip / "tokenizer")
    # bigG's tokenizer pads with "!", token 0, instead of <eot>
    second = CLIPTokenizerFast.from_pretrained(clip / "tokenizer", pad_token="!")
    torch.manual_seed(3)
    text = CLIPTextConfig(
        vocab_size=len(first), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=12, hidden_act="gelu", bos_token_id=0, eos_token_id=first.eos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, cross_attention_dim=40,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=12 + 6 * 4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=64, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, force_upcast=True,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    shutil.copytree(clip / "tokenizer", folder / "tokenizer")
    StableDiffusionXLPipeline(
        vae, CLIPTextModel.from_pretrained(clip / "text_encoder"), noisy(CLIPTextModelWithProjection(text)), first,
        second, unet, scheduler, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@once
def tiny_sd3(folder: Path, **transformer_settings) -> Path:
    """Writes a Stable Diffusion 3 for 64x64 images in its Hub layout, in float16.

    Its CLIP text models have widths 8 and 12, and T5 has width 32. ``transformer_settings`` are further arguments of
    ``SD3Transformer2DModel``.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        AutoTokenizer,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizerFast,
        T5EncoderModel,
    )

    tiny_clip_text(folder)
    first = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    second = CLIPTokenizerFast.from_pretrained(folder / "tokenizer", pad_token="!")
    t5 = tiny_t5(folder / "t5", width=32)
    torch.manual_seed(4)
    texts = [
        CLIPTextConfig(
            vocab_size=len(first), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=width, hidden_act=act, bos_token_id=0,
            eos_token_id=first.eos_token_id,
        )
        for width, act in ((8, "quick_gelu"), (12, "gelu"))
    ]  # fmt: skip
    settings = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "pos_embed_max_size": 12}
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, caption_projection_dim=16, joint_attention_dim=32,
        pooled_projection_dim=20, **{**settings, **transformer_settings},
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=16, sample_size=64, scaling_factor=1.5305,
        shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    models = [noisy(CLIPTextModelWithProjection(text)) for text in texts]
    StableDiffusion3Pipeline(
        transformer.half(), FlowMatchEulerDiscreteScheduler(shift=3.0), vae.half(), models[0].half(), first,
        models[1].half(), second, T5EncoderModel.from_pretrained(t5).half(), AutoTokenizer.from_pretrained(t5),
    ).save_pretrained(folder)  # fmt: skip
    shutil.rmtree(t5)
    return folder


@once
def tiny_flux(folder: Path, dynamic: bool = True, guidance: bool = True) -> Path:
    """Writes a FLUX.1 for 32x32 images in its Hub layout, with a CLIP of width 16 and a T5 of width 32.

    Args:
        folder: the folder to write to.
        dynamic: whether noise levels depend on the image size, as in FLUX.1-dev and unlike FLUX.1-schnell.
        guidance: whether the transformer has a guidance embedding, as in FLUX.1-dev and unlike FLUX.1-schnell.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizerFast, T5EncoderModel

    clip = tiny_clip_text(parts_folder(folder))
    t5 = tiny_t5(parts_folder(folder) / "t5", width=32)
    torch.manual_seed(5)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    shift = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "shift": 3.0}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shift) if dynamic else None
    text_encoder = CLIPTextModel.from_pretrained(clip / "text_encoder")
    tokenizer = CLIPTokenizerFast.from_pretrained(clip / "tokenizer")
    text_encoder.config.eos_token_id = tokenizer.eos_token_id  # whose position is pooled
    FluxPipeline(
        scheduler or FlowMatchEulerDiscreteScheduler(shift=1.0), vae,
        text_encoder, tokenizer, T5EncoderModel.from_pretrained(t5), AutoTokenizer.from_pretrained(t5), transformer,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@once
def tiny_pixart(folder: Path, sigma: bool = False, size_conditions: bool = False) -> Path:
    """Writes a PixArt for 32x32 images in its Hub layout, with a T5 of width 32.

    Args:
        folder: the folder to write to.
        sigma: whether to write PixArt-Sigma instead of PixArt-alpha.
        size_conditions: whether the transformer has embeddings of image size and aspect ratio, as PixArt-alpha has for
            1024 px.
    """
    import diffusers
    from transformers import AutoTokenizer, T5EncoderModel

    t5 = tiny_t5(parts_folder(folder) / "t5", width=32)
    torch.manual_seed(6)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=24, sample_size=8, caption_channels=32, use_additional_conditions=size_conditions,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    pipeline = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    pipeline(
        AutoTokenizer.from_pretrained(t5), T5EncoderModel.from_pretrained(t5), vae, transformer,
        diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


VLM_WORDS = ("<pad>", "<unk>", "<image>", "<s>", "</s>", "yes", "no", "1", "2", "tie", "is", "are", "there", "a", "red")
"""Vocabulary of `tiny_vlm`; other words are unknown."""


@once
def tiny_vlm(folder: Path, seed: int = 0) -> Path:
    """Writes a LLaVA for 32x32 images with processor and chat template, whose output depends on the image.

    ``seed`` is that of the random weights.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VLM_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=32, patch_size=16),
            text_config=LlamaConfig(**tower, vocab_size=len(VLM_WORDS), max_position_embeddings=4096),
            image_token_index=VLM_WORDS.index("<image>"),
        )
    )
    noisy(model).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_resize=True), tokenizer, patch_size=16,
        num_additional_image_tokens=1, vision_feature_select_strategy="default",
        chat_template="<s>{% for part in messages[0]['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}",
    ).save_pretrained(folder)  # fmt: skip
    return folder


#: special tokens of Qwen2-VL
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@once
def tiny_qwen2_vl(folder: Path) -> Path:
    """Writes a Qwen2-VL in transformers layout, with processor and chat template.

    The processor resizes images to between 56 by 56 and 84 by 84 pixels.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    vocabulary = [*QWEN_TOKENS, "<unk>", "Yes", "No", *VLM_WORDS[5:]]
    ids = {word: i for i, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<unk>",
        additional_special_tokens=list(QWEN_TOKENS[1:]),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={
                "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": len(vocabulary), "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
                "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2,
            },
            vision_config={"embed_dim": 16, "hidden_size": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2},
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        )
    )  # fmt: skip
    noisy(model).save_pretrained(folder)
    size = {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size),
        chat_template="<|im_start|>{% for part in messages[0]['content'] %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}<|im_end|><|im_start|>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


@once
def tiny_hpsv3(folder: Path) -> Path:
    """Writes ``HPSv3.safetensors`` with the published weight names, and the other files of `tiny_qwen2_vl`."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    from longalign.rewards.hpsv3.config import REWARD_TOKEN, WEIGHTS
    from longalign.rewards.hpsv3.weights import make_head

    tiny_qwen2_vl(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer) + 1, mean_resizing=False)
    head = make_head(16)
    with torch.no_grad():  # far from the kinks of its ReLUs, which rounding would cross
        head[0].bias.copy_(torch.tensor([3.0, -3.0]).repeat(512))
        head[3].bias.fill_(4.0)
    state = {f"rm_head.{key}": value for key, value in head.state_dict().items()}
    for key, value in model.state_dict().items():  # names before transformers 4.52
        state[key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")] = value.clone()
    assert tokenizer.convert_tokens_to_ids(REWARD_TOKEN) in (None, tokenizer.unk_token_id)
    save_file(state, folder / WEIGHTS)
    (folder / "model.safetensors").unlink()
    return folder


def tower_reward(towers: Any, preprocessor: Any, **settings: Any) -> Any:
    """Returns a `TowerReward`, by default without segmenter, micro-batches and truncation.

    Args:
        towers: image and text tower; see `longalign.rewards.Towers`.
        preprocessor: preprocesses the images; see `longalign.functional.ImagePreprocessor`.
        **settings: further arguments of `TowerReward`, e.g. ``segmenter``.
    """
    from longalign.rewards import TowerReward

    return TowerReward(towers, preprocessor, **{"segmenter": None, "micro_batch": None, "truncate": False, **settings})


def edited(inner: Any, edit: str = "direction", direction: Any = "batch", gather: Any = None, **settings: Any) -> Any:
    """Returns an `EditedReward`, whose text embedding is edited.

    Args:
        inner: the reward whose embeddings are used.
        edit: name of the edit.
        direction: source of the common direction of the text embeddings; ``"batch"`` is the mean of a batch.
        gather: function that gathers tensors of all processes, see `Runtime`; None for one process.
        **settings: keys of the edit's config.
    """
    from longalign.registry import edits
    from longalign.rewards import EditedReward
    from longalign.runtime import Runtime

    built = edits.build({"name": edit, **settings}, Runtime())
    return EditedReward(inner, edit=built, direction=direction, gather=gather or Runtime.gather)


def steps(name: str, **settings: Any) -> Any:
    """Builds the part ``name`` of kind ``gradient_steps``, for one process; ``settings`` are keys of this part."""
    from longalign.registry import gradient_steps
    from longalign.runtime import Runtime

    return gradient_steps.build({"name": name, **settings}, Runtime())
