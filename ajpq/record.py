"""The record of a search: a file with a line of JSON per evaluation, which outlives a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ajpq.errors import AjpqError
from ajpq.files import sync
from ajpq.policy import CompressionPolicy
from ajpq.scoring.setting import Measured

if TYPE_CHECKING:
    from ajpq.problem import Evaluation

RECORD = "evaluations.jsonl"
_KEYS = {"number", "policy", "widths", "reward", "ratios", "within", "seconds", *(f.name for f in fields(Measured))}


def row(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain data: number, policy (its digest), reward, all fields of `Measured`, ratios, within,
    seconds and widths (the policy itself, as `CompressionPolicy.to_json` writes it)."""
    score = evaluation.score
    return {
        "number": evaluation.number,
        "policy": evaluation.policy.digest(),
        "reward": score.reward,
        **{field.name: getattr(score, field.name) for field in fields(Measured)},
        "ratios": dict(score.ratios),
        "within": score.within,
        "seconds": round(evaluation.seconds, 3),
        "widths": json.loads(evaluation.policy.to_json()),
    }


def policy_of(row: Mapping[str, Any]) -> CompressionPolicy:
    """The policy of a row. Raises AjpqError where it is not the one that the row names."""
    policy = CompressionPolicy.from_json(json.dumps(row["widths"]))
    if policy.digest() != row["policy"]:
        raise AjpqError(
            f"a row of a record must hold the policy that it names, but evaluation {row['number']} names "
            f"{row['policy']} and holds {policy.digest()}; start a new run"
        )
    return policy


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a record; a last line that was not written to its end is left out.

    Raises AjpqError for any other damage.
    """
    return _whole(Path(path))[0]


class Record:
    """A record to append to. rows: what was there when it was opened. Raises AjpqError for a damaged one."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.rows, end = _whole(path) if path.is_file() else ([], 0)
        self._file = path.open("ab")
        self._file.truncate(end)
        sync(path.parent)

    def append(self, evaluation: Evaluation) -> dict[str, Any]:
        """Write a row, and return it once it is on the disk."""
        line = row(evaluation)
        self._file.write(json.dumps(line, separators=(",", ":"), default=float).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return line

    def close(self) -> None:
        self._file.close()


def _whole(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file, and the bytes that they take."""
    *lines, torn = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            whole = found["number"] == number and found.keys() >= _KEYS
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise AjpqError(
                f"every line of a record must be a whole evaluation in its place, but line {number} of {path} is not; "
                "start a new run"
            )
        rows.append(found)
    return rows, sum(len(line) + 1 for line in lines)
