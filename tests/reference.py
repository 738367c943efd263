"""The serial reference: delayed training of one model in one process, by hand, with the batches of all replicas."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

__all__ = ["train_by_hand"]


def train_by_hand(
    module: LightningModule,
    replicas: Sequence[Sequence[Any]],
    stages: dict[str, tuple[int, ...]],
    num_stages: int,
    accumulate: int = 1,
    max_norm: float | None = None,
) -> list[float]:
    """Train ``module`` by a FIFO of gradients a stage; returns the losses of the first replica.

    Args:
        module: With ``loss(batch)``, and a scheduler a step if any.
        replicas: The batches of each replica, whose gradients are averaged.
        stages: The stage of each parameter.
        num_stages: How many stages there are.
        accumulate: Over how many batches gradients are accumulated.
        max_norm: Clip to this norm: a stage takes its own gradient's, for the later stages those of the same batch,
            and for earlier ones the newest before it began the iteration.
    """
    configured = module.configure_optimizers()
    optimizer, scheduler = configured, None
    if isinstance(configured, dict):
        optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    parameters = [{n: p for n, p in module.named_parameters() if stages[n][0] == k} for k in range(num_stages)]
    queues: list[deque[dict[str, Tensor]]] = [deque() for _ in parameters]
    squares = [0.0 for _ in parameters]  # of each stage's newest gradient
    told: list[list[float]] = [[] for _ in parameters]  # what each stage sent with errors, by iteration
    losses: list[float] = []

    def take(k: int, delay: int) -> bool:
        has_backward = len(queues[k]) > delay
        if has_backward:
            due = queues[k].popleft()
            for n, p in parameters[k].items():
                if n in due:
                    p.grad = due[n] if p.grad is None else p.grad + due[n]
        return has_backward

    def step(earlier: list[float]) -> None:
        for k, own in enumerate(parameters):
            if max_norm is not None:
                later = [told[j][-1 - (j - k)] if len(told[j]) > j - k else 0.0 for j in range(k + 1, num_stages)]
                norm = (sum(earlier[:k]) + squares[k] + sum(later)) ** 0.5
                for p in own.values():
                    if p.grad is not None:
                        p.grad = p.grad * min(1.0, max_norm / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad()

    def note(k: int, is_step: bool, has_backward: bool) -> None:
        grads = [p.grad for p in parameters[k].values() if p.grad is not None]
        if is_step and grads:
            squares[k] = sum(float((g**2).sum()) for g in grads)
        told[k].append(squares[k] if has_backward else told[k][-1] if told[k] else 0.0)

    num_batches, count = len(replicas[0]), 0
    for t in range(num_batches):
        gradients: dict[str, Tensor] = {}
        for r, batches in enumerate(replicas):
            loss = module.loss(batches[t])
            named = {n: p for n, p in module.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(loss / accumulate / len(replicas), list(named.values()), allow_unused=True)
            for n, grad in zip(named, found):
                if grad is not None:
                    gradients[n] = gradients[n] + grad if n in gradients else grad
            if r == 0:
                losses.append(loss.item())
        earlier = list(squares)
        count += 1
        is_step = count % accumulate == 0 or t == num_batches - 1
        for k in range(num_stages):
            queues[k].append({n: gradients[n] for n in parameters[k] if n in gradients})
            note(k, is_step, take(k, num_stages - 1 - k))
        if is_step:
            step(earlier)
            count = 0
            if scheduler is not None:
                scheduler.step()
    earlier = list(squares)
    for i in range(num_stages - 1):
        is_step = (i + 1) % accumulate == 0 or i == num_stages - 2
        for k in range(num_stages):
            note(k, is_step, take(k, 0))
        if is_step:
            step(earlier)
    return losses
