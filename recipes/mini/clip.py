"""The small CLIP, in two stages. Run: ``python recipes/mini/clip.py text [steps]``, then ``... image [steps]``.

``text``: the text model learns to hold the facts of one to four sentences, read from its embedding by a linear head.
``image``: the text model is frozen, the image model is trained beside it (as in LiT, Zhai et al., 2022) by contrast, by
the same linear head, and by a head on its patches. A text is matched with every image of the batch of which all its
facts are true; in a world this small many are. The heads are thrown away.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from common import RUNS, WEIGHTS, fit, images_of, scene_and_caption
from facts import SIZES, UNTOLD, FactHead, TokenHead, all_true, contrast, labels_of_caption, labels_of_scene, tensor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from longalign.mini.captions import Caption
from longalign.mini.scenes import Scene
from longalign.mini.tokenizers import write_clip_tokenizer

TEXT_BATCH, IMAGE_BATCH = 96, 64
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


class PatchHead(nn.Module):
    """Linear classifiers of a place's attributes on the mean of its patches."""

    def __init__(self, dim: int):
        super().__init__()
        self.sizes = SIZES[1:5]
        self.linear = nn.Linear(dim, sum(self.sizes))

    def forward(self, patches: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy for patches ``(b, 64, d)`` and the labels of whole scenes ``(b, slots)``."""
        grid = patches.transpose(1, 2).unflatten(2, (8, 8))
        places = F.adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2)
        groups = self.linear(places).split(self.sizes, -1)
        labels = labels[:, 1:].unflatten(1, (9, 4))
        losses = [
            F.cross_entropy(g.flatten(0, 1), labels[..., i].flatten(), ignore_index=UNTOLD)
            for i, g in enumerate(groups)
        ]
        return torch.stack(losses).mean()


def sample_texts(rng: np.random.Generator, size: int) -> tuple[list[Scene], list[Caption]]:
    """Scenes with one to four sentences of a caption each, at most 40 words."""
    scenes, texts = [], []
    while len(texts) < size:
        scene, caption = scene_and_caption(rng, (1, 9), (8, 240) if rng.random() < 0.7 else (8, 45))
        part = some_sentences(caption, rng)
        if part.num_words <= 40:
            scenes.append(scene)
            texts.append(part)
    return scenes, texts


def train_text(clip: CLIPModel, head: FactHead, tokenizer: CLIPTokenizer, steps: int) -> None:
    token_head = TokenHead(128)

    def read(texts: list[Caption]) -> tuple[Tensor, Tensor]:
        tokens = tokenizer([c.text for c in texts], padding=True, truncation=True, return_tensors="pt")
        labels = tensor([labels_of_caption(c) for c in texts])
        out = clip.text_model(**tokens)
        pooled = head(clip.text_projection(out.pooler_output), labels)
        by_token = token_head(out.last_hidden_state, tokens.attention_mask, labels)
        return pooled[0] + by_token[0], torch.stack([pooled[1], by_token[1]])

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        loss, shares = read(sample_texts(rng, TEXT_BATCH)[1])
        return {"loss": loss, "text_read": shares[0], "tokens_read": shares[1]}

    held_out = sample_texts(np.random.default_rng(7), 256)[1]

    def evaluate() -> dict[str, float]:
        shares = read(held_out)[1]
        return {"held_text_read": shares[0].item(), "held_tokens_read": shares[1].item()}

    parts = nn.ModuleList([clip.text_model, clip.text_projection, head, token_head])
    fit("clip-text", parts, loss_of, steps=steps, lr=1.5e-3, warmup=50,
        outer=("embedding", "2.linear", "queries", "ground", "place"),
        evaluate=evaluate, evaluate_every=200)  # fmt: skip
    encoder = CLIPTextModel(clip.config.text_config)
    getattr(encoder, "text_model", encoder).load_state_dict(clip.text_model.state_dict())
    encoder.half().save_pretrained(WEIGHTS / "sd" / "text_encoder")
    write_clip_tokenizer(WEIGHTS / "sd" / "tokenizer")


def train_image(clip: CLIPModel, head: FactHead, tokenizer: CLIPTokenizer, steps: int) -> None:
    patch_head = PatchHead(128)
    for part in (clip.text_model, clip.text_projection, head):
        part.requires_grad_(False)

    @torch.no_grad()
    def embed_texts(texts: list[Caption]) -> Tensor:
        tokens = tokenizer([c.text for c in texts], padding=True, truncation=True, return_tensors="pt")
        return F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        scenes, texts = sample_texts(rng, IMAGE_BATCH)
        told, shown = tensor([labels_of_caption(c) for c in texts]), tensor([labels_of_scene(s) for s in scenes])
        out = clip.vision_model(normalise(images_of(scenes)))
        image = clip.visual_projection(out.pooler_output)
        scores = clip.logit_scale.exp().clamp(max=100) * embed_texts(texts) @ F.normalize(image, dim=-1).T
        nce = contrast(scores, all_true(told, shown).float())
        fact_loss, read = head(image, shown)
        loss = nce + fact_loss + patch_head(out.last_hidden_state[:, 1:], shown)
        return {"loss": loss, "nce": nce, "image_read": read}

    held_scenes, held_texts = sample_texts(np.random.default_rng(7), 256)
    shown = tensor([labels_of_scene(s) for s in held_scenes])
    match = all_true(tensor([labels_of_caption(c) for c in held_texts]), shown)

    def evaluate() -> dict[str, float]:
        image = clip.get_image_features(normalise(images_of(held_scenes))).pooler_output
        best = (embed_texts(held_texts) @ F.normalize(image, dim=-1).T).argmax(-1)
        at_1 = match[torch.arange(len(best)), best].float().mean().item()
        chance = match.float().mean().item()
        return {"true_at_1_of_256": at_1, "chance": chance, "held_image_read": head(image, shown)[1].item()}

    fit("clip-image", nn.ModuleList([clip, head, patch_head]), loss_of, steps=steps, lr=1.5e-3, warmup=50,
        outer=("embedding", "logit_scale", "2.linear"), evaluate=evaluate, evaluate_every=200)  # fmt: skip
    clip.half().save_pretrained(WEIGHTS / "clip")
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD
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
        raise SystemExit("expected text or image")
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
