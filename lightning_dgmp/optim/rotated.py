"""AdamW in the eigenbasis of the gradients ("basis rotation").

Adam scales each coordinate by itself, so it works best where coordinates do not interact. In the eigenbasis of the
curvature they do not; in others its direction oscillates from step to step, and a delayed direction points the wrong
way (Jung et al., ICML 2026, arXiv 2602.03515). SOAP (Vyas et al., 2024, arXiv 2409.11321) estimates such a basis from
the gradients of a matrix; what is done here differs from it in where the first moment and ``eps`` are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

__all__ = ["RotatedAdamW"]

_TIE_BREAK = 1e-3  # of the mean eigenvalue: far more than rounding, far less than what matters


class RotatedAdamW(Optimizer):
    r"""AdamW for matrices in a basis that slowly follows their gradients, and plain AdamW for all other parameters.

    For a matrix ``W`` of shape ``(m, n)`` with gradient ``G``, at its update ``t``::

        M <- b1 M + (1 - b1) G              (m, n)  in the space of W, so it needs no care when the basis changes
        v <- b2 v + (1 - b2) (U^T G V)^2    (m, n)  in the eigenbasis
        W <- (1 - lr wd) W - lr U [ (U^T M V) / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) ] V^T
        L <- b2 L + (1 - b2) G G^T          (m, m)
        R <- b2 R + (1 - b2) G^T G          (n, n)
        U, V <- Q of QR(L' U), QR(R' V)     (m, m), (n, n)  every `refresh_every` updates

    ``eps`` is added after the bias correction, as in :class:`torch.optim.AdamW`, which this is for ``U = V = I``. Bases
    change last, so a gradient is never measured in a basis that it has shaped itself.

    The first gradient that is not zero gives ``L``, ``R`` and their eigenbases. Up to and with it, a matrix changes by
    weight decay alone. A null space, as one side of a matrix that is not square has then, gets its basis by the order
    of the coordinates and keeps it, not by rounding: ``L'`` and ``R'`` have a thousandth of their mean eigenvalue more
    on the diagonal.

    Besides the two moments, a matrix keeps four square factors, of ``2 (m^2 + n^2)`` numbers. Statistics are kept in
    float32, or float64 for such parameters. Every option can differ from group to group::

        RotatedAdamW([{"params": hidden}, {"params": embeddings, "rotate": False, "lr": 1e-4}], lr=1e-3)

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate, a number or a tensor without dimensions.
        betas: The decay of the averages of gradients, and that of all averages of their products.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        rotate: Whether matrices are rotated. Hidden matrices should be; the paper leaves out embeddings and the head.
        refresh_every: How many updates a basis lasts.
        max_size: Matrices with a side larger than this are not rotated, because their factors would be too large.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rotate: bool = True,
        refresh_every: int = 10,
        max_size: int = 10_000,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rotate": rotate,
            "refresh_every": refresh_every,
            "max_size": max_size,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not have are those of the constructor."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, whose statistics keep their precision: torch would round them to that of parameters."""
        given: dict[str, Any] = {}
        # The last of the hooks that may change the state before it is loaded, so it sees what is.
        handle = self.register_load_state_dict_pre_hook(lambda _, state: given.update(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        keys = [key for group in given["param_groups"] for key in group["params"]]
        for key, p in zip(keys, [p for group in self.param_groups for p in group["params"]]):
            for name, value in given["state"].get(key, {}).items():
                if name != "step":
                    self.state[p][name] = value.to(p.device, _statistics_dtype(p))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have gradients.

        Args:
            closure: Evaluates the model again and returns the loss, which is returned.

        Raises:
            RuntimeError: If a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, _dense_real(p.grad).to(_statistics_dtype(p)), group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if "step" not in self.state.get(p, ()):
            if not _is_rotated(p, group):
                self.state[p] = _moments(grad)
            else:
                # In its own eigenbasis a gradient is diagonal: off the diagonal there is nothing but rounding, which
                # Adam would blow up to whole steps. So its update is left out, as in SOAP. Adam's own first update
                # instead would depend on the basis of W, from which rotation makes us independent otherwise. And a
                # zero has no eigenbasis: behind a projection that starts at zero, first gradients are zero. Asking
                # waits for the device, but only until there is a basis.
                if grad.any():
                    self.state[p] = {**_moments(grad), **_bases(grad, group["betas"][1])}
                return
        state = self.state[p]
        direction = _direction(state, grad, group)
        p.sub_(direction.mul_(group["lr"]))
        if "left_basis" in state:
            _follow(state, grad, group)


def _check(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.dim() > 0:
        raise ValueError(
            f"`lr` must be a number or a tensor without dimensions, but has shape {tuple(lr.shape)}. Pass"
            " `lr.squeeze()`."
        )
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0.0:  # nan is refused, too
            raise ValueError(f"`{name}` must be at least 0, but is {group[name]}. Pass a positive number, or 0.")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"`betas` must be two numbers from 0 to below 1, but are {betas}. AdamW's are (0.9, 0.999).")
    for name in ("refresh_every", "max_size"):
        if not isinstance(group[name], int) or group[name] < 1:
            cure = " To rotate nothing, pass `rotate=False`." if name == "max_size" else " Usual is 10."
            raise ValueError(f"`{name}` must be an integer of at least 1, but is {group[name]}.{cure}")


def _dense_real(grad: Tensor) -> Tensor:
    if grad.is_sparse:
        raise RuntimeError(
            "`RotatedAdamW` needs dense gradients, but one is sparse. Use `sparse=False` in the embedding, or give its"
            " weight to `torch.optim.SparseAdam`."
        )
    if grad.is_complex():
        raise RuntimeError(
            "`RotatedAdamW` needs real parameters, but one is complex. Make it a real one of `torch.view_as_real`, and"
            " use `torch.view_as_complex` in the forward."
        )
    return grad


def _is_rotated(p: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["rotate"]) and p.dim() == 2 and max(p.shape) <= group["max_size"]


def _statistics_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _moments(grad: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),  # as torch's: counting needs no device
        "exp_avg": torch.zeros_like(grad),
        "exp_avg_sq": torch.zeros_like(grad),
    }


def _bases(grad: Tensor, beta: float) -> dict[str, Tensor]:
    return {
        "left_gram": (1 - beta) * (grad @ grad.T),
        "right_gram": (1 - beta) * (grad.T @ grad),
        "left_basis": _eigenbasis(grad),
        "right_basis": _eigenbasis(grad.T),
    }


def _eigenbasis(grad: Tensor) -> Tensor:
    """The eigenvectors of ``G G^T``, and where eigenvalues are equal those that the coordinates choose.

    One of the two products has a null space unless the matrix is square. A basis of it by rounding alone would be
    another one in another process. In single precision rounding would still be as large as the gaps that are made here.
    """
    gram = grad.double() @ grad.double().T
    order = torch.linspace(0, 1, len(gram), dtype=gram.dtype, device=gram.device)
    gram.diagonal().add_(order * (_TIE_BREAK * gram.diagonal().mean()))
    # Contiguous, as all checkpoints bring them back: other strides may round otherwise.
    return torch.linalg.eigh(gram).eigenvectors.to(grad.dtype).contiguous()


def _direction(state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> Tensor:
    """Take a gradient into the moments, and return what to subtract at a learning rate of 1."""
    beta1, beta2 = group["betas"]
    u, v = state.get("left_basis"), state.get("right_basis")
    state["step"] += 1
    step = state["step"].item()
    mean = state["exp_avg"].lerp_(grad, 1 - beta1)
    if u is not None and v is not None:
        grad, mean = u.T @ grad @ v, u.T @ mean @ v
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    direction = mean.div(denominator).div_(1 - beta1**step)
    return direction if u is None or v is None else u @ direction @ v.T


def _follow(state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    """Take a gradient into its products, and refresh the bases if it is time."""
    beta = group["betas"][1]
    state["left_gram"].addmm_(grad, grad.T, beta=beta, alpha=1 - beta)
    state["right_gram"].addmm_(grad.T, grad, beta=beta, alpha=1 - beta)
    if state["step"].item() % group["refresh_every"] == 0:
        state["left_basis"], rows = _refreshed(state["left_gram"], state["left_basis"])
        state["right_basis"], columns = _refreshed(state["right_gram"], state["right_basis"])
        state["exp_avg_sq"] = state["exp_avg_sq"][rows][:, columns]


def _refreshed(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration and QR, and the order of the old columns in the new basis.

    QR lets a column give way to all before it, so they go by their Rayleigh quotients, the largest first; the second
    moments go with them. Columns may change their signs, on which no update depends.
    """
    powers = gram @ basis
    order = (basis * powers).sum(0).argsort(descending=True)
    powers += _TIE_BREAK * gram.diagonal().mean() * basis  # a null space keeps its basis, instead of one by rounding
    return torch.linalg.qr(powers[:, order]).Q.contiguous(), order
