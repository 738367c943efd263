"""What is refused, and the sentence that says why and what to do."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.optim import LBFGS, SGD

from lightning_dgmp.host import (
    BitsandbytesPrecision,
    DeepSpeedPrecision,
    FSDPPrecision,
    LightningModule,
    MisconfigurationException,
    MixedPrecision,
    Trainer,
    TransformerEnginePrecision,
    callbacks,
    is_overridden,
)
from lightning_dgmp.plan.record import Trace
from lightning_dgmp.stage.shadow import Shadow

_AVERAGING = callbacks.StochasticWeightAveraging, callbacks.WeightAveraging
_PRECISIONS = BitsandbytesPrecision, DeepSpeedPrecision, FSDPPrecision, TransformerEnginePrecision

__all__ = [
    "ONCE",
    "SEVERAL_OPTIMIZERS",
    "check_arguments",
    "check_devices",
    "check_optimizers",
    "check_supported",
    "checked_trace",
    "tied_in_memory",
]

ONCE = (
    "`strategy='delayed_mp'` needs an optimizer that evaluates each batch once, but its closure was called again for"
    " the same batch. Use a first-order optimizer, and call the closure once in `optimizer_step`."
)
SEVERAL_OPTIMIZERS = (
    "`strategy='delayed_mp'` needs a single optimizer, but `configure_optimizers` returned several. Use one"
    " optimizer with several parameter groups."
)


def check_arguments(strategy: type, further: Iterable[str]) -> None:
    """Refuse misspelt arguments, which only a wrapped stage of several replicas would miss.

    Args:
        strategy: The class, whose bases take the further arguments.
        further: The names of what is to be handed on.
    """
    known: set[str] = set()
    for owner in (*strategy.__mro__[:-1], DistributedDataParallel):
        if (init := vars(owner).get("__init__")) is not None:
            known |= set(_argument_names(init)) - {"self", "module", "kwargs"}
    for name in further:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(
                f"`{strategy.__name__}` has no argument `{name}`, and neither has Lightning's `DDPStrategy`."
                + (f" Did you mean `{near[0]}`?" if near else "")
            )


def check_devices(
    num_stages: int | Literal["auto"],
    data_parallel_size: int | Literal["auto"],
    chosen_stages: int,
    num_devices: int,
    virtual: bool,
) -> None:
    """Refuse numbers of stages and replicas that the devices cannot hold.

    Args:
        num_stages: As the user gave it.
        data_parallel_size: As the user gave it.
        chosen_stages: How many stages a replica would have.
        num_devices: On all nodes together.
        virtual: Whether a device holds a whole replica.
    """
    for name, value in (("num_stages", num_stages), ("data_parallel_size", data_parallel_size)):
        if value != "auto" and (isinstance(value, bool) or value < 1):
            raise MisconfigurationException(f"`{name}` must be at least 1 or 'auto', but is {value}.")
    width = 1 if virtual else max(chosen_stages, 1)
    if data_parallel_size != "auto" and width * data_parallel_size != num_devices:
        raise MisconfigurationException(
            f"{'`virtual=True` and ' if virtual else '`num_stages` times '}`data_parallel_size` must make the number of"
            f" devices, but {'' if virtual else f'{width} times '}{data_parallel_size} is not {num_devices}. Set"
            f" `Trainer(devices={width * data_parallel_size})` (of all nodes together), or leave one of them 'auto'."
        )
    if num_devices % width:
        raise MisconfigurationException(
            f"`num_stages` must divide the number of devices, but {width} stages do not divide {num_devices} device(s)."
            f" Set `Trainer(devices={width})` (or a multiple), or `DelayedMPStrategy(num_stages={width}, virtual=True)`"
            f" to train with the delays of {width} stages on one device."
        )


def check_supported(
    trainer: Trainer, module: LightningModule, virtual: bool, backward: str, num_replicas: int = 1
) -> None:
    """Refuse what does not work with delayed gradients (yet)."""
    strategy = "`strategy='delayed_mp'`"
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{strategy} needs automatic optimization, but `{type(module).__name__}.automatic_optimization` is False:"
            " it decides itself when each stage runs its backward and its step. Return the loss from `training_step`,"
            " or use another strategy."
        )
    if is_overridden("training_step", module) and "dataloader_iter" in _argument_names(module.training_step):
        raise MisconfigurationException(
            f"{strategy} needs `training_step(batch, ...)`, but `{type(module).__name__}` takes `dataloader_iter`."
        )
    plugin = trainer.precision_plugin
    if isinstance(plugin, _PRECISIONS):
        raise MisconfigurationException(
            f"{strategy} does not support `{type(plugin).__name__}`, which exchanges modules or their weights. Use one"
            " of `precision=` '32-true', '64-true', 'bf16-mixed', '16-mixed', 'bf16-true' and '16-true'."
        )
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    if scaler is not None and not issubclass(torch.cuda.amp.GradScaler, type(scaler)):
        raise MisconfigurationException(
            f"{strategy} scales losses as `torch.amp.GradScaler` does, but the precision plugin has a"
            f" `{type(scaler).__name__}`. Use torch's, which may have any settings."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, callbacks.LearningRateFinder):
            raise MisconfigurationException(
                f"{strategy} does not support the search for a learning rate, which steers by the loss of each batch,"
                f" but there is a `{type(callback).__name__}`, as by `Tuner.lr_find`. Search on one device without this"
                " strategy."
            )
        if not virtual and isinstance(callback, _AVERAGING):
            raise MisconfigurationException(
                f"{strategy} does not support averages of weights yet, because a process holds only those of its stage,"
                f" but there is a `{type(callback).__name__}`. Remove it."
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise MisconfigurationException(
                f"{strategy} needs to know the shapes of all parameters, but `{name}` is not initialized. Run the lazy"
                " modules once on an example, as in `configure_model` or `__init__`."
            )
    if (tied := _tied_by_storage(module)) is not None and not virtual:
        raise tied_in_memory(*tied)
    for name, child in module.named_modules():
        if not virtual and isinstance(child, torch.jit.ScriptModule):
            raise MisconfigurationException(
                f"{strategy} cannot look into compiled TorchScript, but `{name}` is a `{type(child).__name__}`. Use the"
                " Python module that it was made from."
            )
        if not virtual and num_replicas > 1 and getattr(child, "sparse", False) is True:
            raise MisconfigurationException(
                f"{strategy} with several replicas averages dense gradients, but `{name}` has `sparse=True`. Remove it."
            )
        if not virtual and getattr(child, "max_norm", None) is not None:
            raise MisconfigurationException(
                f"{strategy} does not support modules that change their weights in the forward, but `{name}` has"
                f" `max_norm={child.max_norm}`. Normalise what it returns instead."
            )
    if trainer.strategy._model_averaging_period is not None:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"{strategy} averages gradients, but `model_averaging_period` asks for averages of weights. Leave it out."
        )
    if virtual and backward != "stash":
        raise MisconfigurationException(
            f"`virtual=True` computes whole gradients at once, but `backward={backward!r}`. Use `backward='stash'`."
        )


def tied_in_memory(name: str, other: str) -> MisconfigurationException:
    """The error for two parameters that lie in the same memory."""
    return MisconfigurationException(
        f"`strategy='delayed_mp'` finds parameters that modules share by their identity, but `{name}` and `{other}` are"
        " two that lie in one storage. Assign the parameter itself, as in `head.weight = embedding.weight`; for a part"
        " or a transpose of one use it in `forward`."
    )


def check_optimizers(optimizers: list[Any], virtual: bool) -> None:
    """Refuse optimizers that evaluate the step more than once, or that know other processes."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "`strategy='delayed_mp'` needs an optimizer that evaluates each batch once, but"
                f" `{type(optimizer).__name__}` calls its closure several times. Use a first-order optimizer."
            )
        has_momentum = any(group.get("momentum") for group in optimizer.param_groups)
        if virtual and isinstance(optimizer, SGD) and optimizer.defaults.get("fused") and has_momentum:
            raise MisconfigurationException(
                "`virtual=True` gives the parameters of each stage their first gradient at another step, but"
                " `torch.optim.SGD(fused=True)` with momentum wants them all at once. Use `fused=False`."
            )
        if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
            raise MisconfigurationException(
                "`strategy='delayed_mp'` does not support `ZeroRedundancyOptimizer`, which divides its state among"
                " processes with the same parameters, but stages have different ones. Use the optimizer inside of it:"
                " each stage keeps the state of its own parameters alone."
            )


def checked_trace(trace: Trace, backward: str) -> Trace:
    """``trace``, unless it is of a step that cannot run twice but has to."""
    if backward != "stash" and trace.changed_frozen:
        raise MisconfigurationException(
            f"`backward={backward!r}` runs steps twice, but `training_step` changes frozen parameters in place, such as"
            f" `{min(trace.changed_frozen)}`. Change them in a hook, or use `backward='stash'`."
        )
    return trace


def _argument_names(function: object) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]


def _tied_by_storage(module: LightningModule) -> tuple[str, str] | None:
    """Two different parameters, or one and a buffer, that have memory in common, if there are any."""
    places: list[tuple[int, int, int, str, bool]] = []  # begin, number, end, name, whether it is trained
    for i, (name, tensor) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta and not isinstance(tensor, Shadow):
            begin = tensor.data_ptr()
            extent = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
            places.append((begin, i, begin + (extent + 1) * tensor.itemsize, name, tensor.requires_grad))
    places.sort()
    for (*_, end, name, is_trained), (begin, _, _, other, is_other_trained) in pairwise(places):
        if begin < end and (is_trained or is_other_trained):
            return name, other
    return None
