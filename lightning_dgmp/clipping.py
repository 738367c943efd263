"""Clipping by the norm of all gradients, of which a process has those of its stage alone.

``torch.nn.utils.clip_grad_norm_``, which Lightning calls and users may under any name, is ``get_total_norm`` and then
``clip_grads_with_norm_``, and what these wrap is exchanged while a pipeline trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_dgmp.host import Callback, LightningModule, MisconfigurationException, is_overridden

__all__ = [
    "Part",
    "after_clipping",
    "clip_by_total_norm",
    "clips_by_norm",
    "hooks_see_gradients",
    "norm_of",
    "updated_by",
]

_HOOKS = "on_after_backward", "on_before_optimizer_step"  # of callbacks too
_HOOKS_OF_MODULE = (*_HOOKS, "configure_gradient_clipping", "optimizer_step")


_ONLY_ALL = (
    "`strategy='delayed_mp'` clips by the norm of all gradients, which stages tell each other, but it was asked for"
    " that of some of the parameters. Pass all that have gradients, as `self.parameters()`."
)


class Part(NamedTuple):
    """A stage, as far as clipping is concerned.

    Attributes:
        parameters: Those that the optimizer updates.
        total_norm: Tells the norm of the gradients of all stages, as far as this one knows it.
        note: Is told by what the gradients were multiplied.
    """

    parameters: Sequence[nn.Parameter]
    total_norm: Callable[[], Tensor]
    note: Callable[[Tensor], None]


def clips_by_norm(module: LightningModule) -> bool:
    """Whether gradients are, or may be, clipped by norm."""
    trainer = module.trainer
    by_norm = str(trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
    return bool(trainer.gradient_clip_val and by_norm) or any(is_overridden(hook, module) for hook in _HOOKS_OF_MODULE)


def hooks_see_gradients(module: LightningModule) -> bool:
    """Whether there are hooks between the backward and clipping, which may change gradients."""
    callbacks: list[Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
    return any(is_overridden(hook, module) for hook in _HOOKS_OF_MODULE) or any(
        is_overridden(hook, callback, Callback) for callback in callbacks for hook in _HOOKS
    )


def updated_by(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of ``parameters`` that ``optimizers`` update."""
    updated = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [parameter for parameter in parameters if parameter in updated]


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of these tensors alone, whatever is exchanged."""
    with torch.no_grad():
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        return _original(get_total_norm)(dense)  # type: ignore[no-any-return]


def clip_by_total_norm(
    parts: Callable[[], Sequence[Part]],
    gradients: Callable[[], Iterable[Tensor]],
    parameters: Iterable[nn.Parameter],
) -> Callable[[], None]:
    """Let torch's functions for clipping take the norm of all stages, and let them do nothing without gradients.

    Args:
        parts: The stages of this process now; none: the norm is not known.
        gradients: Those that it concerns; a function that is called with others does what it always does.
        parameters: Those of all stages.

    Returns:
        What undoes it.
    """
    totals: list[Tensor] = []  # of the gradients as they are now, of each part
    refusals = WeakTensorKeyDictionary()  # norms that are no totals, and why nothing can be clipped by them
    of_stages = {id(parameter) for parameter in parameters}

    def total_norm(
        tensors: Iterable[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False, *args: Any, **kwargs: Any
    ) -> Tensor:
        tensors, known = list(tensors), parts()
        given = {id(grad) for grad in tensors}
        if not any(id(grad) in given for grad in gradients()):
            return measure(tensors, norm_type, error_if_nonfinite, *args, **kwargs)  # type: ignore[no-any-return]
        is_whole = all(id(p.grad) in given for part in known for p in part.parameters if p.grad is not None)
        if refusal := _refusal(bool(known), float(norm_type), is_whole):
            norm = measure(tensors, norm_type, error_if_nonfinite, *args, **kwargs)
            refusals[norm] = refusal
            return norm  # type: ignore[no-any-return]
        totals[:] = [part.total_norm() for part in known]
        if error_if_nonfinite and not all(norm.isfinite() for norm in totals):
            raise RuntimeError("The norm of all gradients is not finite, so they cannot be clipped.")
        return totals[-1]

    def clip_with_norm(parameters: Any, max_norm: float, total_norm: Tensor, *args: Any, **kwargs: Any) -> None:
        if isinstance(total_norm, Tensor) and total_norm in refusals:
            raise MisconfigurationException(refusals[total_norm])
        if not any(total_norm is norm for norm in totals):
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            is_of_others = not parameters or any(id(p) in of_stages and p.requires_grad for p in parameters)
            if parts() and is_of_others and next(iter(gradients()), None) is not None:  # as groups that are empty here
                raise MisconfigurationException(_ONLY_ALL)
            clip(parameters, max_norm, total_norm, *args, **kwargs)
            return
        for part, norm in zip(parts(), totals):
            clip([p for p in part.parameters if p.grad is not None], max_norm, norm, *args, **kwargs)
            part.note((float(max_norm) / (norm + 1e-6)).clamp(max=1.0))

    def clip_value(parameters: Any, *args: Any, **kwargs: Any) -> None:
        concerned = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if any(parameter.grad is not None for parameter in concerned):  # torch's cannot do without
            clip_by_value(concerned, *args, **kwargs)

    ours = {get_total_norm: total_norm, clip_grads_with_norm_: clip_with_norm, clip_grad_value_: clip_value}
    measure, clip, clip_by_value = map(_original, ours)
    for function, replacement in ours.items():
        _cell(function).cell_contents = replacement

    def undo() -> None:
        for function in ours:
            _cell(function).cell_contents = _original(function)

    return undo


def _refusal(is_known: bool, norm_type: float, is_whole: bool) -> str | None:
    """Why gradients cannot be clipped by a norm; ``None`` if they can."""
    if not is_known:
        return (
            "`strategy='delayed_mp'` clips by the norm of all gradients, which stages tell each other if they know that"
            " it is wanted. Clip by `Trainer(gradient_clip_val=...)`, or in the LightningModule's hook"
            " `configure_gradient_clipping`."
        )
    if norm_type != 2.0:
        return (
            "`strategy='delayed_mp'` clips by the 2-norm of all gradients, or by value, but `norm_type="
            f"{norm_type}`. Use `norm_type=2`."
        )
    return None if is_whole else _ONLY_ALL


def _original(function: Any) -> Any:
    return function.__wrapped__


def _cell(function: Any) -> Any:
    """Where a function of torch keeps what it wraps: the same for all who have imported it, under any name."""
    return function.__closure__[function.__code__.co_freevars.index("func")]


@contextmanager
def after_clipping(module: LightningModule, then: Callable[[], None]) -> Iterator[None]:
    """Call ``then()`` when Lightning or the user's hook has clipped the gradients, also if there is nothing to do."""
    own, original = module.__dict__.get("configure_gradient_clipping"), module.configure_gradient_clipping

    def configure_gradient_clipping(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        then()

    module.__dict__["configure_gradient_clipping"] = configure_gradient_clipping
    try:
        yield
    finally:
        del module.__dict__["configure_gradient_clipping"]
        if own is not None:
            module.__dict__["configure_gradient_clipping"] = own
