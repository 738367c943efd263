"""Checkpoints: what Lightning saves and loads of a model whose parts are on several processes."""

from __future__ import annotations

import zipfile
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dgmp.building import BuildingStrategy
from lightning_dgmp.host import LightningModule, MisconfigurationException, TorchCheckpointIO
from lightning_dgmp.nests import leaves
from lightning_dgmp.pipeline import Pipeline
from lightning_dgmp.placement import Placement
from lightning_dgmp.sharded import is_sharded, load_sharded, put_in_place, save_sharded
from lightning_dgmp.stage.shadow import holds_parameters

__all__ = ["SavingStrategy"]

_KEY = "lightning_dgmp"  # of what we add to checkpoints
_NO_MODULES = (
    "`save_distributed_checkpoint=True` cannot write modules that are hyperparameters, whose weights no process has."
    " Leave them out, as by `save_hyperparameters(ignore=['net'])`."
)


class SavingStrategy(BuildingStrategy):
    """Saves ordinary Lightning files with the whole model, or folders into which each process writes what it holds.

    Args:
        num_stages: See :class:`~lightning_dgmp.mesh.MeshStrategy`.
        data_parallel_size: See there.
        virtual: See there.
        timeout: See there.
        is_sharded: Whether checkpoints are folders.
        **kwargs: See there.
    """

    def __init__(
        self,
        num_stages: int | Literal["auto"],
        data_parallel_size: int | Literal["auto"],
        virtual: bool,
        timeout: timedelta | None,
        is_sharded: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_stages, data_parallel_size, virtual, timeout, **kwargs)
        self._is_sharded = is_sharded
        self._pipeline: Pipeline | None = None
        self._trained: Pipeline | None = None  # the newest, which knows the optimizers also after `fit`
        self._seed = 0
        self._seeds: list[int] = []  # of all replicas
        self._loaded_seeds: list[int] = []
        self._loaded_squares = torch.zeros(0)
        self._loaded_states: list[dict[str, Any]] = []  # of optimizers, for when the plan is known

    @property
    @abstractmethod
    def squares(self) -> Tensor | None:
        """What is known of the norms of gradients."""

    @abstractmethod
    def flush(self) -> None:
        """Let nothing be in flight."""

    @abstractmethod
    def whole_model(self) -> AbstractContextManager[None]:
        """Flush, and give every process the whole model meanwhile."""

    def check_hyperparameters(self, module: LightningModule) -> None:
        """Refuse before training what could not be saved."""
        if self._is_sharded and any(isinstance(leaf, nn.Module) for leaf in leaves(dict(module.hparams))):
            raise MisconfigurationException(_NO_MODULES)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._is_sharded and self._pipeline is not None:
            self.flush()
            return self._pipeline.own_state_dict()
        if (placement := self.place_module()) is not None:
            self.flush()
            return placement.own_state_dict() if self._is_sharded else placement.state_dict()
        with self.whole_model():
            return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._trained is not None:
            self.flush()
            optimizer = getattr(optimizer, "_optimizer", optimizer)
            state = self._trained.optimizer_state(optimizer, only_own=self._is_sharded)
            if state is not None:
                return state
        return super().optimizer_state(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.num_stages > 1:
            squares = {} if self.squares is None else {"squares": self.squares.cpu()}
            checkpoint[_KEY] = {
                "seeds": self._seeds,
                **squares,
            }  # from which the random numbers of all epochs and steps follow
        assert self.lightning_module is not None
        datamodule = getattr(self.lightning_module.trainer, "datamodule", None)
        if self._world is not None and datamodule is not None:  # the first stage loads
            key = type(datamodule).__qualname__
            state = self.share_of_first_stage(checkpoint.pop(key, None), "the state of the data module")
            checkpoint.update({} if state is None else {key: state})
        arguments = checkpoint.get(self.lightning_module.CHECKPOINT_HYPER_PARAMS_KEY)  # the same in all processes
        has_modules = self._pipeline is not None and holds_parameters(arguments)
        if has_modules and self._is_sharded:
            raise MisconfigurationException(_NO_MODULES)
        with self.whole_model() if has_modules else nullcontext():
            self._write(checkpoint, filepath, storage_options)

    def _write(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any) -> None:
        if self._is_sharded:
            group = None if self._world is None else self._world.group
            path = Path(self.broadcast(filepath))  # one folder, whatever callbacks name it in each process
            save_sharded(checkpoint, path, group, self.is_global_zero, self.barrier)
            return
        if not self._is_plain_file(filepath):
            super().save_checkpoint(checkpoint, filepath, storage_options)
        elif self.is_global_zero:  # a kill at any moment leaves the previous file
            partial_path = f"{filepath}.part"
            super().save_checkpoint(checkpoint, partial_path, storage_options)
            put_in_place(Path(partial_path), Path(filepath))

    def _is_plain_file(self, path: Any) -> bool:
        return type(self.checkpoint_io) is TorchCheckpointIO and "://" not in str(path)

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        placement = self.place_module()
        try:
            if "://" not in str(checkpoint_path) and is_sharded(Path(checkpoint_path)):
                return load_sharded(Path(checkpoint_path), _is_later(placement), *args, **kwargs)
            if placement is not None and self._is_plain_file(checkpoint_path):  # each reads what it needs
                return torch.load(checkpoint_path, "cpu", mmap=zipfile.is_zipfile(checkpoint_path), **kwargs)
            return super().load_checkpoint(checkpoint_path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except (Exception, CheckpointException) as error:  # of torch, which does not say of which file
            if isinstance(error, UnpicklingError) and "weights_only" in str(error):
                raise
            raise RuntimeError(
                f"The checkpoint `{checkpoint_path}` cannot be read: {type(error).__name__}: {error} If it is"
                " not whole, copy it again, or resume from an earlier one."
            ) from error

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        ours = checkpoint.get(_KEY, {})
        self._loaded_seeds, self._loaded_squares = ours.get("seeds", []), ours.get("squares", torch.zeros(0))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.place_module() is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        self._loaded_states = list(checkpoint["optimizer_states"])  # of which a stage needs its own
        for optimizer, state in zip(self.optimizers, self._loaded_states):
            optimizer.load_state_dict({**state, "state": {}})


def _is_later(placement: Placement | None) -> Callable[[str], bool]:
    """Tells which tensors of a sharded checkpoint are read when it is known who needs them."""
    if placement is None:
        return lambda key: False
    awaited = {f"model.{name}" for name in placement.awaited}
    return lambda key: key in awaited or key.startswith("optimizer_")
