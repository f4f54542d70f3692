import math

import pytest

from lightning_qat_osc.schedules import constant, cosine_anneal


def test_constant():
    assert [constant(0.3)(t) for t in (0, 1, 10**9)] == [0.3] * 3


def test_whole_run_by_hand():
    schedule = cosine_anneal(0.0, 2.0, total_steps=4)
    expected = [0.0, 1 - math.cos(math.pi / 4), 1.0, 1 - math.cos(3 * math.pi / 4), 2.0, 2.0]
    assert [schedule(t) for t in range(6)] == pytest.approx(expected, abs=1e-15)


def test_holds_until_the_start_and_after_the_end():
    schedule = cosine_anneal(0.04, 0.01, total_steps=100, start=0.25)
    assert [schedule(t) for t in (0, 10, 25)] == [0.04] * 3
    assert schedule(26) < 0.04
    assert schedule(62) > schedule(63) > schedule(64)
    assert schedule(25 + 75 // 3) == pytest.approx(0.01 + 0.5 * 0.03 * (1 + math.cos(math.pi / 3)))
    assert [schedule(t) for t in (100, 1000)] == [0.01] * 2


@pytest.mark.parametrize(
    ("steps", "start", "word"), [(0, 0.0, "total_steps=0"), (9, 1.0, "start=1.0"), (9, -0.1, "start")]
)
def test_errors_name_the_value(steps, start, word):
    with pytest.raises(ValueError, match=word):
        cosine_anneal(0.0, 1.0, steps, start)
