"""Making modules without memory for their parameters, whose values come later, for those that are wanted.

While a :class:`Recording` is active, tensors that operations make are fakes: shapes without values. The operations are
written down; the values of a parameter are made by running again what writes its memory, and what that reads. So they
come from the module's own code, whatever that is. Each random operation has a seed of its own, by its number: values do
not depend on which others are made. What reads a value on the way, as ``.item()``, gets it by the same means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dgmp.calls import assigning_data
from lightning_dgmp.nests import replace_leaves
from lightning_dgmp.stage.randomness import mix_seed

__all__ = ["Recording"]


_HOST = torch.device("cpu")


class _Place(NamedTuple):
    """What a tensor is a view of."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Op(NamedTuple):
    func: Any
    args: Any  # with places for fakes, and real tensors as they are
    kwargs: Any
    outputs: list[_Place | None]
    storages: set[int]
    is_empty: bool  # whether it leaves memory as it is
    seed: int | None
    dtype: torch.dtype  # the default one of that time


class Recording:
    """What is made while it is :meth:`active`.

    Args:
        seed: From which all random values follow.
        device: Where parameters shall be that are made on the meta device.
    """

    def __init__(self, seed: int, device: torch.device = _HOST) -> None:
        self._seed, self._num_random, self._device = seed, 0, device
        self._lifts = False  # whether the next operation takes a real tensor and gives a fake
        self._ops: list[_Op] = []
        self._ops_on: dict[int, list[int]] = {}
        self._storages: dict[int, Any] = {}  # held, so that no other has their number
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._modules: dict[nn.Module, None] = {}
        self._places: dict[nn.Parameter, _Place] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let what is made meanwhile have no memory."""
        with ExitStack() as stack:
            for register in (
                torch_module.register_module_parameter_registration_hook,
                torch_module.register_module_buffer_registration_hook,
                torch_module.register_module_module_registration_hook,
            ):
                stack.callback(register(self._note_module).remove)
            stack.enter_context(assigning_data(self._data))
            stack.enter_context(_Recorder(self))
            stack.enter_context(_Reads(self))
            yield

    # ----- afterwards

    def settle(self, stand_in: Callable[[nn.Parameter], None] | None = None) -> None:
        """Put ordinary tensors in the places of fakes, in all modules that were made and what these hold.

        Args:
            stand_in: Given an empty parameter of the shape of a fake, makes of it what it shall be until it gets its
                values, which :meth:`make` gives; by default it has them at once, as all else does.
        """
        roots = list(dict.fromkeys(m for root in self._modules for m in root.modules()))
        fakes: dict[int, FakeTensor] = {}
        for root in roots:
            replace_in(root, lambda fake: fakes.setdefault(id(fake), fake))
        parameters: list[FakeTensor] = [fake for fake in fakes.values() if isinstance(fake, nn.Parameter)]
        others = [fake for fake in fakes.values() if not isinstance(fake, nn.Parameter)]
        new: dict[int, Tensor] = {}
        owners: dict[int, nn.Parameter] = {}
        wanted: list[FakeTensor] = others if stand_in is not None else [*parameters, *others]
        if stand_in is not None:
            for fake in parameters:
                empty = torch.zeros((), dtype=fake.dtype, device=self._device if fake.is_meta else fake.device)
                new[id(fake)] = parameter = _parameter(empty.expand(fake.shape), fake)
                stand_in(parameter)
                self._places[parameter] = place = self.place(fake)
                owners[place.storage] = parameter
            for fake in others:
                if (owner := owners.get(self.place(fake).storage)) is not None:  # as of `nn.utils.spectral_norm`
                    new[id(fake)] = owner.detach()
            wanted = [fake for fake in others if id(fake) not in new]
        for fake, value in zip(wanted, self.values([self.place(fake) for fake in wanted])):
            if isinstance(fake, nn.Parameter):
                value = _parameter(torch.empty_like(value, device=self._device) if value.is_meta else value, fake)
            new[id(fake)] = value
        if stand_in is None:
            self._places = {new[id(fake)]: self.place(fake) for fake in parameters}  # type: ignore[misc]
        for root in roots:
            replace_in(root, lambda fake: new[id(fake)])
        self._modules.clear()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are in the places of fakes now, in order."""
        return list(self._places)

    def without_values(self) -> list[nn.Parameter]:
        """Those of the new parameters that nothing has written."""
        return [parameter for parameter, place in self._places.items() if parameter.numel() and self._is_empty(place)]

    def sharing_memory(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Two of the new parameters that are views of the same memory, if there are any."""
        seen: dict[int, nn.Parameter] = {}
        for parameter, place in self._places.items():
            if (other := seen.setdefault(place.storage, parameter)) is not parameter:
                return other, parameter
        return None

    def make(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The values of some of the new parameters, as they were when :meth:`active` ended."""
        return self.values([self._places[parameter] for parameter in parameters])

    # ----- while it is active

    def _note_module(self, module: nn.Module, name: str, item: Any) -> None:
        self._modules[module] = None
        if isinstance(item, nn.Module):
            self._modules[item] = None

    def _data(self, tensor: Tensor, value: Tensor) -> Tensor:
        """What ``tensor.data = value`` should assign: torch does not mix fakes and real tensors."""
        if isinstance(value, FakeTensor) and not isinstance(tensor, FakeTensor):
            return self.values([self.place(value)])[0]
        if isinstance(tensor, FakeTensor) and not isinstance(value, FakeTensor):
            self._lifts = True
            with torch.no_grad():
                value = value.clone()
        return value

    def place(self, fake: Tensor) -> _Place:
        storage = fake.untyped_storage()
        number = storage._cdata
        self._storages.setdefault(number, storage)
        size, stride = tuple(fake.size()), tuple(fake.stride())
        return _Place(number, size, stride, int(fake.storage_offset()), fake.dtype, fake.device)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on fakes, if it is one, and write it down."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [t for t in _written(func, args, kwargs) if not isinstance(t, FakeTensor)]
        lifts, self._lifts = self._lifts, False
        is_fake = lifts or not tensors or any(isinstance(t, FakeTensor) for t in tensors)
        if not is_fake or any(t.numel() for t in written):
            return self.run_for_real(func, args, kwargs)
        try:
            with self._fakes:
                out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self.run_for_real(func, args, kwargs)
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors and not any(isinstance(t, FakeTensor) and t.numel() for t in made):
            return self.run_for_real(func, args, kwargs)
        self._note(func, args, kwargs, out)
        return out

    def run_for_real(self, func: Any, args: Any, kwargs: Any) -> Any:
        fakes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        reals = iter(self.values([self.place(fake) for fake in fakes]))
        args, kwargs = pytree.tree_map_only(FakeTensor, lambda _: next(reals), (args, kwargs))
        with no_dispatch():
            return func(*args, **kwargs)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        writes = bool(_written(func, args, kwargs))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        seed = mix_seed(self._seed, self._num_random, 0) if is_random else None
        self._num_random += is_random
        args, kwargs = places = pytree.tree_map_only(FakeTensor, self.place, (args, kwargs))
        outputs = [self.place(t) if isinstance(t, FakeTensor) else None for t in pytree.tree_leaves(out)]
        leaves = pytree.tree_leaves(places, is_leaf=_is_place)
        before = {leaf.storage for leaf in leaves if isinstance(leaf, _Place)}
        storages = before | {place.storage for place in outputs if place is not None}
        is_view = not writes and storages == before
        is_empty = func.overloadpacket in _EMPTY or is_view
        op = _Op(func, args, kwargs, outputs, storages, is_empty, seed, torch.get_default_dtype())
        for storage in storages:
            self._ops_on.setdefault(storage, []).append(len(self._ops))
        self._ops.append(op)

    # ----- values

    def _is_empty(self, place: _Place) -> bool:
        return place.device.type == "meta" or all(self._ops[i].is_empty for i in self._ops_on.get(place.storage, []))

    def _needed(self, wanted: Iterable[int]) -> list[_Op]:
        waiting, seen, needed = list(wanted), set(), set()
        while waiting:
            if (storage := waiting.pop()) not in seen:
                seen.add(storage)
                for i in self._ops_on.get(storage, []):
                    if i not in needed:
                        needed.add(i)
                        waiting += self._ops[i].storages
        return [self._ops[i] for i in sorted(needed)]

    @torch.no_grad()
    def values(self, places: Sequence[_Place]) -> list[Tensor]:
        """Real tensors; those that share memory in the recording do so too."""
        wanted = {place.storage for place in places}
        ops = self._needed(wanted)
        last_use = {storage: i for i, op in enumerate(ops) for storage in op.storages}
        memory: dict[int, Any] = {}

        def real(leaf: Any) -> Any:
            return _view(memory[leaf.storage], leaf) if isinstance(leaf, _Place) else leaf

        devices = {p.device.index or 0 for op in ops for p in op.outputs if p is not None and p.device.type == "cuda"}
        default = torch.get_default_dtype()
        with no_dispatch(), torch.random.fork_rng(devices=sorted(devices)):
            try:
                for i, op in enumerate(ops):
                    args, kwargs = pytree.tree_map(real, (op.args, op.kwargs), is_leaf=_is_place)
                    if op.seed is not None:
                        torch.manual_seed(op.seed)
                        kwargs = {k: None if isinstance(v, torch.Generator) else v for k, v in kwargs.items()}
                    torch.set_default_dtype(op.dtype)
                    out = op.func(*args, **kwargs)
                    for place, tensor in zip(op.outputs, pytree.tree_leaves(out)):
                        if place is not None:
                            memory.setdefault(place.storage, tensor.untyped_storage())
                    for storage in op.storages - wanted:
                        if last_use[storage] == i:
                            memory.pop(storage, None)
            finally:
                torch.set_default_dtype(default)
            return [_view(memory[place.storage], place) for place in places]


class _Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recording.run(func, args, kwargs or {})


class _Reads(TorchFunctionMode):
    """Answers what asks tensor subclasses for their values, and not by an operation."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], FakeTensor)
        return (self._recording.run_for_real if reads else _call)(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


_EMPTY = {
    torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided, torch.ops.aten.empty_permuted,
}  # fmt: skip


def _is_place(leaf: Any) -> bool:
    return isinstance(leaf, _Place)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes."""
    arguments = func._schema.arguments
    given = [*zip(arguments, args), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    changed = [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves(changed) if isinstance(leaf, Tensor)]


def _view(storage: Any, place: _Place) -> Tensor:
    empty = torch.empty(0, dtype=place.dtype, device=storage.device)
    return empty.set_(storage, place.offset, place.size, place.stride)


def _parameter(value: Tensor, fake: FakeTensor) -> nn.Parameter:
    """A parameter with ``value`` in the place of ``fake``, with the attributes and hooks that it has been given."""
    parameter = nn.Parameter(value, requires_grad=fake.requires_grad)
    with fake.fake_mode:
        own = vars(nn.Parameter(torch.empty(1)))  # of all fakes
    vars(parameter).update({name: value for name, value in vars(fake).items() if name not in own})
    for hook in (fake._backward_hooks or {}).values():
        parameter.register_hook(hook)
    for hook in (fake._post_accumulate_grad_hooks or {}).values():
        parameter.register_post_accumulate_grad_hook(hook)
    return parameter


def replace_in(module: nn.Module, function: Callable[[FakeTensor], Tensor]) -> None:
    """Put ``function(fake)`` in the place of each fake that ``module`` itself has."""

    def replaced(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, FakeTensor) else leaf

    for name, value in vars(module).items():
        if (
            isinstance(value, FakeTensor)
            or name in ("_parameters", "_buffers", "_flat_weights")
            or (name != "_modules" and not isinstance(value, (nn.Module, str, int, float)))
        ):
            vars(module)[name] = replace_leaves(replaced, value)
