"""The curves of a search, read back as TensorBoard reads them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
from nets import problem_of

from agents.random_search import RandomSearch
from ajpq.errors import AjpqError
from ajpq.record import row
from ajpq.scalars import FOLDER, Scalars


def test_curves_are_those_of_the_record(tmp_path: Path) -> None:
    problem = problem_of("digits_cnn")
    history = RandomSearch(8, batch=2).search(problem).history
    rows = [row(evaluation) for evaluation in history]
    first = Scalars(tmp_path)
    first.evaluations([{**line, "reward": -1.0} for line in rows[:6]], 1)
    for step in (2, 4, 6):
        first.scalar("loss", float(step), step)
    first.close()
    second = Scalars(tmp_path, first=4)  # a resumed run: its search continues after 3 evaluations
    problem.on_scalar = second.scalar
    second.evaluations(rows, 4)
    problem.log("loss", 0.5)
    second.close()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / FOLDER)).Reload()
    found = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    costs = {f"cost/{name}" for name in rows[0]["ratios"]}
    assert set(found) == {"reward", "best", "accuracy", "seconds", "search/loss", *costs}  # nothing else was measured
    assert found["search/loss"] == {2: 2.0, 8: 0.5}
    assert found["reward"] == pytest.approx(
        {i: -1.0 for i in (1, 2, 3)} | {i: rows[i - 1]["reward"] for i in range(4, 9)}
    )
    assert found["best"][8] == pytest.approx(problem.best.score.reward)
    for name in rows[0]["ratios"]:
        assert found[f"cost/{name}"] == pytest.approx({line["number"]: line["ratios"][name] for line in rows})


def test_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(AjpqError, match="tensorboard=false"):
        Scalars(tmp_path)
    assert not list(tmp_path.iterdir())
