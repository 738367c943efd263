"""What is refused, and the sentence that says why and what to do."""

from __future__ import annotations

import torch
from torch.nn.parameter import UninitializedParameter
from torch.optim import LBFGS

from lightning_dgmp.host import (
    LightningModule,
    MisconfigurationException,
    MixedPrecision,
    Trainer,
    callbacks,
    is_overridden,
)

# `WeightAveraging` is new in Lightning 2.6
_NAMES = ("StochasticWeightAveraging", "WeightAveraging")
_AVERAGING = tuple(getattr(callbacks, name) for name in _NAMES if hasattr(callbacks, name))

__all__ = ["check_devices", "check_optimizers", "check_supported"]


def check_devices(num_stages: int, num_devices: int, virtual: bool) -> None:
    """Refuse a number of stages that the devices cannot hold."""
    if num_stages < 1:
        raise MisconfigurationException(f"`num_stages` must be at least 1 or 'auto', but is {num_stages}.")
    if virtual:
        if num_devices > 1:
            raise MisconfigurationException(
                f"`virtual=True` runs all stages on one device, but there are {num_devices}. Set `devices=1`."
            )
    elif num_devices % num_stages:
        raise MisconfigurationException(
            f"`num_stages` must divide the number of devices, but {num_stages} stages do not divide {num_devices}"
            f" device(s). Set `Trainer(devices={num_stages})` (or a multiple), or `DelayedMPStrategy(num_stages="
            f"{num_stages}, virtual=True)` to train with the delays of {num_stages} stages on one device."
        )
    elif 1 < num_stages < num_devices:
        raise MisconfigurationException(
            f"Several replicas of a pipeline are not supported yet, but {num_devices} devices hold"
            f" {num_devices // num_stages} replicas of {num_stages} stages. Set `num_stages={num_devices}` or"
            f" `Trainer(devices={num_stages})`."
        )


def check_supported(trainer: Trainer, module: LightningModule, virtual: bool, backward: str) -> None:
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
    if isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None:
        raise MisconfigurationException(
            f"{strategy} does not support `precision='16-mixed'` yet, because each stage would scale its loss alone."
            " Use `precision='bf16-mixed'`."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, callbacks.LearningRateFinder):
            raise MisconfigurationException(
                f"{strategy} does not support the search for a learning rate, which steers by the loss of each batch,"
                f" but there is a `{type(callback).__name__}`. Search on one device without this strategy."
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
    for name, child in module.named_modules():
        if not virtual and isinstance(child, torch.jit.ScriptModule):
            raise MisconfigurationException(
                f"{strategy} cannot look into compiled TorchScript, but `{name}` is a `{type(child).__name__}`. Use the"
                " Python module that it was made from."
            )
        if not virtual and getattr(child, "max_norm", None) is not None:
            raise MisconfigurationException(
                f"{strategy} does not support modules that change their weights in the forward, but `{name}` has"
                f" `max_norm={child.max_norm}`. Normalise what it returns instead."
            )
    if virtual and backward != "stash":
        raise MisconfigurationException(
            f"`virtual=True` computes whole gradients at once, but `backward={backward!r}`. Use `backward='stash'`."
        )


def check_optimizers(optimizers: list[object]) -> None:
    """Refuse optimizers that evaluate the step more than once."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "`strategy='delayed_mp'` needs an optimizer that evaluates each batch once, but"
                f" `{type(optimizer).__name__}` calls its closure several times. Use a first-order optimizer."
            )


def _argument_names(function: object) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]
