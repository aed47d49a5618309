"""The backbone `sd`: layout, latent scaling, LoRA, full fine-tuning."""

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel

from longalign.backbones.config import LoraConfig
from longalign.backbones.lora import inject_lora, lora_layers, lora_targets, stochastic_round
from longalign.backbones.stable_diffusion.config import SDConfig
from longalign.backbones.stable_diffusion.sd import SDBackbone, scheduler_constants
from longalign.encoders.base import Conditioning
from longalign.registry import backbones
from longalign.testing.tiny import tiny_backbone, tiny_sd, tiny_unet

LORA = LoraConfig(rank=2, dropout=0.0)


def conditioning(count=2, width=8):
    return Conditioning(torch.randn(count, 3, width, generator=torch.Generator().manual_seed(5)))


def predict(backbone, count=2):
    latents = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    return backbone.predict(latents, torch.tensor([10, 900][:count]), conditioning(count))


def perturb(parameters, std=0.3):
    with torch.no_grad():
        for p in parameters:
            p.add_(std * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def test_lora_targets_of_sd15_published_numbers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        assert sum(p.numel() for p in unet.parameters()) == 859_520_964
        targets = lora_targets(unet)
        parameters = inject_lora(unet, LoraConfig(rank=32), "align")
    assert len(targets) == 224 and len(parameters) == 448
    assert sum(p.numel() for p in parameters) == 28_291_072
    assert targets[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert sum(".attn" in t for t in targets) == 128
    assert sum(".resnets." in t for t in targets) == 80
    assert sum(t.endswith("ff.net.0.proj") for t in targets) == 16
    layers = {name for name, m in unet.named_modules() if hasattr(m, "lora_A")}
    assert layers == set(targets)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


def test_sd_loads_diffusers_folder(folder):
    backbone = backbones.build({"name": "sd", "checkpoint": str(folder)})
    assert isinstance(backbone, SDBackbone)
    assert backbone.prediction == "epsilon" and backbone.resolution == 64
    assert backbone.latent_shape() == (4, 8, 8) and backbone.latent_shape(128, 64) == (4, 16, 8)
    assert len(backbone.noise_levels) == 1000
    assert backbone.noise_levels.signal[0] ** 2 == pytest.approx(1 - 0.00085)
    assert not any(p.requires_grad for p in backbone.parameters())
    with pytest.raises(ValueError, match="divisible by 8, got 60 x 64"):
        backbone.latent_shape(60, 64)
    half = backbones.build({"name": "sd", "checkpoint": str(folder), "dtype": "bfloat16"})
    assert half.denoiser.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    parameters = half.add_lora(LORA, "x")
    assert {p.dtype for p in parameters} == {torch.float32}


def test_encode_and_decode_scale_and_shift_latents():
    backbone = tiny_backbone(scaling_factor=0.5, shift_factor=0.25)
    images = torch.rand(2, 3, 8, 8)
    latents = backbone.encode_images(images, torch.Generator().manual_seed(0))
    raw = backbone.vae.encode(2 * images - 1).latent_dist.sample(torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 4, 4) and not latents.requires_grad
    assert torch.allclose(latents, (raw - 0.25) * 0.5)
    decoded = backbone.decode(latents.requires_grad_())
    assert torch.allclose(decoded, (backbone.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1), atol=1e-6)
    decoded.mean().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_gradient_checkpointing_saves_memory_keeps_gradient():
    backbone = tiny_backbone()
    backbone.train_all()

    def step():
        saved, latents = [], torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(6)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            decoded = backbone.decode(latents)
            decoder = sum(saved)
            prediction = backbone.predict(latents, torch.tensor([10]), conditioning(1))
        (decoded.mean() + prediction.square().mean()).backward()
        return decoder, sum(saved) - decoder, latents.grad

    decoder, unet, gradient = step()
    backbone.enable_gradient_checkpointing()
    checkpointed_decoder, checkpointed_unet, checkpointed_gradient = step()
    assert checkpointed_decoder < decoder / 2 and checkpointed_unet < unet / 2
    torch.testing.assert_close(checkpointed_gradient, gradient)


def test_predict_passes_mask_to_unet():
    backbone = tiny_backbone()
    latents, times = torch.randn(1, 4, 4, 4), torch.tensor([500])
    states = torch.randn(1, 3, 8)
    masked = Conditioning(states, mask=torch.tensor([[True, True, False]]))
    shorter = Conditioning(states[:, :2])
    expected = backbone.predict(latents, times, shorter)
    assert torch.allclose(backbone.predict(latents, times, masked), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"width 8, .*width 5"):
        backbone.predict(latents, times, conditioning(1, 5))


def test_add_lora_starts_at_zero_update_and_only_it_is_trainable():
    backbone = tiny_backbone()
    before = predict(backbone)
    parameters = backbone.add_lora(LoraConfig(rank=64, dropout=0.0), "align")
    assert torch.equal(predict(backbone), before)
    downs, ups = parameters[0::2], parameters[1::2]
    assert all((p == 0).all() for p in ups)
    assert torch.cat([p.flatten() for p in downs]).std().item() == pytest.approx(1 / 64, rel=0.03)
    assert [p for p in backbone.parameters() if p.requires_grad] == parameters
    predict(backbone).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ups)
    assert all(p.grad is None for p in backbone.vae.parameters())


def test_lora_scale_multiplies_update():
    backbone, double = tiny_backbone(), tiny_backbone()
    for b, scale in ((backbone, 1.0), (double, 2.0)):
        torch.manual_seed(0)
        perturb(b.add_lora(LoraConfig(rank=2, scale=scale, dropout=0.0), "x"))
    name, layer = next((n, m) for n, m in backbone.denoiser.named_modules() if hasattr(m, "lora_A"))
    x = torch.randn(1, layer.in_features)
    update = layer(x) - layer.base_layer(x)
    assert torch.allclose(update, x @ layer.lora_A["x"].weight.T @ layer.lora_B["x"].weight.T, atol=1e-6)
    other = double.denoiser.get_submodule(name)
    assert torch.allclose(other(x) - other.base_layer(x), 2 * update, atol=1e-5)


@pytest.mark.parametrize("placement", ["down", "up"])
def test_lora_dropout_placement_and_only_in_training(placement):
    backbone = tiny_backbone()
    perturb(backbone.add_lora(LoraConfig(rank=2, dropout=0.5, dropout_placement=placement), "x"))
    layer = next(m for m in backbone.denoiser.modules() if hasattr(m, "lora_A") and hasattr(m, "in_features"))
    x = torch.ones(1, layer.in_features)
    without = (layer.eval()(x) - layer.base_layer(x)).flatten()
    noisy = (layer.train()(x) - layer.base_layer(x)).flatten()
    dropped_or_doubled = [
        bool(torch.isclose(n, torch.tensor(0.0), atol=1e-6) or torch.isclose(n, 2 * q, rtol=1e-3))
        for n, q in zip(noisy, without, strict=True)
    ]
    assert all(dropped_or_doubled) == (placement == "up")
    assert not torch.allclose(noisy, without)


def test_add_lora_merges_previous_lora():
    backbone = tiny_backbone()
    perturb(backbone.add_lora(LORA, "align"))
    with_align = predict(backbone)
    parameters = backbone.add_lora(LORA, "reward")
    assert torch.allclose(predict(backbone), with_align, atol=1e-5)
    assert [p for p in backbone.parameters() if p.requires_grad] == parameters
    perturb(parameters)
    with_both = predict(backbone)
    assert not torch.allclose(with_both, with_align, atol=1e-3)
    assert backbone.lora_names == ["align", "reward"] and backbone.unused_name("reward") == "reward-2"
    reloaded = tiny_backbone()
    reloaded.load_lora(backbone.lora_state())
    assert torch.equal(predict(reloaded), with_both)
    backbone.merge_lora()
    assert torch.allclose(predict(backbone), with_both, atol=1e-5)
    assert [lora.name for lora in backbone.lora_state()] == ["align", "reward"]
    with pytest.raises(ValueError, match=r"LoRA 'align'; .*\['align', 'reward'\]"):
        backbone.add_lora(LORA, "align")
    with pytest.raises(ValueError, match=r"without LoRA.*\['align', 'reward'\]"):
        reloaded.load_lora([])


@pytest.mark.parametrize("full", [False, True])
def test_predict_reference_after_training(full):
    backbone = tiny_backbone()
    perturb(backbone.add_lora(LORA, "align"))
    before = predict(backbone)
    if full:
        backbone.keep_reference_model()
        parameters = backbone.train_all()
    else:
        parameters = backbone.add_lora(LORA, "x")
    perturb(parameters)
    after = predict(backbone)
    assert not torch.allclose(after, before, atol=1e-3)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    start = backbone.predict_reference(latents, torch.tensor([10, 900]), conditioning())
    assert torch.allclose(start, before, atol=1e-5) and not start.requires_grad
    assert torch.equal(predict(backbone), after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_lora_in_half_precision_is_unbiased(dtype):
    backbone, eps = tiny_backbone(), torch.finfo(dtype).eps
    backbone.denoiser.to(dtype)
    parameters = backbone.add_lora(LORA, "x")
    layers = [layer.get_base_layer() for _, layer in lora_layers(backbone.denoiser, "x")]
    with torch.no_grad():
        for weight in (*parameters, *(layer.weight for layer in layers)):
            weight.fill_(1.0)
        for up in parameters[1::2]:
            up.fill_(eps / 16 / LORA.rank)
    backbone.merge_lora()
    merged = torch.cat([layer.weight.flatten() for layer in layers]).float()
    assert set(merged.unique().tolist()) == {1.0, 1.0 + eps}
    assert (merged - 1).mean() == pytest.approx(eps / 16, rel=0.2)


def test_stochastic_round_keeps_representable_numbers():
    exact = torch.tensor([0.0, 1.0, -1.5, 2.0**-20, -3.0, 1000.0])
    generator = torch.Generator().manual_seed(0)
    assert all(torch.equal(stochastic_round(exact, torch.bfloat16, generator).float(), exact) for _ in range(20))


def test_predict_reference_of_bfloat16_network_after_train_all():
    backbone = tiny_backbone()
    backbone.denoiser.to(torch.bfloat16)
    backbone.keep_reference_model()
    before = predict(backbone)
    backbone.train_all()
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    start = backbone.predict_reference(latents, torch.tensor([10, 900]), conditioning())
    assert torch.allclose(start, before, atol=0.05)


def test_load_lora_rejects_weights_of_different_model():
    backbone, other = tiny_backbone(), tiny_backbone()
    other.add_lora(LORA, "x")
    (lora,) = other.lora_state()
    with pytest.raises(ValueError, match=r"'.*lora_A.weight' .*\(3, 8.*\), got \(2, 8"):
        backbone.load_lora([replace(lora, config=LoraConfig(rank=3))])
    with pytest.raises(ValueError, match=r"'.*lora_.\.weight' .*\(1 missing, 0 unknown\)"):
        tiny_backbone().load_lora([replace(lora, state=dict(list(lora.state.items())[1:]))])


def test_full_state_contains_merged_lora():
    backbone = tiny_backbone()
    perturb(backbone.add_lora(LORA, "align"))
    perturb(backbone.train_all(), 0.01)
    assert backbone.lora_names == [] and all(p.requires_grad for p in backbone.denoiser.parameters())
    perturb(backbone.add_lora(LORA, "reward"))
    reloaded = tiny_backbone()
    reloaded.load_full(backbone.full_state())
    reloaded.load_lora(backbone.lora_state())
    assert torch.equal(predict(reloaded), predict(backbone))


def test_sd_rejects_unsupported_unets():
    vae = tiny_backbone().vae
    with pytest.raises(ValueError, match=r"9 channels .*VAE has 4"):
        SDBackbone(tiny_unet(channels=9), vae, torch.linspace(1, 0.1, 10), "epsilon")
    with pytest.raises(ValueError, match="class_embed_type=timestep"):
        SDBackbone(tiny_unet(class_embed_type="timestep"), vae, torch.linspace(1, 0.1, 10), "epsilon")


def test_scheduler_constants_values_and_rejections():
    pndm = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    alphas, prediction = scheduler_constants({**pndm, "beta_start": 0.00085, "beta_end": 0.012})
    assert prediction == "v_prediction" and alphas[0] == pytest.approx(1 - 0.00085)
    # diffusers' DDIM clips by default
    with pytest.raises(ValueError, match="clip_sample=true"):
        scheduler_constants({"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match="thresholding=true"):
        scheduler_constants({**pndm, "thresholding": True})
    with pytest.raises(ValueError, match="'Nonesuch'"):
        scheduler_constants({"_class_name": "Nonesuch"})
    assert hasattr(diffusers, "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ValueError, match=r"alphas_cumprod.*FlowMatchEulerDiscreteScheduler.*'sd3'"):
        scheduler_constants({"_class_name": "FlowMatchEulerDiscreteScheduler"})


def test_sd_and_lora_config_reject_wrong_values():
    with pytest.raises(ValueError, match="dtype"):
        SDConfig(checkpoint="x", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank"):
        LoraConfig(rank=0)


def test_posterior_rejects_images_of_wrong_range_or_dtype():
    backbone = tiny_backbone()
    images = torch.rand(1, 3, 8, 8)
    backbone.posterior(images)
    for wrong in (images * 255, images * 4 - 2, (images * 255).byte()):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            backbone.posterior(wrong)
