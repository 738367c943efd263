"""Where each process is among replicas and stages, and what the processes tell each other."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_dgmp.data import Together
from lightning_dgmp.host import (
    DDPStrategy,
    MisconfigurationException,
    Trainer,
    default_pg_timeout,
    rank_zero_warn,
    subprocess_script,
)
from lightning_dgmp.objects import is_of_user
from lightning_dgmp.replicas import Replicas, Vote
from lightning_dgmp.running import start_children_alike
from lightning_dgmp.schedule import delays_of
from lightning_dgmp.support import check_devices
from lightning_dgmp.transport import Transport, group_of_channels
from lightning_dgmp.wire import Wish
from lightning_dgmp.world import PeerError, World

__all__ = ["MeshStrategy"]

_DDP_ADVICE = re.compile(r"either by .*`strategy=DDPStrategy\(find_unused_parameters=True\)`")  # for unused parameters
_OUR_ADVICE = "with `strategy=DelayedMPStrategy(find_unused_parameters=True)`"


class MeshStrategy(DDPStrategy):
    """Processes in replicas of several stages: DDP whose world, for the user's code, is the replicas.

    Barriers, broadcasts and decisions concern all processes and end with a reason when one of them fails.

    Args:
        num_stages: Stages of a replica; ``"auto"``: as many as a node has devices, or all devices have for a replica.
        data_parallel_size: How many replicas there are; ``"auto"``: as many as the devices hold.
        virtual: Whether one process holds all stages of a replica.
        timeout: How long a process waits for another.
        **kwargs: Further arguments of :class:`~lightning.pytorch.strategies.DDPStrategy`.
    """

    def __init__(
        self,
        num_stages: int | Literal["auto"],
        data_parallel_size: int | Literal["auto"],
        virtual: bool,
        timeout: timedelta | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(timeout=timeout, **kwargs)
        for name, value in (("num_stages", num_stages), ("data_parallel_size", data_parallel_size)):
            if value != "auto" and not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer or 'auto', but is {value!r}.")
        if virtual and num_stages == "auto":
            raise ValueError("`virtual=True` needs `num_stages`: there are no devices to count.")
        self._num_stages_flag, self._data_parallel_size_flag = num_stages, data_parallel_size
        self._virtual = virtual
        self.slack = 0  # batches in flight between neighbours beyond those that must be
        self._device_mesh: DeviceMesh | None = None
        self._world: World | None = None
        self._transport: Transport | None = None
        self._replicas: Replicas | None = None
        self._vote: Vote | None = None
        self._group_of_firsts: Any = None
        self._channels: Any = None
        self._single: Any = None
        self._has_warned = False
        self._answer: tuple[Callable[[Any], Any], bool] | None = None

    @property
    def num_stages(self) -> int:
        """Into how many stages the model is cut."""
        if self._num_stages_flag != "auto":
            return self._num_stages_flag
        if self._data_parallel_size_flag != "auto":
            return max(self.num_nodes * self.num_processes // max(self._data_parallel_size_flag, 1), 1)
        return self.num_processes

    @property
    @override
    def world_size(self) -> int:
        """All processes. User code that scales by it, as under DDP, is warned once."""
        if self._is_pipeline and not self._has_warned and _is_frame_of_user(sys._getframe(1)):
            self._has_warned = True
            rank_zero_warn(
                f"`world_size` counts all processes, of which the {self.num_stages} stages of a model are some. Where"
                " it stands for how many processes see different data, as in learning rates and numbers of batches, use"
                " `trainer.strategy.data_parallel_size`."
            )
        return super().world_size

    @property
    def data_parallel_size(self) -> int:
        """How many replicas see different data: what ``trainer.world_size`` is under DDP."""
        return max(self.world_size // (1 if self._virtual else self.num_stages), 1)

    @property
    def stage(self) -> int:
        """The stage of this process. Global rank 0 holds the last one: Lightning expects the loss there."""
        return self.num_stages - 1 - self.global_rank % self.num_stages

    @property
    def replica(self) -> int:
        """The replica that this process belongs to."""
        return self.global_rank if self._virtual else self.global_rank // self.num_stages

    @property
    def device_mesh(self) -> DeviceMesh:
        """All processes as ``(replica, stage)``; along ``stage`` the last one comes first."""
        if self._device_mesh is None:
            raise RuntimeError("Accessing the device mesh before processes have initialized is not allowed.")
        return self._device_mesh

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.replica}

    @property
    def _stage_ranks(self) -> list[int]:
        """The global rank of each stage of this replica."""
        return self._ranks_of(self.replica)

    def _ranks_of(self, replica: int) -> list[int]:
        return [replica * self.num_stages + delay for delay in delays_of(self.num_stages)]

    @property
    def _is_pipeline(self) -> bool:
        return self.num_stages > 1 and not self._virtual

    # ----- setup and end

    @override
    def _configure_launcher(self) -> None:
        given = self._num_stages_flag, self._data_parallel_size_flag
        check_devices(*given, self.num_stages, self.num_nodes * self.num_processes, self._virtual)
        start_children_alike(subprocess_script)
        super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        width = 1 if self._virtual else self.num_stages
        if self._device_mesh is None:
            shape = self.world_size // width, width
            self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replica", "stage"))
        if self._is_pipeline:
            assert self.cluster_environment is not None
            timeout = self._timeout or default_pg_timeout
            over_nccl = self._get_process_group_backend() == "nccl"
            self._world = self._world or World(self.cluster_environment.main_address, timeout)
            if self.data_parallel_size > 1:
                if self._group_of_firsts is None:
                    firsts = range(self.num_stages - 1, self.world_size, self.num_stages)
                    self._group_of_firsts = dist.new_group(firsts, backend="gloo", timeout=timeout)
                self._vote = Vote(self._group_of_firsts, self._world.wait)
            replicas = [self._ranks_of(replica) for replica in range(self.data_parallel_size)]
            self._channels = self._channels or group_of_channels(replicas)
            where = replicas, self.replica, self._channels, self.root_device
            self._transport = Transport(
                self.stage, *where, timeout, over_nccl, delays_of(self.num_stages, self.slack)[0]
            )
        if self._replicas is None and self.num_stages > 1 and self.world_size > 1:
            alone = [self.global_rank]
            self._single = self._single or dist.new_group(alone, backend="gloo", use_local_synchronization=True)
            self._replicas = Replicas(self.device_mesh.get_group("replica"), self._single)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        exception.args = tuple(_DDP_ADVICE.sub(_OUR_ADVICE, a) if isinstance(a, str) else a for a in exception.args)
        if self._world is None:
            return
        if isinstance(exception, PeerError):
            reason = str(exception)
        else:
            trace = "".join(traceback.format_exception(exception))
            reason = f"Stage {self.stage} (rank {self.global_rank}) failed:\n{trace}"
        self._world.fail(reason)  # first: who waits there answers no messages
        self._world = None
        if self._transport is not None:
            self._transport.abort(reason)
            self._transport = self._channels = None

    @override
    def teardown(self) -> None:
        try:
            if self._transport is not None:
                self._transport.close()
                self._transport = None
        finally:
            if self._replicas is not None:
                self._replicas.close()
                self._replicas = None
            super().teardown()

    def step_among_replicas(self) -> AbstractContextManager[None]:
        """Around a step: collectives without a group concern the replicas."""
        return nullcontext() if self._replicas is None else self._replicas.step()

    def step_alone(self) -> AbstractContextManager[None]:
        """Around a step on ghosts: its collectives concern nobody else."""
        return nullcontext() if self._replicas is None else self._replicas.alone()

    @override
    def block_backward_sync(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Stages decide for themselves; and of virtual ones each has its updates from other batches."""
        return super().block_backward_sync() if self.num_stages == 1 else nullcontext()

    def wrap_in_ddp(self, module: nn.Module, **kwargs: Any) -> DistributedDataParallel:
        """DDP with the options of the user, where ``kwargs`` are not ours, and its communication hook."""
        if kwargs.get("find_unused_parameters") and isinstance(self._ddp_comm_state, PowerSGDState):
            raise MisconfigurationException(  # it knows them by their buckets, and would mix its messages with DDP's
                "The communication hook `powerSGD_hook` needs the same trained parameters all the time, but some were"
                " frozen or unfrozen. Use another one, such as `fp16_compress_hook`, or leave `requires_grad` as it is."
            )
        device_ids = self.determine_ddp_device_ids()
        ddp = DistributedDataParallel(module, device_ids=device_ids, **{**self._ddp_kwargs, **kwargs})
        self._register_hook(ddp)
        return ddp

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Around what averages gradients: if another process has failed, its reason is the one to tell."""
        try:
            yield
        except RuntimeError as error:
            reason = None
            if self._world is not None and not isinstance(error, PeerError):
                reason = self._world.failure()
            if reason is None:
                raise
            raise PeerError(reason) from error

    def wait_among_replicas(self, work: Any, what: str) -> None:
        """Wait for a collective among replicas: with gloo the process, with NCCL the stream of its device."""
        if self._world is None or self._get_process_group_backend() == "nccl":
            work.wait()
        else:
            self._world.wait(work, what)

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        super()._register_ddp_hooks() if self.num_stages == 1 else self._register_hook(self.model)

    def _register_hook(self, ddp: DistributedDataParallel) -> None:
        hook, state = self._ddp_comm_hook, self._ddp_comm_state
        if hook is not None and self._ddp_comm_wrapper is not None:
            hook = self._ddp_comm_wrapper(hook)
        if self._world is not None and dist.get_backend(ddp.process_group) == "gloo":
            if hook is None:
                hook, state = default_hooks.allreduce_hook, ddp.process_group
            hook = self._world.guarded_hook(hook)
        if hook is None:
            return
        try:
            ddp.register_comm_hook(state, hook)
        except TypeError as error:
            raise MisconfigurationException(
                f"The communication hook `{getattr(hook, '__name__', hook)}` does not work here: {error}. Use another"
                " one, such as `fp16_compress_hook`, or none."
            ) from None

    @property
    def _in_step(self) -> bool:
        return self._replicas is not None and self._replicas.in_step

    @property
    def _is_alone(self) -> bool:
        return self._replicas is not None and self._replicas.is_alone

    # ----- collectives: replicas average and gather, the world waits and decides

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor if self._is_alone else super().reduce(tensor, self._replica_group(group), reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if self._is_alone:
            return torch.stack([tensor] * self.data_parallel_size)
        return super().all_gather(tensor, self._replica_group(group), sync_grads)

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if self._world is None or self._in_step:
            return super().barrier(name, *args, **kwargs)
        self._world.all_gather(None, f"a barrier ({name})" if name else "a barrier")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._answer is not None:
            answer, once = self._answer
            self._answer = None if once else self._answer
            return answer(obj)
        if self._is_alone:
            return obj
        if self._in_step:
            items = [obj]
            dist.broadcast_object_list(items, group=self._replica_group(None), group_src=src)
            return items[0]
        if self._world is None:
            return super().broadcast(obj, src)
        return self._world.all_gather(obj if self.global_rank == src else None, f"a broadcast of rank {src}")[src]

    @contextmanager
    def answering_broadcasts(self, answer: Callable[[Any], Any], once: bool = False) -> Iterator[None]:
        """Let ``broadcast(obj)`` return ``answer(obj)`` without asking other processes, all or the first of them."""
        self._answer = answer, once
        try:
            yield
        finally:
            self._answer = None

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self._is_alone:
            return decision
        if self._in_step:
            votes = [decision] * self.data_parallel_size
            dist.all_gather_object(votes, decision, group=self._replica_group(None))
        elif self._world is None:
            return super().reduce_boolean_decision(decision, all)
        else:
            votes = self._world.all_gather(bool(decision), "a decision")
        return min(votes) if all else max(votes)

    def _replica_group(self, group: Any) -> Any:
        """The processes that see different data, for all processes, which Lightning names explicitly."""
        if self._is_pipeline and (group is None or group is dist.group.WORLD):
            return self.device_mesh.get_group("replica")
        return group

    def gather_from_replicas(self, item: Any, what: str) -> list[Any]:
        """Give every process the small ``item`` of the last stage of each replica."""
        if self._world is not None:
            return self._world.all_gather(item, what)[:: self.num_stages]
        items = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items

    def agree_on_wishes(self, wishes: Wish) -> Wish:
        """What the first stages of all replicas wish, or did an iteration ago; only they may ask."""
        assert self._vote is not None
        return Wish(self._vote.any_of_last_time(int(wishes), "the wishes of another replica"))

    def _together(self, is_training: Callable[[], bool]) -> Together:
        """For the data of several replicas."""
        assert self._vote is not None
        vote = self._vote

        def shortest(length: int | None) -> int | None:
            lengths = self.gather_from_replicas(length, "the length of a data loader")
            if len(set(lengths)) > 1:
                rank_zero_warn(f"The data loaders of the replicas have {lengths} batches: the fewest count.")
            return None if None in lengths else min(lengths)

        return Together(is_training, shortest, lambda ends: bool(vote.any(ends, "the next batch of another replica")))

    def share_of_last_stage(self, nest: Any, what: str) -> Any:
        """Give all stages of the replica the ``nest`` of the last one; ``what`` says for an error what it is."""
        if self._world is None:
            return nest
        return self._world.share(nest, what, self._stage_ranks, self._stage_ranks[-1], self.root_device)

    def gather_from_stages(self, item: Any, what: str) -> list[Any]:
        """Give all stages of the replica the small ``item`` of each."""
        return [item] if self._world is None else self._world.all_gather(item, what, self._stage_ranks)

    def share_of_first_stage(self, item: Any, what: str) -> Any:
        """Give all stages of the replica the small ``item`` of the first one."""
        return self.gather_from_stages(item, what)[0]


def _is_frame_of_user(frame: FrameType | None) -> bool:
    """Whether the caller, or who asked ``Trainer.world_size``, is neither this project nor Lightning."""
    if frame is not None and frame.f_code is Trainer.world_size.fget.__code__:  # type: ignore[attr-defined]
        frame = frame.f_back
    return frame is not None and is_of_user(frame.f_globals.get("__name__", ""))
