"""What notebook 08 says of runs: the undominated methods of a table, and verdicts from intervals."""

from steer_utils.course.runs import starred, verdicts
from steer_utils.measure.metrics import Interval


def test_a_star_marks_the_methods_that_no_other_one_dominates():
    def row(share: float, other: float, ratio: float) -> dict[str, Interval]:
        judges = {name: Interval(x, x, x) for name, x in {"VADER": share, "MiniLM": other}.items()}
        return judges | {"perplexity ratio": Interval(ratio, ratio, ratio), "loss on news": Interval(9, 9, 9)}

    rows = {"cheap": row(0.2, 0.2, 1.0), "strong": row(0.9, 0.7, 2.0), "worse": row(0.8, 0.7, 2.0)}
    rows |= {"as strong": row(0.8, 0.8, 2.0), "dear": row(0.9, 0.6, 2.5)}
    table = starred(rows, ("VADER", "MiniLM"))
    assert list(table.index) == ["cheap *", "strong *", "worse", "as strong *", "dear"]
    assert "loss on news" in table.columns


def test_a_verdict_needs_both_judges_on_the_same_side_of_zero():
    above, below, around = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1), Interval(0.1, -0.1, 0.3)
    paired = {
        "a − b": {"VADER": above, "MiniLM": above, "loss": around},
        "c − d": {"VADER": above, "MiniLM": around, "loss": below},
        "e − f": {"VADER": below, "MiniLM": below, "loss": above},
        "g − h": {"VADER": below, "MiniLM": above, "loss": around},
    }
    said = verdicts(paired).splitlines()
    assert said[0] == "* a, compared with b: more control; perplexity about the same."
    assert said[1] == "* c, compared with d: no clear difference in control; perplexity lower."
    assert said[2] == "* e, compared with f: less control; perplexity higher."
    assert said[3] == "* g, compared with h: no clear difference in control; perplexity about the same."
