"""The settings of the balance rules: one table for the rules themselves, for the schema and for the check."""

from __future__ import annotations

import pytest

from morphome.schema import schema
from morphome.training.balance import balance_rules
from morphome.training.balance_settings import BALANCE_SETTINGS, balance_problem

SCHEMA = schema()["$defs"]["training"]["properties"]["balance"]["properties"]


def test_every_rule_starts_from_the_table():
    assert {key: dict(rule.defaults) for key, rule in balance_rules().items()} == BALANCE_SETTINGS


def test_the_schema_has_every_rule_and_every_setting():
    assert set(SCHEMA["rule"]["enum"]) == set(BALANCE_SETTINGS)
    assert set(SCHEMA) - {"rule"} == {key for settings in BALANCE_SETTINGS.values() for key in settings}


@pytest.mark.parametrize("rule", BALANCE_SETTINGS)
def test_a_rule_takes_its_own_settings_and_the_schema_says_so(rule):
    known = BALANCE_SETTINGS[rule]
    assert balance_problem({"rule": rule, **known}) is None
    for key in set(SCHEMA) - {"rule"}:
        problem = balance_problem({"rule": rule, key: known.get(key, 1)})
        assert (problem is None) == (key in known), key
        told = SCHEMA[key]["description"]
        assert (rule != "none" and (rule in told or "Every rule but none" in told)) == (key in known), key


def test_the_check_needs_no_torch(loaded_by):
    assert "torch" not in loaded_by("morphome.config", "morphome.training.balance_settings")
