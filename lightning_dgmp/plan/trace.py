"""What a step runs: one execution of the user's code in which only the parameters are ghosts.

What depends on the batch alone stays real, is computed by every stage for itself, and does not appear in the trace.
"""

from __future__ import annotations

import contextlib
import math
import traceback
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dgmp.calls import (
    ParameterSlots,
    custom_functions,
    data_assignments,
    has_backward_hooks,
    intercepted_calls,
    no_backward_hooks,
)
from lightning_dgmp.ghost import STORAGE_IDS, Ghost, GhostError, GhostRead, GhostWritten, left_behind
from lightning_dgmp.nests import is_same, map_leaves, marks, replace_leaves, tensors_in, values_in
from lightning_dgmp.objects import modules_beside
from lightning_dgmp.operations import GhostMode, Result, shares_memory
from lightning_dgmp.plan.changes import Kept, Toggles
from lightning_dgmp.plan.kept import Checkpoints, Graph
from lightning_dgmp.plan.record import Appearance, Call, Op, ParameterInfo, Trace, Value
from lightning_dgmp.plan.restore import is_plain, untouched

__all__ = ["trace_step"]


def trace_step(
    step: Callable[[Callable[..., None]], Any],
    root: nn.Module,
    device: torch.device,
    *,
    readers: tuple[type, ...] = (),
) -> Trace:
    """Run ``step`` with ghosts as the parameters of ``root`` and write down what happens.

    Args:
        step: Runs the user's code on a real batch, for example ``training_step``. Its argument is a function that takes
            what is logged.
        root: The module whose submodules and parameters count.
        device: Where the parameters would be.
        readers: Module classes whose calls read the values of their arguments, such as metrics.

    Nothing of the run stays behind in the modules' attributes and buffers or in the random number generators.
    """
    tracer = _Tracer(root, device, readers)
    functions = custom_functions(tracer.on_function)
    with untouched(root, device), torch.compiler.set_stance("force_eager"):
        calls = intercepted_calls(root, tracer.on_call)
        with tracer.slots.holding(tracer.ghosts), calls, functions, data_assignments(), no_backward_hooks(root):
            try:
                with tracer.written:
                    returned = step(tracer.want)
                tracer.trace.returned_none = returned is None
                tracer.want(returned)
                for value in list(vars(root).values()):
                    with contextlib.suppress(RecursionError):  # a nest that contains itself
                        tracer.want(value)
            except GhostRead as read:
                tracer.stop(read)
            except RuntimeError as error:
                if "TorchScript" not in str(error):
                    raise
                raise GhostError(
                    "A step may not call functions that `torch.jit.script` has compiled, because they need values that"
                    f" are not here. Use the Python functions that they were made from. ({error})"
                ) from None
            tracer.finish()
    tracer.is_over = True
    return tracer.trace


class _Tracer(GhostMode):
    def __init__(self, root: nn.Module, device: torch.device, readers: tuple[type, ...]) -> None:
        super().__init__()
        self.slots = ParameterSlots(root)
        self.readers = readers
        self.ghosts = {
            name: self.like(parameter, name, parameter.requires_grad, device)
            for name, parameter in self.slots.parameters.items()
        }
        self.trace = Trace(
            {
                name: ParameterInfo(name, p.numel(), p.numel() * p.element_size(), p.requires_grad)
                for name, p in self.slots.parameters.items()
            }
        )
        self._name_of = {id(ghost): name for name, ghost in self.ghosts.items()}
        self._views: list[list[Ghost]] = []  # of parameters, which count as these; held, so that no other has their id
        self._name_of_storage = {ghost.storage_id: name for name, ghost in self.ghosts.items()}
        self._root, self._toggles, self._kept = root, Toggles(root), Kept(root)
        for ghost in self.ghosts.values():
            ghost._is_param = True  # type: ignore[attr-defined]
        # Also what metrics count in; all of it is put back after the trace.
        modules = (*root.modules(), *modules_beside(root).values())
        kept = [item for module in modules for item in (*vars(module).values(), *module.buffers()) if is_plain(item)]
        self.written_over = lambda: (*root.buffers(), *kept)
        self._hooked = {module for module in root.modules() if has_backward_hooks(module)}
        self._open: list[int] = []
        self._open_modules: list[nn.Module] = []
        self.is_over = False
        self._time = self._functions_open = 0
        self._values: list[weakref.ref[Ghost]] = []
        self._checkpoints = Checkpoints()
        self._graph = Graph(self, STORAGE_IDS)
        self._calling: tuple[Any, Any, Mapping[str, Any]] = (), (), {}
        self.written, self.take_over = _Written(self), self._take_over

    # ----- calls

    def on_call(
        self, call: Callable[..., Any], module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        trace, index = self.trace, len(self.trace.calls)
        self._toggles.look()
        self._look_at_attributes()
        parent = self._open[-1] if self._open else -1
        trace.calls.append(Call(path, parent, self._tick(), module in self._hooked))
        args, kwargs = self.written.current(args), self.written.current(kwargs)
        self._note((args, kwargs), index, "arg")
        if isinstance(module, self.readers) and (read := tensors_in((args, kwargs), Ghost)):
            raise GhostRead(read[0], f"{type(module).__name__} `{path}`")
        self._open.append(index)
        self._open_modules.append(module)
        buffers = marks(list(module._buffers.values()), max_compared=math.inf)
        out = call(*args, **kwargs)
        trace.calls[index].has_state |= not is_same(buffers, list(module._buffers.values()))
        self._look_at_attributes()
        self._open.pop()
        self._open_modules.pop()
        trace.calls[index].end = self._tick()
        self._note(out, index, "out")
        return out

    def on_function(self, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look through a custom function: its forward runs without a graph, its outputs have one.

        What is inside cannot cross a cut, because no error comes back to it.
        """
        self._functions_open += 1
        try:
            out = apply(*args, **kwargs)
        finally:
            self._functions_open -= 1
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in((args, kwargs))):
            for ghost in tensors_in(out, Ghost):
                ghost.needs_grad = ghost.is_floating_point() or ghost.is_complex()
        return out

    def _note(self, nest: Any, call: int, kind: str) -> None:
        if self._functions_open:
            return
        for leaf, item in enumerate(values_in(nest)):
            if isinstance(item, Ghost) and item.vid >= 0:
                item.origin = self.trace.calls[call].path or item.origin if kind == "out" else item.origin
                self.trace.values[item.vid].appearances.append(Appearance(self._tick(), call, kind, leaf))

    def _tick(self) -> int:
        self._time += 1
        return self._time

    # ----- operations

    def place(self) -> str:
        path = self.trace.calls[self._open[-1]].path if self._open else ""
        return f" in `{path}`" if path else ""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.is_over and getattr(func, "__name__", "") != "__get__":
            raise left_behind(tensors_in((args, kwargs), Ghost)[0])
        for tensor in tensors_in((args, kwargs)):
            hidden = None if isinstance(tensor, Ghost) or not tensor.requires_grad else self._hidden_parameter(tensor)
            if hidden is not None:
                raise GhostError(
                    f"Parameters must be read where their modules hold them, but `{hidden}` is used through a reference"
                    " that is kept elsewhere, as in a list: another stage may own it. Read it as an attribute of its"
                    " module."
                )
        if getattr(func, "__name__", "") == "register_hook" and isinstance(args[0], Ghost) and args[0].vid >= 0:
            self.trace.touched.append((self._tick(), self._open[-1] if self._open else -1, args[0].vid))
        self._calling = func, args, kwargs
        return super().call(func, args, kwargs)

    def observe(
        self, func: Any, inputs: list[Ghost], outputs: list[Ghost], changed: Ghost | None, result: Result
    ) -> None:
        names = {self._name_of.get(id(ghost)) for ghost in inputs}
        is_view = changed is None and all(ghost.storage_id == inputs[0].storage_id for ghost in outputs)
        if is_view and len(names) == 1 and (parameter := names.pop()) is not None:
            self._name_of.update({id(ghost): parameter for ghost in outputs})
            self._views.append(outputs)
            return
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        op = self._record(name, inputs)
        op.in_place = changed is not None
        op.flops, op.nbytes = result.flops, result.nbytes
        if changed is not None:
            self._note_changed_parameter(name, changed)
        for ghost in outputs:
            if id(ghost) in self._name_of:
                continue  # a frozen parameter
            if ghost is changed or ghost.vid < 0:
                ghost.vid = len(self.trace.values)
                nbytes = ghost.fake.numel() * ghost.fake.element_size()
                self.trace.values.append(Value(len(self.trace.ops) - 1, nbytes, ghost.storage_id))
                if ghost is changed:
                    self.trace.changes.setdefault(ghost.storage_id, []).append(op.time)
                self._values.append(weakref.ref(ghost))
                op.outputs.append(ghost.vid)
        kept = self._graph.kept(*self._calling, outputs, changed)
        op.kept = {number: nbytes for number, nbytes in kept.items() if number not in self._name_of_storage}

    def _note_changed_parameter(self, name: str, changed: Ghost) -> None:
        parameter = self._name_of_storage.get(changed.storage_id)
        if parameter is None:
            return
        if self.ghosts[parameter].needs_grad:
            raise GhostError(
                f"A step may change weights only through the optimizer, but `{name}` changes the parameter"
                f" `{parameter}` in place, which would change one of several versions of it. Do it in a hook such as"
                " `on_before_zero_grad`, or as part of the forward with `torch.nn.utils.parametrize`."
            )
        self.trace.changed_frozen.add(parameter)

    def _hidden_parameter(self, tensor: Tensor) -> str | None:
        """The name of a real parameter of the model that ``tensor`` is or depends on."""
        if (name := self.slots.names.get(tensor)) is not None:  # type: ignore[call-overload]
            return str(name)
        nodes, seen = [tensor.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and variable in self.slots.names:
                return self.slots.names[variable]
            nodes.extend(before for before, _ in node.next_functions)
        return None

    def _record(self, name: str, inputs: list[Ghost]) -> Op:
        op = Op(
            self._tick(),
            name,
            self._open[-1] if self._open else -1,
            tuple(dict.fromkeys(g.vid for g in inputs if id(g) not in self._name_of)),
            tuple(dict.fromkeys(self._name_of[id(g)] for g in inputs if id(g) in self._name_of)),
            self._checkpoints.current(),
        )
        self.trace.ops.append(op)
        for call in self._open:
            self.trace.calls[call].ops.append(len(self.trace.ops) - 1)
        return op

    def _take_over(self, name: str, inputs: list[Ghost], target: Tensor) -> Ghost | None:
        """Go on with a ghost in the place of a tensor of the step's own into which ghosts are written."""
        if shares_memory(target, self.written_over()):
            return None
        self._note_read(GhostWritten(inputs[0], name), traceback.extract_stack())
        op = self._record(name, inputs)
        with torch._C.DisableTorchFunction():
            nbytes, needs_grad = target.nbytes, target.requires_grad or any(ghost.needs_grad for ghost in inputs)
        ghost = self.stand_in(target, inputs[0].origin, needs_grad)
        ghost.vid = len(self.trace.values)
        self.trace.values.append(Value(len(self.trace.ops) - 1, nbytes, ghost.storage_id))
        op.outputs.append(ghost.vid)
        self.written.pairs.append((target, ghost))
        return ghost

    def stand_in(self, tensor: Tensor, origin: str, needs_grad: bool) -> Ghost:
        """A ghost in the place of a real tensor."""
        with torch._C.DisableTorchFunction():
            return self.like(tensor, origin, needs_grad, tensor.device)

    def ignore_write(self, inputs: list[Ghost], target: Tensor) -> None:
        self.want(inputs)
        for call, module in zip(self._open, self._open_modules):
            buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
            self.trace.calls[call].has_state |= shares_memory(target, buffers)

    def want(self, *nest: Any, **more: Any) -> None:
        """Note that the last stage should have the values in ``nest``."""
        for ghost in tensors_in((nest, more), Ghost):
            if ghost.vid >= 0:
                self.trace.wanted.setdefault(ghost.vid, min(self._tick(), self.trace.read_at))

    def finish(self) -> None:
        """Note what the step has done to attributes."""
        self._look_at_attributes()
        for module in self._root.modules():  # also of those that did not run at that time
            if self._kept.have_changed(module):
                self.trace.touched.append((self._time + 1, -1, None))
        self.trace.toggled = self._toggles.changed_back(self.trace.stopped is not None)

    def _look_at_attributes(self) -> None:
        """Note changes by the code that runs."""
        for module in (self._root, *self._open_modules):
            if self._kept.have_changed(module):
                self.trace.touched.append((self._time + 1, self._open[-1] if self._open else -1, None))

    def _note_read(self, read: GhostRead, frames: traceback.StackSummary) -> str:
        """Note that what comes now belongs to the last stage, and tell what was read where."""
        frame = next(filter(_is_user, reversed(frames)), None)
        text = f"{read}" if frame is None else f"{read} ({frame.filename}:{frame.lineno})"
        if self.trace.read is None:
            self.trace.read, self.trace.read_at = text, self._tick()
        return text

    def _guessed_rest(self) -> float:
        """How many times as much follows a read inside of a module, by the parameters that have not been read yet."""
        parameters, seen = self.trace.parameters, {name for op in self.trace.ops for name in op.parameters}
        if not seen or all(module is self._root for module in self._open_modules):
            return 0  # behind the network
        rest = [p for name, p in parameters.items() if name not in seen and p.requires_grad]
        self.trace.num_guessed = sum(p.numel for p in rest)
        return self.trace.num_guessed / sum(parameters[name].numel for name in seen)

    def stop(self, read: GhostRead) -> None:
        """End the trace at a read."""
        self.trace.stopped = self._note_read(read, traceback.extract_tb(read.__traceback__))
        rest, ops = self._guessed_rest(), list(self.trace.ops)
        self._open.clear()
        self._open_modules.clear()
        self._checkpoints.forget()
        op = self._record("read", [read.ghost])
        op.flops, op.nbytes = int(rest * sum(o.flops for o in ops)), int(rest * sum(o.nbytes for o in ops))
        self.want(*(g for ref in self._values if (g := ref()) is not None))  # what follows may use any of them
        for call in self.trace.calls:
            call.end = call.end if call.end >= 0 else self._tick()


def _is_user(frame: traceback.FrameSummary) -> bool:
    return not any(part in frame.filename for part in ("/lightning_dgmp/", "/torch/", "<frozen"))


class _Written(TorchFunctionMode):
    """Real tensors into which the step has written ghosts: from then on ghosts take the place of these and of views."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self.pairs: list[tuple[Tensor, Ghost]] = []

    def current(self, nest: Any) -> Any:
        return replace_leaves(self._current, nest) if self.pairs else nest

    def _current(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, Ghost):
            return leaf
        writer = next((ghost for target, ghost in self.pairs if shares_memory(leaf, [target])), None)
        if writer is None:
            return leaf
        ghost = self._tracer.stand_in(leaf, writer.origin, writer.needs_grad)
        ghost.vid, ghost.storage_id = writer.vid, writer.storage_id
        return ghost

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.pairs:
            args, kwargs = map_leaves(self._current, args), map_leaves(self._current, kwargs)
        return func(*args, **kwargs)
