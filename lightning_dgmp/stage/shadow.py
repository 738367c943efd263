"""Shadows: parameters of other stages, which have a shape, a dtype and a device, and say so if asked for more."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dgmp.ghost import GhostError
from lightning_dgmp.nests import tensors_in

__all__ = ["Shadow", "cast_shadow", "holds_parameters", "restore", "taking_copies"]


class Shadow(nn.Parameter):
    """What a parameter of another stage is meanwhile: the same object, of this class.

    It holds one element of storage. Callbacks may freeze it, count it and move it, but not read or write its values.
    """

    whose: str
    original: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        is_attribute = name in ("__get__", "__set__")
        name = getattr(getattr(func, "__self__", None), "__name__", "") if is_attribute else name
        if name == "copy_" and _taken is not None and isinstance(args[0], Shadow):
            _taken(args[0], args[1])
            return args[0]
        if name == "equal":  # asked by Lightning's finetuning callbacks to see whether two parameters are one
            return args[0] is args[1]
        shadow = args[0] if args else None
        if not isinstance(shadow, Shadow) or name not in (_ATTRIBUTES if is_attribute else _METHODS):
            raise GhostError(_of(args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            if name in _CASTS:  # of the one element
                out = func(shadow.as_strided((), ()), *args[1:], **(kwargs or {})).expand(shadow.shape)
                return shadow if _are_alike(out, shadow) else _like(out, shadow)
            if name in _LAYOUT:  # as where it is real
                return func(torch.empty(shadow.shape, dtype=shadow.dtype, device="meta"), *args[1:], **(kwargs or {}))
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out is not shadow and name not in _OWN:
                out = _like(out, shadow)
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise GhostError(_of(self, {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<parameter {self.whose}, whose values are not here>"


def _like(out: Tensor, shadow: Shadow) -> Shadow:
    new: Any = out.as_subclass(Shadow)
    new.whose, new.original = shadow.whose, shadow.original
    return new  # type: ignore[no-any-return]


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


_taken: Callable[[Shadow, Tensor], None] | None = None


@contextlib.contextmanager
def taking_copies(take: Callable[[Shadow, Tensor], None]) -> Iterator[None]:
    """Let ``shadow.copy_(tensor)`` be ``take(shadow, tensor)``, as where a state is loaded."""
    global _taken
    _taken = take
    try:
        yield
    finally:
        _taken = None


def cast_shadow(parameter: nn.Parameter, whose: str) -> None:
    """Take the values of ``parameter`` away; ``whose`` names it and its stage."""
    nothing = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    parameter.data = nothing.expand(parameter.shape)
    parameter.grad = None
    original: Any = type(parameter)
    parameter.__class__ = Shadow
    assert isinstance(parameter, Shadow)
    parameter.whose, parameter.original = whose, original


def restore(parameter: nn.Parameter, value: Tensor | None = None) -> None:
    """Give a shadow storage again, with ``value``, or undefined values."""
    assert isinstance(parameter, Shadow)
    shape, dtype, device = parameter.shape, parameter.dtype, parameter.device
    parameter.__class__ = parameter.original
    del parameter.whose, parameter.original
    parameter.data = torch.empty(shape, dtype=dtype, device=device) if value is None else value.to(device, dtype)


def holds_parameters(nest: Any) -> bool:
    """Whether a pickle of ``nest`` would have the values of parameters, as that of modules has."""
    finder = _Finder(io.BytesIO())
    with contextlib.suppress(Exception):  # whoever writes it will see
        finder.dump(nest)
    return finder.has_found


class _Finder(pickle.Pickler):
    has_found = False

    def persistent_id(self, obj: Any) -> Any:
        self.has_found |= isinstance(obj, nn.Parameter)
        return "tensor" if isinstance(obj, Tensor) else None


def _of(args: Any, kwargs: Any) -> str:
    shadows = tensors_in((args, kwargs), Shadow)
    return (
        "A hook or callback may use the values of parameters of its own stage alone, but it asked for those of"
        f" {shadows[0].whose}. Averages of weights and the like are not supported: use another strategy for them. To"
        " look at the whole model, do it within `with trainer.strategy.whole_model():`, which all processes must enter"
        " at the same point. If a fit has failed before, make the module anew."
    )


_ATTRIBUTES = frozenset(
    """
    H T data device dtype grad grad_fn is_cpu is_cuda is_ipu is_leaf is_meta is_mkldnn is_mps is_mtia is_nested
    is_quantized is_sparse is_sparse_csr is_xla is_xpu itemsize layout mH mT name names nbytes ndim output_nr
    requires_grad retains_grad shape _backward_hooks _base _post_accumulate_grad_hooks _version
    """.split()  # noqa: SIM905
)
# What has values of its own.
_OWN = frozenset(
    """
    empty_like full_like grad grad_fn new_empty new_full new_ones new_tensor new_zeros ones_like rand_like randn_like
    zeros_like
    """.split()  # noqa: SIM905
)
_CASTS = frozenset({"bfloat16", "cpu", "cuda", "double", "float", "half", "to"})
_LAYOUT = frozenset({"is_contiguous", "stride"})
_METHODS = (
    _OWN
    | _CASTS
    | frozenset(
        """
    __len__ _has_compatible_shallow_copy_type cpu cuda data_ptr dense_dim detach dim element_size flatten get_device
    is_complex is_conj is_contiguous is_floating_point is_inference is_neg is_pinned is_same_size is_shared is_signed
    ndimension nelement numel permute register_hook register_post_accumulate_grad_hook requires_grad_ retain_grad size
    storage_offset stride t to transpose type untyped_storage view view_as
    """.split()  # noqa: SIM905
    )
)
