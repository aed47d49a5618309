"""Small preference models in the manner of PickScore, HPSv2 and Denscore, each fine-tuned from the small CLIP.

Two images of one prompt are compared: both show the prompt's scene with some facts wrong and with looks of their own.
Which is preferred is drawn from truth to the text and from a taste (warm light, dark corners) that no text tells:
``p = sigmoid(truth_weight * (truth_0 - truth_1) + taste_weight * (taste_0 - taste_1))``.
The loss is PickScore's (Kirstain et al., 2023): the KL divergence from ``p`` to the softmax of the two scores.
Denscore scores a long caption by the mean over its sentences and adds a contrastive term over sentences.

Run: ``python recipes/mini/preference.py pickscore|hpsv2|denscore [steps]``.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from clip import MEAN, STD, normalise
from common import WEIGHTS, fit, images_of
from facts import all_true, labels_of_caption, labels_of_scene, tensor
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from longalign.mini import oracle
from longalign.mini.captions import Caption, describe
from longalign.mini.scenes import ATTRIBUTES, GROUNDS, VALUES, Scene, sample_scene
from longalign.mini.tokenizers import write_open_clip_bpe

# truth weight, taste weight, longest caption in words, whether sentences are scored one by one
SETTINGS = {
    "pickscore": (8.0, 4.0, (10, 40), False),
    "hpsv2": (6.0, 4.0, (10, 40), False),
    "denscore": (10.0, 4.0, (20, 160), True),
}
PAIRS = 24


def taste(scene: Scene) -> float:
    """Between -1 and 1: warm light and dark corners please."""
    return 0.5 * scene.tint + 0.5 * (2 * scene.vignette - 1)


def corrupt(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with a random share of its facts changed, and a look of its own."""
    rate = rng.choice([0.0, 0.1, 0.25, 0.5])
    things = []
    for thing in scene.things:
        for attribute in ATTRIBUTES:
            if rng.random() < rate:
                thing = replace(thing, **{attribute: VALUES[attribute][int(rng.integers(len(VALUES[attribute])))]})
        if rng.random() >= rate / 3:
            things.append(thing)
    ground = list(GROUNDS)[int(rng.integers(len(GROUNDS)))] if rng.random() < rate else scene.ground
    return Scene(tuple(things), ground, float(rng.uniform(-1, 1)), float(rng.uniform(0, 1)))


def truth(scene: Scene, caption: Caption) -> float:
    """Share of the caption's facts that hold in the scene."""
    return float(np.mean([oracle.holds(fact, scene) for fact in caption.facts]))


def main(name: str, steps: int) -> None:
    torch.manual_seed(0)
    truth_weight, taste_weight, words, by_sentence = SETTINGS[name]
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")

    def unit(features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1)

    def batch(rng: np.random.Generator, pairs: int) -> tuple[list[Scene], list[list[Caption]], Tensor]:
        scenes, texts, margins = [], [], []
        for _ in range(pairs):
            scene = sample_scene(rng, (1, 9) if by_sentence else (1, 4))
            caption = describe(scene, rng, words=int(rng.integers(words[0], words[1] + 1)))
            two = [corrupt(scene, rng), corrupt(scene, rng)]
            true, nice = [truth(s, caption) for s in two], [taste(s) for s in two]
            margins.append(truth_weight * (true[0] - true[1]) + taste_weight * (nice[0] - nice[1]))
            scenes += two
            texts.append([Caption((s,)) for s in caption.sentences] if by_sentence else [caption])
        return scenes, texts, torch.tensor(margins)

    def features(scenes: list[Scene], texts: list[list[Caption]]) -> tuple[Tensor, Tensor, Tensor, list[Caption]]:
        flat = [c for caption in texts for c in caption]
        tokens = tokenizer([c.text for c in flat], padding=True, truncation=True, return_tensors="pt")
        segments = unit(clip.get_text_features(**tokens).pooler_output)
        means = torch.stack([part.mean(0) for part in segments.split([len(t) for t in texts])])
        return unit(clip.get_image_features(normalise(images_of(scenes))).pooler_output), means, segments, flat

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        scenes, texts, margins = batch(rng, PAIRS)
        image, text, segments, flat = features(scenes, texts)
        scale = clip.logit_scale.exp().clamp(max=100)
        scores = scale * (image.view(PAIRS, 2, -1) * text[:, None]).sum(-1)
        # a label is one drawn preference, as a person would give it
        label = (torch.from_numpy(rng.random(PAIRS)).float() < margins.sigmoid()).float()
        loss = F.cross_entropy(scores, torch.stack([label, 1 - label], -1))
        out = {"preference": loss}
        if by_sentence:
            told, shown = tensor([labels_of_caption(c) for c in flat]), tensor([labels_of_scene(s) for s in scenes])
            match = all_true(told, shown).float()
            some = match.sum(1) > 0
            logits = scale * segments[some] @ image.T
            out["contrastive"] = F.cross_entropy(logits, match[some] / match[some].sum(1, keepdim=True))
            loss = loss + 0.5 * out["contrastive"]
        return {"loss": loss, **out}

    held_out = batch(np.random.default_rng(21), 200)

    def evaluate() -> dict[str, float]:
        scenes, texts, margins = held_out
        image, text, _, _ = features(scenes, texts)
        scores = (image.view(200, 2, -1) * text[:, None]).sum(-1)
        common = unit(text.mean(0))
        eta = text @ common
        relevant = text - eta[:, None] * common
        parts = {"score": scores, "relevant": (image.view(200, 2, -1) * relevant[:, None]).sum(-1)}
        parts["irrelevant"] = scores - parts["relevant"]
        out = {"agreement": ((scores[:, 0] > scores[:, 1]) == (margins > 0)).float().mean().item()}
        out["eta"] = eta.mean().item()
        facts = [np.mean([oracle.holds(f, s) for c in texts[i // 2] for f in c.facts]) for i, s in enumerate(scenes)]
        looks = [taste(s) for s in scenes]
        for part, value in parts.items():
            for what, of in (("truth", facts), ("taste", looks)):
                out[f"{part}_{what}_correlation"] = float(np.corrcoef(value.flatten().numpy(), np.array(of))[0, 1])
        return out

    fit(name, clip, loss_of, steps=steps, lr=3e-4, warmup=20, muon=10.0, outer=("embedding", "logit_scale"),
        evaluate=evaluate, evaluate_every=100)  # fmt: skip
    folder = WEIGHTS / name
    folder.mkdir(parents=True, exist_ok=True)
    clip.half()
    if name == "hpsv2":
        write_open_clip(clip, folder)
    else:
        clip.save_pretrained(folder)
        for file in WEIGHTS.joinpath("clip").iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                shutil.copy(file, folder / file.name)


def write_open_clip(clip: CLIPModel, path: Path) -> None:
    """Writes a transformers CLIP as open_clip's state dict, the way HPSv2 is published."""
    source, out = clip.state_dict(), {}
    for ours, theirs in (("text_model.", ""), ("vision_model.", "visual.")):
        layers = clip.config.text_config.num_hidden_layers
        for i in range(layers):
            a, b = f"{ours}encoder.layers.{i}.", f"{theirs}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                qkv = [source[f"{a}self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{b}attn.in_proj_{kind}"] = torch.cat(qkv)
                pairs = [("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")]
                for x, y in [*pairs, ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]:
                    out[f"{b}{y}.{kind}"] = source[f"{a}{x}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = source[f"text_model.final_layer_norm.{kind}"]
        out[f"visual.ln_pre.{kind}"] = source[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = source[f"vision_model.post_layernorm.{kind}"]
    out["token_embedding.weight"] = source["text_model.embeddings.token_embedding.weight"]
    out["positional_embedding"] = source["text_model.embeddings.position_embedding.weight"]
    out["text_projection"] = source["text_projection.weight"].T.contiguous()
    out["visual.conv1.weight"] = source["vision_model.embeddings.patch_embedding.weight"]
    out["visual.class_embedding"] = source["vision_model.embeddings.class_embedding"]
    out["visual.positional_embedding"] = source["vision_model.embeddings.position_embedding.weight"]
    out["visual.proj"] = source["visual_projection.weight"].T.contiguous()
    out["logit_scale"] = source["logit_scale"]
    torch.save({"state_dict": out}, path / "HPS_v2.1_compressed.pt")
    text, vision = clip.config.text_config, clip.config.vision_config
    model = {
        "embed_dim": clip.config.projection_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": vision.image_size, "layers": vision.num_hidden_layers, "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads, "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
            "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
        },
    }  # fmt: skip
    config = {"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (path / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    write_open_clip_bpe(path)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SETTINGS:
        raise SystemExit(f"expected one of {', '.join(SETTINGS)}")
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 300)
