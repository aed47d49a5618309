"""The small CLIP: contrastive over scenes and one to a few sentences. Run: ``python recipes/mini/clip.py``.

A text is matched with every image of the batch of which all its facts are true (in a world this small many are). A
linear head that reads the facts from either embedding is trained beside it and thrown away.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from common import WEIGHTS, fit, images_of, scene_and_caption
from facts import FactHead, all_true, labels_of_caption, labels_of_scene, tensor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from longalign.mini.captions import Caption
from longalign.mini.tokenizers import write_clip_tokenizer

STEPS, BATCH = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, 64
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    shared = {"num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
    text = {
        **shared, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "projection_dim": 256,
    }  # fmt: skip
    vision = {**shared, "image_size": 64, "patch_size": 8, "projection_dim": 256}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256))


def normalise(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def some_sentences(caption: Caption, rng: np.random.Generator) -> Caption:
    """One to four neighbouring sentences."""
    number = int(rng.integers(1, min(4, len(caption.sentences)) + 1))
    start = int(rng.integers(len(caption.sentences) - number + 1))
    return Caption(caption.sentences[start : start + number])


def main() -> None:
    torch.manual_seed(0)
    folder = WEIGHTS / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(write_clip_tokenizer(folder))
    clip, head = build(tokenizer), FactHead(256)

    def batch(rng: np.random.Generator, size: int) -> tuple[Tensor, list[str], Tensor, Tensor]:
        scenes, texts = [], []
        while len(texts) < size:
            scene, caption = scene_and_caption(rng, (1, 9), (8, 240) if rng.random() < 0.7 else (8, 45))
            part = some_sentences(caption, rng)
            if part.num_words <= 40:
                scenes.append(scene)
                texts.append(part)
        told, shown = tensor([labels_of_caption(c) for c in texts]), tensor([labels_of_scene(s) for s in scenes])
        return normalise(images_of(scenes)), [c.text for c in texts], told, shown

    def embed(images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return clip.get_image_features(images).pooler_output, clip.get_text_features(**tokens).pooler_output

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        images, texts, told, shown = batch(rng, BATCH)
        image, text = embed(images, texts)
        scores = clip.logit_scale.exp().clamp(max=100) * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
        match = all_true(told, shown).float()
        nce = F.cross_entropy(scores, match / match.sum(1, keepdim=True))
        nce = nce / 2 + F.cross_entropy(scores.T, match.T / match.T.sum(1, keepdim=True)) / 2
        image_loss, image_read = head(image, shown)
        text_loss, text_read = head(text, told)
        loss = nce + image_loss + text_loss
        return {"loss": loss, "nce": nce, "image_read": image_read, "text_read": text_read}

    held_out = batch(np.random.default_rng(7), 256)

    def evaluate() -> dict[str, float]:
        images, texts, told, shown = held_out
        image, text = (F.normalize(f, dim=-1) for f in embed(images, texts))
        best = (text @ image.T).argmax(-1)
        match = all_true(told, shown)
        return {
            "true_at_1_of_256": match[torch.arange(len(best)), best].float().mean().item(),
            "chance": match.float().mean().item(),
            "held_image_read": head(embed(images, texts)[0], shown)[1].item(),
            "held_text_read": head(embed(images, texts)[1], told)[1].item(),
        }

    fit(
        "clip",
        nn.ModuleList([clip, head]),
        loss_of,
        steps=STEPS,
        lr=1.5e-3,
        warmup=50,
        outer=("embedding", "logit_scale", "head", "1.linear"),
        evaluate=evaluate,
        evaluate_every=200,
    )
    clip.half().save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    for part, name in ((clip.text_model, "text_encoder"),):
        from transformers import CLIPTextModel

        encoder = CLIPTextModel(clip.config.text_config)
        getattr(encoder, "text_model", encoder).load_state_dict(part.state_dict())
        encoder.half().save_pretrained(WEIGHTS / "sd" / name)
    write_clip_tokenizer(WEIGHTS / "sd" / "tokenizer")


if __name__ == "__main__":
    main()
