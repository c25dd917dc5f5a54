"""Rows as the report's charts and tables read them."""

from __future__ import annotations

from typing import Any

from tests.test_plots import row


def shown(solver: str, nfe: int, value: float, stderr: float | None = 0.01, **more: Any) -> Any:
    metrics = {"energy": {"value": value, "stderr": stderr}}
    given = {"nfe": nfe, "budget": nfe, "spec": solver, "primary": "energy", "truth": "exact"}
    return row(solver=solver, metrics=metrics, **{**given, **more})
