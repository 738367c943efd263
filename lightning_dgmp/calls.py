"""Interception of module calls, and of the parameters that they read.

Things are done to the user's modules while a step runs, and undone after it: every call of a submodule goes through a
handler of ours, entries of ``_parameters`` are exchanged, and backward hooks are set aside where there is no graph.
This file is the only one that does any of it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dgmp.ghost import Ghost, GhostError

__all__ = [
    "CallHandler",
    "ParameterSlots",
    "assigning_data",
    "custom_functions",
    "data_assignments",
    "has_backward_hooks",
    "intercepted_calls",
    "no_backward_hooks",
]

#: ``handler(call, module, path, args, kwargs)`` does what a call of ``module`` should do; ``call`` is the original.
CallHandler = Callable[[Callable[..., Any], nn.Module, str, tuple[Any, ...], dict[str, Any]], Any]


class _Call(partial):  # type: ignore[type-arg]
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _nothing, ()


def _nothing() -> None: ...


@contextmanager
def intercepted_calls(root: nn.Module, handler: CallHandler, paths: Container[str] | None = None) -> Iterator[None]:
    """Send every call of ``root`` and its submodules, hooks included, through ``handler``; of ``paths`` alone if given.

    ``nn.Module.__call__`` looks for ``_compiled_call_impl`` on the instance first (that is how ``module.compile()``
    works), so nothing is patched but the instances, and copies or pickles of them made meanwhile are clean: modules
    leave it out, and metrics of torchmetrics, which do not, get ``None``.
    """
    touched: list[tuple[nn.Module, Any]] = []
    for path, module in root.named_modules():
        if paths is not None and path not in paths:
            continue
        before = module.__dict__.get("_compiled_call_impl")
        call = before if before is not None else module._call_impl
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            call = partial(_without_fast_path, module, call)
        module.__dict__["_compiled_call_impl"] = _Call(_through, handler, call, module, path)
        touched.append((module, before))
    try:
        yield
    finally:
        for module, before in touched:
            if before is None:
                module.__dict__.pop("_compiled_call_impl", None)
            else:
                module.__dict__["_compiled_call_impl"] = before


@contextmanager
def custom_functions(around: Callable[..., Any]) -> Iterator[None]:
    """Send every ``torch.autograd.Function.apply`` through ``around(apply, cls, args, kwargs)``.

    It is the one operation that does not ask its arguments what to do: given a ghost it would run on an empty shell.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return around(partial(original.__func__, cls), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


_OWN_DATA: Any = torch._C.TensorBase.data


def _assign_data(tensor: Tensor, value: Any) -> None:
    if isinstance(value, Ghost) and not isinstance(tensor, Ghost):
        value.family.call(_OWN_DATA.__set__, (tensor, value), {})
    else:
        _OWN_DATA.__set__(tensor, value)


class _Data(property):
    __name__ = "data"  # as of the descriptor that it stands for


_DATA: Any = _Data(_OWN_DATA.__get__, _assign_data)


@contextmanager
def data_assignments() -> Iterator[None]:
    """Let a ghost decide what ``tensor.data = ghost`` does.

    Torch asks the tensor alone, and a real one would get the memory of the ghost, which is none.
    """
    is_outermost = "data" not in torch.Tensor.__dict__
    torch.Tensor.data = _DATA
    try:
        yield
    finally:
        if is_outermost:
            del torch.Tensor.data


@contextmanager
def assigning_data(convert: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let ``tensor.data = value`` assign ``convert(tensor, value)``."""
    exchanged: Any = _Data(_OWN_DATA.__get__, lambda t, value: _OWN_DATA.__set__(t, convert(t, value)))
    torch.Tensor.data = exchanged
    try:
        yield
    finally:
        del torch.Tensor.data


@contextmanager
def no_backward_hooks(root: nn.Module) -> Iterator[None]:
    """Let ``root`` and its submodules have no backward hooks: ghosts have no graph to hang them on."""
    modules = [module for module in root.modules() if has_backward_hooks(module)]
    kept = [(module, module._backward_hooks, module._backward_pre_hooks) for module in modules]
    for module in modules:
        module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in kept:
            module._backward_hooks, module._backward_pre_hooks = hooks, pre_hooks


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether ``module`` wants to see the gradients of its outputs or inputs."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _through(
    handler: CallHandler, call: Callable[..., Any], module: nn.Module, path: str, *args: Any, **kwargs: Any
) -> Any:
    return handler(call, module, path, args, kwargs)


def _without_fast_path(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a part of a Transformer as in training.

    In evaluation torch would make a nested tensor of padded input, which cannot cross a cut, and would not call what is
    inside of a layer.
    """
    if not torch.backends.mha.get_fastpath_enabled():
        return call(*args, **kwargs)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if not isinstance(module, nn.TransformerEncoder) or not module.use_nested_tensor:
            return call(*args, **kwargs)
        with intercepted_calls(module.layers[-1], partial(_with_zeros_for_padding, module), [""]):
            return call(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _with_zeros_for_padding(
    encoder: nn.TransformerEncoder, call: Callable[..., Any], _: nn.Module, path: str, args: Any, kwargs: Any
) -> Tensor:
    """The output of the last layer as a nested tensor would leave it, where torch would make one."""
    out: Tensor = call(*args, **kwargs)
    padding = kwargs.get("src_key_padding_mask")
    if (
        padding is None
        or kwargs.get("src_mask") is not None
        or out.dim() != 3
        or encoder.layers[0].training
        or out.requires_grad
        or torch.is_autocast_enabled()
    ):
        return out
    if encoder.mask_check:
        shape = padding.new_empty(*padding.shape, 1)
        if not torch._nested_tensor_from_mask_left_aligned(shape, padding.logical_not()):
            return out
    return out.masked_fill(padding.bool().unsqueeze(-1), 0.0)


class ParameterSlots:
    """The places in which the parameters of a module tree stand, to put other tensors there for a while.

    Args:
        root: The module tree.

    A parameter that is registered under several names has several places; its name is the first of them.
    """

    def __init__(self, root: nn.Module) -> None:
        self.names: dict[nn.Parameter, str] = {}
        self._places: list[tuple[dict[str, Any], str, nn.Parameter, str]] = []
        self._flat: list[tuple[Any, list[Any]]] = []
        for path, module in root.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    full_name = self.names.setdefault(parameter, f"{path}.{name}" if path else name)
                    self._places.append((module._parameters, name, parameter, full_name))
            if isinstance(module, nn.RNNBase):  # keeps a second list of its parameters
                self._flat.append((module, list(module._flat_weights)))
        self.parameters = {name: parameter for parameter, name in self.names.items()}
        uses = Counter(id(parameter) for _, _, parameter, _ in self._places)
        self.aliased = {name for name, parameter in self.parameters.items() if uses[id(parameter)] > 1}

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let ``tensors[name]`` stand in the places of the parameter ``name`` meanwhile; the others stay."""
        wanted = [place for place in self._places if place[3] in tensors]
        for entries, name, _, full_name in wanted:
            if name not in entries:
                raise GhostError(
                    f"The parameters of modules must stay the same during training, but `{full_name}` is not there any"
                    " more, as after pruning or reparametrization in a hook. Do it before `fit`."
                )
        places = [(entries, name, entries[name], full_name) for entries, name, _, full_name in wanted]
        before = [module._flat_weights for module, _ in self._flat]
        for entries, name, _, full_name in places:
            entries[name] = tensors[full_name]
        for (module, flat), weights in zip(self._flat, before):
            module._flat_weights = [self._substitute(tensors, *pair) for pair in zip(flat, weights)]
        try:
            yield
        finally:
            for entries, name, held, _ in places:
                entries[name] = held
            for (module, _), weights in zip(self._flat, before):
                module._flat_weights = weights

    def _substitute(self, tensors: Mapping[str, Tensor], weight: Any, held: Any) -> Any:
        return tensors.get(self.names[weight], held) if weight in self.names else held
