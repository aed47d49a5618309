"""The stages of a run at their published sizes on meta tensors, which have a shape and no values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from _live import LikeCuda, Live
from torch import Tensor, nn
from torch.utils._pytree import tree_map

SD, SDXL = "Stable Diffusion 1.5", "Stable Diffusion XL"
TEXTS = {SD: ("CLIP-L text", "T5-large encoder"), SDXL: ("CLIP-L text", "OpenCLIP-bigG text")}
DENSCORE = "Denscore (CLIP-H)"


@dataclass(frozen=True)
class Setting:
    """One table row: a stage of a model, and the run settings that affect its memory.

    Attributes:
        model: `SD` or `SDXL`.
        stage: ``texts``, ``images``, ``align``, ``reward``, ``plain`` or ``generate``. ``plain`` is a reward step with
            autograd through the sampling.
        batch: number of prompts or images.
        unet: ``backbone.dtype``; ``loop.precision`` is bf16 throughout.
        lora: train a LoRA instead of all weights of the UNet.
        checkpointing: ``loop.gradient_checkpointing``.
        single: ``denoise_batch: 1``, ``decode_batch: 1`` and ``micro_batch: 1`` of the reward.
    """

    model: str
    stage: str
    batch: int = 1
    unet: str = "bfloat16"
    lora: bool = True
    checkpointing: bool = False
    single: bool = False


#: modules in memory, trainable parameters, and the function to run; it returns the bytes of a call's graph (``plain``)
Stage = tuple[list[nn.Module], list[nn.Parameter], Callable[[Live], int]]


def stage(setting: Setting, cuda: LikeCuda) -> Stage:
    """Builds the stage of a row on meta tensors."""
    kinds = {"texts": encode_texts, "images": encode_images, "generate": generate}
    return kinds.get(setting.stage, train)(setting, cuda)


def network(model: str, name: str, dtype: torch.dtype = torch.bfloat16, device: str = "meta", toy: bool = False) -> Any:
    """A network of a model, or the reward, with random weights, at its published size or, if ``toy``, a tiny one."""
    import diffusers
    import transformers

    from longalign.encoders.t5.adapter import TextAdapter

    def clip(width: int, layers: int, heads: int, **extra: Any) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {**sizes, "num_attention_heads": heads, **extra}

    unet: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    if model == SDXL:
        unet = {
            "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }  # fmt: skip
    vae: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    if toy:
        small = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
        depth = {"transformer_layers_per_block": (1, 2)} if model == SDXL else {}
        unet |= {**small, "sample_size": 8, "attention_head_dim": 2, **depth} | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        vae |= {**small, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    t5 = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "is_encoder_decoder": False}
    towers = {"text_config": clip(1024, 24, 16), "vision_config": clip(1280, 32, 16, patch_size=14)}
    if toy:
        towers = {"text_config": clip(64, 2, 2), "vision_config": clip(64, 2, 2, patch_size=14, image_size=224)}
    small_clip = clip(768, 2 if toy else 12, 12)
    big = clip(1280, 2 if toy else 32, 20, projection_dim=1280)
    makers: dict[str, Callable[[], nn.Module]] = {
        "UNet": lambda: diffusers.UNet2DConditionModel(**unet),
        "VAE": lambda: diffusers.AutoencoderKL(**vae),
        "CLIP-L text": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**small_clip)),
        "OpenCLIP-bigG text": lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**big)),
        "T5-large encoder": lambda: transformers.T5EncoderModel(transformers.T5Config(**t5, use_cache=False)),
        "adapter": lambda: TextAdapter(1024, 896, 768),
        DENSCORE: lambda: transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=1024)),
    }
    with torch.device(device):
        return nn.Module.to(makers[name](), dtype).requires_grad_(False).eval()


def backbone(setting: Setting) -> Any:
    """UNet and VAE; the VAE has the dtype of ``loop.precision``."""
    from longalign.backbones.stable_diffusion.sd import SDBackbone
    from longalign.backbones.stable_diffusion.sdxl import SDXLBackbone

    kind = SDXLBackbone if setting.model == SDXL else SDBackbone
    unet = network(setting.model, "UNet", getattr(torch, setting.unet))
    return kind(unet, network(setting.model, "VAE"), torch.linspace(0.999, 0.005, 1000), "epsilon")


def encoder(setting: Setting) -> Any:
    """An encoder that reads a cache: states of the text models' sizes, and the adapter on T5's states."""
    from longalign.encoders.base import Conditioning, Encoder
    from longalign.encoders.concat import join

    class Cached(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = None if setting.model == SDXL else network(setting.model, "adapter", torch.float32)
            self.requires_grad_(True)

        def encode(self, prompts: Sequence[Any]) -> Conditioning:
            states, second = (
                torch.empty(len(prompts), 240, width, dtype=torch.bfloat16, device="meta")
                for width in ((2048, 1280) if setting.model == SDXL else (768, 1024))
            )
            if self.adapter is None:
                return Conditioning(states, pooled=second[:, 0])
            return join([Conditioning(states), self.adapter.adapt(Conditioning(second))])

    return Cached()


def reward(setting: Setting) -> Any:
    """Denscore, with constant text embeddings."""
    from longalign.functional.images import ImagePreprocessor
    from longalign.rewards.base import Reward, Scores
    from longalign.rewards.clip.towers import ClipTowers
    from longalign.rewards.towers import TowerReward

    class Denscore(Reward):
        def __init__(self) -> None:
            super().__init__()
            # texts are constant here: of the tokenizer, only what the constructor reads
            tokenizer = SimpleNamespace(is_fast=True, eos_token_id=0, all_special_ids=[], all_special_tokens=[])
            towers = ClipTowers(network(setting.model, DENSCORE), cast(Any, tokenizer))
            micro_batch = 1 if setting.single else None
            preprocessor = ImagePreprocessor((224, 224))
            self.inner = TowerReward(towers, preprocessor, segmenter=None, micro_batch=micro_batch, truncate=False)

        def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
            features = self.inner.image_features(images)
            return Scores((features * torch.empty_like(features)).sum(-1))

    return Denscore()


def encode_texts(setting: Setting, _: LikeCuda) -> Stage:
    """Prompts of four segments of 60 tokens through the frozen text models."""
    large = setting.model == SDXL
    models = [network(setting.model, name) for name in TEXTS[setting.model]]
    shapes = [(4 * setting.batch, 62), (4 * setting.batch, 62) if large else (setting.batch, 240)]

    @torch.no_grad()
    def run(live: Live) -> int:
        ids = [torch.zeros(shape, dtype=torch.long, device="meta") for shape in shapes]
        conditioning = [model(input_ids=i, output_hidden_states=large) for model, i in zip(models, ids, strict=True)]
        return 0 * len(conditioning)

    return models, [], run


def encode_images(setting: Setting, _: LikeCuda) -> Stage:
    """Images through the VAE as in ``longalign cache``; the UNet is in memory."""
    model = backbone(setting)
    shape = (setting.batch, 3, model.resolution, model.resolution)
    return [model], [], lambda live: 0 * len(model.posterior(torch.empty(shape, device="meta")))


def generate(setting: Setting, _: LikeCuda) -> Stage:
    """Sampling with guidance; the text models are in memory."""
    from longalign.inference.sampling import sample

    model, texts = backbone(setting), encoder(setting)
    prompts, settings = ["a prompt"] * setting.batch, {"num_steps": 1, "solver": "ddim"}
    modules = [model, texts, *(network(setting.model, name) for name in TEXTS[setting.model])]
    return modules, [], lambda live: 0 * len(sample(model, texts, prompts, seeds=range(setting.batch), **settings))


def train(setting: Setting, cuda: LikeCuda) -> Stage:
    """A training step on cached prompts and latents."""
    from longalign.backbones.config import LoraConfig
    from longalign.runtime import Runtime
    from longalign.trainers.align.config import AlignConfig
    from longalign.trainers.align.trainer import AlignTrainer
    from longalign.trainers.diffusion import guided_prediction
    from longalign.trainers.reward.config import RewardConfig
    from longalign.trainers.reward.trainer import RewardTrainer

    def prepared(module: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a call as accelerate wraps trainable modules."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with cuda.autocast(torch.bfloat16):
                out = module(*args, **kwargs)
            return tree_map(lambda v: v.float() if isinstance(v, Tensor) else v, out)

        return call

    model, texts, prompts = backbone(setting), encoder(setting), ["a prompt"] * setting.batch
    lora = LoraConfig(dropout_placement="up") if setting.lora else None
    chunk = 1 if setting.single else None
    if setting.stage == "align":
        trainer: Any = AlignTrainer.from_config(AlignConfig(lora=lora), Runtime(), backbone=model, encoder=texts)
    else:
        gradient_steps: Any = {"name": "grouped-random", "groups": 1}
        chunks = {"denoise_batch": chunk, "decode_batch": chunk}
        config = RewardConfig(lora=lora, num_steps=1, gradient_steps=gradient_steps, **chunks)
        parts: dict[str, Any] = {"backbone": model, "encoder": texts, "rewards": [reward(setting)]}
        trainer = RewardTrainer.from_config(config, Runtime(), **parts)
    if setting.checkpointing:
        trainer.enable_gradient_checkpointing()
    model.wrap_denoiser(prepared(model.denoiser), partial(cuda.autocast, torch.bfloat16))
    trainer.wrap_encoder(prepared(texts.encode))
    trainer.train()

    def step(live: Live) -> int:
        posterior = torch.empty(setting.batch, 8, *model.latent_shape()[1:], device="meta")
        trainer.step({"prompt": prompts, "posterior": posterior}, Tensor.backward)
        return 0

    def plain(live: Live) -> int:
        conditioning, noise = trainer.encode_with_uncond(prompts), trainer.noise(setting.batch)
        before, timesteps = live.now, torch.zeros(setting.batch, dtype=torch.long, device="meta")
        rows = torch.arange(setting.batch, device="meta")
        latents = noise + guided_prediction(model.predict, noise, timesteps, conditioning, rows, trainer.guidance)
        graph = live.now - before
        trainer.reward_loss(trainer.score(latents, prompts))["reward_loss"].backward()
        return graph

    return [trainer], trainer.trainable(), plain if setting.stage == "plain" else step
