"""Replicas of a stage: their gradients are averaged while they are computed, and they keep the same buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Averaging"]


class Averaging:
    """Wraps the parameters of a stage in DDP, whose forward is called with what a delayed backward begins with.

    So DDP sees a forward and its backward at once, however long ago the batch was run, and its options mean what they
    mean elsewhere. The snapshots of that time lead to the parameters of today, where DDP's hooks are.

    Args:
        own: The parameters of the stage.
        buffers: The buffers of each of its modules, of which all replicas use those of the first one.
        group: The process group of this stage's replicas.
        wrap: ``wrap(module, **kwargs)`` makes DDP of a module with these arguments and those of the user.
        wait: ``wait(work, what)`` waits for a collective in that group, with a limit.
        device: Where the stage lives.
    """

    def __init__(
        self,
        own: list[nn.Parameter],
        buffers: list[dict[str, Tensor | None]],
        group: dist.ProcessGroup,
        wrap: Callable[..., DistributedDataParallel],
        wait: Callable[[Any, str], None],
        device: torch.device,
    ) -> None:
        self._own, self._buffers, self._device = own, buffers, device
        self._group, self._wrap, self._wait = group, wrap, wait
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

        Not into them, as DDP does: batches in flight may need the old ones.
        """
        buffers = {
            id(buffer): buffer
            for entries in self._buffers
            for buffer in entries.values()
            if isinstance(buffer, Tensor) and buffer.numel() and buffer.layout == torch.strided
        }
        if not buffers:
            return
        contents = [buffer.reshape(-1).view(torch.uint8) for buffer in buffers.values()]
        together = torch.cat(contents)
        work = dist.broadcast(together, group=self._group, group_src=0, async_op=True)
        self._wait(work, "the buffers of the first replica")
        if self._group.rank() == 0:
            return
        parts = together.split([content.numel() for content in contents])
        new = {key: part.clone().view(old.dtype).view(old.shape) for (key, old), part in zip(buffers.items(), parts)}
        for entries in self._buffers:
            entries.update({name: new.get(id(buffer), buffer) for name, buffer in entries.items()})


class _Beginnings(nn.Module):
    """What DDP takes for the model: the parameters of a stage, and what a backward begins with."""

    def __init__(self, parameters: list[nn.Parameter], device: torch.device) -> None:
        super().__init__()
        self.own = nn.ParameterList(parameters)
        self.anchor = nn.Parameter(torch.zeros(1, device=device))  # hooks do not like tensors without dimensions

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return [*tensors, self.anchor * 1]
