"""Section of the page on training: what is said where inner validation gives no C."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from morphome.report import history
from morphome.report.inputs import is_neural, load_report


@pytest.fixture
def runs(make_inputs):
    data = load_report(make_inputs(only=["mome"]))
    return data, [run for run in data.runs_of("mome") if is_neural(run)]


def blind(run):
    return replace(run, history=run.history.assign(inner_c=np.nan))


def test_without_inner_c_the_panel_is_left_out_and_the_rule_is_told(runs, monkeypatch):
    data, found = runs
    whole = history.training(data)["curves"][0]
    assert "C, inner validation" in whole["figure"] and "best inner validation" in whole["how"]
    monkeypatch.setattr(type(data), "runs_of", lambda self, name: [blind(run) for run in found])
    card = history.training(data)["curves"][0]
    assert "C, inner validation" not in card["figure"] and "Loss" in card["figure"]
    assert "epoch with the lowest loss of inner validation, which has no comparable pair" in card["how"]
    assert "best inner validation" not in card["how"]


def test_some_runs_without_inner_c_are_counted(runs):
    _, found = runs
    told = history.how([blind(found[0]), *found[1:]])
    assert f"best inner validation; in 1 of {len(found)} runs epoch with the lowest loss" in told
