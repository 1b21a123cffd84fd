"""What the report says must follow from the numbers, also where they speak against FINO."""

import pytest

from fino_fast.evaluate.summary import check_arms, compare, gather, markdown, table, verdicts


def result(seed: int, frozen: float, control: float, fino: float) -> dict:
    def arm(score: float) -> dict[str, float]:
        return {
            "in domain": score,
            "out of domain": score - 0.05,
            "camera": 1 - score,
            "camera chance": 1 / 6,
            "exposure R²": 0.1,
            "module type": 0.9,
        }

    return {
        "seed": seed,
        "arms": {"FINO": arm(fino), "contrastive only": arm(control), "frozen": arm(frozen)},
        "samples": {"adapt": 100, "test-in": 20, "test-out": 20},
        "seconds": {"train": 10.0},
    }


GOOD = [result(s, 0.60, 0.65 + s / 100, 0.75 + s / 100 + s % 2 / 200) for s in range(5)]
BAD = [result(s, 0.60, 0.75 + s / 100, 0.65 + s / 100 + s % 2 / 200) for s in range(5)]


def test_the_table_holds_mean_and_range() -> None:
    lines = table(gather(GOOD)).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "frozen",
        "contrastive only",
        "FINO",
        "chance",
    ]
    assert "0.600 " in lines[2]
    assert "0.670 (0.650 … 0.690)" in lines[3]
    assert "0.167" in lines[5]


def test_a_clear_win_and_a_clear_loss_are_told_apart() -> None:
    for line in verdicts(gather(GOOD)):
        assert "FINO beats the " in line
        assert "better in 5 of 5 seeds" in line
    for line in verdicts(gather(BAD))[:3]:
        assert "FINO does NOT beat the control, it is worse" in line
        assert "better in 0 of 5 seeds" in line


def test_lower_leakage_is_the_better_one() -> None:
    assert compare([0.5, 0.51, 0.52], [0.9, 0.92, 0.91], "it", True).startswith("beats")
    assert compare([0.5, 0.51, 0.52], [0.9, 0.92, 0.91], "it", False).startswith("does NOT beat")


def test_noise_is_called_noise() -> None:
    text = compare([0.70, 0.60, 0.75], [0.66, 0.66, 0.66], "it", False)
    assert "does NOT beat it, the difference is within the noise" in text
    assert "better in 2 of 3 seeds" in text


def test_the_interval_is_the_paired_t_interval() -> None:
    """Differences 1, 2, 3 points: mean 2, deviation 1, t(0.975, 2) = 4.303, half 2.484."""
    text = compare([0.51, 0.62, 0.73], [0.50, 0.60, 0.70], "it", False)
    assert "+2.0 points, 95 % interval -0.5 … +4.5" in text


@pytest.mark.parametrize(("ours", "word"), [(0.8, "is ahead"), (0.6, "does NOT beat")])
def test_one_seed_decides_nothing(ours: float, word: str) -> None:
    text = compare([ours], [0.7], "it", False)
    assert text.startswith(word)
    assert "decides nothing" in text


def test_the_report_says_what_was_run() -> None:
    text = markdown(gather(BAD), BAD, {"batch_size": 32, "epochs": 3})
    assert "5 seeds (0, 1, 2, 3, 4)" in text
    assert "about 12 steps of 32 images" in text
    assert "does NOT beat" in text
    assert table(gather(BAD)) in text


def test_a_result_without_an_arm_is_no_result() -> None:
    broken = result(3, 0.5, 0.5, 0.5)
    del broken["arms"]["FINO"]
    with pytest.raises(ValueError, match="seed 3"):
        check_arms([*GOOD, broken])
