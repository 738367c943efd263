"""Closed forms on a quadratic: what a step changes, and what is foretold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_dgmp.remedies import Moment, Remedies, Updates

CURVATURE = 0.5  # of the loss `CURVATURE / 2 * x ** 2`, whose gradient is `CURVATURE * x`


class Descent:
    """A parameter that is updated by its own gradients of ``delay`` steps ago."""

    def __init__(self, remedies: dict[str, Any], delay: int, accumulate: int = 1, **options: Any) -> None:
        self.x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.x], **{"lr": 0.1, **options})
        self.moment = Moment(0, accumulate, 0, 100, False)
        self.updates = Updates(Remedies(**remedies), [self.optimizer], {self.x: delay}, lambda: self.moment)
        self.delay, self.seen = delay, [1.0]  # with which weights forwards ran

    def forward(self) -> float:
        return float(self.updates.predicted({"x": self.x}).get("x", self.x).detach())

    def run(self, num_steps: int) -> list[float]:
        """The weights after each step."""
        weights, forwards = [], []
        for t in range(num_steps):
            forwards.append(self.forward())
            self.x.grad = None
            if t >= self.delay:
                self.x.grad = torch.tensor([CURVATURE * forwards[t - self.delay]], dtype=torch.float64)
            self.optimizer.step()
            self.moment = self.moment._replace(step=t + 1)
            weights.append(float(self.x.detach()))
        return weights


def by_hand(num_steps: int, delay: int, momentum: float = 0.0, lr: float = 0.1) -> list[float]:
    weights, velocity = [1.0], 0.0
    for t in range(num_steps):
        if t >= delay:
            velocity = momentum * velocity + CURVATURE * weights[t - delay]
            weights.append(weights[-1] - lr * velocity)
        else:
            weights.append(weights[-1])
    return weights[1:]


def test_without_remedies_it_is_the_delayed_iterate() -> None:
    assert Descent({}, 3, momentum=0.9).run(20) == pytest.approx(by_hand(20, 3, 0.9), rel=1e-12)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_prediction_is_the_momentum_continued(momentum: float) -> None:
    descent = Descent({"predict_weights": True}, 3, momentum=momentum)
    descent.run(7)
    velocity = float(descent.optimizer.state[descent.x]["momentum_buffer"])
    expected = float(descent.x.detach()) - 0.1 * velocity * (momentum + momentum**2 + momentum**3)
    assert descent.forward() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("num_steps", "tolerance"), [(1, None), (3, None), (300, 0.01)])
def test_prediction_for_adamw_is_its_last_update_continued(num_steps: int, tolerance: float | None) -> None:
    """By hand from its moments; later on that is FTPipe's rule, but for the weight decay of the steps to come."""
    lr, (b1, b2), eps, decay = 0.01, (0.9, 0.999), 1e-8, 0.1
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([x], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    updates = Updates(Remedies(predict_weights=True), [optimizer], {x: 3}, lambda: Moment(0, 1, 0, 100, False))
    last = m = v = 0.0
    for t in range(1, num_steps + 1):
        last = float(x.detach())
        grad = 1.0 + t % 3
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        x.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
    now, ours = float(x.detach()), float(updates.predicted({"x": x})["x"].detach())
    step = m / (1 - b1**num_steps) / ((v / (1 - b2**num_steps)) ** 0.5 + eps)
    assert now == pytest.approx(last - lr * decay * last - lr * step, rel=1e-12)
    assert ours == pytest.approx(now - (lr * decay * last + lr * step) * (b1 + b1**2 + b1**3), rel=1e-12)

    ftpipe = now
    for t, factor in zip(range(num_steps + 1, num_steps + 4), (b1, b1**2, b1**3)):
        ftpipe -= lr * decay * ftpipe
        ftpipe -= lr * factor * m / (1 - b1**t) / ((v / (1 - b2**t)) ** 0.5 + eps)
    if tolerance is None:  # as for the bias, the first gradients count for more here
        assert ours < ftpipe
    else:
        assert ours - now == pytest.approx(ftpipe - now, rel=tolerance, abs=3 * lr * decay * abs(now))


def test_prediction_looks_ahead_by_updates() -> None:
    """With M = 4 and a delay of 3, the first batch of an update is in that update, the others in the next."""
    descent = Descent({"predict_weights": True}, 3, accumulate=4, momentum=0.9)
    descent.run(7)
    now, forwards = float(descent.x.detach()), []
    for position in range(4):
        descent.moment = descent.moment._replace(position=position)
        forwards.append(descent.forward())
    assert forwards[0] == now
    assert forwards[1] == forwards[2] == forwards[3] != now


def test_prediction_looks_ahead_by_updates_that_come() -> None:
    """After a flush nothing is in flight that would bring any."""
    descent = Descent({"predict_weights": True}, 3, momentum=0.9)
    descent.run(7)
    now = float(descent.x.detach())
    last = float(descent.optimizer.state[descent.x]["last_update"])
    for num_in_flight, factor in (
        (0, 0.0),
        (1, 0.9),
        (2, 0.9 + 0.81),
        (3, 0.9 + 0.81 + 0.729),
        (9, 0.9 + 0.81 + 0.729),
    ):
        descent.moment = descent.moment._replace(num_in_flight=num_in_flight)
        assert descent.forward() == pytest.approx(now + factor * last, rel=1e-12)


def test_nothing_is_predicted_without_delay_or_while_synchronous() -> None:
    descent = Descent({"predict_weights": True}, 0, momentum=0.9)
    descent.run(5)
    assert descent.updates.predicted({"x": descent.x}) == {}
    descent = Descent({"predict_weights": True}, 2, momentum=0.9)
    descent.run(5)
    descent.moment = descent.moment._replace(is_synchronous=True)
    assert descent.updates.predicted({"x": descent.x}) == {}


def test_the_discount_is_a_smaller_learning_rate() -> None:
    ours = Descent({"lr_discount_steps": 10}, 4, momentum=0.9).run(15)
    expected, velocity = [1.0], 0.0
    for t in range(15):
        if t >= 4:
            velocity = 0.9 * velocity + CURVATURE * expected[t - 4]
        expected.append(expected[-1] - 0.1 * 4.0 ** -(1 - min(t / 10, 1)) * velocity)
    assert ours == pytest.approx(expected[1:], rel=1e-12)


def test_a_delay_of_less_than_an_update_has_no_discount() -> None:
    plain = Descent({}, 2, momentum=0.9).run(8)
    assert Descent({"lr_discount_steps": 10}, 2, accumulate=2, momentum=0.9).run(8) == pytest.approx(plain, rel=1e-12)


def test_the_correction_is_twice_the_update_less_the_one_before() -> None:
    ours = Descent({"correct_updates": True}, 1, weight_decay=0.0).run(12)
    expected, last = [1.0], 0.0
    for t in range(12):
        update = 0.1 * CURVATURE * expected[t - 1] if t >= 1 else 0.0
        expected.append(expected[-1] - 2 * update + last)
        last = update
    assert ours == pytest.approx(expected[1:], rel=1e-12)


def test_closed_updates_leave_the_optimizer_alone() -> None:
    descent = Descent({"lr_discount_steps": 100}, 4)
    descent.updates.close()
    assert descent.run(9) == pytest.approx(by_hand(9, 4), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"predict_weights": True, "correct_updates": True}, "do it twice"),
        ({"lr_discount_steps": -1}, "`lr_discount_steps` must be a number of steps"),
        ({"synchronous_steps": 0.5}, "`synchronous_steps` must be a number of steps"),
    ],
)
def test_remedies_that_are_wrong(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Remedies(**options)
