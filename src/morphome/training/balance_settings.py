"""Settings of the balance rules with their defaults: what a configuration may say, and what the rules start from.

Standard library only, so that a wrong setting is refused while the workflow is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Share of the past in the moving averages of the losses.
MOVING_AVERAGE = 0.9
#: Settings of every rule but "none": the first and the last epoch in which it acts (None: to the end).
EPOCHS: Mapping[str, Any] = {"start_epoch": 1, "end_epoch": None}
#: Settings of the rules that set the pace of a branch.
RATE: Mapping[str, Any] = {"apply_to": "lr", **EPOCHS}
#: Settings of each rule with their defaults.
BALANCE_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "ogm_cox": {
        "rho": "log_ratio",
        "alpha": 1.0,
        "form": "continuous",
        "ge_noise": "off",
        "moving_average": MOVING_AVERAGE,
        **RATE,
    },
    "agm": {"alpha": 0.1, "sign": "ours", **RATE},
    "pdmp": {"ratio": 2.0, **RATE},
    "opm": {"q_0": 0.5, "lambda": 0.5, "p_exe": 0.7, "moving_average": MOVING_AVERAGE, **EPOCHS},
    "aux": {"beta": 1.0, "omega": "gap", "moving_average": MOVING_AVERAGE, **EPOCHS},
    "pmr_surv": {"weight": 1.0, "moving_average": MOVING_AVERAGE, **EPOCHS},
    "mmpareto": {"gamma": 1.0, **EPOCHS},
    "dgl": EPOCHS,
    "rank_distill": {"teacher": "better", "weight": 1.0, "moving_average": MOVING_AVERAGE, **EPOCHS},
}


def balance_problem(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is wrong with a section ``training.balance``: key below the section with the problem, and the remedy.

    Args:
        given: ``rule`` and settings of that rule.

    Returns:
        None where nothing is wrong.
    """
    rule = given.get("rule", "none")
    if rule not in BALANCE_SETTINGS:
        return f".rule: there is no rule '{rule}'", f"choose one of {', '.join(BALANCE_SETTINGS)}"
    known = BALANCE_SETTINGS[rule]
    foreign = sorted(set(given) - set(known) - {"rule"})
    if foreign:
        return (
            f": {', '.join(foreign)} means nothing for the rule '{rule}'",
            f"take it out; settings of '{rule}': {', '.join(known) or 'none'}",
        )
    full = {**known, **given}
    if full.get("end_epoch") is not None and full["end_epoch"] < full["start_epoch"]:
        return (
            f": end_epoch {full['end_epoch']} lies before start_epoch {full['start_epoch']}",
            "let the rule act in at least one epoch, or choose the rule none",
        )
    return None
