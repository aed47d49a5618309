"""Counts the bytes of live tensors, and runs networks on meta tensors with the allocations of CUDA."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Context manager that tracks the bytes of live tensors: ``now`` and ``peak``.

    A storage counts from the operation that allocates or first uses it until it is no longer referenced, in forward and
    backward passes. Views share the storage of their base. Tensors may be meta tensors. The output shapes of their
    operations are then cached by input shapes, which is several times as fast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        self._outputs: dict[Any, Any] = {}

    def hold(self, tensors: Any) -> None:
        """Counts existing tensors, in any nesting of lists and mappings."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._add(tensor)

    def _add(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return False
        self._storages[key] = weakref.ref(storage, partial(self._free, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        return True

    def _free(self, key: int, size: int, _: Any) -> None:
        del self._storages[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.hold(tensors)
        if func._schema.is_mutable and not func._schema.returns and all(t.is_meta for t in tensors):
            return None  # in-place operations on meta tensors have no effect
        key = (func, *map(_signature, leaves))
        if outputs := self._outputs.get(key):
            out: Any = tuple(
                None if d is None else torch.empty_strided(*d[1:], dtype=d[0], device="meta") for d in outputs
            )
            self.hold(out)
            return out if len(out) > 1 else out[0]
        out = func(*args, **(kwargs or {}))
        tensors_out = out if isinstance(out, tuple) else (out,)
        allocated = [isinstance(t, Tensor) and self._add(t) and t.is_meta and t.untyped_storage().nbytes() == t.nbytes
                 for t in tensors_out if t is not None]  # fmt: skip
        if allocated and all(allocated):
            self._outputs[key] = tuple(None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors_out)
        elif isinstance(out, list):
            self.hold(out)
        return out


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape, leaf.stride()
    return type(leaf), leaf


class LikeCuda:
    """Context manager that runs networks on meta tensors as on CUDA.

    ``torch.autocast("cpu")`` casts the operations that CUDA's autocast casts. Attention is one kernel that does not
    store the attention weights. Values that are read back are zero.
    """

    def __init__(self) -> None:
        self._casts: dict[int, Tensor] | None = None
        self._patches = ExitStack()

    def __enter__(self) -> LikeCuda:
        casts = {"linear": self._narrow, "conv2d": self._narrow, "layer_norm": _widen, "group_norm": _widen}
        functions = {name: _casting(getattr(F, name), cast) for name, cast in casts.items()}
        functions["scaled_dot_product_attention"] = _casting(_attention, self._narrow)
        self._patches.enter_context(patch.multiple(F, **functions))
        self._patches.enter_context(patch.object(Tensor, "cpu", _read))
        to_list = Tensor.tolist
        self._patches.enter_context(patch.object(Tensor, "tolist", lambda tensor: to_list(_read(tensor))))
        self._patches.enter_context(patch.object(torch, "isfinite", _finite(torch.isfinite)))
        return self

    def __exit__(self, *_: Any) -> None:
        self._patches.close()

    @contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """Mixed precision. Casts of trainable weights are cached until the end, as on CUDA."""
        self._casts = {}
        try:
            with torch.autocast("cpu", dtype):
                yield
        finally:
            self._casts = None

    def _narrow(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        dtype = torch.get_autocast_dtype("cpu")
        if self._casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _finite(isfinite: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @wraps(isfinite)
    def call(tensor: Tensor) -> Tensor:
        # meta tensors have no values: report all of them as finite, in a tensor on the CPU
        return torch.ones(tensor.shape, dtype=torch.bool) if tensor.is_meta else isfinite(tensor)

    return call


def _read(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


def _casting(function: Callable[..., Tensor], cast: Callable[[Any], Any]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    return call


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
               scale: float | None = None, **_: Any) -> Tensor:  # fmt: skip
    compute_log_sumexp = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, compute_log_sumexp, dropout_p, is_causal, scale=scale)[0]
