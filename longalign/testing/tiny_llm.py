"""Builders of tiny random checkpoints with a language model as text encoder, like those of `longalign.testing.tiny`."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportOptionalMemberAccess=false

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from longalign.testing.tiny import noisy, once, parts_folder

__all__ = ["tiny_flux2", "tiny_llm", "tiny_qwen_image", "tiny_sana", "tiny_z_image"]

WIDTH = 16
"""Width of the language models' hidden states."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Chat template in the format ChatML, with Qwen3's variable ``enable_thinking``."""
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set tag = 'SYSTEM_PROMPT' if message['role'] == 'system' else 'INST' %}[{{ tag }}]"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}[/{{ tag }}]{% endfor %}"
)
"""Chat template in the format of Mistral."""
#: vocabulary of the tokenizer of `tiny_llm` with kind "gemma2"
GEMMA_WORDS = ("paint", "this:", "a", "red", "fox.", "fox", "the", "sky", "is", "green.", "wall.")


@once
def tiny_llm(folder: Path, kind: Literal["qwen3", "qwen2.5-vl", "gemma2", "mistral3"] = "qwen3") -> Path:
    """Writes a language model of width 16 and its tokenizer in diffusers layout: ``text_encoder/``, ``tokenizer/``.

    The tokens of ``"qwen3"`` and ``"qwen2.5-vl"`` are bytes, and their chat template is ChatML. The tokens of
    ``"gemma2"`` are the words in `GEMMA_WORDS`, each with or without a space before it, and texts start with ``<bos>``.
    The tokens of ``"mistral3"`` are bytes, padded on the left; ``tokenizer/`` also contains the image processor.
    """
    import transformers

    tokenizer = {"gemma2": _word_tokenizer, "mistral3": _mistral_tokenizer}.get(kind, _byte_tokenizer)()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    torch.manual_seed(7)
    if kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))
    elif kind == "gemma2":
        model = transformers.Gemma2Model(transformers.Gemma2Config(**settings, query_pre_attn_scalar=8))
    elif kind == "mistral3":
        image_token = tokenizer.convert_tokens_to_ids("[IMG]")
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.Mistral3Config(
            text_config={"model_type": "mistral", **settings},
            vision_config={"model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 8, **vision},
            image_token_index=image_token,
        )
        model = transformers.Mistral3ForConditionalGeneration(config)
        size = {"longest_edge": 56}
        tokenizer = transformers.PixtralProcessor(
            transformers.PixtralImageProcessor(size=size, patch_size={"height": 14, "width": 14}), tokenizer,
            patch_size=14, spatial_merge_size=2, chat_template=INSTRUCT,
        )  # fmt: skip
    else:
        del settings["head_dim"]
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        vision = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": WIDTH, "depth": 1, "num_heads": 2}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**settings, "rope_parameters": rope, "rope_scaling": rope}, vision_config=vision
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    noisy(model).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@once
def tiny_z_image(folder: Path, dynamic: bool = False) -> Path:
    """Writes a Z-Image for 32x32 images in its Hub layout, with a Qwen3 of width 16 and 4 latent channels.

    ``dynamic`` makes noise levels depend on the image size.
    """
    import diffusers

    text_encoder, tokenizer = _text_parts(folder, "qwen3", "Qwen3ForCausalLM")
    torch.manual_seed(8)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    diffusers.ZImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


@once
def tiny_qwen_image(folder: Path) -> Path:
    """Writes a Qwen-Image for 32x32 images in its Hub layout, with a Qwen2.5-VL of width 16 and 4 latent channels."""
    import diffusers

    text_encoder, tokenizer = _text_parts(folder, "qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration")
    torch.manual_seed(9)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.7, 0.6, 0.8],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02,
    )  # fmt: skip
    diffusers.QwenImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


@once
def tiny_sana(folder: Path) -> Path:
    """Writes a Sana for 32x32 images in its Hub layout, with a Gemma 2 of width 16 and 4 latent channels."""
    import diffusers

    text_encoder, tokenizer = _text_parts(folder, "gemma2", "Gemma2Model")
    torch.manual_seed(10)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=8,
    )  # fmt: skip
    blocks = {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8, 8),
            "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), (5,)),
        }.items()
    }  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, upsample_block_type="interpolate", **blocks
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    diffusers.SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    return folder


@once
def tiny_flux2(folder: Path, mistral: bool = False) -> Path:
    """FLUX.2 in its Hub layout: a language model 16 wide, VAE of factor 4 with 4 channels; for 32 px.

    FLUX.2-klein with Qwen3, or FLUX.2-dev with Mistral 3 and a guidance embedding if ``mistral``. The transformer takes
    the states of three layers.
    """
    import diffusers

    if mistral:
        parts = _text_parts(folder, "mistral3", "Mistral3ForConditionalGeneration", "PixtralProcessor")
    else:
        parts = _text_parts(folder, "qwen3", "Qwen3ForCausalLM")
    torch.manual_seed(11)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=mistral,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip
    pipeline = diffusers.Flux2Pipeline if mistral else diffusers.Flux2KleinPipeline
    pipeline(scheduler, vae, *parts, transformer).save_pretrained(folder)
    return folder


def _text_parts(folder: Path, kind: str, model_class: str, tokenizer_class: str = "AutoTokenizer") -> tuple[Any, Any]:
    """Returns the language model ``kind`` of `tiny_llm`, loaded as ``transformers.<model_class>``, and its tokenizer.

    The pipeline with both will be saved to ``folder``.
    """
    import transformers

    parts = tiny_llm(parts_folder(folder), kind)
    model = getattr(transformers, model_class).from_pretrained(parts / "text_encoder")
    return model, getattr(transformers, tokenizer_class).from_pretrained(parts / "tokenizer")


def _byte_tokenizer() -> Any:
    return _bytes_with(
        pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


def _mistral_tokenizer() -> Any:
    tags = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    return _bytes_with(
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", additional_special_tokens=tags, padding_side="left"
    )


def _bytes_with(**settings: Any) -> Any:
    """Returns a tokenizer with a token for each byte, and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(vocabulary, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **settings)


def _word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    words = [*special, "▁", *(space + word for word in GEMMA_WORDS for space in ("▁", ""))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    tokens.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        padding_side="right",
    )  # fmt: skip
