"""The `mini` CLIP, in two stages. Run: ``python recipes/mini/clip.py text [steps]``, then ``... image [steps]``.

``text``: trains the text model so that a linear head predicts the facts of one to four sentences from its embedding.
``image``: freezes the text model and trains the image model (as in LiT, Zhai et al., 2022) with a contrastive loss, the
same linear head, a head on the patches, and a head for light and vignette, which texts do not describe but a CLIP model
encodes. A text matches every image of the batch in which all its facts hold, often several. The heads are discarded.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from common import RUNS, WEIGHTS, load_or_compute, publish_text_encoder, render_images, render_uint8, train
from facts import (
    IGNORED,
    SIZES,
    FactHead,
    TokenHead,
    all_true,
    contrast,
    label_tensor,
    labels_of_caption,
    labels_of_scene,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from longalign.functional.images import CLIP_MEAN, CLIP_STD
from longalign.mini.captions import Caption, describe
from longalign.mini.scenes import Scene, sample_scene
from longalign.mini.tokenizers import write_clip_tokenizer

TEXT_BATCH, IMAGE_BATCH = 96, 64
POOL, TEXTS = 16000, 4


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512,
        "vocab_size": len(tokenizer), "max_position_embeddings": 77, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "projection_dim": 256,
    }  # fmt: skip
    # an image has facts at all nine places: a linear head needs more dimensions than for the few facts of a text
    vision = {
        "num_hidden_layers": 2, "hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 768,
        "image_size": 64, "patch_size": 8, "projection_dim": 256,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256))


def normalize(images: Tensor) -> Tensor:
    return (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def sample_sentences(caption: Caption, rng: np.random.Generator) -> Caption:
    """One to four consecutive sentences."""
    count = int(rng.integers(1, min(4, len(caption.sentences)) + 1))
    start = int(rng.integers(len(caption.sentences) - count + 1))
    return Caption(caption.sentences[start : start + count])


class PatchHead(nn.Module):
    """Linear classifiers of the attributes of a place on the mean of its patches."""

    def __init__(self, dim: int):
        super().__init__()
        self.sizes = SIZES[1:5]
        self.linear = nn.Linear(dim, sum(self.sizes))

    def forward(self, patches: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of patches ``(b, 64, d)`` and the labels of scenes ``(b, slots)``."""
        grid = patches.transpose(1, 2).unflatten(2, (8, 8))
        places = F.adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2)
        groups = self.linear(places).split(self.sizes, -1)
        labels = labels[:, 1:].unflatten(1, (9, 4))
        losses = [
            F.cross_entropy(g.flatten(0, 1), labels[..., i].flatten(), ignore_index=IGNORED)
            for i, g in enumerate(groups)
        ]
        return torch.stack(losses).mean()


def sample_text(scene: Scene, rng: np.random.Generator) -> Caption:
    """One to four sentences of a caption of the scene, at most 40 words in total."""
    while True:
        max_words = 240 if rng.random() < 0.7 else 45
        sentences = sample_sentences(describe(scene, rng, words=int(rng.integers(8, max_words + 1))), rng)
        if sentences.num_words <= 40:
            return sentences


def sample_texts(rng: np.random.Generator, size: int) -> tuple[list[Scene], list[Caption]]:
    """Scenes with a few sentences of a caption each."""
    scenes = [sample_scene(rng, (1, 9)) for _ in range(size)]
    return scenes, [sample_text(scene, rng) for scene in scenes]


def train_text(clip: CLIPModel, head: FactHead, tokenizer: CLIPTokenizer, steps: int) -> None:
    token_head = TokenHead(128)

    def predict(texts: list[Caption]) -> tuple[Tensor, Tensor]:
        tokens = tokenizer([c.text for c in texts], padding=True, truncation=True, return_tensors="pt")
        labels = label_tensor([labels_of_caption(c) for c in texts])
        out = clip.text_model(**tokens)
        pooled = head(clip.text_projection(out.pooler_output), labels)
        by_token = token_head(out.last_hidden_state, tokens.attention_mask, labels)
        return pooled[0] + by_token[0], torch.stack([pooled[1], by_token[1]])

    def compute_loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        loss, accuracies = predict(sample_texts(rng, TEXT_BATCH)[1])
        return {"loss": loss, "text_read": accuracies[0], "tokens_read": accuracies[1]}

    held_out = sample_texts(np.random.default_rng(7), 256)[1]

    def evaluate() -> dict[str, float]:
        accuracies = predict(held_out)[1]
        return {"held_text_read": accuracies[0].item(), "held_tokens_read": accuracies[1].item()}

    parts = nn.ModuleList([clip.text_model, clip.text_projection, head, token_head])
    train("clip-text", parts, compute_loss, steps=steps, lr=1.5e-3, warmup=50,
        outer=("embedding", "2.linear", "queries", "ground", "place"),
        evaluate=evaluate, evaluate_every=200)  # fmt: skip
    encoder = CLIPTextModel(clip.config.text_config)
    getattr(encoder, "text_model", encoder).load_state_dict(clip.text_model.state_dict())
    encoder.half().save_pretrained(WEIGHTS / "sd" / "text_encoder")
    publish_text_encoder()
    write_clip_tokenizer(WEIGHTS / "sd" / "tokenizer")


def looks(scenes: list[Scene]) -> Tensor:
    """Tint and vignette ``(n, 2)``, both from -1 to 1."""
    return torch.tensor([[s.tint, 2 * s.vignette - 1] for s in scenes])


def pool_scenes() -> list[Scene]:
    """Training scenes of the image model."""
    rng = np.random.default_rng(13)
    return [sample_scene(rng, (1, 9)) for _ in range(POOL)]


def train_image(clip: CLIPModel, head: FactHead, tokenizer: CLIPTokenizer, steps: int) -> None:
    patch_head, look_head = PatchHead(clip.config.vision_config.hidden_size), nn.Linear(256, 2)
    for part in (clip.text_model, clip.text_projection, head):
        part.requires_grad_(False)

    @torch.no_grad()
    def embed_texts(texts: list[Caption]) -> Tensor:
        tokens = tokenizer([c.text for c in texts], padding=True, truncation=True, return_tensors="pt")
        return F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)

    def compute_pool() -> dict[str, Tensor]:
        scenes, rng = pool_scenes(), np.random.default_rng(14)
        texts = [sample_text(scene, rng) for scene in scenes for _ in range(TEXTS)]
        text_labels = label_tensor([labels_of_caption(c) for c in texts]).short()
        embedded = torch.cat([embed_texts(texts[i : i + 128]) for i in range(0, len(texts), 128)])
        return {
            "pixels": render_uint8(scenes), "looks": looks(scenes),
            "image_labels": label_tensor([labels_of_scene(s) for s in scenes]),
            "text_labels": text_labels.view(POOL, TEXTS, -1), "embedded": embedded.view(POOL, TEXTS, -1),
        }  # fmt: skip

    pool = load_or_compute("clip-data", compute_pool)

    def compute_loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = torch.from_numpy(rng.choice(POOL, IMAGE_BATCH, replace=False))
        text_index = torch.from_numpy(rng.integers(TEXTS, size=IMAGE_BATCH))
        image_labels, text_labels = pool["image_labels"][index], pool["text_labels"][index, text_index].long()
        out = clip.vision_model(normalize(pool["pixels"][index].float() / 255))
        image = clip.visual_projection(out.pooler_output)
        text = pool["embedded"][index, text_index]
        scores = clip.logit_scale.exp().clamp(max=100) * text @ F.normalize(image, dim=-1).T
        nce = contrast(scores, all_true(text_labels, image_labels).float())
        fact_loss, accuracy = head(image, image_labels)
        look = F.mse_loss(look_head(image), pool["looks"][index])
        loss = nce + 2 * fact_loss + patch_head(out.last_hidden_state[:, 1:], image_labels) + look
        return {"loss": loss, "nce": nce, "image_read": accuracy, "look_error": look}

    held_scenes, held_texts = sample_texts(np.random.default_rng(7), 256)
    image_labels = label_tensor([labels_of_scene(s) for s in held_scenes])
    match = all_true(label_tensor([labels_of_caption(c) for c in held_texts]), image_labels)

    def evaluate() -> dict[str, float]:
        image = clip.get_image_features(normalize(render_images(held_scenes))).pooler_output
        best = (embed_texts(held_texts) @ F.normalize(image, dim=-1).T).argmax(-1)
        at_1 = match[torch.arange(len(best)), best].float().mean().item()
        chance = match.float().mean().item()
        return {"true_at_1_of_256": at_1, "chance": chance, "held_image_read": head(image, image_labels)[1].item()}

    parts = nn.ModuleList([clip, head, patch_head, look_head])
    train("clip-image", parts, compute_loss, steps=steps, lr=1.5e-3, warmup=50,
        outer=("embedding", "logit_scale", "2.linear", "3.weight"), evaluate=evaluate, evaluate_every=500)  # fmt: skip
    clip.half().save_pretrained(WEIGHTS / "clip")
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(WEIGHTS / "clip")


def main(stage: str, steps: int | None) -> None:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(write_clip_tokenizer(WEIGHTS / "clip"))
    clip, head = build(tokenizer), FactHead(256)
    if stage == "text":
        train_text(clip, head, tokenizer, steps or 1000)
        return
    text = torch.load(RUNS / "clip-text.pt", weights_only=True)["modules"]
    text = {k: v for k, v in text.items() if not k.startswith("3.")}
    nn.ModuleList([clip.text_model, clip.text_projection, head]).load_state_dict(text)
    train_image(clip, head, tokenizer, steps or 1000)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("text", "image"):
        raise SystemExit(f"usage: clip.py STAGE [STEPS], with STAGE text or image; got {sys.argv[1:]}")
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
