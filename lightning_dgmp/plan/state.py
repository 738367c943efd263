"""What an optimizer will keep of each parameter."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["state_bytes"]

_KNOWN = ("torch.optim.", "lightning_dgmp.optim.")  # whose step does nothing but step
_AS_ADAM = 2  # numbers of a parameter that others are taken to keep


def state_bytes(optimizer: Optimizer) -> dict[Tensor, int]:
    """The bytes of state of each parameter, before there is any: an optimizer like this makes a step without values."""
    found: dict[Tensor, int] = {}
    for group in optimizer.param_groups:
        of_looks: dict[Any, int] = {}
        for parameter in group["params"]:
            if parameter.requires_grad:
                looks = parameter.shape, parameter.dtype
                if looks not in of_looks:
                    of_looks[looks] = _bytes_after_step(optimizer, group, parameter)
                found[parameter] = of_looks[looks]
    return found


def _bytes_after_step(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> int:
    kind = type(optimizer)
    if f"{kind.__module__}.".startswith(_KNOWN):
        like = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        like.grad = torch.empty_like(like)
        how: dict[str, Any] = {name: False for name in ("foreach", "fused", "capturable") if name in group}
        other = object.__new__(kind)
        changed = {**group, **how, "params": [like]}
        other.__dict__.update(vars(optimizer), param_groups=[changed])
        other.state = defaultdict(dict)
        other.__dict__.update({name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")})
        try:
            with torch.no_grad(), _Ones():
                inspect.unwrap(kind.step)(other)
            tensors = [value for value in other.state[like].values() if isinstance(value, Tensor)]
            return sum(tensor.nbytes for tensor in tensors if tensor.dim())
        except Exception:  # it does not run so
            pass
    return _AS_ADAM * parameter.numel() * parameter.element_size()


class _Ones(TorchDispatchMode):
    """Answers 1 where a value is asked for that does not exist."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        return func(*args, **(kwargs or {}))
