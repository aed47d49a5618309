"""The `mini` preference models like PickScore, HPSv2 and Denscore, each fine-tuned from the `mini` CLIP.

Each pair has two images of one prompt, which show the prompt's scene with some wrong facts and different looks. The
fraction of people who prefer the first follows from faithfulness to the text and a taste (warm light, dark corners)
that is independent of it: ``p = sigmoid(truth_weight * (truth_0 - truth_1) + taste_weight * (taste_0 - taste_1))``.
The loss is PickScore's (Kirstain et al., 2023): the KL divergence from ``p`` to the softmax of the two scores.
Denscore scores a long caption by the mean over its sentences and adds a contrastive term over sentences.
Only the projection of the text model is trained, so the text states are computed once.

Run: ``python recipes/mini/preference.py pickscore|hpsv2|denscore [steps]``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from clip import normalize
from common import WEIGHTS, load_or_compute, render_uint8, train
from facts import all_true, label_tensor, labels_of_caption, labels_of_scene
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from longalign.functional.images import CLIP_MEAN, CLIP_STD
from longalign.mini.captions import Caption, describe
from longalign.mini.preferences import taste, truth, vary
from longalign.mini.scenes import sample_scene
from longalign.mini.tokenizers import write_open_clip_bpe

# truth weight, taste weight, range of caption lengths in words, whether sentences are scored separately
SETTINGS = {
    "pickscore": (8.0, 4.0, (10, 40), False),
    "hpsv2": (6.0, 4.0, (10, 40), False),
    "denscore": (10.0, 4.0, (20, 160), True),
}
PAIRS, POOL, IMAGES = 24, 6000, 4


def main(name: str, steps: int) -> None:
    torch.manual_seed(0)
    truth_weight, taste_weight, words, by_sentence = SETTINGS[name]
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", torch_dtype=torch.float32)
    clip.text_model.requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")

    @torch.no_grad()
    def text_states(texts: list[Caption]) -> Tensor:
        chunks = [[c.text for c in texts[i : i + 128]] for i in range(0, len(texts), 128)]
        tokens = (tokenizer(chunk, padding=True, truncation=True, return_tensors="pt") for chunk in chunks)
        return torch.cat([clip.text_model(**t).pooler_output for t in tokens])

    def compute_pairs(seed: int, size: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(seed)
        images, texts, owner, truths = [], [], [], []
        for i in range(size):
            scene = sample_scene(rng, (1, 9) if by_sentence else (1, 4))
            caption = describe(scene, rng, words=int(rng.integers(words[0], words[1] + 1)))
            variants = [vary(scene, rng) for _ in range(IMAGES)]
            images += variants
            truths += [truth(s, caption) for s in variants]
            parts = [Caption((s,)) for s in caption.sentences] if by_sentence else [caption]
            texts += parts
            owner += [i] * len(parts)
        text_labels = [labels_of_caption(text) for text in texts]
        image_labels = [labels_of_scene(scene) for scene in images]
        return {
            "pixels": render_uint8(images).view(size, IMAGES, 3, 64, 64),
            "image_labels": label_tensor(image_labels).view(size, IMAGES, -1),
            "truth": torch.tensor(truths).view(size, IMAGES),
            "taste": torch.tensor([taste(s) for s in images]).view(size, IMAGES),
            "states": text_states(texts), "text_labels": label_tensor(text_labels).short(),
            "owner": torch.tensor(owner),
        }  # fmt: skip

    kind = "long" if by_sentence else "short"
    pool, held_out = (
        load_or_compute(f"preference-{kind}", lambda: compute_pairs(31, POOL)),
        load_or_compute(f"preference-{kind}-held-out", lambda: compute_pairs(21, 200)),
    )
    starts = torch.searchsorted(pool["owner"], torch.arange(POOL + 1))

    def image_features(pixels: Tensor) -> Tensor:
        out = clip.vision_model(normalize(pixels.float() / 255)).pooler_output
        return F.normalize(clip.visual_projection(out), dim=-1)

    def text_features(states: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Text embeddings of the segments, and their mean over each caption."""
        segments = F.normalize(clip.text_projection(states), dim=-1)
        return segments, torch.stack([part.mean(0) for part in segments.split(lengths)])

    def compute_loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = torch.from_numpy(rng.choice(POOL, PAIRS, replace=False))
        columns = torch.from_numpy(np.stack([rng.permutation(IMAGES)[:2] for _ in range(PAIRS)]))
        segment_rows = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in rows])
        lengths = (starts[rows + 1] - starts[rows]).tolist()
        pick = (rows[:, None], columns)
        image = image_features(pool["pixels"][pick].flatten(0, 1))
        segments, text = text_features(pool["states"][segment_rows], lengths)
        scale = clip.logit_scale.exp().clamp(max=100)
        scores = scale * torch.einsum("pid,pd->pi", image.view(PAIRS, 2, -1), text)
        margins = truth_weight * pool["truth"][pick] + taste_weight * pool["taste"][pick]
        loss = F.kl_div(scores.log_softmax(-1), margins.softmax(-1).float(), reduction="batchmean")
        out = {"preference": loss}
        if by_sentence:
            text_labels, image_labels = pool["text_labels"][segment_rows], pool["image_labels"][pick]
            match = all_true(text_labels.long(), image_labels.flatten(0, 1)).float()
            matched = match.sum(1) > 0
            logits = scale * segments[matched] @ image.T
            targets = match[matched] / match[matched].sum(1, keepdim=True)
            out["contrastive"] = F.cross_entropy(logits, targets)
            loss = loss + 0.5 * out["contrastive"]
        return {"loss": loss, **out}

    def evaluate() -> dict[str, float]:
        image = image_features(held_out["pixels"].flatten(0, 1)).view(200, IMAGES, -1)
        _, text = text_features(held_out["states"], held_out["owner"].bincount().tolist())
        parts = {"score": torch.einsum("pid,pd->pi", image, text)}
        common = F.normalize(text.mean(0), dim=-1)
        eta = text @ common
        parts["relevant"] = torch.einsum("pid,pd->pi", image, text - eta[:, None] * common)
        parts["irrelevant"] = parts["score"] - parts["relevant"]
        margins = truth_weight * held_out["truth"] + taste_weight * held_out["taste"]
        agrees = (parts["score"][:, 0] > parts["score"][:, 1]) == (margins[:, 0] > margins[:, 1])
        out = {"agreement": agrees.float().mean().item(), "eta": eta.mean().item()}
        for part, value in parts.items():
            for factor in ("truth", "taste"):
                # centred within the images of each prompt
                centred = [(x - x.mean(1, keepdim=True)).flatten() for x in (value, held_out[factor])]
                out[f"{part}_{factor}_correlation"] = float(np.corrcoef(*centred)[0, 1])
        return out

    train(name, clip, compute_loss, steps=steps, lr=5e-4, warmup=50, muon=10.0, outer=("embedding", "logit_scale"),
        evaluate=evaluate, evaluate_every=250)  # fmt: skip
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
    """Writes a transformers CLIP as an open_clip state dict, the format of the published HPSv2."""
    source, out = clip.state_dict(), {}
    halves = (("text_model.", "", clip.config.text_config), ("vision_model.", "visual.", clip.config.vision_config))
    for ours, theirs, half in halves:
        for i in range(half.num_hidden_layers):
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
    config = {"model_cfg": model, "preprocess_cfg": {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}}
    (path / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    write_open_clip_bpe(path)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SETTINGS:
        raise SystemExit(
            f"usage: preference.py MODEL [STEPS], with MODEL one of {', '.join(SETTINGS)}; got {sys.argv[1:]}"
        )
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 300)
