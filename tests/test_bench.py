"""The benchmark's rows all run, on a tiny model, and what it writes is what docs/speed.md can show."""

import json
from collections.abc import Callable

import bench
import pytest
import torch


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The file that a run writes to."""
    monkeypatch.setattr(bench, "FIGURES", tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / ("bench_cuda.json" if torch.cuda.is_available() else "bench.json")


def row(name: str, bound: float, *values: float) -> bench.Row:
    return bench.Row(name, bound, lambda _: list(values))


def only(*rows: bench.Row) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(bench, "ROWS", list(rows))


def test_every_row_runs_and_a_quick_run_writes_nothing(out, capsys):
    bench.main(["--quick"])
    shown = capsys.readouterr().out
    assert all(row.name in shown for row in bench.ROWS)
    assert not out.exists()


def test_the_rows_are_those_of_the_budget_with_their_bounds():
    bounds = {row.name: row.bound for row in bench.ROWS}
    assert len(bounds) == len(bench.ROWS)
    assert [*bounds.values()][:9] == [1.03, 1.03, 1.02, 1.15, 1.35, 1.15, 0.2, 0.1, 0.2]


def test_a_row_has_the_median_of_its_runs_and_their_range(monkeypatch):
    found = bench.measured(row("a", 1.5, 3.0, 1.0, 1.25), bench.quick())
    assert found == {
        "name": "a",
        "ratio": 1.25,
        "interval": [1.0, 3.0],
        "bound": 1.5,
        "holds": True,
        "runs": 3,
    }
    assert not bench.measured(row("a", 1.2, 3.0, 1.0, 1.25), bench.quick())["holds"]
    assert bench.measured(row("a", 1.25, 1.25), bench.quick())["holds"]


def test_a_whole_run_is_written_with_its_machine_and_versions(out, monkeypatch):
    only(row("a", 1.0, 0.5), row("b ÷ c", 1.0, 2.0))(monkeypatch)
    bench.main([])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [one["name"] for one in found["rows"]] == ["a", "b ÷ c"]
    assert found["machine"].startswith(("cpu, ", "cuda, "))
    assert found["versions"].keys() == {"python", "torch", "transformers"}


def test_what_was_measured_before_an_error_is_on_file(out, monkeypatch):
    only(row("a", 1.0, 0.5), bench.Row("b", 1.0, lambda _: 1 / 0))(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        bench.main([])
    assert [one["name"] for one in json.loads(out.read_text(encoding="utf-8"))["rows"]] == ["a"]


def test_a_row_that_is_measured_again_replaces_its_own_on_the_same_machine_only(out, monkeypatch):
    only(row("a", 1.0, 0.5), row("b", 1.0, 2.0))(monkeypatch)
    bench.main([])
    only(row("a", 1.0, 9.0), row("b", 1.0, 3.0))(monkeypatch)
    bench.main(["b"])
    assert [one["ratio"] for one in json.loads(out.read_text(encoding="utf-8"))["rows"]] == [0.5, 3.0]
    monkeypatch.setattr(bench, "machine", lambda model: "cpu, another")
    bench.main(["b"])
    assert [one["name"] for one in json.loads(out.read_text(encoding="utf-8"))["rows"]] == ["b"]


def test_rows_that_are_not_there_are_named_with_those_that_are(out, monkeypatch, capsys):
    only(row("a", 1.0, 0.5))(monkeypatch)
    with pytest.raises(SystemExit):
        bench.main(["nonsense"])
    assert "no row has nonsense in its name: a" in capsys.readouterr().err
