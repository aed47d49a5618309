"""A checkpoint as a folder for others: its files, its card, and what is sent to the hub."""

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tiny import tiny_adapter, tiny_sd, tiny_t5

from longalign import publish
from longalign.checkpoint import load_for_sampling, save
from longalign.cli import main
from longalign.config import load_config
from longalign.encoders.adapter import TextAdapter
from longalign.encoders.base import Conditioning
from longalign.files import find_checkpoint
from longalign.table import MetricTable


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    tiny_sd(folder / "sd")
    tiny_t5(folder / "t5")
    tiny_adapter(folder / "adapter")
    return folder


def trained(folder, lora=True, adapter=True):
    """A checkpoint of two stages, or of all weights, moved off the start."""
    clip = {"name": "clip-segment", "checkpoint": str(folder / "sd")}
    t5 = {"name": "t5", "checkpoint": str(folder / "t5"), "adapter": {"checkpoint": str(folder / "adapter")}}
    config = load_config(
        {
            "backbone": {"name": "sd", "checkpoint": str(folder / "sd")},
            "encoder": {"name": "concat", "parts": [clip, t5]} if adapter else clip,
            "trainer": {"name": "align", "lora": {"rank": 2} if lora else None},
            "data": {"name": "scenes", "size": 7},
        }
    )
    from longalign.runtime import Runtime

    backbone, encoder = config.backbone.build(Runtime()), config.encoder.build(Runtime())
    torch.manual_seed(0)
    for name in ("align", "reward") if lora else ("all",):
        parameters = backbone.add_lora(config.trainer.lora, name) if lora else backbone.train_all()
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.05 * torch.randn_like(parameter))
    out = folder / f"run-{lora}-{adapter}"
    save(out, config, backbone, encoder, 12)
    return out


def answer(unet):
    generator = torch.Generator().manual_seed(3)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        if hasattr(unet, "predict"):
            return unet.predict(latents, torch.tensor([7, 900]), Conditioning(states))
        return unet(latents, torch.tensor([7, 900]), encoder_hidden_states=states).sample


def head_of(card):
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_an_export_holds_all_that_is_needed(folder, tmp_path):
    run = trained(folder)
    values = {"base": {"denscore": np.array([0.1, 0.2])}, "ours": {"denscore": np.array([0.3, 0.4])}}
    table = MetricTable(values, ["a", "b"], [0, 0])
    (tmp_path / "table.json").write_text(table.json())
    out = tmp_path / "out"
    written = publish.export(run, out, tmp_path / "table.json", "openrail++")
    names = ["longalign.safetensors", "pytorch_lora_weights.safetensors", "adapter", "README.md"]
    assert [path.name for path in written] == names and all(path.exists() for path in written)
    config, backbone, encoder = load_for_sampling(out)
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    before = answer(pipe.unet)
    pipe.load_lora_weights(out)
    torch.testing.assert_close(answer(pipe.unet), answer(backbone), atol=1e-5, rtol=1e-4)
    assert (answer(pipe.unet) - before).abs().mean() > 1e-3
    adapter = TextAdapter.load(str(out / "adapter")).state_dict()
    assert all(torch.equal(adapter[k], v) for k, v in encoder.parts[1].adapter.state_dict().items())
    head, text = head_of((out / "README.md").read_text())
    assert head["license"] == "openrail++" and "lora" in head["tags"] and "base_model" not in head
    for told in ("`align`: LoRA of rank 2", "`reward`: LoRA", '"size": 7', "0.3500", "12 steps", "load_lora_weights"):
        assert told in text, told
    inside = text.split("```yaml\n")[1].split("```")[0]
    assert load_config(yaml.safe_load(inside)) == config
    with pytest.raises(ValueError, match="choose another folder"):
        publish.export(run, out)


def test_all_weights_are_exported_as_diffusers_saves_them(folder, tmp_path, capsys):
    run = trained(folder, lora=False, adapter=False)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.split()] == [
        "longalign.safetensors",
        "unet",
        "README.md",
    ]
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").eval()
    torch.testing.assert_close(answer(unet), answer(load_for_sampling(run)[1]), atol=1e-6, rtol=1e-5)
    head, text = head_of((tmp_path / "out" / "README.md").read_text())
    assert "lora" not in head["tags"] and "all weights" in text and "load_lora_weights" not in text


def test_the_card_names_a_base_model_of_the_hub():
    from longalign.checkpoint import Weights

    config = load_config({"backbone": {"name": "sd", "checkpoint": "owner/model"}, "encoder": "clip-segment"})
    head, text = head_of(publish.model_card(config, Weights([], {}, {}), {}))
    assert head["base_model"] == "owner/model" and "Data: none." in text


def test_uploading_happens_only_when_asked_for(folder, tmp_path, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, *args, **keys):
            calls.append(("create", args, keys))

        def upload_folder(self, **keys):
            calls.append(("upload", keys["repo_id"], keys["folder_path"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    run = trained(folder, adapter=False)
    assert main(["export", str(run), str(tmp_path / "a")]) == 0 and calls == []
    assert main(["export", str(run), str(tmp_path / "b"), "--push-to-hub", "me/x", "--private"]) == 0
    assert calls == [
        ("create", ("me/x",), {"private": True, "exist_ok": True}),
        ("upload", "me/x", str(tmp_path / "b")),
    ]
    assert capsys.readouterr().out.strip().endswith("https://huggingface.co/me/x")
    assert main(["export", str(run), str(tmp_path / "c"), "--private"]) == 2
    with pytest.raises(ValueError, match="export a checkpoint into it first"):
        publish.push_to_hub(tmp_path, "me/x")


def test_what_is_no_table_is_refused(folder, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"values": 3}))
    with pytest.raises(ValueError, match="no table of metrics"):
        publish.read_table(tmp_path / "x.json")


def test_checkpoints_are_found_here_and_on_the_hub(folder, tmp_path, monkeypatch):
    run = trained(folder, adapter=False)
    assert find_checkpoint(str(run)) == run / "longalign.safetensors"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *given, revision: f"/hub/{'/'.join(given)}")
    assert str(find_checkpoint("owner/name")) == "/hub/owner/name/longalign.safetensors"
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in runs/missing"):
        find_checkpoint("runs/missing")
