"""Counts the bytes of tensors as they come and go, and runs networks without arithmetic as a GPU would run them."""

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
    """Inside, ``now`` is how many bytes of tensors there are, and ``peak`` the most that there were at any time.

    Memory counts from the operation that makes it, or first uses it, until nothing refers to it, forward and backward;
    views share that of their base. Tensors may be meta tensors: what an operation gives is then only asked once for the
    same shapes, which is several times as fast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        self._known: dict[Any, Any] = {}

    def hold(self, tensors: Any) -> None:
        """Counts tensors that are there already, in any nesting of lists and mappings."""
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
            return None  # changes nothing that is not there
        key = (func, *map(_described, leaves))
        if known := self._known.get(key):
            out: Any = tuple(
                None if d is None else torch.empty_strided(*d[1:], dtype=d[0], device="meta") for d in known
            )
            self.hold(out)
            return out if len(out) > 1 else out[0]
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple) else (out,)
        fresh = [isinstance(t, Tensor) and self._add(t) and t.is_meta and t.untyped_storage().nbytes() == t.nbytes
                 for t in made if t is not None]  # fmt: skip
        if fresh and all(fresh):
            self._known[key] = tuple(None if t is None else (t.dtype, t.shape, t.stride()) for t in made)
        elif isinstance(out, list):
            self.hold(out)
        return out


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape, leaf.stride()
    return type(leaf), leaf


class LikeCuda:
    """Inside, networks of meta tensors run as on CUDA: ``torch.autocast("cpu")`` narrows and widens what CUDA's does,
    attention is one kernel that keeps no weights, and numbers that are read back are zero."""

    def __init__(self) -> None:
        self._casts: dict[int, Tensor] | None = None
        self._patches = ExitStack()

    def __enter__(self) -> LikeCuda:
        ways = {"linear": self._narrow, "conv2d": self._narrow, "layer_norm": _widen, "group_norm": _widen}
        functions = {name: _casting(getattr(F, name), cast) for name, cast in ways.items()}
        functions["scaled_dot_product_attention"] = _casting(_attention, self._narrow)
        self._patches.enter_context(patch.multiple(F, **functions))
        self._patches.enter_context(patch.object(Tensor, "cpu", _read))
        self._patches.enter_context(patch.object(torch, "isfinite", _finite(torch.isfinite)))
        return self

    def __exit__(self, *_: Any) -> None:
        self._patches.close()

    @contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """Mixed precision. Copies of trained weights are kept till its end, as in CUDA."""
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
        # meta tensors have no content: what asks about it gets a tensor on the CPU, which says that all is finite
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
    kept = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, kept, dropout_p, is_causal, scale=scale)[0]
