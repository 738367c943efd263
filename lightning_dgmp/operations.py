"""What operations on ghosts do: they yield ghosts, or compute where values have arrived.

The shapes come from :class:`torch._subclasses.FakeTensor`, the only private part of torch that this file touches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_dgmp.ghost import PLAIN, Ghost, GhostError, GhostRead, GhostWritten, looks_of, realised
from lightning_dgmp.nests import leaves, map_tensors, tensors_in
from lightning_dgmp.reads import READS, answer_to_check, is_mask

__all__ = ["GhostMode", "Result", "is_in_place", "shares_memory"]

_MAX_RESULTS = 10_000
_KNOWN = (Tensor, *PLAIN)  # what they look like is all that counts
_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_FAKES = FakeTensorMode(allow_non_fake_inputs=True)  # one for all, since those of several do not mix


class Result(NamedTuple):
    """What an operation on fakes gave: ``nest`` with fakes for its tensors, and what the operation would cost.

    For each tensor ``storages`` has the number of the input whose memory it shares, or a greater number of its own.
    """

    nest: Any
    storages: list[int]
    flops: int
    nbytes: int


_RESULTS: dict[Any, Result] = {}  # for all modes, so that nothing is found out twice


class GhostMode:
    """What operations on ghosts do. One family of ghosts shares one mode.

    The tracer overrides the hooks; a running stage uses this class as it is.
    """

    def __init__(self) -> None:
        self.fake_mode = _FAKES
        #: The real tensors, such as running statistics, into which ghosts may be written: nothing happens then.
        self.written_over: Callable[[], Iterable[Tensor]] = tuple
        #: What a real tensor is after a function has written ghosts into it, if it is theirs then.
        self.take_over: Callable[[str, list[Ghost], Tensor], Ghost | None] = lambda *_: None
        #: Whether `torch.randn_like(ghost)` is real, as noise that all stages draw alike.
        self.draws_noise = True
        #: Real tensors into which ghosts would have been written, and what has been made of them since.
        self.stale: list[Tensor] = []
        #: Set when values of real tensors have decided something.
        self.has_read_values = False

    # ----- making ghosts

    def like(self, tensor: Tensor, origin: str, requires_grad: bool, device: torch.device, stage: int = -1) -> Ghost:
        """A ghost with the shape and dtype of ``tensor``."""
        with self.fake_mode:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        return Ghost(fake, self, origin, requires_grad, stage)  # type: ignore[arg-type]

    def again(self, ghost: Ghost, origin: str, stage: int) -> Ghost:
        """A fresh, unbound ghost with the looks of ``ghost``."""
        fresh = Ghost(ghost.fake, self, origin, ghost.needs_grad, stage)
        fresh.looks = ghost.looks
        return fresh

    # ----- operations

    def place(self) -> str:
        """In which call the step is, for messages."""
        return ""

    def observe(
        self, func: Any, inputs: list[Ghost], outputs: list[Ghost], changed: Ghost | None, result: Result
    ) -> None:
        """Called after each operation on ghosts; ``changed`` is the ghost that was modified in place, if any."""

    def ignore_write(self, inputs: list[Ghost], target: Tensor) -> None:
        """Called when ghosts are written into one of ``written_over`` or a view of it, which does nothing."""
        self.stale.append(target)

    def is_stale(self, tensor: Any) -> bool:
        """Whether a real tensor has, or is made of, values that only the owner of a buffer changes."""
        return isinstance(tensor, Tensor) and not isinstance(tensor, Ghost) and shares_memory(tensor, self.stale)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name = getattr(func, "__name__", str(func))
        subject = args[0] if args else None
        if isinstance(subject, Ghost) and subject.bound and name in _CHANGES_LEAF:
            return func(subject.received(), *args[1:], **kwargs)
        if isinstance(subject, Ghost) and name in _SPECIAL:
            return _SPECIAL[name](subject, *args[1:], **kwargs)
        if name in _BECOMES and not isinstance(subject, Ghost) and tensors_in(args[1:2], Ghost):
            return args[0].to(args[1].device, args[1].dtype, *args[2:], **kwargs)  # values do not matter
        owner = getattr(func, "__self__", None)  # `Tensor.shape.__get__` and the like
        if name == "__get__" and isinstance(subject, Ghost):
            attribute = getattr(owner, "__name__", "")
            if attribute in _METADATA:
                return getattr(subject.received(), attribute) if subject.has_arrived else _METADATA[attribute](subject)
        elif name == "__set__" and isinstance(subject, Ghost):
            return _set_attribute(subject, getattr(owner, "__name__", ""), args[1])

        flat = leaves((args, kwargs))
        inputs = [item for item in flat if isinstance(item, Ghost)]
        if any(g.bound for g in inputs):
            args, kwargs = realised(args), realised(dict(kwargs))
            inputs = [g for g in inputs if not g.bound]
            if not inputs:
                return func(*args, **kwargs)
            if inputs[0].family is not self:
                return inputs[0].family.call(func, args, kwargs)
            flat, subject = leaves((args, kwargs)), args[0] if args else None
        if name in READS:
            if name == "__bool__" and (answer := answer_to_check()) is not None:
                return answer
            raise GhostRead(inputs[0], name)
        if name == "__getitem__":
            args = (subject, _numbered(args[1]), *args[2:])
            flat = leaves(args)
        if func is torch.autograd.grad:
            raise GhostError(
                f"`torch.autograd.grad` was called on {inputs[0].describe()}. A step may not differentiate by itself,"
                " because its graph lies on several stages: return a loss, or use another strategy."
            )
        if name in _NOISE and self.draws_noise:  # depends on nothing but the shape, so it is no one's value
            return func(*map_tensors(_shell, args), **map_tensors(_shell, dict(kwargs)))

        in_place = is_in_place(name, kwargs)
        out = kwargs.get("out")
        for target in ([subject] if in_place else []) + ([out] if isinstance(out, Tensor) else []):
            if isinstance(target, Tensor) and not isinstance(target, Ghost):
                taken = None if name == "__set__" else self.take_over(name, inputs, target)
                if taken is None:
                    self._write(name, inputs, target, args)
                return None if name in ("__set__", "__setitem__") else target if taken is None else taken

        fakes: dict[int, Ghost] = {}
        key = None if in_place else _key(func, args, kwargs, flat)
        result = None if key is None else _RESULTS.get(key)
        if result is None:  # what was kept may be what an input shows, and yet it is a new tensor
            for ghost in inputs:
                if fakes.get(id(ghost.fake), ghost) is not ghost or (in_place and ghost is subject):
                    ghost.show(self.like(ghost.fake, "", False, ghost.fake.device).fake)  # others may show the same
                fakes[id(ghost.fake)] = ghost
            result = self._run(func, args, kwargs, inputs)
            if key is not None and not any(id(fake) in fakes for fake in tensors_in(result.nest)):
                if len(_RESULTS) >= _MAX_RESULTS:  # as when every batch brings another number
                    _RESULTS.clear()
                _RESULTS[key] = result
        needs_grad = (
            torch.is_grad_enabled()
            and name not in _CUTS_GRAPH
            and any(t.needs_grad if isinstance(t, Ghost) else t.requires_grad for t in flat if isinstance(t, Tensor))
        )
        outputs: list[Ghost] = []
        latest = max(inputs, key=lambda ghost: ghost.stage)
        shared = dict(enumerate(ghost.storage_id for ghost in inputs))
        numbers = iter(result.storages)

        def wrap(fake: Tensor) -> Ghost:
            ghost, number = fakes.get(id(fake)), next(numbers)
            if ghost is None:
                differentiable = fake.dtype.is_floating_point or fake.dtype.is_complex  # asking it would dispatch
                requires_grad = needs_grad and differentiable
                ghost = Ghost(fake, self, latest.origin, requires_grad, latest.stage)  # type: ignore[arg-type]
                ghost.storage_id = shared.setdefault(number, ghost.storage_id)
            outputs.append(ghost)
            return ghost

        nest = map_tensors(wrap, result.nest)
        changed = subject if in_place and isinstance(subject, Ghost) else None
        if changed is not None:
            changed.needs_grad |= needs_grad
            changed.stage = latest.stage
            changed.looks = None
            if changed not in _Identity(outputs):
                outputs.append(changed)
        self.observe(func, inputs, outputs, changed, result)
        return nest

    def _write(self, name: str, inputs: list[Ghost], target: Tensor, args: tuple[Any, ...]) -> None:
        """Do nothing, if ``target`` may be written over."""
        if name == "__set__" and (target.shape, target.dtype) != (args[1].shape, args[1].dtype):
            raise GhostError(
                f"`.data` may be assigned a tensor of the same shape and dtype, but one of {tuple(target.shape)} and"
                f" {target.dtype} was assigned {inputs[0].describe()}. Assign the attribute itself."
            )
        if not shares_memory(target, self.written_over()):
            raise GhostWritten(inputs[0], ".data" if name == "__set__" else name)
        self.ignore_write(inputs, target)

    def _run(self, func: Any, args: Any, kwargs: Mapping[str, Any], inputs: list[Ghost]) -> Result:
        cost, name = _Cost(), getattr(func, "__name__", str(func))
        is_quiet, _LOG.disabled = _LOG.disabled, True  # it would tell of errors that are raised besides
        try:
            with torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), self.fake_mode, cost:
                nest = func(*map_tensors(_fake, args), **map_tensors(_fake, dict(kwargs)))
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise GhostRead(inputs[0], name) from None
        except RuntimeError as error:
            if "data is not allocated" in str(error):  # the operation reads a real argument, as of packed sequences
                raise GhostRead(inputs[0], name) from None
            if not _runs_on_values(func, args, kwargs):
                raise
            raise GhostError(
                f"`{name}`{self.place()} cannot run on the shape alone of {inputs[0].describe()}: the rule of torch"
                f" {torch.__version__} for that is missing or wrong ({str(error).strip()}). Use another operation,"
                " dtype or version of torch."
            ) from error
        finally:
            _LOG.disabled = is_quiet
        numbers = {_storage(ghost.fake): number for number, ghost in reversed(list(enumerate(inputs)))}
        storages = [
            numbers.setdefault(_storage(fake), len(inputs) + number) for number, fake in enumerate(tensors_in(nest))
        ]
        return Result(nest, storages, cost.flops, cost.nbytes)


def _runs_on_values(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether real tensors would do, so that an error is none of the user's."""
    try:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            func(*map_tensors(_zeros, args), **map_tensors(_zeros, dict(kwargs)))
    except Exception:
        return False
    return True


def _key(func: Any, args: Any, kwargs: Any, flat: list[Any]) -> Any:
    """What decides the looks of the result of ``func``, or ``None`` if something else may."""
    if not all(isinstance(item, _KNOWN) for item in flat):
        return None
    device = args[0].fake.device.type if args and isinstance(args[0], Ghost) else "cpu"
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    modes = autocast, torch.get_default_dtype(), torch.is_inference_mode_enabled()
    return func, modes, looks_of(args), looks_of(dict(kwargs))


def shares_memory(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether a real tensor is one of ``others`` or a view of it, also through ``.data``."""
    with torch._C.DisableTorchFunction():  # to ask for a place is no read
        return _place(tensor) in {_place(other) for other in others if not isinstance(other, Ghost)}


def _place(tensor: Tensor) -> int:
    return _storage(tensor) if tensor.layout == torch.strided else id(tensor)


def _storage(fake: Tensor) -> int:
    return int(fake.untyped_storage()._cdata)


class _Cost(TorchDispatchMode):
    """Counts the floating point operations and the bytes of the operations below it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and (answer := answer_to_check()) is not None:
            return answer
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        if not func.is_view:
            self.nbytes += sum(t.numel() * t.element_size() for t in tensors_in((args, out)))
        return out


class _Identity:
    """Membership by identity: ``==`` on tensors compares values."""

    def __init__(self, items: list[Any]) -> None:
        self.ids = {id(item) for item in items}

    def __contains__(self, item: Any) -> bool:
        return id(item) in self.ids


def is_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of that name changes its first argument."""
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))


def _fake(tensor: Tensor) -> Tensor:
    return tensor.fake if isinstance(tensor, Ghost) else tensor.detach()


def _numbered(index: Any) -> Any:
    """``index`` with places in the stead of real masks, so that the shape of what they select is known."""

    def one(item: Any) -> tuple[Any, ...]:
        is_real_mask = is_mask(item) and not isinstance(item, Ghost)
        return item.nonzero(as_tuple=True) if is_real_mask and item.dim() else (item,)

    parts = index if isinstance(index, tuple) else (index,)
    numbered = tuple(part for item in parts for part in one(item))
    if len(numbered) == len(parts) and all(a is b for a, b in zip(numbered, parts)):
        return index
    return numbered if len(numbered) != 1 or isinstance(index, tuple) else numbered[0]


def _shell(tensor: Tensor) -> Tensor:
    """A real tensor with the looks of a ghost and undefined values."""
    if not isinstance(tensor, Ghost):
        return tensor
    fake = tensor.fake
    return torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device=fake.device)


def _zeros(tensor: Tensor) -> Tensor:
    """A real tensor with the looks of a ghost, or a copy."""
    return _shell(tensor).zero_() if isinstance(tensor, Ghost) else tensor.detach().clone()


def _set_attribute(ghost: Ghost, attribute: str, value: Any) -> None:
    if attribute == "requires_grad":
        ghost.needs_grad = bool(value)
    elif attribute not in ("grad",):
        raise GhostRead(ghost, f"assignment to .{attribute}")


def _requires_grad_(ghost: Ghost, requires_grad: bool = True) -> Ghost:
    ghost.needs_grad = requires_grad
    return ghost


class _NoHandle:
    def remove(self) -> None: ...


def _metadata(attribute: str) -> Callable[[Ghost], Any]:
    def get(ghost: Ghost) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return getattr(ghost.fake, attribute)

    return get


# Answered without waiting for a bound value and without counting as an operation.
_BECOMES = {"to", "type_as"}
_METADATA: dict[str, Callable[[Ghost], Any]] = {
    **{
        name: _metadata(name)
        for name in """
        shape dtype device ndim layout itemsize nbytes names
        is_cpu is_cuda is_meta is_mkldnn is_mps is_nested is_quantized is_sparse is_xpu
        """.split()  # noqa: SIM905
    },
    "requires_grad": lambda ghost: ghost.needs_grad,
    "is_leaf": lambda ghost: not ghost.needs_grad,
    "grad": lambda ghost: None,
    "grad_fn": lambda ghost: None,
    "_version": lambda ghost: 0,
}

_SPECIAL: dict[str, Callable[..., Any]] = {
    "size": lambda ghost, *args, **kwargs: ghost.fake.size(*args, **kwargs),
    "dim": lambda ghost: ghost.fake.dim(),
    "numel": lambda ghost: ghost.fake.numel(),
    "is_floating_point": lambda ghost: ghost.fake.is_floating_point(),
    "is_complex": lambda ghost: ghost.fake.is_complex(),
    "element_size": lambda ghost: ghost.fake.element_size(),
    "__hash__": id,
    "__len__": lambda ghost: ghost.fake.size(0),
    "__repr__": lambda ghost, **_: Ghost.__repr__(ghost),
    "requires_grad_": _requires_grad_,
    "retain_grad": lambda ghost: None,
    "register_hook": lambda ghost, hook: _NoHandle(),
    "__deepcopy__": Ghost.__deepcopy__,
    "__reduce_ex__": Ghost.__reduce_ex__,
}

_IN_PLACE = frozenset(
    """
    __set__ __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ifloordiv__ __imod__ __ipow__
    __iand__ __ior__ __ixor__ __ilshift__ __irshift__
    """.split()  # noqa: SIM905
)
_CHANGES_LEAF = frozenset(("requires_grad_", "retain_grad", "__set__"))
_CUTS_GRAPH = frozenset(("detach", "detach_"))
_NOISE = frozenset(("rand_like", "randn_like", "randint_like"))
