"""Parameters that live on several stages: what K processes do is what K virtual stages do, and these a FIFO."""

from __future__ import annotations

from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dgmp import DelayedMPStrategy
from tests import models, sharing
from tests.pool import Failure, WorkerPool
from tests.reference import train_by_hand
from tests.training import Outcome, assert_equal, fit

TOLERANCE = 1e-6

MODELS: dict[str, tuple[Any, Any]] = {
    "tied": (sharing.Tied, models.ragged_tokens),
    "by hand": (sharing.TiedByHand, models.ragged_tokens),
    "one bias": (sharing.OneBias, models.ragged_tokens),
    "one layer": (sharing.OneLayer, models.vectors),
    "layers between": (partial(sharing.OneLayer, others=True), models.vectors),
    "sometimes": (sharing.Sometimes, models.ragged_tokens),
    "thaws": (sharing.Thaws, models.ragged_tokens),
    "gpt2": (partial(models.HuggingFace, "gpt2", tied=True), models.ragged_tokens),
}
# Here many gradients are added up, in another order by processes: single precision would hide mistakes.
IN_DOUBLE = {"one layer", "layers between"}


def precision(name: str) -> dict[str, Any]:
    return {"precision": "64-true"} if name in IN_DOUBLE else {}


def tolerance(name: str) -> float:
    return 1e-12 if name in IN_DOUBLE else TOLERANCE


def virtual(pool: WorkerPool, name: str, num_stages: int, replicas: int = 1, **kwargs: Any) -> Outcome:
    strategy = {"num_stages": num_stages, "virtual": True}
    return pool.run(fit, replicas, *MODELS[name], strategy, replicas, **precision(name), **kwargs)[0]


def processes(
    pool: WorkerPool, name: str, num_stages: int, replicas: int = 1, backward: str = "stash", **kwargs: Any
) -> Outcome:
    num_devices = num_stages * replicas
    strategy = {"num_stages": num_stages, "backward": backward}
    outcomes = pool.run(fit, num_devices, *MODELS[name], strategy, num_devices, **precision(name), **kwargs)
    assert any(len(stages) > 1 for stages in outcomes[0].stages.values()), "nothing is shared"
    for other in outcomes[1:]:
        for key, value in outcomes[0].state.items():
            torch.testing.assert_close(other.state[key], value, rtol=0, atol=0)
    return outcomes[0]


@pytest.mark.parametrize(("accumulate", "max_norm"), [(1, None), (1, 0.3), (3, 0.3)])
def test_virtual_stages_are_a_fifo_with_the_delay_of_the_home(
    pool: WorkerPool, accumulate: int, max_norm: float | None
) -> None:
    args: dict[str, Any] = {"accumulate_grad_batches": accumulate, "module_args": {"optimizer": "momentum"}}
    ours = virtual(pool, "tied", 4, gradient_clip_val=max_norm, **args)
    assert ours.stages["gpt.tok_emb.weight"] == (0, 3)
    seed_everything(7, verbose=False)
    module = sharing.Tied(optimizer="momentum")
    train_by_hand(module, [list(models.ragged_tokens())], ours.stages, 4, accumulate, max_norm)
    for name, p in module.named_parameters():
        torch.testing.assert_close(ours.state[name], p.detach(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("name", list(MODELS))
def test_processes_equal_virtual_stages(pool: WorkerPool, name: str, num_stages: int) -> None:
    args = {"module_args": {"optimizer": "momentum", "lr": 0.02}}
    assert_equal(processes(pool, name, num_stages, **args), virtual(pool, name, num_stages, **args), tolerance(name))


class Hooked(sharing.Tied):
    """A hook on the shared parameter concerns its whole gradient, once."""

    def on_fit_start(self) -> None:
        self.gpt.tok_emb.weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01) * 0.5)


@pytest.mark.parametrize("backward", ["stash", "recompute"])
def test_hooks_on_the_parameter(pool: WorkerPool, backward: str) -> None:
    strategy = {"num_stages": 3, "backward": backward}
    ours = pool.run(fit, 3, Hooked, models.ragged_tokens, strategy, 3)[0]
    expected = pool.run(fit, 1, Hooked, models.ragged_tokens, {"num_stages": 3, "virtual": True}, 1)[0]
    assert_equal(ours, expected, TOLERANCE)


def test_replay_runs(pool: WorkerPool) -> None:
    outcome = processes(pool, "one bias", 3, backward="replay")
    assert all(value.isfinite().all() for value in outcome.state.values())


class ClipsByItself(sharing.Tied):
    def on_fit_start(self) -> None:
        self.count = 0
        self.configure_gradient_clipping = self.clip  # type: ignore[method-assign]

    def clip(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1

    def on_train_end(self) -> None:
        assert self.count > 20


def test_a_hook_of_the_instance_stays(pool: WorkerPool) -> None:
    pool.run(fit, 2, ClipsByItself, models.ragged_tokens, {"num_stages": 2}, 2)


@pytest.mark.parametrize("name", ["tied", "one bias", "layers between"])
def test_adamw(pool: WorkerPool, name: str) -> None:
    args = {"module_args": {"optimizer": "adamw"}}
    assert_equal(processes(pool, name, 3, **args), virtual(pool, name, 3, **args), tolerance(name))


@pytest.mark.parametrize("backward", ["recompute"])
@pytest.mark.parametrize("name", ["tied", "layers between"])
def test_recompute(pool: WorkerPool, name: str, backward: str) -> None:
    assert_equal(processes(pool, name, 3, backward=backward), virtual(pool, name, 3), tolerance(name))


@pytest.mark.parametrize(
    "args",
    [
        {"gradient_clip_val": 0.3},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3},
        {"accumulate_grad_batches": 5, "val_check_interval": 7, "make_val_loader": models.ragged_tokens},
        {"precision": "bf16-mixed"},
        {"max_epochs": 2, "limit_train_batches": 2},
    ],
    ids=lambda args: "-".join(args),
)
@pytest.mark.parametrize("name", ["tied", "one bias"])
def test_trainer_arguments(pool: WorkerPool, name: str, args: dict[str, Any]) -> None:
    if name == "one bias" and "make_val_loader" in args:
        pytest.skip("has no validation step")
    args = {"module_args": {"optimizer": "momentum"}, **args}
    assert_equal(processes(pool, name, 3, **args), virtual(pool, name, 3, **args), TOLERANCE)


@pytest.mark.parametrize(("name", "num_stages"), [("tied", 2), ("tied", 4), ("layers between", 2)])
@pytest.mark.parametrize("args", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}], ids=["", "options"])
def test_replicas(pool: WorkerPool, name: str, num_stages: int, args: dict[str, Any]) -> None:
    args = {"module_args": {"optimizer": "adamw"}, **args}
    expected = virtual(pool, name, num_stages, 2, **args)
    assert_equal(processes(pool, name, num_stages, 2, **args), expected, tolerance(name))


def test_a_home_in_the_middle(pool: WorkerPool) -> None:
    """`others.0` first: the shared layer is on the second stage and the third."""
    split = {"split_at": ["layer", "others.2"]}
    args: dict[str, Any] = {"module_args": {"optimizer": "momentum"}, **precision("layers between")}
    ours = pool.run(fit, 3, *MODELS["layers between"], {"num_stages": 3, **split}, 3, **args)[0]
    expected = pool.run(fit, 1, *MODELS["layers between"], {"num_stages": 3, "virtual": True, **split}, 1, **args)[0]
    assert ours.stages["layer.gain"] == (1, 2)
    assert_equal(ours, expected, tolerance("layers between"))


@pytest.mark.parametrize("split_at", [["layer", "between.2"], ["between.0", "layer", "between.2"]])
def test_homes_on_several_stages(pool: WorkerPool, split_at: list[str]) -> None:
    """Stages then take part in different numbers of iterations of a flush, of which there are several here."""
    num_stages = len(split_at) + 1
    strategy = {"num_stages": num_stages, "split_at": split_at}
    args: dict[str, Any] = {"module_args": {"optimizer": "momentum"}, "val_check_interval": 9, "max_epochs": 2}
    data = models.ragged_tokens, models.ragged_tokens
    ours = pool.run(fit, num_stages, sharing.TwoHomes, data[0], strategy, num_stages, make_val_loader=data[1], **args)
    alone = strategy | {"virtual": True}
    expected = pool.run(fit, 1, sharing.TwoHomes, data[0], alone, 1, make_val_loader=data[1], **args)[0]
    last = num_stages - 1
    assert expected.stages["embedding.weight"] == (0, last)
    assert expected.stages["layer.gain"] == (last - 1, last)
    assert_equal(ours[0], expected, TOLERANCE)


# ----- the rule of the paper


def test_the_rule_of_ouroboros(pool: WorkerPool) -> None:
    """Half of the output side's gradient now, half of the input side's of K - 1 iterations ago."""
    num_stages, lr = 4, 0.05
    strategy = {"num_stages": num_stages, "virtual": True, "tied": "ouroboros"}
    ours = pool.run(fit, 1, *MODELS["tied"], strategy, 1)[0]

    seed_everything(7, verbose=False)
    module = sharing.Tied(lr=lr)
    named = dict(module.named_parameters())
    queues: list[deque[list[torch.Tensor]]] = [deque() for _ in range(num_stages)]
    matrix = module.gpt.tok_emb.weight
    own = [[n for n in named if ours.stages[n] == (k,)] for k in range(num_stages)]
    batches = list(models.ragged_tokens())
    for t in range(len(batches) + num_stages - 1):
        if t < len(batches):
            tokens, output_side = batches[t], matrix.detach().clone().requires_grad_()
            hidden = module.gpt.drop(module.gpt.tok_emb(tokens[:, :-1]) + module.gpt.pos_emb[:, : tokens.shape[1] - 1])
            for block in module.gpt.blocks:
                hidden = block(hidden)
            logits = module.gpt.ln_f(hidden) @ output_side.T
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            gradients = dict(zip([*named, "output"], torch.autograd.grad(loss, [*named.values(), output_side])))
            for k, names in enumerate(own):
                queues[k].append([gradients[n] for n in names])
            queues[0][-1].append(gradients["gpt.tok_emb.weight"])
            queues[-1][-1].append(gradients["output"])
        with torch.no_grad():
            for k, names in enumerate(own):
                delay = num_stages - 1 - k if t < len(batches) else 0
                if len(queues[k]) > delay:
                    due = queues[k].popleft()
                    for n, grad in zip(names, due):
                        named[n] -= lr * grad
                    if len(due) > len(names):
                        matrix -= lr / 2 * due[-1]

    for name, p in named.items():
        torch.testing.assert_close(ours.state[name], p.detach(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["by hand", "one bias"])
def test_the_rule_of_ouroboros_needs_to_know_the_side(pool: WorkerPool, name: str) -> None:
    strategy = {"num_stages": 2, "virtual": True, "tied": "ouroboros"}
    (failure,) = pool.try_run(fit, 1, *MODELS[name], strategy, 1)
    assert "is used outside of the modules that stages own" in failure.message


@pytest.mark.parametrize(("options", "text"), [({"tied": "apart"}, "'aligned' or 'ouroboros'"), ({}, "`virtual=True`")])
def test_arguments_that_are_wrong(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DelayedMPStrategy(**{"tied": "ouroboros", **options})


# ----- checkpoints and evaluation


def fit_and_save(folder: str, strategy: Any, devices: int, **kwargs: Any) -> Outcome:
    from lightning.pytorch.callbacks import ModelCheckpoint

    callback = ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    args: dict[str, Any] = {"module_args": {"optimizer": "adamw"}, "enable_checkpointing": True, **kwargs}
    return fit(sharing.Tied, models.ragged_tokens, strategy, devices, callbacks=[callback], **args)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 2), (2, 1)])
def test_resume(pool: WorkerPool, tmp_path: Path, before: int, after: int, is_sharded: bool) -> None:
    if is_sharded and after == 1:
        pytest.skip("plain Lightning reads folders only when they are consolidated")

    def strategy(num_stages: int) -> Any:
        options = {"num_stages": num_stages, "save_distributed_checkpoint": is_sharded}
        return options if num_stages > 1 else None

    pool.run(fit_and_save, before, str(tmp_path / "a"), strategy(before), before, limit_train_batches=10)
    path = next((tmp_path / "a").iterdir())
    if not is_sharded:
        checkpoint = torch.load(path, weights_only=True)
        assert len(checkpoint["optimizer_states"][0]["state"]) == len(list(sharing.Tied().parameters()))
    args = {"max_epochs": 2, "limit_train_batches": 10, "ckpt_path": str(path)}
    resumed = pool.run(fit_and_save, after, str(tmp_path / "b"), strategy(after), after, **args)[0]
    alone = {"num_stages": after, "virtual": True, "save_distributed_checkpoint": is_sharded} if after > 1 else None
    expected = pool.run(fit_and_save, 1, str(tmp_path / "c"), alone, 1, **args)[0]
    assert resumed.global_step == 20
    assert_equal(resumed, expected, TOLERANCE)


def predict(strategy: Any, devices: int) -> Any:
    seed_everything(7, verbose=False)
    module = sharing.Tied()
    chosen = DelayedMPStrategy(**strategy) if strategy else "auto"
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=chosen, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_train_batches=8,
    )  # fmt: skip
    trainer.fit(module, models.ragged_tokens())
    return trainer.predict(module, DataLoader(torch.arange(32).view(4, 8) % 20, batch_size=2))


def test_evaluation(pool: WorkerPool) -> None:
    ours = pool.run(predict, 3, {"num_stages": 3}, 3)[0]
    expected = pool.run(predict, 1, {"num_stages": 3, "virtual": True}, 1)[0]
    torch.testing.assert_close(ours, expected, rtol=TOLERANCE, atol=TOLERANCE)


# ----- what goes wrong


class Drifts(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.strategy.stage == 0 and trainer.fit_loop.batch_idx == 5:
            with torch.no_grad():
                pl_module.gpt.tok_emb.weight[0, 0] += 1e-3


def drift() -> None:
    fit(sharing.Tied, models.ragged_tokens, {"num_stages": 2}, 2, callbacks=[Drifts()])


def test_copies_that_differ_are_an_error(pool: WorkerPool) -> None:
    results = pool.try_run(drift, 2)
    assert all(isinstance(result, Failure) for result in results)
    assert any("`gpt.tok_emb.weight` differs between stage 0 and stage 1" in result.message for result in results)
