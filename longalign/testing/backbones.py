"""The conformance check of a backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.backbones.config import BackboneConfig
from longalign.encoders.base import Conditioning
from longalign.registry import backbones
from longalign.runtime import Runtime
from longalign.testing.common import CPU, checked_config, config_checks, expect, expect_close, run_checks


def check_backbone(config: Any, *, lora: Any, runtime: Runtime = CPU, size: int | None = None) -> None:
    """Checks that a backbone can be trained, sampled and saved.

    It checks the config (see `longalign.testing.common.config_checks`), shapes of latents and images, and the decoder's
    gradient. Predictions must depend on the conditioning, and gradient checkpointing must not change gradients. Nothing
    may be trainable before a LoRA is added. Adding, merging and reloading a LoRA must not change predictions. Training
    a LoRA must not change the predictions of the reference model. In full fine-tuning, all trainable weights must get a
    gradient.

    Args:
        config: name, mapping or config of the backbone.
        lora: `longalign.backbones.config.LoraConfig` of the LoRA to add, without dropout.
        runtime: device and dtype.
        size: side of the square test images in pixels; None is the native resolution.

    Raises:
        AssertionError: listing all failed checks.
    """
    checked = checked_config("backbones", config, BackboneConfig)
    widths = checked.widths()

    def build() -> Backbone:
        return backbones.construct(checked, runtime).eval()

    backbone = build()
    shape = backbone.latent_shape(size, size)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, *shape), generator=generator).to(backbone.device)
    timesteps = torch.tensor([10, len(backbone.noise_levels) - 1], device=backbone.device)

    def conditioning(seed: int = 0) -> Conditioning:
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(2, 7, widths[0] or 8, generator=generator)
        pooled = None if not checked.has_pooled else torch.randn(2, widths[1] or 8, generator=generator)
        return Conditioning(states, None, pooled).to(backbone.device)

    def predict(model: Backbone, seed: int = 0) -> Tensor:
        with torch.no_grad():
            return model.predict(latents, timesteps, conditioning(seed))

    def latents_and_images_have_their_shapes() -> None:
        height = size or backbone.resolution
        images = torch.rand(2, 3, height, height, generator=generator).to(backbone.device)
        encoded = backbone.encode_images(images)
        expect(
            encoded.shape == latents.shape,
            f"encode_images: expected {tuple(latents.shape)}, got {tuple(encoded.shape)}",
        )
        decoded = backbone.decode(latents)
        expect(decoded.shape == images.shape, f"decode: expected {tuple(images.shape)}, got {tuple(decoded.shape)}")
        expect(float(decoded.min()) >= 0 and float(decoded.max()) <= 1, "decoded images are not in [0, 1]")

    def the_decoder_has_gradient() -> None:
        leaf = latents.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(backbone.decode(leaf).sum(), leaf)
        expect(bool(gradient.isfinite().all()) and bool(gradient.any()), "the decoder's gradient is zero or not finite")

    def predictions_depend_on_the_conditioning() -> None:
        first, other = predict(backbone), predict(backbone, seed=1)
        expect(first.shape == latents.shape, f"predict: expected {tuple(latents.shape)}, got {tuple(first.shape)}")
        expect(not torch.equal(first, other), "a different conditioning gives the same prediction")

    def loras_are_added_merged_and_reloaded() -> None:
        model = build()
        expect(not any(p.requires_grad for p in model.parameters()), "a new backbone has trainable parameters")
        before = predict(model)
        parameters = model.add_lora(lora, "first")
        expect(bool(parameters) and all(p.requires_grad for p in parameters), "add_lora gives no trainable parameters")
        expect_close("prediction with a new LoRA", predict(model), before, atol=1e-4)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
        trained = predict(model)
        expect(not torch.allclose(trained, before, atol=1e-5), "the LoRA does not change the prediction")
        expect_close(
            "the reference model", model.predict_reference(latents, timesteps, conditioning()), before, atol=1e-4
        )
        again = build()
        again.load_lora(model.lora_state())
        expect_close("prediction with the LoRA loaded again", predict(again), trained, atol=1e-4)
        model.merge_lora()
        expect_close("prediction with the LoRA merged", predict(model), trained, 1e-2, 1e-3)

    def checkpointing_changes_no_gradient() -> None:
        grads = []
        for checkpointing in (False, True):
            torch.manual_seed(0)  # the LoRA starts from random numbers
            model = build()
            parameters = model.add_lora(lora, "first")
            model.denoiser.train()
            if checkpointing:
                model.enable_gradient_checkpointing()
            torch.manual_seed(0)
            loss = model.predict(latents, timesteps, conditioning()).float().square().mean()
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        expect_close("gradient with checkpointing", grads[1], grads[0], 1e-3, 1e-5)

    def full_fine_tuning_trains_only_weights_with_gradient() -> None:
        model = build()
        model.train_all()
        model.predict(latents, timesteps, conditioning()).float().square().mean().backward()
        missing = [name for name, p in model.denoiser.named_parameters() if p.requires_grad and p.grad is None]
        expect(
            not missing,
            "distributed training rejects weights without gradient; name their modules in 'unused_modules': "
            f"{', '.join(missing)}",
        )

    run_checks(
        "backbones",
        config,
        [
            *config_checks("backbones", checked),
            latents_and_images_have_their_shapes,
            the_decoder_has_gradient,
            predictions_depend_on_the_conditioning,
            loras_are_added_merged_and_reloaded,
            checkpointing_changes_no_gradient,
            full_fine_tuning_trains_only_weights_with_gradient,
        ],
    )
