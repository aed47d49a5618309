"""Denoiser calls without gradient replayed as graphs. Here, a graph repeats the call on the same tensors."""

import pytest
import torch

from longalign.backbones.graphs import GraphedCall
from longalign.encoders.base import Conditioning
from longalign.loop.fit import fit
from longalign.testing.tiny import tiny_backbone


def capture(call):
    """Repeats the call, writing to the same output, as a CUDA graph does."""
    capture.count += 1
    output = call().clone()

    def replay():
        output.copy_(call())

    return replay, output


@pytest.fixture
def graphed():
    capture.count = 0
    backbone = tiny_backbone()
    backbone.eval()
    return backbone, GraphedCall(backbone.predict, lambda: backbone.denoiser.training, capture)


def inputs(batch=2, length=3):
    return torch.randn(batch, 4, 4, 4), torch.full((batch,), 500), Conditioning(torch.randn(batch, length, 8))


@torch.no_grad()
def test_graphed_call_equals_call_with_one_graph_for_each_shape(graphed):
    backbone, call = graphed
    cases = (inputs(), inputs(), inputs(length=5), inputs(batch=1), inputs())
    outputs = [(call(*arguments), backbone.predict(*arguments)) for arguments in cases]
    assert capture.count == 3
    for got, expected in outputs:  # later calls did not overwrite earlier outputs
        torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_graphed_call_uses_changed_weights(graphed):
    backbone, call = graphed
    arguments = inputs()
    before = call(*arguments)
    for parameter in backbone.denoiser.parameters():
        parameter.mul_(1.5)
    torch.testing.assert_close(call(*arguments), backbone.predict(*arguments))
    assert not torch.allclose(call(*arguments), before) and capture.count == 1


def test_graphed_call_with_gradient_is_not_replayed(graphed):
    backbone, call = graphed
    backbone.train_all()
    assert call(*inputs()).requires_grad and capture.count == 0


@torch.no_grad()
def test_graphed_call_with_dropout_is_not_replayed():
    capture.count = 0
    module = torch.nn.Dropout(0.5)
    call = GraphedCall(lambda latents, timesteps, conditioning: module(latents), lambda: module.training, capture)
    arguments = inputs()
    torch.manual_seed(1)
    got = [call(*arguments) for _ in range(2)]
    torch.manual_seed(1)
    for value in got:  # the random numbers are those of calls without graphs
        assert torch.equal(value, module(arguments[0]))
    assert capture.count == 0
    module.eval()
    assert torch.equal(call(*arguments), arguments[0]) and capture.count == 1


def test_cuda_graphs_without_cuda(world, tmp_path):
    with pytest.raises(ValueError, match=r"loop\.cuda_graphs .*num_processes=1.*'cpu'.*false"):
        fit(world.align_config(tmp_path, cuda_graphs=True), device="cpu")
    with pytest.raises(ValueError, match=r"CUDA.*cpu.*loop\.cuda_graphs"):
        tiny_backbone().use_cuda_graphs()
