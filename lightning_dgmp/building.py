"""How a module is made: without holding it, if it is made in ``configure_model`` or under ``trainer.init_module``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_dgmp.deferred import Recording
from lightning_dgmp.host import MisconfigurationException
from lightning_dgmp.mesh import MeshStrategy
from lightning_dgmp.placement import Placement, await_values
from lightning_dgmp.stage.shadow import Shadow
from lightning_dgmp.support import tied_in_memory

__all__ = ["BuildingStrategy"]


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
        recording = Recording(seed if self._world is None else self.broadcast(seed))
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
        names = {p: name for name, p in module.named_parameters()}
        if not self._virtual and placement is None and any(isinstance(p, Shadow) for p in names):
            raise MisconfigurationException(
                "The weights of the module are where another strategy or an earlier module has left them. Make the"
                " module anew, and load its checkpoint."
            )
        recordings = self._recordings if placement is None else placement.recordings
        for tied in filter(None, (r.sharing_memory() for r in recordings if not self._virtual)):
            raise tied_in_memory(names[tied[0]], names[tied[1]])
        empty = [name for p, name in names.items() if p.is_meta]
        empty += self._unwritten(names) if placement is None else placement.without_values()
        if empty:
            raise MisconfigurationException(
                f"All parameters must be initialised where they are made, or loaded, but nothing writes values into"
                f" {', '.join(f'`{name}`' for name in empty)}. Initialise what `torch.empty` makes, as in"
                " `reset_parameters`, or give a checkpoint."
            )
        self._recordings = []

    def _unwritten(self, names: Mapping[nn.Parameter, str]) -> list[str]:
        return [names[p] for recording in self._recordings for p in recording.without_values() if p in names]

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        placement = self.place_module()
        if placement is None:
            super().load_model_state_dict(checkpoint, strict)
            self._recordings = []  # all is written
        else:
            placement.load_state_dict(checkpoint["state_dict"], strict)
