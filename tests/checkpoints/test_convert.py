"""Conversion of the published longSD files, compared with a manual merge in the published order."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from longsd import RANK, published_order, write_longsd
from safetensors import safe_open

from longalign.backbones.lora import lora_targets
from longalign.backbones.stable_diffusion.sd import empty_unet
from longalign.checkpoints.checkpoint import load_for_sampling, load_weights
from longalign.checkpoints.convert import _UNET, convert_longsd, read_tensors
from longalign.cli.main import main
from longalign.encoders.base import Conditioning, TruncationWarning
from longalign.inference.sampling import sample
from longalign.testing.tiny import tiny_adapter, tiny_sd15, tiny_t5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longsd")
    tiny_sd15(folder / "sd")
    tiny_t5(folder / "t5")
    source = write_longsd(folder / "LongSD")
    convert_longsd(source, folder / "out", str(folder / "sd"), str(folder / "t5"))
    return folder


def manual_merge(folder, files):
    unet = UNet2DConditionModel.from_pretrained(folder / "sd", subfolder="unet")
    with torch.no_grad():
        for file in files:
            tensors = torch.load(folder / "LongSD" / file, weights_only=True)
            for i, name in enumerate(published_order()):
                up, down = tensors[2 * i].float(), tensors[2 * i + 1].float()
                weight = unet.get_submodule(name).weight
                weight += (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return unet.eval()


def sample_inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)


def predict(unet):
    latents, states = sample_inputs()
    with torch.no_grad():
        return unet(latents, torch.tensor([7, 900]), encoder_hidden_states=states).sample


def test_lora_targets_match_published_order():
    unet = empty_unet("unused", _UNET)
    names = list(published_order())
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert lora_targets(unet) == names
    assert len(names) == 224 and names[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names[-1] == "mid_block.resnets.1.conv2"


def test_convert_longsd_matches_manual_merge(world):
    config, backbone, _ = load_for_sampling(world / "out")
    latents, states = sample_inputs()
    with torch.no_grad():
        output = backbone.predict(latents, torch.tensor([7, 900]), Conditioning(states))
    expected = predict(manual_merge(world, ["s28750_lora_vis.pt", "sd15-reward-3750.pt"]))
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    assert (expected - predict(manual_merge(world, ["s28750_lora_vis.pt"]))).abs().mean() > 0.01
    assert config.trainer is None and [p.name for p in config.encoder.parts] == ["clip-segment", "t5"]
    loras = load_weights(world / "out").loras
    assert [(s.name, s.config.rank, s.config.dropout_placement) for s in loras] == [
        ("align", RANK, "up"),
        ("reward", RANK, "up"),
    ]


def test_convert_longsd_keeps_adapter(world):
    from longalign.encoders.t5.adapter import TextAdapter

    _, backbone, encoder = load_for_sampling(world / "out")
    expected = TextAdapter.load(str(world / "LongSD" / "s28750_adapter")).state_dict()
    loaded = encoder.parts[1].adapter.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    with pytest.warns(TruncationWarning):
        images = sample(backbone, encoder, ["A red fox. " * 90], seeds=[0], num_steps=1, guidance=1)
    assert images.shape == (1, 3, 64, 64)


def test_convert_longsd_lora_loads_in_diffusers(world):
    pipe = StableDiffusionPipeline.from_pretrained(world / "sd", safety_checker=None)
    pipe.load_lora_weights(world / "out", weight_name="pytorch_lora_weights.safetensors")
    expected = predict(manual_merge(world, ["s28750_lora_vis.pt", "sd15-reward-3750.pt"]))
    torch.testing.assert_close(predict(pipe.unet), expected, atol=1e-4, rtol=1e-4)
    with safe_open(world / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["unet.lora_alpha"] == 2 * RANK
    assert settings["unet.target_modules"] == sorted(published_order())


def test_convert_command_align_only(world, tmp_path, capsys):
    bases = ["--backbone", str(world / "sd"), "--t5", str(world / "t5")]
    command = ["convert", "longsd", str(world / "LongSD"), str(tmp_path / "out"), *bases]
    assert main([*command, "--align-only"]) == 0
    assert [s.name for s in load_weights(tmp_path / "out").loras] == ["align"]
    assert capsys.readouterr().out.strip().endswith("longalign.safetensors")
    assert main(command) == 2
    assert "longalign.safetensors exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-2], r" 446 tensors.* 448 .*224"),
        (lambda t: [x for pair in zip(t[1::2], t[::2], strict=True) for x in pair], r"tensor 0, 'up' of .*attn1.to_q'"),
        (lambda t: [*t[:13], t[13][:, :-1], *t[14:]], r"tensor 13, 'down' of .*shape \(4, 16\), got .* \(4, 15\)"),
        (lambda t: {"state": t}, r"list of tensors.*\['state'\]"),
        (lambda t: [], "list of tensors.*class 'list'"),
        (lambda t: [*t, len], r"s28750_lora_vis\.pt.*len"),
    ],
)
def test_convert_longsd_invalid_file_raises(world, tmp_path, change, message):
    source = tmp_path / "LongSD"
    tiny_adapter(source / "s28750_adapter")
    torch.save(change(torch.load(world / "LongSD" / "sd15-reward-3750.pt")), source / "s28750_lora_vis.pt")
    with pytest.raises(ValueError, match=message):
        convert_longsd(source, tmp_path / "out", str(world / "sd"), str(world / "t5"), align_only=True)
    assert not (tmp_path / "out").exists()


def test_convert_longsd_missing_files_raise(world, tmp_path):
    with pytest.raises(FileNotFoundError, match=r" s28750_adapter, s28750_lora_vis\.pt, sd15"):
        convert_longsd(tmp_path, tmp_path / "out")
    (tmp_path / "x.pt").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"/x\.pt\b"):
        read_tensors(tmp_path / "x.pt")
