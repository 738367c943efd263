"""Long-lived worker processes for tests: starting torch and Lightning costs seconds, running a small fit does not."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore

__all__ = ["CONTEXT", "Failure", "WorkerPool", "exit_codes", "free_port"]

CONTEXT = multiprocessing.get_context("forkserver")  # processes begin with everything imported
CONTEXT.set_forkserver_preload(["tests.preload"])


class Failure:
    """What a worker raised."""

    def __init__(self, error: BaseException) -> None:
        self.type = type(error).__name__
        self.message = str(error)
        self.traceback = "".join(traceback.format_exception(error))

    def __repr__(self) -> str:
        return f"<{self.type}: {self.message}>"


class WorkerPool:
    """Processes that run functions as the ranks of a world of any size up to theirs."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, **kwargs: Any
    ) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank and return the results, rank 0 first.

        Raises:
            AssertionError: If a rank raised, with its traceback; if one did not answer, with the stacks of all.
        """
        results = self.try_run(function, world_size, *args, timeout=timeout, **kwargs)
        failures = [f"rank {rank}:\n{r.traceback}" for rank, r in enumerate(results) if isinstance(r, Failure)]
        assert not failures, "\n".join(failures)
        return results

    def try_run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, **kwargs: Any
    ) -> list[Any]:
        """As :meth:`run`, with a :class:`Failure` in the place of each result that is missing because of an error."""
        while len(self._workers) < world_size:
            self._workers.append(_Worker())
        workers = self._workers[:world_size]
        for worker in workers:
            worker.wait_until_ready()
        # As with torchrun, the store is there before the ranks are: who looks for it in vain sleeps half a second.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, worker in enumerate(workers):
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
            }
            worker.pipe.send((function, args, kwargs, environment, timeout))
        deadline = time.monotonic() + timeout
        results: list[Any] = []
        for rank, worker in enumerate(workers):
            if not worker.pipe.poll(max(deadline - time.monotonic(), 0)):
                ended = [w.pipe.recv()[0] for w in workers[rank + 1 :] if w.pipe.poll(0)]
                raised = [r.traceback for r in (*results, *ended) if isinstance(r, Failure)]
                stacks = "\n".join((f"--- rank {r}\n{w.stacks()}" for r, w in enumerate(workers)))
                self.close()
                raise AssertionError("\n".join([f"Rank {rank} did not end within {timeout} s.", stacks, *raised]))
            try:
                result, clean = worker.pipe.recv()
            except EOFError:
                self.close()
                raise AssertionError(f"The process of rank {rank} died.") from None
            results.append(result)
            if not clean:
                worker.replace_later = True
        for worker in workers:
            if worker.replace_later:
                worker.kill()
        self._workers = [w for w in self._workers if w.process.is_alive()]
        return results

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []


class _Worker:
    def __init__(self) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.log = tempfile.NamedTemporaryFile("r", prefix="stacks-")  # noqa: SIM115
        self.process = CONTEXT.Process(target=_work, args=(theirs, self.log.name))  # not a daemon: it may have children
        self.process.start()
        theirs.close()
        self.replace_later = self._is_ready = False

    def wait_until_ready(self) -> None:
        """Starting is slow on a busy machine, and no part of what a test measures."""
        if not self._is_ready:
            assert self.pipe.poll(180), "a worker did not start"
            self.pipe.recv()
            self._is_ready = True

    def stacks(self) -> str:
        """What the worker wrote when its time was up; it may need a moment for that."""
        deadline = time.monotonic() + 3
        while not (text := self.log.read()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return text

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _work(pipe: Any, log: str) -> None:
    stacks = open(log, "w")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch.distributed as dist

    import lightning_dgmp  # noqa: F401

    gc.freeze()
    num_modules = len(sys.modules)
    pipe.send("ready")
    while True:
        try:
            function, args, kwargs, environment, timeout = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        faulthandler.dump_traceback_later(0.9 * timeout, file=stacks)  # signals are Lightning's
        result: Any
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            result = Failure(error)
        # What is at work in a thread, or between processes of which one has failed, cannot be destroyed.
        clean = not isinstance(result, Failure) and _ends_soon(
            lambda: any(thread.name.startswith("dgmp-") for thread in threading.enumerate())
        )
        if dist.is_initialized() and clean:
            dist.destroy_process_group()
        for name in environment:
            os.environ.pop(name, None)
        if clean:
            gc.collect()  # each process group has threads of its own, which wake up again and again
            if len(sys.modules) > num_modules + 50:  # what is imported never goes, and is not to be looked at again
                num_modules = len(sys.modules)
                gc.freeze()
        faulthandler.cancel_dump_traceback_later()
        pipe.send((result, clean))


def _ends_soon(goes_on: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 2
    while goes_on():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def exit_codes(function: Callable[..., Any], world_size: int, *args: Any) -> list[int | None]:
    """How processes end that run ``function(rank, port, *args)``, by ranks; ``None``: not within a minute."""
    port = free_port()
    workers = [CONTEXT.Process(target=function, args=(rank, port, *args)) for rank in range(world_size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [worker.exitcode for worker in workers]


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            port = random.randint(12000, 32000)  # below those that the system gives to others
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
