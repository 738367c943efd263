"""Ghosts: tensors that have a shape, a dtype and a device but no values.

A ghost stands for the work of another stage. Operations on ghosts yield ghosts, whatever touches no ghost stays real:
no mode is active around user code. A ghost may be *bound* to a value that arrives from the stage that made it; the
first operation that touches a bound ghost waits for the value and computes with it.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_dgmp.nests import replace_leaves, tensors_in
from lightning_dgmp.objects import attributes_of, has_attributes

if TYPE_CHECKING:
    from lightning_dgmp.operations import GhostMode

__all__ = [
    "PLAIN",
    "STORAGE_IDS",
    "Ghost",
    "GhostError",
    "GhostRead",
    "GhostWritten",
    "check_sent",
    "left_behind",
    "looks_of",
    "realised",
]


#: Types of arguments that are what they look like.
PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type)


STORAGE_IDS = itertools.count()  # one for each memory
_LOOKED_AT: set[int] = set()  # objects whose looks are being taken, which may refer to themselves


class GhostError(RuntimeError):
    """A ghost reached a computation that needs its values."""


class GhostRead(BaseException):
    """User code asked for the value of a ghost.

    Not an :class:`Exception`, so that ``except Exception`` in user code does not swallow it.
    """

    def __init__(self, ghost: Ghost, what: str, why: str = "") -> None:
        super().__init__(f"`{what}` reads the value of {ghost.describe()}{why}")
        self.ghost = ghost
        self.what = what


class GhostWritten(GhostRead):
    """A ghost was to be written into a real tensor."""

    def __init__(self, ghost: Ghost, what: str) -> None:
        super().__init__(
            ghost,
            what,
            " to write it into a tensor that does not come from the model, which a stage without the value cannot:"
            " make that tensor from one of the model, as by `x.new_zeros(...)`, or build the result with `torch.cat`,"
            " `torch.stack`, `torch.where` or `total = total + part`",
        )


class Ghost(torch.Tensor):
    """A tensor without values. See the module docstring.

    Args:
        fake: The shape, dtype, strides and device to show.
        family: What decides what operations on the ghost do.
        origin: Who makes the value, for messages: a module path or a parameter name.
        requires_grad: What ``requires_grad`` of the real tensor would be.
        stage: The stage that makes the value, if there are stages; -1 if not.
    """

    fake: FakeTensor
    family: GhostMode
    origin: str
    needs_grad: bool
    stage: int
    vid: int
    looks: tuple[Any, ...] | None
    storage_id: int
    _real: Tensor | None
    _receive: Callable[[], Tensor] | None

    @staticmethod
    def __new__(
        cls, fake: FakeTensor, family: GhostMode, origin: str, requires_grad: bool = False, stage: int = -1
    ) -> Ghost:
        with torch._C.DisableTorchFunctionSubclass():
            ghost = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, fake.size(), strides=fake.stride(), dtype=fake.dtype, layout=fake.layout, device=fake.device
            )
        ghost.fake, ghost.family, ghost.origin, ghost.needs_grad = fake, family, origin, requires_grad
        ghost.stage, ghost.vid, ghost.looks, ghost._real, ghost._receive = stage, -1, None, None, None
        ghost.storage_id = next(STORAGE_IDS)
        return ghost

    @property
    def bound(self) -> bool:
        """Whether a real value is, or will be, here."""
        return self._real is not None or self._receive is not None

    @property
    def has_arrived(self) -> bool:
        """Whether the value has been received."""
        return self._real is not None

    def show(self, fake: FakeTensor) -> None:
        """Look like ``fake`` from now on."""
        self.fake, self.looks = fake, None

    def bind(self, receive: Callable[[], Tensor]) -> None:
        """Let ``receive()`` supply the value at the first touch."""
        self._receive = receive

    def received(self) -> Tensor:
        """The received value; waits for it if need be. Only for bound ghosts."""
        if self._real is None:
            assert self._receive is not None
            real, self._receive = self._receive(), None
            if real.shape != self.fake.shape:
                raise GhostError(
                    f"A{self.describe()[1:]} arrived with the shape {tuple(real.shape)}. What a module returns"
                    " must have a shape that follows from the shapes and plain values of its arguments, because other"
                    " stages do not run it; pass it what else decides the shape, or make it on the stage that needs it."
                )
            self._real = real
        return self._real

    def describe(self) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            return f"a {tuple(self.shape)} {self.dtype} tensor made by {self.origin}"

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<ghost: {self.describe()}>"

    def __hash__(self) -> int:
        return id(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.bound:
            return self.received().__reduce_ex__(protocol)
        raise GhostRead(self, "pickle")

    def __deepcopy__(self, memo: Any) -> Any:
        if self.bound:
            return copy.deepcopy(self.received(), memo)
        raise GhostRead(self, "copy.deepcopy")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _first_ghost(args, kwargs).family.call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        ghosts = tensors_in((args, kwargs), Ghost)
        for ghost in ghosts:
            if not ghost.bound or ghost.received().requires_grad:
                raise GhostRead(ghost, str(func))
        return func(*realised(args), **realised(kwargs or {}))


def looks_of(obj: Any) -> Any:
    """A key for the nest ``obj``: its structure, what its tensors look like, and its plain values.

    Objects of the user's classes count as nests; of others the plain attributes count.
    """
    if isinstance(obj, Ghost):
        if obj.looks is None:
            fake = obj.fake
            obj.looks = fake.shape, fake.stride(), fake.dtype, fake.device
        return Ghost, *obj.looks, obj.needs_grad
    if isinstance(obj, Tensor):
        return obj.shape, obj.stride(), obj.dtype, obj.device, obj.requires_grad
    if isinstance(obj, PLAIN):
        return type(obj), obj
    if isinstance(obj, (list, tuple, deque)):
        return type(obj), *map(looks_of, obj)
    if isinstance(obj, MutableMapping):
        return type(obj), *((key, looks_of(value)) for key, value in obj.items())
    if isinstance(obj, slice):
        return slice, looks_of(obj.start), looks_of(obj.stop), looks_of(obj.step)
    if isinstance(obj, Enum):
        return type(obj), obj.name
    if isinstance(obj, (numpy.ndarray, numpy.generic)):
        return type(obj), obj.shape, obj.dtype, hash(obj.tobytes())
    if isinstance(obj, (set, frozenset)):
        return type(obj), frozenset(map(looks_of, obj))
    if not has_attributes(obj):
        attributes = getattr(obj, "__dict__", {})
        return type(obj), *((name, value) for name, value in attributes.items() if isinstance(value, PLAIN))
    if id(obj) in _LOOKED_AT:
        return type(obj)
    _LOOKED_AT.add(id(obj))
    try:
        return type(obj), *((name, looks_of(value)) for name, value in attributes_of(obj).items())
    finally:
        _LOOKED_AT.discard(id(obj))


def realised(nest: Any) -> Any:
    """``nest`` with their values in the place of bound ghosts, also in its containers; waits for them if need be."""
    return replace_leaves(_realise, nest)


def check_sent(tensors: Iterable[Tensor]) -> None:
    """See that no ghost is sent, which torch.distributed takes for done without sending anything.

    Raises:
        GhostError: If one of ``tensors`` has no value.
    """
    for tensor in tensors:
        if isinstance(tensor, Ghost) and not tensor.bound:
            raise GhostError(
                f"a value is needed that is not here, of {tensor.describe()}: keep and log what the last stage computes"
            )


def left_behind(ghost: Ghost) -> GhostError:
    """The error for who uses a ghost of a trace that is over."""
    return GhostError(
        f"The first step also runs once without values, to see what it does, and has left {ghost.describe()} where that"
        " is not undone. What steps keep belongs in attributes of the LightningModule, of its modules and of batches,"
        " or in containers and objects of your own classes there."
    )


def _realise(leaf: Any) -> Any:
    return leaf.received() if isinstance(leaf, Ghost) and leaf.bound else leaf


def _first_ghost(args: Any, kwargs: Any) -> Ghost:
    return tensors_in((args, kwargs), Ghost)[0]
