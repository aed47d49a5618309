"""Caches of latents and text states: equal results, reuse of entries, rejection of stale caches."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import huggingface_hub
import pytest
import torch
from torch import nn

from longalign.caching import precompute as caching
from longalign.cli.main import main
from longalign.compose import build_from_config
from longalign.config.changes import override
from longalign.config.run import load_config, to_yaml
from longalign.data.cached import CachedImages
from longalign.encoders.base import Conditioning, Encoder, TruncationWarning
from longalign.encoders.cached import CachedEncoder, entries, prompt_key
from longalign.encoders.config import EncoderConfig
from longalign.encoders.t5.config import AdapterConfig
from longalign.errors import ConfigError
from longalign.files.fingerprint import fingerprint, fingerprints
from longalign.files.locks import Lock
from longalign.files.store import StaleCache, Store, key_of
from longalign.image_io import write_png
from longalign.inference.sampling import load_model
from longalign.loop.fit import fit
from longalign.registry import Part, encoders
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_adapter, tiny_sd, tiny_sdxl, tiny_t5

CAPTIONS = ("A red fox sleeps on a wall. The sky is green.", "A wall.", "The sky. " * 12, "A fox is red.", "A fox.")
CPU = Runtime()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_sd(folder / "sd")
    tiny_t5(folder / "t5")
    tiny_adapter(folder / "adapter")
    return folder


@pytest.fixture
def config(models, tmp_path):
    """A run with CLIP segments and adapted T5 on five images; image 3 is unreadable."""
    images = tmp_path / "images"
    images.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, caption in enumerate(CAPTIONS):
        write_png(images / f"{i}.png", torch.rand(3, 20, 24, generator=generator))
        rows.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (images / "3.png").write_bytes(b"no image")
    (images / "metadata.jsonl").write_text("\n".join(rows))
    clip = {"name": "clip-segment", "checkpoint": str(models / "sd"), "max_tokens": 20}
    t5 = {"name": "t5", "checkpoint": str(models / "t5"), "max_tokens": 12}
    t5["adapter"] = {"checkpoint": str(models / "adapter")}
    return load_config(
        {
            "backbone": {"name": "sd", "checkpoint": str(models / "sd")},
            "encoder": {"name": "concat", "parts": [clip, t5]},
            "trainer": {"name": "align", "lora": {"rank": 2}, "caption_dropout": 0.5},
            "data": {"name": "folder", "folder": str(images), "resolution": 16},
            "loop": {"steps": 3, "batch_size": 2, "log_every": 1, "lr": 1e-2},
            "cache": {"folder": str(tmp_path / "cache")},
            "output": str(tmp_path / "cached"),
        }
    )


def train_metrics(config):
    """Lines of a run's log, without the times."""
    fit(config, device="cpu")
    lines = Path(config.output, "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_training_gives_equal_numbers_with_and_without_cache(config, tmp_path, smooth_adamw):
    assert caching.make_caches(config, CPU, 2) == {
        "latents": (4, 4),
        "prompts-clip-segment": (6, 6),
        "prompts-t5": (6, 6),
    }
    plain = train_metrics(override(config, {"cache": None, "output": str(tmp_path / "plain")}))
    assert len(plain) == 3 and all(line["noise_loss"] > 0 for line in plain)
    for line, cached in zip(plain, train_metrics(config), strict=True):
        line.pop("truncated_prompts", None)  # not stored in a cache
        assert line == pytest.approx(cached, rel=1e-4)
    plain, cached = (load_model(tmp_path / name / "checkpoint-000003") for name in ("plain", "cached"))
    assert cached[0].cache is not None
    for a, b in zip(plain[2].parameters(), cached[2].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_cached_encoder_builds_no_text_model(config, monkeypatch):
    caching.make_caches(config, CPU)
    monkeypatch.setattr(
        "longalign.encoders.t5.encoder.load_text_model", lambda *_: pytest.fail("a text model is loaded")
    )
    composition = build_from_config(config, CPU)
    names = set(dict(composition.encoder.named_parameters()))
    assert names and all(name.startswith("parts.1.adapter.") for name in names)
    with pytest.raises(ValueError, match=r"'A new one'.*prompts-clip-segment"):
        composition.encoder.encode(["A new one"])
    with pytest.raises(ValueError, match=r"\bcache\b"):
        composition.encoder.parts[0].report(["A fox."])
    item = composition.data[3]  # unreadable, so the next item replaces it, as without a cache
    assert item["prompt"] == "A fox." and item["posterior"].shape == (8, 2, 2) and "image" not in item


@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_make_caches_reuses_existing_entries(config, monkeypatch, caplog):
    def interrupt(*args, **keys):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("longalign.caching.latents.write_items", interrupt)
        with pytest.raises(KeyboardInterrupt):
            caching.make_caches(config, CPU, 2, shard_bytes=1)
    with pytest.raises(ValueError, match=r"cache/latents.*longalign cache"):
        build_from_config(config, CPU).data  # noqa: B018
    assert caching.make_caches(config, CPU)["latents"] == (4, 0)
    with monkeypatch.context() as patch:
        patch.setattr("longalign.backbones.stable_diffusion.sd.SDBackbone.from_config", interrupt)
        patch.setattr("longalign.encoders.t5.encoder.load_text_model", interrupt)
        assert caching.make_caches(config, CPU)["prompts-t5"] == (6, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.parts.0.max_tokens": 30}, r"encoder\.max_tokens: 20 .*30"),
        (
            {"encoder.parts.0.segmenter": "longalign"},
            r"encoder\.segmenter\.name: 'sentence' .*'longalign'",
        ),
        ({"data.resolution": 32}, r"data\.resolution: 16 .*32"),
        ({"loop.precision": "bf16"}, r"dtype: 'float32' .*'bfloat16'"),
    ],
)
@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_check_caches_rejects_a_different_config(config, change, message):
    caching.make_caches(config, CPU)
    changed = override(config, change)
    runtime = Runtime.detect(changed.loop.precision)
    with pytest.raises(StaleCache, match=message):
        fit(changed)
    with pytest.raises(StaleCache, match=message):
        caching.make_caches(changed, runtime)
    caching.check_caches(
        override(config, {"encoder.parts.1.adapter": None, "encoder.parts.0.max_batch_tokens": 9}), CPU
    )


@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_caches_reject_changed_weights_images_and_captions(config, models, tmp_path):
    caching.make_caches(config, CPU)
    images = tmp_path / "images"
    os.utime(images / "0.png", (1, 1))  # a copied file has a different time and the same content
    build_from_config(config, CPU).data[0]
    write_png(images / "0.png", torch.zeros(3, 20, 24))
    with pytest.raises(ValueError, match=r"item 0 .*longalign cache"):
        build_from_config(config, CPU).data  # noqa: B018
    assert caching.make_caches(config, CPU)["latents"] == (5, 1)
    data = build_from_config(config, CPU).data
    assert isinstance(data, CachedImages)
    write_png(images / "1.png", torch.zeros(3, 20, 24))
    with pytest.raises(ValueError, match=r"item 1 .*longalign cache"):
        data[1]
    (images / "1.png").unlink()
    with pytest.raises(ValueError, match=r"item 1 .*No such file"):
        data[1]
    text = (images / "metadata.jsonl").read_text()
    (images / "metadata.jsonl").write_text(text.replace("A wall.", "A dog."))
    prompts_only = override(config, {"cache.latents": False})
    with pytest.raises(ValueError, match=r"'A dog\.'"):
        build_from_config(prompts_only, CPU).encoder  # noqa: B018
    (images / "metadata.jsonl").write_text(text + '\n{"file_name": "0.png", "text": "A fox."}')
    with pytest.raises(ValueError, match=r" 6 items.* 5;"):
        build_from_config(config, CPU).data  # noqa: B018
    weights = tmp_path / "t5"
    tiny_t5(weights, width=16)
    moved = override(config, {"encoder.parts.1.checkpoint": str(weights)})
    with pytest.raises(StaleCache, match=r"encoder\.checkpoint: .*models.*/t5' .*/t5'"):
        caching.check_caches(moved, CPU)
    moved = override(moved, {"cache.folder": str(tmp_path / "other"), "cache.latents": False})
    caching.make_caches(moved, CPU)
    file = weights / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(StaleCache, match=r"weights\.checkpoint"):
        caching.check_caches(moved, CPU)


def test_cached_encoder_restores_pooled_and_masked_states(tmp_path):
    tiny_sdxl(tmp_path / "sdxl")
    encoder = {"name": "clip-segment-sdxl", "checkpoint": str(tmp_path / "sdxl"), "pad": "none"}
    file = tmp_path / "prompts.txt"
    file.write_text("A red fox. A wall.\nThe sky.")
    config = load_config(
        {
            "backbone": {"name": "sdxl", "checkpoint": str(tmp_path / "sdxl")},
            "encoder": encoder,
            "data": {"name": "prompts", "file": str(file)},
            "monitor": {"prompts": ["A green sky."]},
            "cache": {"folder": str(tmp_path / "cache")},
        }
    )
    assert caching.make_caches(config, CPU) == {"prompts-clip-segment-sdxl": (4, 4)}
    cached, plain = build_from_config(config, CPU).encoder, config.encoder.build(CPU)
    for prompts in (["A red fox. A wall.", "", "A green sky."], ["", "The sky."]):
        actual, expected = cached.encode(prompts), plain.encode(prompts)
        for a, b in (
            (actual.states, expected.states * expected.mask[..., None]),
            (actual.pooled, expected.pooled),
        ):
            # rounding errors depend on the batch and scale with the largest terms of a sum
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
        assert torch.equal(actual.mask, expected.mask)


@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_cached_encoder_finds_plugin_adapter_under_any_key(config, models, tmp_path):
    class MappedConfig(EncoderConfig):
        name: Literal["mapped"] = "mapped"
        adapter_key: ClassVar[str] = "mapper"
        mapper: AdapterConfig | None = None

        def build(self, runtime):
            inner = encoders.build({"name": "t5", "checkpoint": str(models / "t5"), "max_tokens": 12}, runtime)
            return Mapped(inner, self.mapper and self.mapper.build(runtime))

    class Mapped(Encoder):
        def __init__(self, inner, mapper):
            super().__init__()
            self.inner, self.mapper, self.dim = inner, mapper, inner.dim if mapper is None else mapper.out_dim

        def encode(self, prompts):
            conditioning = self.inner.encode(prompts)
            return conditioning if self.mapper is None else self.mapper.adapt(conditioning)

        def report(self, prompts):
            return self.inner.report(prompts)

    encoders.register("mapped", MappedConfig)
    try:
        encoder = {"name": "mapped", "mapper": {"checkpoint": str(models / "adapter")}}
        changed = override(config, {"encoder": encoder})
        caching.make_caches(changed, CPU)
        cached, plain = (
            build_from_config(run, CPU).encoder.eval()
            for run in (changed, override(changed, {"cache": None, "output": str(tmp_path / "plain")}))
        )
    finally:
        encoders.unregister("mapped")
    prompts = [CAPTIONS[0], ""]
    torch.testing.assert_close(cached.encode(prompts).states, plain.encode(prompts).states, rtol=0, atol=1e-5)
    names = [{name for name, p in encoder.named_parameters() if p.requires_grad} for encoder in (cached, plain)]
    assert names[0] == names[1]
    assert all(name.startswith("mapper.") for name in names[0])


@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_cached_encoder_combines_parts_of_plugin_encoder(config, tmp_path):
    class SummedConfig(EncoderConfig):
        name: Literal["summed"] = "summed"
        terms: list[Part("encoders")]

        def inner_encoders(self):
            return self.terms

        def build(self, runtime, parts=None):
            return Summed([encoders.construct(term, runtime) for term in self.terms] if parts is None else parts)

    class Summed(Encoder):
        def __init__(self, terms):
            super().__init__()
            self.terms, self.dim = nn.ModuleList(terms), terms[0].dim

        def encode(self, prompts):
            return Conditioning(sum(term.encode(prompts).states.mean(1, keepdim=True) for term in self.terms))

    encoders.register("summed", SummedConfig)
    try:
        encoder = {"name": "summed", "terms": [part.model_dump() for part in config.encoder.parts]}
        changed = override(config, {"encoder": encoder})
        assert {"prompts-clip-segment", "prompts-t5"} <= set(caching.make_caches(changed, CPU))
        cached, plain = (
            build_from_config(run, CPU).encoder.eval()
            for run in (changed, override(changed, {"cache": None, "output": str(tmp_path / "plain")}))
        )
    finally:
        encoders.unregister("summed")
    torch.testing.assert_close(cached.encode([CAPTIONS[0]]).states, plain.encode([CAPTIONS[0]]).states)


def test_reward_training_gives_equal_numbers_with_cache(config, tmp_path):
    from longalign.registry import rewards

    rewards.register("red", lambda images, prompts: images[:, 0].mean((1, 2)))
    (tmp_path / "prompts.txt").write_text("A red fox.\nA wall.\nThe sky.")
    trainer = {"name": "reward", "lora": {"rank": 2}, "num_steps": 2, "resolution": 16}
    trainer["gradient_steps"] = {"name": "grouped-random", "groups": 1}
    data = {"name": "prompts", "file": str(tmp_path / "prompts.txt")}
    try:
        changed = override(config, {"trainer": trainer, "rewards": ["red"], "data": data, "loop.steps": 2})
        caching.make_caches(changed, CPU)
        plain = train_metrics(override(changed, {"cache": None, "output": str(tmp_path / "plain")}))
        for line, cached in zip(plain, train_metrics(changed), strict=True):
            assert line == pytest.approx(cached, rel=1e-4)
    finally:
        rewards.unregister("red")


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"overflow": "truncate"}, {"pad": "none", "mask": True}])
@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_cached_encoder_matches_encoder_for_any_length_and_batch(config, tmp_path, part, settings):
    keys = type(config.encoder.parts[part]).model_fields
    supported = {key: value for key, value in settings.items() if key in keys}
    encoder = config.encoder.parts[part].frozen_config().model_copy(update=supported).build(CPU)
    # one sentence of 19 tokens fills CLIP's 20 states
    prompts = ["", "A fox.", "A red fox " * 6 + "sky", "A wall. " * 40, "The sky is green. " * 20, "A red wall"]
    store, length = Store(tmp_path / "states", {"a": 1}, writable=True), int(entries(encoder, [""], None)[0]["length"])
    for prompt, entry in zip(prompts, entries(encoder, prompts, length), strict=True):
        store.add(prompt_key(prompt), entry)
    store.flush()
    cached = CachedEncoder(Store(tmp_path / "states", {"a": 1}), None, device="cpu")
    for batch in (prompts, prompts[:2], prompts[:3], prompts[2:4], [prompts[3]], prompts[1:5:3]):
        actual, expected = cached.encode(batch), encoder.encode(batch)
        torch.testing.assert_close(actual.states, expected.states, rtol=1e-4, atol=1e-5)
        assert (actual.mask is None) == (expected.mask is None)
        assert actual.mask is None or torch.equal(actual.mask, expected.mask)


def test_make_caches_rejects_streams_and_invalid_configs(config, tmp_path):
    tars = {"name": "webdataset", "shards": str(tmp_path / "a.tar")}
    (tmp_path / "a.tar").write_bytes(b"")
    for call in (lambda run: caching.make_caches(run, CPU), lambda run: build_from_config(run, CPU).data):
        with pytest.raises(ValueError, match=r"'webdataset'.*stream"):
            call(override(config, {"data": tars}))
    with pytest.raises(FileNotFoundError, match=r"cache/latents.*longalign cache CONFIG"):
        fit(config, device="cpu")
    with pytest.raises(ConfigError, match=r"cache\.latents: 'prompts'"):
        override(config, {"trainer": None, "data": {"name": "prompts", "file": "x"}, "cache.latents": True})
    with pytest.raises(ConfigError, match=r"cache: .*both.*false"):
        override(config, {"cache.latents": False, "cache.prompts": False})
    with pytest.raises(ConfigError, match=r"data: .*required.*cache"):
        override(config, {"trainer": None, "data": None})


def test_make_caches_rejects_random_items(config, monkeypatch):
    from longalign.data.images.folder import Folder

    def load_item(self, index):
        return {"prompt": "A fox.", "image": torch.rand(3, 16, 16)}

    monkeypatch.setattr(Folder, "load_item", load_item)
    with pytest.raises(ValueError, match=r"item 0 .*cache\.latents"):
        caching.make_caches(config, CPU)


def test_cache_command(config, tmp_path, capsys, caplog):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    overrides = ["encoder.parts.0.max_tokens=18", "encoder.parts.0.overflow=truncate"]
    with caplog.at_level(logging.ERROR), pytest.warns(TruncationWarning, match="18"):
        assert main(["cache", str(path), *overrides, "--batch", "3"]) == 0
    assert "latents: 4 entries, 4 of them new" in capsys.readouterr().out
    assert main(["cache", str(path), "cache=null"]) == 2


def test_store_restores_ragged_tensors_from_several_shards(tmp_path):
    store = Store(tmp_path, {"a": 1}, writable=True, shard_bytes=100)
    entries = {key_of(str(i)): {"x": torch.full((i, 2), float(i)), "n": torch.tensor([i])} for i in range(1, 9)}
    for key, entry in entries.items():
        store.add(key, entry)
    store.flush()
    store = Store(tmp_path, {"a": 1})
    assert len(store) == 8 and len(list(tmp_path.glob("0*.safetensors"))) > 1
    for key, entry in entries.items():
        assert all(torch.equal(store[key][name], entry[name]) for name in ("x", "n"))
    (tmp_path / "000000.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"000000\.safetensors.*damaged"):
        Store(tmp_path, {"a": 1})


def test_store_names_damaged_files(tmp_path):
    entries_of = {key_of(f"{i}"): {"states": torch.full((4, 8), float(i)), "n": torch.tensor([i])} for i in range(5)}

    def write_store():
        store = Store(tmp_path / "store", {"a": 1}, writable=True)
        for key, entry in entries_of.items():
            store.add(key, entry)
        store.flush()
        return store

    shard = tmp_path / "store" / "000000.safetensors"
    write_store()
    assert oct(shard.stat().st_mode & 0o777) == oct(0o666 & ~_umask())
    content = shard.read_bytes()
    flipped = bytearray(content)
    flipped[content.find(torch.full((4, 8), 3.0).numpy().tobytes()) + 5] ^= 4
    shard.write_bytes(flipped)
    store = Store(tmp_path / "store", {"a": 1})
    assert all(torch.equal(store[key]["states"], entries_of[key]["states"]) for key in list(entries_of)[:3])
    with pytest.raises(ValueError, match=r"000000\.safetensors.*entry 3.*longalign cache"):
        store[key_of("3")]
    for damaged in (
        content[:200],
        content[:-1],
        content.replace(b'"checks"', b'"checkz"'),
        content.replace(b'"keys"', b'"keyz"'),
        b"",
    ):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000000\.safetensors.*damaged"):
            list(map(Store(tmp_path / "store", {"a": 1}).__getitem__, entries_of))
    shard.unlink()
    assert len(write_store()) == 5
    (tmp_path / "store" / "identity.json").write_text("{")
    with pytest.raises(ValueError, match=r"identity\.json.*longalign cache"):
        Store(tmp_path / "store", {"a": 1})


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_cached_images_name_a_damaged_list_of_items(config, caplog):
    caching.make_caches(config, CPU)
    assert config.cache is not None
    items = Path(config.cache.folder) / "latents" / "items.safetensors"
    content = items.read_bytes()
    for damaged in (b"", content[:100], content[:-1], content[:-1] + b"x"):
        items.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"items\.safetensors.*damaged"):
            _ = build_from_config(config).data
    items.unlink()
    caching.make_caches(config, CPU)
    assert len(build_from_config(config).data) == 5


def test_make_caches_rejects_a_locked_folder(config):
    assert config.cache is not None
    lock = Lock(Path(config.cache.folder))
    with pytest.raises(ValueError, match=f"process {os.getpid()} on .*{config.cache.folder}"):
        caching.make_caches(config, CPU)
    lock.release()
    assert caching.make_caches(config, CPU)


def test_fingerprint_of_hub_id_is_the_commit_to_load(tmp_path, monkeypatch):
    def model_info(self, repository, revision=None, timeout=None):
        if not online:
            raise ConnectionError
        return SimpleNamespace(sha="a" * 40)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    online = False
    assert fingerprint("owner/name", None, None, ["vae"]) is None
    assert fingerprint("owner/name", "c" * 40, None, ["vae"]) == f"commit {'c' * 40}"
    (tmp_path / "models--owner--name" / "refs").mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("b" * 40)
    assert fingerprint("owner/name", None, None, ["vae"]) == f"commit {'b' * 40}"
    online = True  # the branch has moved
    assert fingerprint("owner/name", None, None, ["vae"]) == f"commit {'a' * 40}"


@pytest.mark.parametrize("subfolder", ["", "inner", "inner/vae"])
def test_fingerprints_differ_for_weights_in_a_subfolder(tmp_path, subfolder):
    weights = tmp_path / subfolder.removesuffix("/vae") / "vae" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    digests = set()
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        digests |= set(fingerprints({"checkpoint": str(tmp_path), "subfolder": subfolder or None}, ["vae"]).values())
    assert len(digests) == 2
