"""What a trace writes down: operations on values that depend on parameters, with the module calls around them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Appearance", "Call", "Op", "ParameterInfo", "Trace", "Value"]


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter of the model, by its first name."""

    name: str
    numel: int
    nbytes: int
    requires_grad: bool


@dataclass(frozen=True)
class Appearance:
    """A moment at which every stage can point at a value: it is leaf ``leaf`` of what ``call`` takes or returns."""

    time: int
    call: int
    kind: str  # "arg" or "out"
    leaf: int


@dataclass
class Value:
    """A tensor that depends on parameters."""

    op: int
    nbytes: int
    storage: int
    appearances: list[Appearance] = field(default_factory=list)


@dataclass
class Op:
    """An operation on values.

    ``call`` is the innermost module call that it happens in, -1 outside of all; ``checkpoint`` numbers the function of
    :func:`torch.utils.checkpoint.checkpoint` that it happens in; ``kept`` has the bytes of each memory that its
    backward needs, apart from those of parameters.
    """

    time: int
    name: str
    call: int
    inputs: tuple[int, ...]
    parameters: tuple[str, ...]
    checkpoint: int | None = None
    in_place: bool = False
    flops: int = 0
    nbytes: int = 0
    outputs: list[int] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)


@dataclass
class Call:
    """A call of a module.

    ``is_hooked`` says that the module has backward hooks, and so has to be on one stage; ``has_state`` that the call
    changed buffers, which is why all calls of the module have to be.
    """

    path: str
    parent: int
    start: int
    is_hooked: bool = False
    has_state: bool = False
    end: int = -1
    ops: list[int] = field(default_factory=list)  # those inside, at any depth


@dataclass
class Trace:
    """What one step ran, in order.

    Attributes:
        stopped: Where and why the trace ended before the step did; ``None`` if it did not.
        read: Where and why the step first needs values; ``None`` if it does not. What comes after that belongs to the
            last stage.
        read_at: When that is.
        num_guessed: How many parameters are behind a read inside of the network, which ended the trace.
        wanted: Values that the last stage should have if they can travel, and when: those that are logged, returned or
            kept by the root module, and all that are in reach where the trace stopped.
        returned_none: Whether the step returned ``None``.
        changes: When the content of a storage was changed in place.
        changed_frozen: The frozen parameters that the step changes in place.
        toggled: Attributes of modules, by path and name, that the step changes and changes back.
        touched: When a value was hooked, or an attribute changed: the time, the call whose code did it, and the value.
    """

    parameters: dict[str, ParameterInfo]
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    stopped: str | None = None
    read: str | None = None
    read_at: float = math.inf
    num_guessed: int = 0
    wanted: dict[int, float] = field(default_factory=dict)
    returned_none: bool = False
    changes: dict[int, list[int]] = field(default_factory=dict)
    changed_frozen: set[str] = field(default_factory=set)
    toggled: list[tuple[str, str]] = field(default_factory=list)
    touched: list[tuple[int, int, int | None]] = field(default_factory=list)

    def sources(self) -> list[tuple[int, ...]]:
        """For each operation the values that it cannot come before: those that it takes, or else those of its call.

        So what a layer makes of its weights alone happens where the layer is called.
        """
        of_calls: dict[int, list[int]] = {-1: []}
        for v, value in enumerate(self.values):
            for appearance in value.appearances:
                if appearance.kind == "arg":
                    of_calls.setdefault(appearance.call, []).append(v)
        for index, call in enumerate(self.calls):
            of_calls.setdefault(index, of_calls[call.parent])
        return [
            op.inputs or tuple(v for v in of_calls[op.call] if self.values[v].op < i) for i, op in enumerate(self.ops)
        ]
