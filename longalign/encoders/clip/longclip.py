"""LongCLIP (arXiv 2403.15378): CLIP's text model with 248 positions, in the original or transformers layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, CLIPTextModel

from longalign.encoders.clip.config import LongClipConfig
from longalign.encoders.clip.truncate import ClipTruncateEncoder
from longalign.encoders.clip.weights import text_state
from longalign.encoders.loading import load_frozen_model, load_tokenizer, subfolders
from longalign.files.weights import load_pickle, load_tensors
from longalign.hub import find_checkpoint_file
from longalign.runtime import Runtime, resolve_checkpoint


class LongClipEncoder(ClipTruncateEncoder):
    """Encodes the whole prompt with LongCLIP, like `ClipTruncateEncoder` but with a window of 248 tokens."""

    @classmethod
    def from_config(cls, config: LongClipConfig, runtime: Runtime) -> LongClipEncoder:  # type: ignore[override]
        """Loads the text model and tokenizer from a published ``.pt`` file, a folder or a Hub repository.

        Raises:
            ValueError: if the checkpoint does not exist or is incomplete, or if the text model has at most 77
                positions, as CLIP has.
        """
        checkpoint, revision = resolve_checkpoint(config.checkpoint), config.revision
        tokenizer_source, path = checkpoint, None
        if Path(checkpoint).is_file():
            path, tokenizer_source = Path(checkpoint), str(Path(checkpoint).parent)
        elif config.filename is not None:
            path = find_checkpoint_file(checkpoint, config.filename, revision)
            if path is None:
                raise ValueError(f"no file '{config.filename}' in '{checkpoint}'; correct or remove 'filename'")
        elif config.subfolder is None and config.variant is None:
            path = find_checkpoint_file(checkpoint, "longclip-L.pt", revision)
        folder, tokenizer_folder = "", ""
        if path is None:
            folder, tokenizer_folder = subfolders(checkpoint, config.subfolder, revision)
            model: Any = load_frozen_model(CLIPTextModel, checkpoint, folder, revision, runtime, config.variant)
        else:
            model = read_original(path)
            model.requires_grad_(False).eval().to(device=runtime.device, dtype=runtime.torch_dtype)
        if model.config.max_position_embeddings <= 77:
            raise ValueError(
                f"expected a LongCLIP with 248 positions, got {model.config.max_position_embeddings} in "
                f"'{config.checkpoint}'; use the encoder 'clip-truncate' or 'clip-segment'"
            )
        if config.tokenizer is not None:
            tokenizer = load_tokenizer(resolve_checkpoint(config.tokenizer), "", None)
        elif path is not None and find_checkpoint_file(tokenizer_source, "tokenizer_config.json", revision) is None:
            tokenizer = load_tokenizer("openai/clip-vit-large-patch14", "", None)
        else:
            tokenizer = load_tokenizer(tokenizer_source, tokenizer_folder, revision)
        return cls(model, tokenizer, overflow=config.overflow, max_batch_tokens=config.max_batch_tokens)


def read_original(path: Path) -> CLIPTextModel:
    """Loads the text model of the published ``longclip-L.pt`` or ``longclip-B.pt``, in float32 on the CPU.

    A ``.safetensors`` file with the same weight names is accepted too.

    Raises:
        ValueError: if the file contains objects other than tensors, or the tensors of a different model.
    """
    state: Any = load_tensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ValueError(
            f"{path}: expected a state dict, got a {type(state).__name__}; use the original longclip-L.pt or -B.pt"
        )
    weights = text_state(state)
    vocab_size, width = weights["embeddings.token_embedding.weight"].shape
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=len({key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}),
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=len(weights["embeddings.position_embedding.weight"]),
            hidden_act="quick_gelu",
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
        )
    )
    getattr(model, "text_model", model).load_state_dict(weights)  # transformers 4 has one more module level
    return model
