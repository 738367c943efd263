"""Replicas of a stage: their gradients are averaged while they are computed, and they keep the same buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Averaging", "BufferSlot", "buffer_slots"]


@dataclass(frozen=True)
class BufferSlot:
    """Where modules have the same buffer, and how it looked before the first step; steps put other tensors there."""

    shape: torch.Size
    dtype: torch.dtype
    places: list[tuple[str, str]]  # path of a module, name


def buffer_slots(root: nn.Module) -> list[BufferSlot]:
    """The buffers that the modules of ``root`` have now."""
    slots: dict[int, BufferSlot] = {}
    for path, module in root.named_modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and tensor.numel() and tensor.layout == torch.strided:
                slots.setdefault(id(tensor), BufferSlot(tensor.shape, tensor.dtype, [])).places.append((path, name))
    return list(slots.values())


class _Buffer:
    """What is in a slot, in the modules of one stage."""

    def __init__(self, slot: BufferSlot, places: list[tuple[dict[str, Tensor | None], str]]) -> None:
        self._shape, self._dtype, self._places = slot.shape, slot.dtype, places

    def fits(self) -> bool:
        """Whether it is as it was in the beginning, apart from its values."""
        now = self._now()
        return now is not None and (now.shape, now.dtype, now.layout) == (self._shape, self._dtype, torch.strided)

    def content(self, device: torch.device) -> Tensor:
        """Its bytes, or as many zeros if it does not fit."""
        now = self._now()
        if now is None or not self.fits():
            return torch.zeros(self._shape.numel() * self._dtype.itemsize, dtype=torch.uint8, device=device)
        return now.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)

    def put(self, content: Tensor) -> None:
        """Put a new tensor with these bytes wherever the present one is."""
        new, old = content.view(self._dtype).view(self._shape).detach(), self._now()  # no view of one that lives on
        for entries, name in self._places:
            if entries.get(name) is old:
                entries[name] = new

    def _now(self) -> Tensor | None:
        entries, name = self._places[0]
        return entries.get(name)


class Averaging:
    """Wraps the parameters of a stage in DDP, whose forward is called with what a delayed backward begins with.

    So DDP sees a forward and its backward at once, however long ago the batch was run, and its options mean what they
    mean elsewhere. The snapshots of that time lead to the parameters of today, where DDP's hooks are.

    Args:
        own: The parameters of the stage.
        slots: Those of its modules' buffers of which all replicas use the values of the first one.
        modules: The modules of the stage by their paths.
        group: The process group of this stage's replicas.
        wrap: ``wrap(module, **kwargs)`` makes DDP of a module with these arguments and those of the user.
        wait: ``wait(work, what)`` waits for a collective in that group, with a limit.
        device: Where the stage lives.
    """

    def __init__(
        self,
        own: list[nn.Parameter],
        slots: Iterable[BufferSlot],
        modules: Mapping[str, nn.Module],
        group: dist.ProcessGroup,
        wrap: Callable[..., DistributedDataParallel],
        wait: Callable[[Any, str], None],
        device: torch.device,
    ) -> None:
        self._own, self._device = own, device
        self._group, self._wrap, self._wait = group, wrap, wait
        self._buffers = []
        for slot in slots:
            places = [(modules[path]._buffers, name) for path, name in slot.places if path in modules]
            if places:
                self._buffers.append(_Buffer(slot, places))
        self._trained, self._ddp = self._wrapped()
        self.share_buffers()

    def _wrapped(self, **kwargs: Any) -> tuple[list[bool], DistributedDataParallel]:
        module = _Beginnings(self._own, self._device)
        return self._which_are_trained(), self._wrap(
            module, process_group=self._group, broadcast_buffers=False, **kwargs
        )

    def _which_are_trained(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._own]

    @contextmanager
    def backward(self, reduces: bool) -> Iterator[None]:
        """Around a backward, before which :meth:`roots` must be called; without ``reduces`` gradients only add up."""
        if self._which_are_trained() != self._trained:  # as after finetuning callbacks; batches in flight know nothing
            self.reduce_kept()  # what has added up for parameters that are no longer trained counts, but not here alone
            # The weights are the same everywhere, and what has run its forward needs them untouched.
            self._trained, self._ddp = self._wrapped(find_unused_parameters=True, init_sync=False)
        with nullcontext() if reduces else self._ddp.no_sync():
            yield

    def roots(self, *tensors: Tensor) -> list[Tensor]:
        """What the backward should begin with instead of ``tensors``, and one number more, whose error is zero.

        That one takes part even if there are no others, so that no replica waits for this one.
        """
        return self._ddp(*tensors)

    def root(self, loss: Tensor) -> Tensor:
        """As :meth:`roots`, with that number in the loss."""
        loss, anchor = self.roots(loss)
        return loss + 0 * anchor.to(loss.dtype).sum()

    @torch.no_grad()
    def reduce_kept(self) -> None:
        """Average gradients that have added up without being reduced."""
        if not self._own:
            return
        used = torch.tensor([p.grad is not None for p in self._own], dtype=torch.int32, device=self._device)
        work = dist.all_reduce(used, dist.ReduceOp.MAX, self._group, async_op=True)
        self._wait(work, "the average of gradients")
        for parameter, is_used in zip(self._own, used.tolist()):
            if is_used:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                work = dist.all_reduce(grad.div_(self._group.size()), group=self._group, async_op=True)
                self._wait(work, "the average of gradients")
                parameter.grad = grad

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Put buffers of the first replica in the place of those of the others.

        Not into them, as DDP does: batches in flight may need the old ones. A buffer that has another size than in the
        beginning, here or there, stays as it is: what modules make as they need it may differ between replicas.
        """
        if not self._buffers:
            return
        fits = [buffer.fits() for buffer in self._buffers]
        is_sent = torch.ones(len(fits), dtype=torch.uint8, device=self._device)
        for i, does_fit in enumerate(fits):
            if not does_fit:
                is_sent[i] = 0
        contents = [buffer.content(self._device) for buffer in self._buffers]
        together = torch.cat([is_sent, *contents])
        work = dist.broadcast(together, group=self._group, group_src=0, async_op=True)
        self._wait(work, "the buffers of the first replica")
        if self._group.rank() == 0:
            return
        is_sent, *received = together.split([len(fits), *map(len, contents)])
        for buffer, does_fit, sent, new, old in zip(self._buffers, fits, is_sent.bool(), received, contents):
            if does_fit:
                buffer.put(torch.where(sent, new, old))  # to ask whether it was sent would wait for the device


class _Beginnings(nn.Module):
    """What DDP takes for the model: the parameters of a stage, and what a backward begins with."""

    def __init__(self, parameters: list[nn.Parameter], device: torch.device) -> None:
        super().__init__()
        self.own = nn.ParameterList(parameters)
        self.anchor = nn.Parameter(torch.zeros(1, device=device))  # hooks do not like tensors without dimensions

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return [*tensors, self.anchor * 1]
