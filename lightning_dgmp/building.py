"""How a module is made: without holding it, if it is made in ``configure_model`` or under ``trainer.init_module``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_dgmp.agreement import agree_on_model
from lightning_dgmp.deferred import Recording
from lightning_dgmp.host import LightningModule, MisconfigurationException
from lightning_dgmp.later import read_all
from lightning_dgmp.mesh import MeshStrategy
from lightning_dgmp.placement import Placement, await_values
from lightning_dgmp.stage.shadow import Shadow
from lightning_dgmp.support import tied_in_memory
from lightning_dgmp.weights import mismatch, named_for, open_weights

__all__ = ["BuildingStrategy"]


_MAX_NAMES = 10  # in an error


class BuildingStrategy(MeshStrategy):
    """Makes modules of several stages without memory for their parameters.

    Args:
        *args: See :class:`~lightning_dgmp.mesh.MeshStrategy`.
        **kwargs: See there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recordings: list[Recording] = []
        self._placement: Placement | None = None
        self._weights_path: str | Path | None = None  # of weights that are to be loaded
        self._loaded: set[nn.Parameter] = set()  # if there is no placement

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        is_early = self._world is None and not self._virtual  # before there are processes
        if self.num_stages == 1 or (is_early and self._start_method != "popen"):
            with super().tensor_init_context(empty_init):
                yield
            return
        with torch.random.fork_rng(devices=[]):
            seed = int(torch.randint(2**62, (), device="cpu")) + len(self._recordings)
        recording = Recording(seed if self._world is None else self.broadcast(seed), self.root_device)
        with super().tensor_init_context(empty_init=False), recording.active():
            yield
        recording.settle(None if self._virtual else await_values)
        if recording.parameters:
            self._recordings.append(recording)

    def place_module(self) -> Placement | None:
        """Where the parameters of the module are, if it was made without them."""
        module, world = self.lightning_module, self._world
        if self._placement is not None and self._placement.root is not module:
            self._placement = None
        if self._recordings and module is not None and world is not None:
            group = self.device_mesh.get_group("stage")
            self._placement = Placement(module, self._recordings, self.stage, self._stage_ranks, group, world)
            self._recordings = []
        return self._placement

    def check_built(self) -> None:
        """Refuse parameters that have no values, or that cannot be told apart."""
        module, placement = self.lightning_module, self.place_module()
        assert module is not None
        if self._weights_path is not None:
            self._load_weights(module, Path(self._weights_path))
        if self.num_stages == 1:
            return
        names = {p: name for name, p in module.named_parameters()}
        if not self._virtual and placement is None and any(isinstance(p, Shadow) for p in names):
            raise MisconfigurationException(
                "The weights of the module are where another strategy or an earlier module has left them. Make the"
                " module anew, and load its checkpoint."
            )
        recordings = self._recordings if placement is None else placement.recordings
        for tied in filter(None, (r.sharing_memory() for r in recordings if not self._virtual)):
            raise tied_in_memory(names[tied[0]], names[tied[1]])
        unwritten = {p for recording in recordings for p in recording.without_values()}
        unwritten -= self._loaded if placement is None else placement.loaded
        tensors = [*module.named_parameters(), *module.named_buffers()]
        empty = [f"`{name}`" for name, tensor in tensors if tensor.is_meta or tensor in unwritten]
        if empty:
            for child in module.modules():  # the end of the run moves all, and nobody can move what is on no device
                for entries in (child._parameters, child._buffers):
                    entries.update({key: None for key, t in entries.items() if t is not None and t.is_meta})  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"All parameters must be initialised where they are made, or loaded, but nothing writes values into"
                f" {', '.join(empty)}. Initialise what `torch.empty` makes, as in"
                " `reset_parameters`, or give a checkpoint."
            )
        self._recordings, self._loaded = [], set()
        if placement is not None:
            placement.begin()

    def _load_weights(self, module: LightningModule, path: Path) -> None:
        prefix, weights = named_for(module, open_weights(path))
        if wrong := mismatch(module, prefix, weights):
            raise MisconfigurationException(
                f"The weights at `load_weights='{path}'` must be those of the module, or of a module in it, but"
                f" {', '.join(wrong[:_MAX_NAMES])}{', ...' if len(wrong) > _MAX_NAMES else ''}."
            )
        if self._placement is None:
            weights = read_all(weights)
        self.load_model_state_dict({"state_dict": weights}, strict=False)

    def agree_on_model(self) -> None:
        """Begin with the same model in all processes."""
        if self._world is None:
            return
        assert self.lightning_module is not None
        is_apart = self._placement is not None and self._placement.plan is not None
        agree_on_model(self.lightning_module, self._world, self._stage_ranks, is_apart)

    @override
    def teardown(self) -> None:
        if self._placement is not None:
            self._placement.end()
        super().teardown()

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._weights_path = None
        placement = self.place_module()
        if placement is None:
            super().load_model_state_dict(checkpoint, strict)
            assert self.lightning_module is not None
            self._loaded = {p for n, p in self.lightning_module.named_parameters() if n in checkpoint["state_dict"]}
        else:
            placement.load_state_dict(checkpoint["state_dict"], strict)
