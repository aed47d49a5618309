"""The `mini` LongCLIP (Zhang et al., 2024): the text model of the `mini` CLIP stretched to 248 positions.

The first 20 positions stay unchanged, the others are interpolated by a factor of 4. The image model is frozen. The
contrastive loss selects the image of each caption among many.
Run: ``python recipes/mini/longclip.py [steps]``.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
from clip import POOL, normalize, pool_scenes
from common import WEIGHTS, load_or_compute, render_images, train
from facts import FactHead, TokenHead, all_true, label_tensor, labels_of_caption, labels_of_scene
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from longalign.mini.captions import Caption, describe
from longalign.mini.scenes import ATTRIBUTES, VALUES, Scene, sample_scene
from longalign.mini.tokenizers import write_clip_tokenizer

STEPS, UNCHANGED, LENGTH = int(sys.argv[1]) if len(sys.argv) > 1 else 2000, 20, 248
WORDS, OTHERS = 1600, 256
"""Words per batch, and further images as contrastive negatives."""


def stretch(clip: CLIPModel) -> CLIPModel:
    """The same model with 248 text positions."""
    old = clip.text_model.embeddings.position_embedding.weight.detach()
    tail = F.interpolate(old[UNCHANGED:].T[None], scale_factor=4, mode="linear", align_corners=False)[0].T
    config = clip.config
    config.text_config.max_position_embeddings = LENGTH
    long = CLIPModel(config)
    weights = {k: v for k, v in clip.state_dict().items() if not k.endswith("position_ids")}
    weights["text_model.embeddings.position_embedding.weight"] = torch.cat([old[:UNCHANGED], tail])
    long.load_state_dict(weights)
    return long


def variants(scene: Scene, caption: Caption, tokenizer: CLIPTokenizer, rng: np.random.Generator) -> list[Scene]:
    """The scene and seven variants that match the first 75 tokens of the caption; facts after these are resampled.

    All eight are equally likely given the truncated caption, so a model that reads only this is right 1 in 8 times.
    """
    early = Caption(())
    for sentence in caption.sentences:
        if len(tokenizer(Caption((*early.sentences, sentence)).text).input_ids) > 77:
            break
        early = Caption((*early.sentences, sentence))
    late = [f for f in caption.facts if f.kind in ATTRIBUTES and f not in early.facts]
    out = [scene]
    while len(out) < 8:
        things = {t.place: t for t in scene.things}
        for fact in late:
            value = VALUES[fact.kind][int(rng.integers(len(VALUES[fact.kind])))]
            things[fact.place] = replace(things[fact.place], **{fact.kind: value})
        out.append(Scene(tuple(things.values()), scene.ground, scene.tint, scene.vignette))
    return out


def main() -> None:
    torch.manual_seed(0)
    short = CLIPModel.from_pretrained(WEIGHTS / "clip", torch_dtype=torch.float32)
    folder = WEIGHTS / "longclip"
    tokenizer = CLIPTokenizer.from_pretrained(write_clip_tokenizer(folder, max_length=LENGTH))
    clip, head, token_head = stretch(short), FactHead(256), TokenHead(128)
    short = CLIPModel.from_pretrained(WEIGHTS / "clip", torch_dtype=torch.float32).eval()
    for part in (clip.vision_model, clip.visual_projection):
        part.requires_grad_(False)

    def tokenize(texts: list[str], limit: int) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"))

    def text_features(model: CLIPModel, texts: list[str], limit: int) -> Tensor:
        return model.get_text_features(**tokenize(texts, limit)).pooler_output

    @torch.no_grad()
    def image_features(scenes: list[Scene]) -> Tensor:
        return short.get_image_features(normalize(render_images(scenes))).pooler_output

    scenes = pool_scenes()
    image_labels = label_tensor([labels_of_scene(s) for s in scenes])

    def compute_features() -> dict[str, Tensor]:
        return {"features": torch.cat([image_features(scenes[i : i + 100]) for i in range(0, POOL, 100)])}

    gallery = F.normalize(load_or_compute("longclip-images", compute_features)["features"], dim=-1)

    def compute_loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        # captions of one length per step, for little padding
        words = round(15 * 13 ** rng.random())
        size = WORDS // words
        index = torch.from_numpy(rng.choice(POOL, size + OTHERS, replace=False))
        style = "referring" if rng.random() < 0.3 else "plain"
        captions = [describe(scenes[i], rng, words=words, style=style) for i in index[:size]]
        text_labels = label_tensor([labels_of_caption(c) for c in captions])
        tokens = tokenize([c.text for c in captions], LENGTH)
        out = clip.text_model(**tokens)
        text = clip.text_projection(out.pooler_output)
        scores = clip.logit_scale.exp().clamp(max=100) * F.normalize(text, dim=-1) @ gallery[index].T
        match = all_true(text_labels, image_labels[index]).float()
        nce = F.cross_entropy(scores, match / match.sum(1, keepdim=True))
        text_loss, text_accuracy = head(text, text_labels)
        token_loss, token_accuracy = token_head(out.last_hidden_state, tokens["attention_mask"], text_labels)
        loss = nce + text_loss + token_loss
        return {"loss": loss, "nce": nce, "text_read": text_accuracy, "tokens_read": token_accuracy}

    held_out = []
    for i in range(200):
        rng = np.random.default_rng([9, i])
        scene = sample_scene(rng, (6, 9))
        caption = describe(scene, rng, words=150)
        held_out.append((variants(scene, caption, tokenizer, rng), caption))
    variant_features = F.normalize(torch.stack([image_features(scenes) for scenes, _ in held_out]), dim=-1)

    def evaluate() -> dict[str, float]:
        texts = [c.text for _, c in held_out]
        out = {}
        for name, model, limit in (("long", clip, LENGTH), ("truncated", short, 77)):
            text = F.normalize(text_features(model, texts, limit), dim=-1)
            best = torch.einsum("qd,qvd->qv", text, variant_features).argmax(-1)
            out[f"late_r1_of_8_{name}"] = (best == 0).float().mean().item()
        return out

    train("longclip", nn.ModuleList([clip, head, token_head]), compute_loss, steps=STEPS, lr=1e-3, warmup=30,
        outer=("embedding", "logit_scale", "1.linear", "queries", "ground", "place"),
        evaluate=evaluate, evaluate_every=250)  # fmt: skip
    clip.half().save_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(WEIGHTS / "clip")
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
