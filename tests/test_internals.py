"""Private parts of torch and Lightning that this project touches: fails clearly when a new version changes them."""

from __future__ import annotations

import inspect

import torch
import torch.distributed.distributed_c10d as c10d
import torchmetrics.metric
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.prediction_loop import _PredictionLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.call import _interrupt
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad

from lightning_dgmp.clipping import _cell
from lightning_dgmp.loops import (
    _DelayedEpochLoop,
    _DelayedFitLoop,
    _SharingEvaluationLoop,
    _SharingPredictionLoop,
    install_loops,
)


def test_a_modules_call_can_be_replaced_on_the_instance() -> None:
    module = nn.Linear(2, 2)
    module.__dict__["_compiled_call_impl"] = lambda x: "ours"
    assert module(torch.zeros(2)) == "ours"
    assert "_compiled_call_impl" not in module.__getstate__()
    del module.__dict__["_compiled_call_impl"]
    assert isinstance(module(torch.zeros(2)), torch.Tensor)


def test_recurrent_networks_keep_a_list_of_their_parameters() -> None:
    lstm = nn.LSTM(2, 2)
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters()))


def test_the_loops_have_what_is_overridden() -> None:
    own = {"_broadcast_sigterm_tensor", "_pass_on_wishes_to_stop", "increment_progress_to_evaluation_end"}
    pairs = [
        (_DelayedEpochLoop, _TrainingEpochLoop),
        (_DelayedFitLoop, _FitLoop),
        (_SharingEvaluationLoop, _EvaluationLoop),
        (_SharingPredictionLoop, _PredictionLoop),
    ]
    for ours, theirs in pairs:
        names = {n for n in vars(ours) if not n.startswith("__")} - own
        assert all(hasattr(theirs, name) for name in names), names
    advance = inspect.getsource(_TrainingEpochLoop.advance)
    collectives = [word for word in ("broadcast", "barrier", "all_reduce", "reduce(") if word in advance]
    assert collectives == ["broadcast"], "there is a new synchronisation in every batch"
    assert advance.count("broadcast") == advance.count("_broadcast_sigterm_tensor") == 1


def test_the_loops_take_over_all_state() -> None:
    trainer = Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False)
    install_loops(trainer)
    assert trainer.fit_loop.max_steps == 3
    assert isinstance(trainer.fit_loop.epoch_loop, _DelayedEpochLoop)


def test_the_trainer_has_what_is_set() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert trainer._signal_connector.received_sigterm is False
    assert trainer._accelerator_connector.use_distributed_sampler is True
    assert "strategy.on_exception" in inspect.getsource(_interrupt)


def test_clipping_by_norm_measures_and_scales_by_the_public_functions() -> None:
    source = inspect.getsource(clip_grad.clip_grad_norm_)
    assert "_get_total_norm(grads, norm_type, error_if_nonfinite, foreach)" in source
    assert "_clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)" in source
    assert clip_grad._get_total_norm is nn.utils.get_total_norm
    assert clip_grad._clip_grads_with_norm_ is nn.utils.clip_grads_with_norm_


def test_functions_for_clipping_keep_what_they_wrap_in_a_cell() -> None:
    for function in (nn.utils.get_total_norm, nn.utils.clip_grads_with_norm_, nn.utils.clip_grad_value_):
        assert _cell(function).cell_contents is function.__wrapped__  # type: ignore[attr-defined]


def test_the_clipping_hook_is_called_whether_there_is_clipping_or_not() -> None:
    source = inspect.getsource(Precision._clip_gradients)
    assert '"configure_gradient_clipping"' in source
    assert "self._clip_gradients(" in inspect.getsource(Precision._after_closure)


def test_collectives_look_up_the_world() -> None:
    assert isinstance(vars(c10d._WorldMeta)["WORLD"], property)
    assert "_get_default_group()" in inspect.getsource(c10d.all_reduce)
    assert "GroupMember.WORLD" in inspect.getsource(c10d._get_default_group)


def test_metrics_look_up_how_to_gather() -> None:
    assert "dist_sync_fn = gather_all_tensors" in inspect.getsource(torchmetrics.metric.Metric.sync)


def test_scalers_keep_their_state_where_it_is_set() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    assert scaler._scale is None
    scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    assert (scaler._scale, scaler._growth_tracker) == (torch.tensor(4.0), torch.tensor(0))
    scaler.scale(layer(torch.ones(2)).sum()).backward()
    gradients = [p.grad for p in layer.parameters()]
    found = torch.zeros(())
    founds = scaler._unscale_grads_(optimizer, torch.tensor(0.25), found, False)
    assert founds == {found.device: found}
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in layer.parameters())  # type: ignore[arg-type]
    assert all(p.grad is grad for p, grad in zip(layer.parameters(), gradients))
    state = scaler._per_optimizer_states[id(optimizer)]
    assert {"stage", "found_inf_per_device"} <= state.keys()
    assert {type(state["stage"]).READY, type(state["stage"]).UNSCALED}
    state["found_inf_per_device"] = {torch.device("cpu"): torch.tensor(0.0), "told": torch.tensor(1.0)}
    scaler.update()
    assert scaler.get_scale() == 4.0 * scaler.get_backoff_factor()


def test_children_of_a_script_are_started_by_a_function_of_their_module() -> None:
    source = inspect.getsource(subprocess_script._SubprocessScriptLauncher._call_children_scripts)
    assert "command = _basic_subprocess_cmd()" in source
    assert callable(subprocess_script._basic_subprocess_cmd)
    assert "command, cwd = _hydra_subprocess_cmd(local_rank)" in source
    of_hydra = inspect.getsource(subprocess_script._hydra_subprocess_cmd)
    assert "command = [sys.executable, to_absolute_path(sys.argv[0])]" in of_hydra
    assert "return command, cwd" in of_hydra


def test_an_evaluation_synchronises_what_ddp_does_not_ignore() -> None:
    assert "_sync_module_states(self.model)" in inspect.getsource(DDPStrategy.setup)
    assert '"_ddp_params_and_buffers_to_ignore"' in inspect.getsource(_sync_module_states)


def test_loops_iterate_over_loaders_by_fetchers_and_combined_loaders() -> None:
    assert _DataFetcher.__module__.endswith(".loops.fetchers")
    assert CombinedLoader.__module__.endswith(".utilities.combined_loader")
    assert "iter(self.combined_loader)" in inspect.getsource(_DataFetcher.__iter__)


def test_callbacks_can_ask_when_to_log() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert isinstance(trainer._logger_connector.should_update_logs, bool)
    assert isinstance(trainer.fit_loop._should_accumulate(), bool)


def test_modules_are_made_in_a_context_of_the_strategy() -> None:
    assert "trainer.strategy.tensor_init_context()" in inspect.getsource(call._call_configure_model)
    assert "self.strategy.tensor_init_context(empty_init=empty_init)" in inspect.getsource(Trainer.init_module)


def test_fakes_have_memory_with_a_number() -> None:
    with FakeTensorMode():
        fake = nn.Parameter(torch.ones(2))
    assert fake.untyped_storage()._cdata == fake.view(1, 2).untyped_storage()._cdata
    assert isinstance(fake, nn.Parameter)
