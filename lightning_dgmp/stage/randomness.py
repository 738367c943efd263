"""Random numbers: what the batch alone determines is equal on all stages.

In every step, and again before and after every module call that all stages see, the stages of a replica start from the
same seed, so that masks, noise and timesteps agree, whether ``training_step`` draws them or a module. (A random
operation on a ghost, such as dropout, draws nothing on the stages that do not own the value; what they draw after it
agrees again from the next call on.) Each seed follows from the one before, which a generator remembers: so activation
checkpointing, which puts a generator back to where it was before a call, draws in its second run what it drew in its
first. Outside of steps nothing changes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch

__all__ = ["OwnRandomness", "RandomState", "StepRandomness", "aligned", "mix_seed", "seed_all"]


_HOST = torch.device("cpu")
_STEP_GENERATOR = numpy.random.MT19937(0)


class RandomState(NamedTuple):
    """The state of all generators: Python's, NumPy's, torch's on the host and on one accelerator."""

    python: Any
    numpy: Any
    host: torch.Tensor
    device: torch.Tensor | None

    @classmethod
    def current(cls, device: torch.device) -> RandomState:
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), numpy.random.get_state(), torch.get_rng_state(), on_device)

    def apply(self, device: torch.device) -> None:
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


class OwnRandomness:
    """Random numbers of the host for some work, apart from those of the rest; they begin in today's state."""

    def __init__(self) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self._numpy = numpy.random.MT19937()
        self._numpy.state = numpy.random.get_state(legacy=False)  # type: ignore[assignment]

    def seed(self, seed: int) -> None:
        with self():
            seed_all(seed, _HOST)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put the state back afterwards."""
        python, host, array = self._python, self._torch, self._numpy.state
        try:
            yield
        finally:
            self._python, self._torch, self._numpy.state = python, host, array

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around the work."""
        with _numpy_drawing_from(self._numpy), _put_back():
            random.setstate(self._python)
            torch.set_rng_state(self._torch)
            try:
                yield
            finally:
                self._python, self._torch = random.getstate(), torch.get_rng_state()


@contextmanager
def _put_back() -> Iterator[None]:
    """Put Python's and torch's generators of the host back to what they were."""
    python, host = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(host)


@contextmanager
def _numpy_drawing_from(generator: Any) -> Iterator[None]:
    """Exchange NumPy's generator: its state is slow to read and to write."""
    outside = numpy.random.get_bit_generator()  # type: ignore[attr-defined]
    numpy.random.set_bit_generator(generator)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        numpy.random.set_bit_generator(outside)  # type: ignore[attr-defined]


class StepRandomness:
    """The random state of one step on one stage.

    Args:
        seed: Equal on all stages of a replica.
        batch: Number of the batch; the same batch draws the same again when its forward is rebuilt.
        device: Where the stage's modules run.
    """

    def __init__(self, seed: int, batch: int, device: torch.device) -> None:
        self.device, self._seed = device, mix_seed(seed, batch, 0)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the user's step."""
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        with _numpy_drawing_from(_STEP_GENERATOR), _put_back():
            seed_all(self._seed, self.device)
            try:
                yield
            finally:
                if on_device is not None:
                    torch.cuda.set_rng_state(on_device, self.device)


@contextmanager
def aligned(device: torch.device) -> Iterator[None]:
    """Around a module call: begin it, and go on after it, in a state that is common to all stages."""
    seed = mix_seed(torch.default_generator.initial_seed(), 0, 0)
    _seed_torch(seed, device)
    yield
    _seed_torch(mix_seed(seed, 0, 1), device)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed Python's, NumPy's and torch's generators, the latter on the host and on ``device``."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    _seed_torch(seed, device)


def _seed_torch(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def mix_seed(seed: int, batch: int, stream: int) -> int:
    """A 63-bit seed for a batch and a stream (the finaliser of splitmix64)."""
    z = (seed + 0x9E3779B97F4A7C15 * (batch * 1024 + stream + 1)) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1
