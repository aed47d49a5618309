"""The published files of longSD with random weights, for a narrow Stable Diffusion 1.5."""

import torch
from diffusers import UNet2DConditionModel

from longalign.testing.tiny import SD15_NARROW, tiny_adapter

RANK = 4


def published_order():
    """The LoRA layers in the published order: down, up, middle; in a block attentions, then residual blocks."""

    def transformer(prefix):
        block = f"{prefix}.transformer_blocks.0"
        for attention in ("attn1", "attn2"):
            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                yield f"{block}.{attention}.{layer}"
        yield f"{block}.ff.net.0.proj"

    def residual(prefix, shortcut):
        for layer in ("conv1", "time_emb_proj", "conv2", *(["conv_shortcut"] if shortcut else [])):
            yield f"{prefix}.{layer}"

    for block in range(4):
        for i in range(2 if block < 3 else 0):
            yield from transformer(f"down_blocks.{block}.attentions.{i}")
        for i in range(2):
            yield from residual(f"down_blocks.{block}.resnets.{i}", shortcut=i == 0 and block in (1, 2))
    for block in range(4):
        for i in range(3 if block > 0 else 0):
            yield from transformer(f"up_blocks.{block}.attentions.{i}")
        for i in range(3):
            yield from residual(f"up_blocks.{block}.resnets.{i}", shortcut=True)
    yield from transformer("mid_block.attentions.0")
    for i in range(2):
        yield from residual(f"mid_block.resnets.{i}", shortcut=False)


def published_list(unet, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name in published_order():
        out_width, in_width, *kernel = unet.get_submodule(name).weight.shape
        up = torch.randn(out_width, RANK, *[1 for _ in kernel], generator=generator)
        down = torch.randn(RANK, in_width, *kernel, generator=generator) / RANK
        tensors += [(0.1 * up).half(), down.half()]
    return tensors


def write_longsd(folder):
    """Writes the adapter and the LoRAs of both stages, in the published layout."""
    tiny_adapter(folder / "s28750_adapter")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_NARROW)
    # the authors' tensors were parameters and still require gradients
    align = [t.requires_grad_() for t in published_list(unet, 1)]
    torch.save(align, folder / "s28750_lora_vis.pt")
    torch.save(published_list(unet, 2), folder / "sd15-reward-3750.pt")
    return folder
