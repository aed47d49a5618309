"""Exports: files, model cards and uploads to the Hub."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects

from longalign import Model, condition, override
from longalign.backbones.config import LoraConfig
from longalign.backbones.lora import LoraWeights
from longalign.checkpoints import publish
from longalign.checkpoints.cards import model_card
from longalign.checkpoints.checkpoint import Weights, load_for_sampling, save
from longalign.checkpoints.upload import push_to_hub
from longalign.cli.main import main
from longalign.config.run import load_config, to_dict
from longalign.encoders.base import Conditioning
from longalign.encoders.t5.adapter import TextAdapter
from longalign.evaluation.table import MetricTable
from longalign.files.paths import find_checkpoint
from longalign.metrics import Value
from longalign.testing.tiny import tiny_adapter, tiny_sd, tiny_t5

FILES = ("README.md", "longalign.safetensors", "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    tiny_sd(folder / "sd")
    tiny_t5(folder / "t5")
    tiny_adapter(folder / "adapter")
    return folder


def trained(folder, lora=True, adapter=True):
    """A checkpoint of two LoRA stages, or of full fine-tuning, with random changes of the weights."""
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


def predict(unet):
    generator = torch.Generator().manual_seed(3)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        if hasattr(unet, "predict"):
            return unet.predict(latents, torch.tensor([7, 900]), Conditioning(states))
        return unet(latents, torch.tensor([7, 900]), encoder_hidden_states=states).sample


def head_of(card):
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_read_table_of_different_model_raises(folder, tmp_path, capsys):
    run = trained(folder)
    config = to_dict(load_config(run / "longalign.safetensors"))
    values = {"base": {"denscore": np.array([0.1, 0.2])}, "ours": {"denscore": np.array([0.3, 0.4])}}
    table = MetricTable(values, ["a", "b"], [0, 0]).to_dict()
    path = tmp_path / "table.json"

    def read_with_config(config_of_ours):
        path.write_text(json.dumps({**table, "configs": {"base": {"pipeline": "owner/name"}, "ours": config_of_ours}}))
        return publish.read_table(path, load_config(config))

    assert read_with_config({**config, "output": "elsewhere"}).models == ["base", "ours"]
    assert read_with_config(None).models == ["base", "ours"]  # images without a config
    with pytest.raises(ValueError, match=r"table\.json.* base, ours:.*config"):
        read_with_config({**config, "seed": 77})
    assert main(["export", str(run), str(tmp_path / "out"), "--metrics", str(path)]) == 2
    assert "table.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_export_replaces_only_with_overwrite(folder, tmp_path, capsys):
    run, out = trained(folder), tmp_path / "out"
    publish.export(run, out)
    (out / "unet").mkdir()
    (out / "unet" / "config.json").write_text("{}")
    assert main(["export", str(run), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(trained(folder, adapter=False)), str(out), "--overwrite"]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"longalign.safetensors", "pytorch_lora_weights.safetensors", "README.md"}
    with pytest.raises(ValueError, match=r"/out is the checkpoint's"):
        publish.export(out, out, overwrite=True)


def test_export_lora_and_adapter_files_and_card(folder, tmp_path):
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
    base_output = predict(pipe.unet)
    pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(predict(pipe.unet), predict(backbone), atol=1e-5, rtol=1e-4)
    assert (predict(pipe.unet) - base_output).abs().mean() > 1e-3
    adapter = TextAdapter.load(str(out / "adapter")).state_dict()
    assert all(torch.equal(adapter[k], v) for k, v in encoder.parts[1].adapter.state_dict().items())
    head, text = head_of((out / "README.md").read_text())
    assert head["license"] == "openrail++" and "lora" in head["tags"] and "base_model" not in head
    for text_part in (
        "`align`: LoRA of rank 2",
        "`reward`: LoRA",
        '"size": 7',
        "0.3500",
        "12 steps",
        "load_lora_weights",
    ):
        assert text_part in text, text_part
    config_yaml = text.split("```yaml\n")[1].split("```")[0]
    assert load_config(yaml.safe_load(config_yaml)).data == config.data and str(folder) not in text
    assert text.index("0.3500") < text.index("```yaml")
    with pytest.raises(ValueError, match=r"longalign\.safetensors exists.*overwrite"):
        publish.export(run, out)


def test_export_full_finetune_in_diffusers_format(folder, tmp_path, capsys):
    run = trained(folder, lora=False, adapter=False)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.split()] == [
        "longalign.safetensors",
        "unet",
        "README.md",
    ]
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").eval()
    torch.testing.assert_close(predict(unet), predict(load_for_sampling(run)[1]), atol=1e-6, rtol=1e-5)
    head, text = head_of((tmp_path / "out" / "README.md").read_text())
    assert "lora" not in head["tags"] and "all weights" in text and "load_lora_weights" not in text


def test_model_card_base_model_on_hub():
    config = load_config({"backbone": {"name": "sd", "checkpoint": "owner/model"}, "encoder": "clip-segment"})
    head, text = head_of(model_card(config, Weights([], {}, {}), {}))
    assert head["base_model"] == "owner/model" and "Data: none." in text


def fake_hub(calls):
    """A Hub client that records its calls."""

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, *args, **keys):
            calls.append(("create", args, keys))

        def create_branch(self, *args, **keys):
            calls.append(("branch", args, keys))

        def upload_folder(self, **keys):
            paths = [p.relative_to(keys["folder_path"]).as_posix() for p in Path(keys["folder_path"]).rglob("*")]
            files = sorted(filter_repo_objects(paths, allow_patterns=keys["allow_patterns"]))
            calls.append(("upload", keys["repo_id"], files, keys["revision"], keys["commit_message"], self.token))

    return Api


def test_export_uploads_only_with_push_to_hub(folder, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", fake_hub(calls))
    run = trained(folder, adapter=False)
    assert main(["export", str(run), str(tmp_path / "a")]) == 0 and calls == []
    assert main(["export", str(run), str(tmp_path / "b"), "--push-to-hub", "me/x", "--private"]) == 0
    assert calls == [
        ("create", ("me/x",), {"private": True, "exist_ok": True}),
        ("upload", "me/x", [*FILES], None, "Upload a longalign checkpoint", None),
    ]
    assert capsys.readouterr().out.strip().endswith("https://huggingface.co/me/x")
    assert main(["export", str(run), str(tmp_path / "c"), "--private"]) == 2
    with pytest.raises(ValueError, match=r"longalign\.safetensors; export"):
        push_to_hub(tmp_path, "me/x")


def test_read_table_invalid_file_raises(folder, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"values": 3}))
    with pytest.raises(ValueError, match=r"x\.json.*longalign eval --json"):
        publish.read_table(tmp_path / "x.json")


def test_find_checkpoint_local_and_hub(folder, tmp_path, monkeypatch):
    run = trained(folder, adapter=False)
    assert find_checkpoint(str(run)) == run / "longalign.safetensors"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, revision: f"/hub/{'/'.join(args)}")
    assert str(find_checkpoint("owner/name")) == "/hub/owner/name/longalign.safetensors"
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="runs/missing"):
        find_checkpoint("runs/missing")


def test_model_from_pretrained_and_save_pretrained_round_trip(folder, tmp_path):
    model = Model.from_pretrained(trained(folder), device="cpu")
    prompts, settings = ["A red fox sleeps.", "The sky."], {"num_steps": 2, "guidance": 2.0, "height": 64, "width": 64}
    images = model(prompts, seeds=[1, 2], **settings)
    assert [image.size for image in images] == [(64, 64)] * 2
    written = model.save_pretrained(tmp_path / "saved", license="mit")
    assert {path.name for path in written} == {*FILES, "adapter"}
    loaded = Model.from_pretrained(tmp_path / "saved", device="cpu", dtype="float32")
    assert loaded.config == model.config
    single = loaded("A red fox sleeps.", seeds=1, **settings)[0]
    assert np.abs(np.asarray(single, dtype=int) - np.asarray(images[0], dtype=int)).max() <= 1
    assert (
        Model.from_pretrained(tmp_path / "saved", device="cpu", dtype="bfloat16").backbone.vae.dtype == torch.bfloat16
    )
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        Model.from_pretrained(tmp_path)


def test_model_to_pipeline(folder):
    model = Model.from_pretrained(trained(folder), device="cpu")
    pipe = model.to_pipeline(safety_checker=None)
    assert type(pipe) is StableDiffusionPipeline and pipe.unet is model.backbone.denoiser
    pipe.set_progress_bar_config(disable=True)
    conditioning = condition(pipe, ["A red fox sleeps."], encoder=model.encoder)
    image = pipe(**conditioning, num_inference_steps=1, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    single = model.config.backbone.model_copy(update={"checkpoint": "x.safetensors"})
    model.config = model.config.model_copy(update={"backbone": single})
    with pytest.raises(ValueError, match=r"'sd'.*'x\.safetensors'"):
        model.to_pipeline()


def test_model_push_to_hub_branch(folder, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", fake_hub(calls))
    model = Model.from_pretrained(trained(folder, adapter=False), device="cpu")
    address = model.push_to_hub("me/x", token="t", revision="next", message="Longer training")
    assert address == "https://huggingface.co/me/x"
    assert calls == [
        ("create", ("me/x",), {"private": False, "exist_ok": True}),
        ("branch", ("me/x",), {"branch": "next", "exist_ok": True}),
        ("upload", "me/x", [*FILES], "next", "Longer training", "t"),
    ]


def test_push_to_hub_uploads_only_exported_files(folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", fake_hub(calls))
    for number, (lora, expected) in enumerate(((True, "pytorch_lora_weights.safetensors"), (False, "unet"))):
        out = tmp_path / str(number)
        (out / ".ssh").mkdir(parents=True)
        for name in (".env", "id_rsa", ".ssh/id_ed25519", "config.json", "notes.txt"):
            (out / name).write_text("secret")
        written = publish.export(trained(folder, lora=lora, adapter=lora), out)
        push_to_hub(out, "me/x")
        assert expected in [path.name for path in written]
        files = {p for path in written for p in ([path] if path.is_file() else path.iterdir())}
        assert calls[-1][2] == sorted(path.relative_to(out).as_posix() for path in files)
    (tmp_path / "2" / "unet").mkdir(parents=True)
    (tmp_path / "2" / "unet" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"unet/config\.json exists"):
        publish.export(trained(folder), tmp_path / "2")


def test_export_removes_paths_and_credentials(folder, tmp_path):
    run = trained(folder, adapter=False)
    config, backbone, encoder = load_for_sampling(run)
    changes = {
        "output": "/home/me/runs/mine", "init_from": r"C:\Users\me\first",
        "data": {"name": "webdataset", "shards": "https://user:hunter2@host/x.tar?token=hunter2"},
        "monitor": {"prompts": "/home/me/prompts.txt"},
    }  # fmt: skip
    save(tmp_path / "run", override(config, changes), backbone, encoder, 1)
    publish.export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    file = (tmp_path / "out" / "longalign.safetensors").read_bytes()
    for secret in ("hunter2", "/home/me", "Users"):
        assert secret not in card and secret.encode() not in file
    assert str(folder) not in card and re.search(r"\b1 step\b", card)
    loaded, unet, _ = load_for_sampling(tmp_path / "out")
    assert (loaded.output, loaded.init_from, loaded.monitor.prompts) == ("mine", "first", "prompts.txt")
    torch.testing.assert_close(predict(unet), predict(load_for_sampling(run)[1]))


def test_model_card_escapes_untrusted_text(tmp_path):
    malicious = 'x"); import os\n```\n<script>alert(1)</script>'
    config = load_config(
        {
            "backbone": {"name": "sd", "checkpoint": malicious},
            "encoder": "clip-segment",
            "monitor": {"prompts": ["A fox.\n```\n<script>alert(2)</script>\n````"]},
        }
    )
    lora = LoraWeights("align", LoraConfig(), {})
    script = "<script>alert(3)</script>"
    metadata = {
        "step": script,
        "versions": json.dumps({script: script}),
        "providers": json.dumps({"rewards.0": f"{script} 1.0"}),
    }
    metric = f"`{script}\n# x"
    values = {f"a|{script}": {metric: np.array([0.1])}, "b": {metric: np.array([0.1])}}
    table = MetricTable(values, ["a"], units={metric: Value(script, "lower")})
    _, card = head_of(model_card(config, Weights([lora], {}, {}), metadata, table))
    outside, fence = [], None
    for line in card.splitlines():
        ticks = re.match("`{3,}", line)
        if fence is None and ticks:
            fence = ticks[0]
        elif fence is not None and line == fence:
            fence = None
        elif fence is None:
            outside.append(re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", line))
    assert fence is None and "<script" not in "\n".join(outside) and "? steps" in card
    python = re.findall("^(`{3,})python\n(.*?)^\\1$", card, re.MULTILINE | re.DOTALL)
    for _, code in python:
        names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import)]
        assert not names


def test_model_card_plugins_and_local_base_model(folder):
    config = load_config({"backbone": {"name": "sd", "checkpoint": "/models/dreamy"}, "encoder": "clip-segment"})
    metadata = {"providers": json.dumps({"encoder": "longalign-ella 1.2", "backbone": "longalign 0.1.0"})}
    weights = Weights([LoraWeights("align", LoraConfig(), {})], {}, {})
    text = model_card(config, weights, metadata)
    assert "`longalign-ella 1.2` (for `encoder`)" in text and "0.1.0" not in text
    assert 'from_pretrained("dreamy")' in text and "# dreamy for long prompts" in text
