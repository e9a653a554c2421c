"""What a network says of patients: outputs on whole bags, those of its branches, and what is logged of its inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.fusion import BRANCHES, Encoded
from morphome.models.nystrom import clear_pinv_errors, largest_pinv_error
from morphome.training.ahead import ahead
from morphome.training.cox_objective import CoxObjective
from morphome.training.data import FoldData
from morphome.training.inputs import Inputs
from morphome.training.objective import HazardObjective

Objective = HazardObjective | CoxObjective
#: What each branch of an encoded patient says alone, {branch: (1, width)}.
Watch = Callable[[Encoded], dict[str, Tensor]]


@dataclass
class Outputs:
    """What a model says of some patients: outputs (n, width), those of its branches, rows of the routing table, and
    the largest relative error of a pseudo-inverse where Nyström attention used one."""

    main: np.ndarray
    branches: dict[str, np.ndarray] = field(default_factory=dict)
    routing: list[dict[str, Any]] = field(default_factory=list)
    pinv_error: float | None = None


@torch.no_grad()
def evaluate(
    name: str,
    module: nn.Module,
    objective: Objective,
    inputs: Inputs,
    fold: FoldData,
    ids: Sequence[str],
    epoch: int,
    watch: Watch | None = None,
) -> Outputs:
    """What a model says of patients, on whole bags and in fp32; of its branches where somebody watches them.

    Raises:
        MorphomeError: a prediction that is not finite; names the patient.
    """
    module.eval()
    found = Outputs(np.empty((len(ids), objective.width)))
    if watch is not None:
        found.branches = {u: np.empty_like(found.main) for u in BRANCHES}
    for i, batch in enumerate(ahead(lambda k: inputs.batch(fold, ids[k]), range(len(ids)))):
        clear_pinv_errors(module)
        if watch is None:
            output = module(batch)
        else:
            encoded = module.encode(batch)
            output = module.output(encoded)
            for u, out in watch(encoded).items():
                found.branches[u][i] = out[0].double().cpu().numpy()
        errors = [found.pinv_error, largest_pinv_error(module)]
        found.pinv_error = max((error for error in errors if error is not None), default=None)
        found.main[i] = output[objective.output][0].double().cpu().numpy()
        role = fold.table.at[ids[i], "role"]
        for layer, routed in output.get("aux", {}).get("routing", {}).items():
            p = routed["pi"].detach().double().cpu().numpy().ravel()
            found.routing.append(
                {
                    "epoch": epoch,
                    "layer": layer,
                    "patient_id": ids[i],
                    "role": role,
                    "expert": int(routed["expert"]),
                    **{f"p{e}": float(p[e]) for e in range(len(p))},
                    "entropy": float(-(p[p > 0] * np.log(p[p > 0])).sum()),
                }
            )
    bad = np.flatnonzero(~np.isfinite(found.main).all(axis=1))
    if len(bad):
        raise MorphomeError(
            f"{name}, epoch {epoch}, patient {ids[bad[0]]}: the prediction is not finite",
            "look for extreme features of this patient; try a lower training.learning_rate",
        )
    return found
