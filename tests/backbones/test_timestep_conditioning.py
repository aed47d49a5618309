"""Conditionings that depend on the timestep, or combine several predictions, in all calls of a denoiser."""

from dataclasses import replace

import torch
from worlds import LORA, ToyEncoder

from longalign.backbones.graphs import GraphedCall
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_backbone
from longalign.trainers.lcm.config import LCMConfig
from longalign.trainers.lcm.trainer import LCMTrainer


class Difference(Conditioning):
    """Predicts twice the prediction with its states, multiplied by the timestep, minus the one with negative states."""

    def at(self, timestep):
        return Conditioning(self.states[..., :8] * timestep.view(-1, 1, 1) / 500)

    def predict(self, call, latents, timesteps):
        both = self.at(timesteps)
        both = replace(both, states=torch.cat([both.states, -both.states]))
        first, second = call(torch.cat([latents] * 2), torch.cat([timesteps] * 2), both).chunk(2)
        return 2 * first - second


def inputs():
    states = torch.randn(3, 5, 8)
    return torch.randn(3, 4, 4, 4), torch.tensor([999, 500, 20]), Difference(states.repeat(1, 1, 2))


def expected(predict, latents, timesteps, conditioning):
    states = conditioning.states[..., :8] * timesteps.view(-1, 1, 1) / 500
    return 2 * predict(latents, timesteps, Conditioning(states)) - predict(latents, timesteps, Conditioning(-states))


@torch.no_grad()
def test_every_prediction_uses_the_conditioning():
    trainer = LCMTrainer.from_config(
        LCMConfig(lora=LORA, ema_decay=0.9), Runtime(), backbone=tiny_backbone(), encoder=ToyEncoder()
    ).eval()
    backbone, arguments = trainer.backbone, inputs()
    for parameter in trainer.trainable():
        parameter.add_(0.3 * torch.randn_like(parameter))
    predictions = [backbone.predict, backbone.predict_reference, trainer.predict_target]
    for predict in predictions:
        torch.testing.assert_close(predict(*arguments), expected(predict, *arguments), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(backbone.predict(*arguments), backbone.predict_reference(*arguments), atol=1e-3)


@torch.no_grad()
def test_graphs_and_counted_operations_get_states_at_the_timestep():
    backbone, (latents, timesteps, conditioning) = tiny_backbone(), inputs()
    plain = Conditioning(conditioning.states[..., :8])
    wanted = expected(backbone.predict, latents, timesteps, conditioning)
    count = backbone.count_flops()
    backbone.predict(latents, timesteps, plain)
    once = count.total
    backbone.predict(latents, timesteps, conditioning)
    assert count.total == 3 * once  # the second prediction has twice the rows

    def capture(call):
        output = call().clone()
        return lambda: output.copy_(call()), output

    backbone._graphed = GraphedCall(backbone._ungraphed_call, lambda: None, capture)
    for _ in range(2):
        got = backbone.predict(latents, timesteps, conditioning)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert len(backbone._graphed._graphs) == 1
