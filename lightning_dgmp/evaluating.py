"""Data and evaluation: stage 0 loads for all, and steps without a backward run through the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import override

from lightning_dgmp.callbacks import reads_outputs
from lightning_dgmp.data import Feed, check_division, own_loader
from lightning_dgmp.evaluation import Evaluation
from lightning_dgmp.host import Trainer
from lightning_dgmp.learned import Learned
from lightning_dgmp.nests import copied_tensors, objects_in
from lightning_dgmp.pipeline import Interception
from lightning_dgmp.plan.restore import attributes_saved
from lightning_dgmp.saving import SavingStrategy
from lightning_dgmp.schedule import delays_of
from lightning_dgmp.stage.randomness import OwnRandomness, RandomState, mix_seed, seed_all

__all__ = ["EvaluatingStrategy"]

_HOST = torch.device("cpu")


class EvaluatingStrategy(SavingStrategy):
    """Loads data on the first stage, and validates, tests and predicts.

    Args:
        *args: See :class:`~lightning_dgmp.saving.SavingStrategy`.
        **kwargs: See there.
    """

    _interception: Interception
    learned: Learned

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._feed: Feed | None = None
        self._evaluation: Evaluation | None = None

    # ----- data

    @property
    def has_feed(self) -> bool:
        """Whether stage 0 loads for the others."""
        return self._feed is not None

    @contextmanager
    def keeping_loading(self) -> Iterator[None]:
        """Let the data that are loaded meanwhile draw nothing from the random numbers of those loaded later."""
        with self._loading.kept():
            yield

    def _share_randomness(self, trainer: Trainer) -> None:
        """Put all stages in the random state of the last one; loading has one for itself from then on."""
        mine = RandomState.current(_HOST), torch.initial_seed()
        state, seed = self.share_of_last_stage(mine, "the random state")
        state.apply(_HOST)
        if self._loaded_seeds:
            seeds = self._loaded_seeds
            seed = seeds[self.replica] if self.replica < len(seeds) else mix_seed(seeds[0], self.replica, 0)
        self._seed, self._seeds = seed, self.gather_from_replicas(seed, "the random seed")
        self._loading = OwnRandomness()
        if self._transport is not None:
            together = None if self._vote is None else self._together(lambda: trainer.training)
            share = self.share_of_first_stage
            how = self._loading_for_replicas, share, together, delays_of(self.num_stages, self.slack)[0]
            self._feed = Feed(self._transport, self.stage, self.num_stages, *how)

    @contextmanager
    def _loading_for_replicas(self) -> Iterator[None]:
        """A stream that divides itself by ``torch.distributed`` divides itself among replicas."""
        with self._loading(), self.step_among_replicas():
            yield

    def align_randomness(self, epoch: int) -> None:
        """Begin an epoch in the same random state on all stages, without asking them."""
        seed = mix_seed(self._seed, epoch, 0)
        seed_all(seed, _HOST)
        self._loading.seed(seed)

    def align_batch(self, number: int, kind: int) -> None:
        """Begin a batch in the same random state on all stages, for the hooks that change it: they may draw.

        Args:
            number: Of the batch.
            kind: Tells training and the loaders of an evaluation apart.
        """
        if self._feed is not None:
            seed_all(mix_seed(self._seed, number, 2 + kind), self.root_device)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self._feed is None:
            return dataloader
        check_division(own_loader(dataloader), self.data_parallel_size, self.replica)
        return self._feed.wrap(dataloader)

    # ----- evaluation

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("validation_step", self.precision_plugin.val_step_context, args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("test_step", self.precision_plugin.test_step_context, args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("predict_step", self.precision_plugin.predict_step_context, args, kwargs)

    def _evaluate(self, name: str, context: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.lightning_module
        assert module is not None

        def step() -> Any:
            restore()
            with self.step_among_replicas(), context():
                return getattr(module, name)(*copied_tensors(args), **kwargs)

        if self._world is None or self._transport is None:
            return getattr(super(), name)(*args, **kwargs)
        if self._evaluation is None:
            self._evaluation = Evaluation(
                module,
                self._pipeline,
                self.place_module(),
                self._interception,
                self._transport,
                self._world,
                self._stage_ranks,
                self.stage,
                self.root_device,
                self._seed,
            )
        if self.stage == self.num_stages - 1:
            self.learned.before_step()
        key = name, args[2] if len(args) > 2 else 0
        is_first = not self._evaluation.has_run(key)
        if self._feed is not None and is_first:
            args = self._feed.read(args)  # for the trace, which runs everything
        restore = attributes_saved(*objects_in(args) if is_first else ())  # the first step runs several times
        result = self._evaluation.run(key, step)
        if self.stage == self.num_stages - 1:
            self.learned.after_step()
        if reads_outputs(name, module):
            result = self.share_of_last_stage(result, f"the output of `{name}`")
        return result

    @override
    def on_validation_end(self) -> None:
        self._end_evaluation()

    @override
    def on_test_end(self) -> None:
        self._end_evaluation()

    @override
    def on_predict_end(self) -> None:
        self._end_evaluation()

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.end()
        if self._feed is not None:
            self._feed.settle()
