"""Learning rate, progress and teacher momentum as functions of the step."""

import math

import pytest

from fino_fast.train.schedule import Schedule


def test_shares_become_steps() -> None:
    assert Schedule.of_shares(200, warmup=0.05, frozen=0.1) == Schedule(200, 10, 20)
    assert Schedule.of_shares(1, warmup=0.9, frozen=0.99) == Schedule(1, 1, 0)


def test_learning_rate_rises_linearly_then_falls_by_a_half_cosine() -> None:
    schedule = Schedule(100, 10, 0)
    rates = [schedule.learning_rate(step) for step in range(100)]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(100)]
    assert rates[:10] == pytest.approx([c * (i + 1) / 10 for i, c in enumerate(cosine[:10])])
    assert rates[10:] == pytest.approx(cosine[10:])
    assert rates[-1] > 0


def test_parameters_that_join_later_warm_up_then() -> None:
    schedule = Schedule(100, 10, 20)
    assert schedule.learning_rate(19, start=20) == 0
    late, early = schedule.learning_rate(24, start=20), schedule.learning_rate(24)
    assert late == pytest.approx(early * 0.5)
    assert schedule.learning_rate(50, start=20) == schedule.learning_rate(50)


def test_progress_counts_from_the_unfreezing() -> None:
    schedule = Schedule(100, 0, 20)
    assert [schedule.progress(step) for step in (0, 19, 20, 60)] == [0, 0, 0, 0.5]
    assert Schedule(100, 0, 0).progress(99) == 0.99


def test_teacher_momentum_rises_to_one() -> None:
    schedule = Schedule(100, 0, 0)
    momenta = [schedule.teacher_momentum(step, 0.9) for step in range(101)]
    assert momenta == sorted(momenta)
    assert momenta[0] == pytest.approx(0.9)
    assert momenta[50] == pytest.approx(0.95)
    assert momenta[100] == 1
