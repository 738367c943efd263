"""AdamW in the eigenbasis of the gradients."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dgmp.optim import RotatedAdamW, rotated
from tests import models, sharing
from tests.integration.test_optimizers import Matrices
from tests.pool import WorkerPool
from tests.training import assert_equal, fit

SETTING: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}


def gradients(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, int(np.prod(shape)), dtype=torch.float64).view(shape).to(dtype))


def run(optimizer: torch.optim.Optimizer, p: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """The values of a parameter after each step."""
    values = []
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        values.append(p.detach().clone())
    return values


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (2, 3, 2, 2)])
def test_other_parameters_go_as_by_adamw(shape: tuple[int, ...]) -> None:
    ours, theirs = parameter(*shape), parameter(*shape)
    grads = gradients(30, *shape)
    expected = run(torch.optim.AdamW([theirs], foreach=False, **SETTING), theirs, grads)
    torch.testing.assert_close(run(RotatedAdamW([ours], **SETTING), ours, grads), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{"rotate": False}, {"max_size": 4}])
def test_matrices_that_are_not_to_be_rotated_go_as_by_adamw(options: dict[str, Any]) -> None:
    ours, theirs = parameter(3, 5), parameter(3, 5)
    grads = gradients(30, 3, 5)
    expected = run(torch.optim.AdamW([theirs], **SETTING), theirs, grads)
    optimizer = RotatedAdamW([{"params": [ours], **options}], **SETTING)
    torch.testing.assert_close(run(optimizer, ours, grads), expected, rtol=1e-6, atol=1e-7)


def test_with_bases_of_one_it_is_adamw() -> None:
    ours = parameter(3, 5)
    optimizer = RotatedAdamW([ours], refresh_every=1000, **SETTING)
    first, *rest = gradients(30, 3, 5)
    run(optimizer, ours, [first])
    optimizer.state[ours].update(left_basis=torch.eye(3), right_basis=torch.eye(5))
    theirs = nn.Parameter(ours.detach().clone())
    expected = run(torch.optim.AdamW([theirs], **SETTING), theirs, rest)
    torch.testing.assert_close(run(optimizer, ours, rest), expected, rtol=1e-6, atol=1e-7)


def test_by_hand() -> None:
    """The basis from the first gradient, two updates in it, a refresh, and one update in what comes of it."""
    p = parameter(2, 3, dtype=torch.float64)
    grads = gradients(4, 2, 3, dtype=torch.float64)
    ours = run(RotatedAdamW([p], refresh_every=2, **SETTING), p, grads)

    lr, (b1, b2), eps = SETTING["lr"], SETTING["betas"], SETTING["eps"]
    keep = 1 - lr * SETTING["weight_decay"]
    g = [grad.numpy() for grad in grads]
    w = np.linspace(-1, 1, 6).reshape(2, 3) * keep
    left, right = (1 - b2) * g[0] @ g[0].T, (1 - b2) * g[0].T @ g[0]
    ties = (1e-3 * np.trace(gram) / len(gram) * np.diag(np.linspace(0, 1, len(gram))) for gram in (left, right))
    u, v = (np.linalg.eigh(gram + tie)[1] for gram, tie in zip((left, right), ties))
    np.testing.assert_allclose(ours[0].numpy(), w, rtol=1e-10)

    mean, square = (1 - b1) * g[1], (1 - b2) * (u.T @ g[1] @ v) ** 2
    w = w * keep - lr * u @ ((u.T @ mean @ v) / (1 - b1) / (np.sqrt(square / (1 - b2)) + eps)) @ v.T
    left, right = b2 * left + (1 - b2) * g[1] @ g[1].T, b2 * right + (1 - b2) * g[1].T @ g[1]
    np.testing.assert_allclose(ours[1].numpy(), w, rtol=1e-10)

    mean, square = b1 * mean + (1 - b1) * g[2], b2 * square + (1 - b2) * (u.T @ g[2] @ v) ** 2
    w = w * keep - lr * u @ ((u.T @ mean @ v) / (1 - b1**2) / (np.sqrt(square / (1 - b2**2)) + eps)) @ v.T
    left, right = b2 * left + (1 - b2) * g[2] @ g[2].T, b2 * right + (1 - b2) * g[2].T @ g[2]
    np.testing.assert_allclose(ours[2].numpy(), w, rtol=1e-10)

    rows, columns = (np.argsort(-np.diag(q.T @ gram @ q)) for gram, q in ((left, u), (right, v)))
    u, v = (
        np.linalg.qr((gram + 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))) @ q[:, order])[0]
        for gram, q, order in ((left, u, rows), (right, v, columns))
    )
    square = square[rows][:, columns]
    mean, square = b1 * mean + (1 - b1) * g[3], b2 * square + (1 - b2) * (u.T @ g[3] @ v) ** 2
    w = w * keep - lr * u @ ((u.T @ mean @ v) / (1 - b1**3) / (np.sqrt(square / (1 - b2**3)) + eps)) @ v.T
    np.testing.assert_allclose(ours[3].numpy(), w, rtol=1e-10)


def test_columns_are_ordered_with_their_second_moments() -> None:
    p = parameter(2, 2, dtype=torch.float64)
    optimizer = RotatedAdamW([p], refresh_every=1, betas=(0.0, 0.0))
    run(optimizer, p, [torch.diag(torch.tensor([2.0, 1.0])).double(), torch.diag(torch.tensor([3.0, 4.0])).double()])
    state = optimizer.state[p]
    torch.testing.assert_close(state["exp_avg_sq"], torch.diag(torch.tensor([16.0, 9.0])).double())
    torch.testing.assert_close(state["left_basis"].abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double())


def test_bases_follow_the_gradients() -> None:
    """One power iteration at a time they reach the eigenbases of distinct eigenvalues, and stay orthogonal."""
    generator = torch.Generator().manual_seed(1)
    p, scales = parameter(4, 6), torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    optimizer = RotatedAdamW([p], betas=(0.9, 0.99), refresh_every=2)
    run(optimizer, p, [scales @ torch.randn(4, 6, generator=generator) for _ in range(401)])
    state = optimizer.state[p]
    for side, size in (("left", 4), ("right", 6)):
        basis, gram = state[f"{side}_basis"], state[f"{side}_gram"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(size), rtol=0, atol=1e-5)
        rotated = basis.T @ gram @ basis
        assert (rotated - rotated.diag().diag()).norm() < 0.15 * rotated.norm()
    torch.testing.assert_close(state["left_basis"].diag().abs(), torch.ones(4), rtol=0, atol=0.1)


def test_bases_are_refreshed_every_so_many_updates() -> None:
    p = parameter(3, 4)
    optimizer = RotatedAdamW([p], refresh_every=3)
    bases = []
    for grad in gradients(10, 3, 4):
        run(optimizer, p, [grad])
        bases.append(optimizer.state[p]["left_basis"].clone())
    changes = [step for step in range(1, 10) if not torch.equal(bases[step], bases[step - 1])]
    assert changes == [3, 6, 9]


def quadratic(make: Callable[..., torch.optim.Optimizer], p: Tensor, q: Tensor, steps: int = 60) -> Tensor:
    """Descend on `1/2 tr(E^T A E B) + <N_t, E>` for `E = P^T W Q - T`, and return `P^T W Q`: P and Q cancel in it."""
    generator = torch.Generator().manual_seed(3)
    a, b, target, start = (torch.randn(*s, generator=generator).double() for s in ((4, 4), (3, 3), (4, 3), (4, 3)))
    a, b = a @ a.T, b @ b.T
    w = nn.Parameter(p @ start @ q.T)
    optimizer = make([w])
    for _ in range(steps):
        noise = 0.3 * torch.randn(4, 3, generator=generator).double()
        error = p.T @ w.detach() @ q - target
        w.grad = p @ (a @ error @ b + noise) @ q.T
        optimizer.step()
    return p.T @ w.detach() @ q


def test_rotating_the_parameters_rotates_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for ties, which the coordinates break; the null space of a side of 4 has one dimension here."""
    monkeypatch.setattr(rotated, "_TIE_BREAK", 0.0)
    generator = torch.Generator().manual_seed(4)
    p, q = (torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q for n in (4, 3))
    one = torch.eye(4).double(), torch.eye(3).double()

    def ours(params: Any) -> RotatedAdamW:
        return RotatedAdamW(params, lr=0.05, betas=(0.9, 0.95), refresh_every=5)

    def adamw(params: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(params, lr=0.05, betas=(0.9, 0.95))

    torch.testing.assert_close(quadratic(ours, p, q), quadratic(ours, *one), rtol=0, atol=1e-9)
    assert (quadratic(adamw, p, q) - quadratic(adamw, *one)).abs().max() > 0.05


def test_first_gradient_gives_the_basis_alone() -> None:
    p = parameter(3, 4)
    start = p.detach().clone()
    optimizer = RotatedAdamW([p], lr=0.1, weight_decay=0.2)
    first, second = run(optimizer, p, gradients(2, 3, 4))
    torch.testing.assert_close(first, start * (1 - 0.1 * 0.2))
    assert optimizer.state[p]["step"] == 1
    assert (second - first).abs().max() > 0.01


def test_gradients_of_zero() -> None:
    """They do not give a basis, decay the weight, and leave everything finite, however many there are."""
    ours, late = parameter(3, 4), parameter(3, 4)
    grads, zero = gradients(3, 3, 4), torch.zeros(3, 4)
    first, second = (RotatedAdamW([p], betas=(0.5, 0.5), refresh_every=2, weight_decay=0.0) for p in (ours, late))
    run(first, ours, grads)
    run(second, late, [zero, zero])
    assert not second.state_dict()["state"]
    run(second, late, grads)
    torch.testing.assert_close(late, ours, rtol=0, atol=0)
    values = run(first, ours, [zero] * 300 + grads)
    assert all(value.isfinite().all() for value in values)
    assert not torch.equal(values[-1], values[299])

    decayed = parameter(3, 4)
    values = run(RotatedAdamW([decayed], lr=0.1, weight_decay=0.5), decayed, [zero])
    torch.testing.assert_close(values[0], parameter(3, 4).detach() * 0.95)


@pytest.mark.parametrize(("dtype", "noise", "bound"), [(torch.float64, 1e-15, 1e-9), (torch.float32, 1e-7, 1e-3)])
@pytest.mark.parametrize("shape", [(4, 4), (4, 12), (12, 4), (48, 96), (2, 48)])
def test_rounding_of_gradients_stays_small(
    shape: tuple[int, int], dtype: torch.dtype, noise: float, bound: float
) -> None:
    """A side has a null space at first, and of (2, 48) still when the basis is refreshed."""
    ours, theirs = (nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in range(2))
    grads = gradients(30, *shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    factors = [1 + noise * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in grads]
    expected = run(RotatedAdamW([theirs]), theirs, [grad.to(dtype) for grad in grads])
    values = run(RotatedAdamW([ours]), ours, [(grad * factor).to(dtype) for grad, factor in zip(grads, factors)])
    for ours_now, expected_now in zip(values[1:], expected[1:]):
        assert (ours_now - expected_now).norm() < bound * expected_now.norm()


def test_gradients_of_low_rank() -> None:
    p = parameter(6, 5)
    rank_one = [grad[:, :1] @ grad[:1] for grad in gradients(1, 6, 5)] * 50
    assert all(value.isfinite().all() and value.abs().max() < 2 for value in run(RotatedAdamW([p]), p, rank_one))


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 1), (0, 3)])
def test_thin_matrices(shape: tuple[int, int]) -> None:
    p = parameter(*shape)
    assert all(value.isfinite().all() for value in run(RotatedAdamW([p], refresh_every=2), p, gradients(6, *shape)))


def test_each_parameter_goes_its_own_way() -> None:
    """Without gradient it stays, whatever the others do; groups may be empty, and what is left out changes nothing."""
    idle, ours, alone = parameter(3, 4), parameter(3, 4), parameter(3, 4)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [idle, ours], "lr": 0.02}, {"params": [parameter(3)]}]
    together, by_itself = RotatedAdamW(groups, **SETTING), RotatedAdamW([alone], **{**SETTING, "lr": 0.02})
    grads = gradients(15, 3, 4)
    torch.testing.assert_close(run(together, ours, grads), run(by_itself, alone, grads), rtol=0, atol=0)
    torch.testing.assert_close(idle, parameter(3, 4), rtol=0, atol=0)
    assert list(together.state) == [ours]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    def make() -> tuple[nn.Parameter, nn.Parameter, RotatedAdamW]:
        matrix, vector = parameter(3, 4, dtype=dtype), parameter(4, dtype=dtype)
        groups = [{"params": [matrix]}, {"params": [vector], "rotate": False}]
        return matrix, vector, RotatedAdamW(groups, refresh_every=3, **SETTING)

    def go(made: tuple[nn.Parameter, nn.Parameter, RotatedAdamW], steps: range) -> None:
        for step in steps:
            made[0].grad, made[1].grad = matrices[step].clone(), matrices[step][0].clone()
            made[2].step()

    matrices = gradients(20, 3, 4, dtype=dtype)
    whole, first, second = make(), make(), make()
    go(whole, range(20))
    go(first, range(8))
    file = io.BytesIO()
    torch.save([first[0], first[1], first[2].state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        second[0].copy_(saved[0])
        second[1].copy_(saved[1])
    second[2].load_state_dict(saved[2])
    go(second, range(8, 20))
    for ours, expected in zip(second[:2], whole[:2]):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    for p, q in zip(second[:2], whole[:2]):
        ours_state, expected_state = second[2].state[p], whole[2].state[q]
        assert ours_state.keys() == expected_state.keys()
        for name, value in expected_state.items():
            assert ours_state[name].dtype == value.dtype
            torch.testing.assert_close(ours_state[name], value, rtol=0, atol=0)


def test_hooks_may_change_what_is_loaded() -> None:
    first, second = parameter(3, 4, dtype=torch.bfloat16), parameter(3, 4, dtype=torch.bfloat16)
    saved, loaded = RotatedAdamW([first]), RotatedAdamW([second])
    run(saved, first, gradients(4, 3, 4, dtype=torch.bfloat16))

    def renamed(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "params": [0]} for group in state["param_groups"]]
        return {"state": {0: state["state"]["weight"]}, "param_groups": groups}

    loaded.register_load_state_dict_pre_hook(renamed)
    state = saved.state_dict()
    groups = [{**group, "params": ["weight"]} for group in state["param_groups"]]
    loaded.load_state_dict({"state": {"weight": state["state"][0]}, "param_groups": groups})
    torch.testing.assert_close(dict(loaded.state[second]), dict(saved.state[first]), rtol=0, atol=0)
    assert len(loaded._optimizer_load_state_dict_pre_hooks) == 1


def test_deep_copies_go_on_by_themselves() -> None:
    p = parameter(3, 4)
    optimizer = RotatedAdamW([p])
    grads = gradients(8, 3, 4)
    run(optimizer, p, grads[:4])
    other = copy.deepcopy(optimizer)
    (q,) = other.param_groups[0]["params"]
    torch.testing.assert_close(run(other, q, grads[4:]), run(optimizer, p, grads[4:]), rtol=0, atol=0)


def test_half_precision_has_statistics_of_single_precision() -> None:
    half, single = parameter(8, 6, dtype=torch.bfloat16), parameter(8, 6)
    grads = gradients(30, 8, 6, dtype=torch.bfloat16)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0}
    optimizer = RotatedAdamW([half], **options)
    ours = run(optimizer, half, grads)[-1]
    expected = run(RotatedAdamW([single], **options), single, [grad.float() for grad in grads])[-1]
    assert ours.dtype == torch.bfloat16
    assert {value.dtype for value in optimizer.state[half].values()} == {torch.float32}
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0.03)


def test_learning_rate_as_a_tensor() -> None:
    ours, expected = parameter(3, 4), parameter(3, 4)
    grads = gradients(15, 3, 4)
    tensors = run(RotatedAdamW([ours], **{**SETTING, "lr": torch.tensor(0.01)}), ours, grads)
    torch.testing.assert_close(tensors, run(RotatedAdamW([expected], **SETTING), expected, grads))


def test_closure_is_called_once_with_gradients_enabled() -> None:
    p = parameter(3, 4)
    optimizer = RotatedAdamW([p])
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    assert optimizer.step() is None


def test_gradient_scaler() -> None:
    """Gradients are unscaled before the step, and an overflow leaves parameters and state alone."""
    ours, expected = parameter(3, 4), parameter(3, 4)
    optimizer, scaler = RotatedAdamW([ours], **SETTING), torch.amp.GradScaler("cpu", init_scale=1024.0)
    grads = gradients(12, 3, 4)
    for step, grad in enumerate(grads):
        scaler.scale((ours * grad).sum()).backward()
        if step == 5:
            ours.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    run(RotatedAdamW([expected], **SETTING), expected, grads[:5] + grads[6:])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_descends_where_adam_oscillates() -> None:
    """A quadratic whose axes are oblique to the coordinates, with gradients four updates old."""
    generator = torch.Generator().manual_seed(5)
    p, q = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (8, 8))
    a, b = (o @ torch.diag(torch.logspace(0, -2, 8)) @ o.T for o in (p, q))
    start = torch.randn(8, 8, generator=generator)

    def loss_after(make: Callable[..., torch.optim.Optimizer]) -> float:
        w = nn.Parameter(start.clone())
        optimizer, queue = make([w], lr=0.03, betas=(0.9, 0.99), weight_decay=0.0), [torch.zeros(8, 8)] * 4
        for _ in range(400):
            queue.append(a @ w.detach() @ b)
            w.grad = queue.pop(0)
            optimizer.step()
        return (w * (a @ w @ b)).sum().item()

    assert loss_after(RotatedAdamW) < 0.5 * loss_after(torch.optim.AdamW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must be at least 0, but is -1.0."),
        ({"lr": float("nan")}, "`lr` must be at least 0, but is nan."),
        ({"lr": torch.ones(2)}, r"`lr` must be a number or a tensor without dimensions, but has shape \(2,\)."),
        ({"eps": -1e-8}, "`eps` must be at least 0, but is -1e-08."),
        ({"weight_decay": -0.1}, "`weight_decay` must be at least 0, but is -0.1."),
        ({"betas": (0.9, 1.0)}, r"`betas` must be two numbers from 0 to below 1, but are \(0.9, 1.0\)."),
        ({"betas": (0.9,)}, r"`betas` must be two numbers from 0 to below 1, but are \(0.9,\)."),
        ({"refresh_every": 0}, "`refresh_every` must be an integer of at least 1, but is 0."),
        ({"refresh_every": 2.5}, "`refresh_every` must be an integer of at least 1, but is 2.5."),
        ({"max_size": 0}, "`max_size` must be an integer of at least 1, but is 0. .* pass `rotate=False`."),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotatedAdamW([parameter(2, 2)], **options)
    with pytest.raises(ValueError, match=message):
        RotatedAdamW([parameter(2, 2)]).add_param_group({"params": [parameter(3)], **options})


def test_sparse_and_complex_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"needs dense gradients, but one is sparse. Use `sparse=False`"):
        RotatedAdamW(embedding.parameters()).step()
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"needs real parameters, but one is complex. .* `torch.view_as_real`"):
        RotatedAdamW([p]).step()


class RotatedMatrices(Matrices):
    """Square matrices, with biases and a matrix that is not rotated in groups of their own."""

    def __init__(self) -> None:
        super().__init__("", {})
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def configure_optimizers(self) -> Any:
        last = list(self.layers[-1].parameters())
        hidden = [p for layer in self.layers[:-1] for p in layer.parameters()]
        groups = [{"params": last, "rotate": False}, {"params": hidden, "lr": 0.002}]
        return RotatedAdamW(groups, lr=0.001, refresh_every=3)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_processes_equal_virtual_stages(pool: WorkerPool, clip: float | None) -> None:
    """The first stage has nothing of the first group."""
    args: dict[str, Any] = {"gradient_clip_val": clip}
    expected = pool.run(fit, 1, RotatedMatrices, models.vectors, {"num_stages": 2, "virtual": True}, 1, **args)[0]
    ours = pool.run(fit, 2, RotatedMatrices, models.vectors, {"num_stages": 2}, 2, **args)[0]
    assert_equal(ours, expected, 1e-5)


class RotatedLayer(sharing.OneLayer):
    """All matrices are rotated, the shared one, which is not square, too."""

    def __init__(self) -> None:
        super().__init__(others=True)
        self.layer.linear = nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 16))  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return RotatedAdamW(self.parameters(), lr=0.002, refresh_every=3)


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-9), ("32-true", 1e-3)])
def test_a_matrix_on_three_stages(pool: WorkerPool, precision: str, tolerance: float) -> None:
    """Contributions to its gradient are added in another order by processes."""
    strategy = {"num_stages": 3, "split_at": ["others.1", "others.3"]}
    args: dict[str, Any] = {"precision": precision}
    ours = pool.run(fit, 3, RotatedLayer, models.vectors, strategy, 3, **args)[0]
    expected = pool.run(fit, 1, RotatedLayer, models.vectors, {**strategy, "virtual": True}, 1, **args)[0]
    assert ours.stages["layer.linear.0.weight"] == (0, 1, 2)
    assert_equal(ours, expected, tolerance)
