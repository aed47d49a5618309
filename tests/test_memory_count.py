"""Memory counting of `benchmarks/memory.py`, on cases computed by hand."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

SPEC = importlib.util.spec_from_file_location("_live", Path(__file__).parents[1] / "benchmarks" / "_live.py")
live_module = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(live_module)
Live, LikeCuda = live_module.Live, live_module.LikeCuda


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_memory_two_linears_forward_backward(device):
    """Layers 8 -> 16 -> 4, 10 rows, float32 (4 bytes per value)."""
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)).to(device)
    weights = 4 * (8 * 16 + 16 * 4)
    with Live() as live:
        live.hold(list(net.parameters()))
        assert live.now == weights
        x = torch.ones(10, 8, device=device)
        out = net(x)
        # input, hidden states, output
        activations = 4 * 10 * (8 + 16 + 4)
        assert live.now == live.peak == weights + activations
        (gradient,) = torch.autograd.grad(out, net[0].weight, torch.ones_like(out))
        # peak: gradients of both layers' outputs; hidden states are freed before the weight's gradient is allocated
        assert live.peak == weights + activations + 4 * 10 * (4 + 16)
        assert live.now == weights + 4 * 10 * (8 + 4) + 4 * 8 * 16
        del gradient, out
        assert live.now == weights + 4 * 10 * 8
        del x
    assert live.now == weights


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_memory_views_and_inplace_ops_are_free(device):
    with Live() as live:
        x = torch.zeros(6, 4, device=device)
        views = [x.view(24), x[:2], x.t(), *x.chunk(2)]
        x.add_(1).mul_(2)
        torch._foreach_add_([x], 1.0)
        assert live.now == live.peak == 96
        del x
        assert live.now == 96
        del views
        assert live.now == 0


def test_live_cached_ops_keep_shape_and_layout():
    def run():
        x = torch.zeros(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
        mean, deviation = torch.var_mean(x.half(), 1)
        return [x.half(), x.half().bfloat16(), mean, deviation, x.sum(1), x.sum(1, keepdim=True)]

    with Live():
        first_run, cached_run = run(), run()
    assert [(t.shape, t.stride(), t.dtype) for t in first_run] == [(t.shape, t.stride(), t.dtype) for t in cached_run]
    assert not first_run[0].is_contiguous()


def test_like_cuda_autocast():
    with LikeCuda() as cuda, Live() as live:
        layer, norm = nn.Linear(8, 8, bias=False, device="meta"), nn.LayerNorm(8, device="meta")
        with cuda.autocast(torch.bfloat16):
            narrow = layer(torch.ones(1, 8, device="meta"))
            assert narrow.dtype == torch.bfloat16 and norm(narrow).dtype == torch.float32
            before = live.now
            layer(narrow)
            assert live.now == before  # autocast caches the weight's copy
        assert layer(torch.ones(1, 8, device="meta")).dtype == torch.float32


def test_like_cuda_attention_keeps_no_weights():
    with LikeCuda(), Live() as live:
        q = torch.ones(1, 2, 512, 16, device="meta", requires_grad=True)
        out = F.scaled_dot_product_attention(q, q, q)
    assert out.shape == q.shape and out.requires_grad
    # no 2 x 512 x 512 weights: input, output, and one value per query
    assert 4 * 2 * 512 * (16 + 16 + 1) <= live.peak < 4 * 2 * 512 * (16 + 16 + 2)


def test_like_cuda_reads_meta_tensors_as_zero():
    with LikeCuda():
        assert torch.ones(3, dtype=torch.long, device="meta").cpu().tolist() == [0, 0, 0]
        assert torch.ones(1).cpu().item() == 1
    with pytest.raises(NotImplementedError):
        torch.ones(3, device="meta").cpu()
