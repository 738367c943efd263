"""Which runs the study is made of, and in which order.

A *cell* is a method on a model, of which the learning rate is still open. Its best rate is searched with the first seed
in steps of a factor 2, until both neighbours of the best one are worse, so every cell has three rates at least and its
best one never lies at an edge. The best one is then repeated with the second seed. So what is to be run depends on what
has been found, and :func:`missing_rows` is asked again after every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from study.results import Results
from study.setting import Setting

__all__ = [
    "GROUPS", "RECOMMENDED", "RECOMMENDED_CODE", "SEEDS", "Cell", "Group", "best_runs", "is_tuned", "make_cell",
    "missing_rates", "missing_rows", "progress",
]  # fmt: skip

SEEDS = (0, 1)  # the first finds the learning rate, the others repeat it

_REMEDIES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "prediction": lambda s: {"predict_weights": True},
    "discount": lambda s: {"lr_discount_steps": s.updates // 4},
    "correction": lambda s: {"correct_updates": True},
    "synchronous beginning": lambda s: {"synchronous_steps": s.updates // 20},  # as long as the warm-up
    "accumulation": lambda s: {"microbatches": 2 ** math.ceil(math.log2(s.stages))},  # at least as many as stages
    "double accumulation": lambda s: {"microbatches": 2 * 2 ** math.ceil(math.log2(s.stages))},
    "paper's rule": lambda s: {"tied_rule": "ouroboros"},
    "small tied steps": lambda s: {"tied_lr_factor": 0.25},
    "large embeddings": lambda s: {"embedding_scale": 3.0},
    "twice the updates": lambda s: {"updates": 2 * s.updates},
}


@dataclass(frozen=True)
class Cell:
    """A method on a model.

    Attributes:
        method: ``"bare"``, or remedies joined by `` + ``.
        setting: With the learning rate at which the search begins.
    """

    method: str
    setting: Setting


class Group(NamedTuple):
    """Cells that answer one question.

    Attributes:
        name: For ``--only``.
        title: For the page.
        remark: What there is to know of it.
        cells: The cells.
    """

    name: str
    title: str
    remark: str
    cells: Sequence[Cell]


def make_cell(method: str, **setting: Any) -> Cell:
    """A cell, by the names of its remedies and all else that differs from the defaults."""
    chosen = Setting(**setting)
    for remedy in method.split(" + ") if method != "bare" else ():
        chosen = replace(chosen, **_REMEDIES[remedy](chosen))
    return Cell(method, chosen)


# ----- the search


def missing_rates(first: float, finals: Mapping[float, float]) -> list[float]:
    """The learning rates to be tried next; none: the best is known.

    Args:
        first: Where the search begins.
        finals: The final losses so far; infinity for a run that has diverged.
    """
    if not finals:
        return [first]
    best = _best_rate(finals)
    return [rate for rate in (best / 2, best * 2) if rate not in finals]


def missing_rows(cells: Iterable[Cell], results: Results) -> Iterator[Setting]:
    """What is to be run next as far as it is known: all learning rates first, then the other seeds."""
    found = [(cell, _finals(cell, results)) for cell in dict.fromkeys(cells)]
    missing = [(cell, missing_rates(cell.setting.lr, finals)) for cell, finals in found]
    rows = [replace(cell.setting, lr=rate) for cell, rates in missing for rate in rates]
    tuned = [(cell, finals) for (cell, finals), (_, rates) in zip(found, missing) if not rates]
    rows += [replace(cell.setting, lr=_best_rate(finals), seed=seed) for cell, finals in tuned for seed in SEEDS[1:]]
    return iter(dict.fromkeys(row for row in rows if row not in results))


def best_runs(cell: Cell, results: Results) -> list[Mapping[str, Any]]:
    """The runs with the best learning rate so far, one a seed, the first seed first."""
    finals = _finals(cell, results)
    if not finals:
        return []
    settings = [replace(cell.setting, lr=_best_rate(finals), seed=seed) for seed in SEEDS]
    return [results[setting] for setting in settings if setting in results]


def is_tuned(cell: Cell, results: Results) -> bool:
    """Whether the best learning rate is known."""
    return not missing_rates(cell.setting.lr, _finals(cell, results))


def progress(cells: Iterable[Cell], results: Results) -> tuple[int, int]:
    """How many runs are there, and of how many at least: how long searches take is not known before."""
    done = planned = 0
    for cell in dict.fromkeys(cells):
        finals = _finals(cell, results)
        rates = missing_rates(cell.setting.lr, finals)
        repeated = 0 if rates else len(best_runs(cell, results)) - 1
        done += len(finals) + repeated
        planned += max(3, len(finals) + len(rates)) + len(SEEDS) - 1
    return done, planned


def _finals(cell: Cell, results: Results) -> dict[float, float]:
    """The final loss by the learning rate, with the first seed."""
    rates = [cell.setting.lr * 2.0**i for i in range(-12, 13)]
    rows = {rate: results.get(replace(cell.setting, lr=rate, seed=SEEDS[0])) for rate in rates}
    return {rate: math.inf if row["final"] is None else row["final"] for rate, row in rows.items() if row is not None}


def _best_rate(finals: Mapping[float, float]) -> float:
    return min(finals, key=lambda rate: (finals[rate], rate))  # of equals the lowest, where all have diverged


# ----- the list, the most informative first


def _cells(optimizers: Iterable[str], stages: Iterable[int], methods: Iterable[str], **setting: Any) -> list[Cell]:
    """A cell of each. Where a long delay is felt, the search begins lower: that saves runs, and changes nothing."""
    return [
        make_cell(method, optimizer=optimizer, stages=k, lr=_first_rate(optimizer, k, method), **setting)
        for k in stages
        for optimizer in optimizers
        for method in methods
    ]


def _first_rate(optimizer: str, stages: int, method: str) -> float:
    rate = 4e-3 if optimizer in ("adamw", "nadamw") else 8e-3
    return rate if stages <= 2 or "accumulation" in method else rate / 2 if stages <= 4 else rate / 4


_REMEDIES_ALONE = ("prediction", "discount", "correction", "synchronous beginning", "accumulation")
_BOTH = ("adamw", "rotated")

RECOMMENDED = ("rotated", "correction + accumulation")  # optimizer and method
RECOMMENDED_CODE = """\
Trainer(strategy=DelayedMPStrategy(num_stages=K, correct_updates=True), accumulate_grad_batches=K)  # or a little more
RotatedAdamW([{"params": hidden_matrices}, {"params": all_others, "rotate": False}], lr=lr, weight_decay=0.0)"""


def _best(stages: Iterable[int], **setting: Any) -> list[Cell]:
    """What is recommended."""
    optimizer, method = RECOMMENDED
    return _cells([optimizer], stages, [method], **setting)


def _bare_and_best(stages: int, **setting: Any) -> list[Cell]:
    """Plain AdamW and what is recommended, each beside one stage."""
    return (
        _cells(["adamw"], (1, stages), ["bare"], **setting)
        + _cells([RECOMMENDED[0]], [1], ["bare"], **setting)
        + _best([stages], **setting)
    )


GROUPS = (
    Group("bare", "Without remedy", "Untied.", _cells(_BOTH, (1, 8, 4), ["bare"])),
    Group(
        "best",
        "What is recommended",
        "Untied. Everywhere the first seeds of RotatedAdamW ran before it broke ties, which changes the third digit.",
        _best((8, 4, 2)),
    ),
    Group(
        "tied",
        "Tied embeddings",
        "",
        _cells(["rotated"], [1], ["bare"], tied=True)
        + _best((8, 4), tied=True)
        + _cells(["adamw"], (1, 4, 8), ["bare"], tied=True)
        + _cells(["rotated"], (8, 4), ["bare"], tied=True),
    ),
    Group(
        "tied-remedies",
        "Tied embeddings with AdamW: where the cost comes from",
        "Large embeddings: tokens enter the first block 3 times as large, beside their positions.",
        _cells(["adamw"], [1], ["large embeddings"], tied=True)
        + _cells(["adamw"], [4], ("large embeddings", "correction + accumulation"), tied=True)
        + _cells(["adamw"], [4], ("synchronous beginning", "small tied steps", "paper's rule"), tied=True),
    ),
    Group(
        "rotated",
        "RotatedAdamW with each remedy that goes with it",
        "Untied.",
        _cells(["rotated"], (8, 4), ("accumulation", "prediction + accumulation"))
        + _cells(["rotated"], [8], ("correction", "prediction", "double accumulation")),
    ),
    Group(
        "remedies",
        "AdamW with each remedy",
        "Untied. NAdamW is AdamW with Nesterov's momentum of 0.99 (Ajanthan et al., ICML 2025).",
        _cells(["adamw"], (8, 4), ("correction + accumulation", *_REMEDIES_ALONE))
        + _cells(["adamw"], [8], ("prediction + discount", "prediction + accumulation"))
        + _cells(["nadamw"], (1, 8), ["bare"]),
    ),
    Group(
        "muon",
        "Muon",
        "Untied.",
        _cells(["muon"], (1, 8, 4), ["bare"]) + _cells(["muon"], [8], ("accumulation", "correction + accumulation")),
    ),
    Group(
        "two-stages",
        "Two stages",
        "Untied.",
        _cells(_BOTH, [2], ["bare"]) + _cells(["adamw"], [2], _REMEDIES_ALONE),
    ),
    Group(
        "transformer-xl",
        "Transformer-XL",
        "Untied, with a memory of 64 characters in each layer.",
        _bare_and_best(4, model="transformer-xl", updates=600),
    ),
    Group(
        "64-layers",
        "64 layers on 4 stages",
        "Untied, narrower.",
        _bare_and_best(4, layers=64, width=32, rows=8, updates=600),
    ),
    Group("12-layers", "12 layers on 11 stages", "Untied.", _bare_and_best(11, layers=12, updates=600)),
    Group(
        "longer",
        "What the delay costs without remedy, if there is time for it",
        "Untied. Compared with one stage and half of the updates.",
        _cells(["adamw"], (8, 4), ["twice the updates"]),
    ),
)
