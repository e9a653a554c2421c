"""How fast a network is trained: our loop against a plain one.

Both train the same model on the same bags of random numbers, one patient at a time, in the same order, with one step
of Adam per window of patients. The plain loop is what a user writes from the papers: fp32, every bag read from its
file each time, dropout of torch, attention and router by their formulas (:func:`plain`).
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.bench.rounds import interleaved
from morphome.errors import MorphomeError
from morphome.features.store import INDEX_FORMAT, index_table
from morphome.files import stamp, write_parquet
from morphome.models import hazard, layers
from morphome.models.batch import Batch
from morphome.models.mome import EXPERTS, MoMELayer
from morphome.models.nystrom import NystromAttention
from morphome.models.registry import build, defaults
from morphome.schema import schema
from morphome.training.cox_objective import CoxObjective
from morphome.training.data import CACHE_BYTES, FoldData, Outcomes
from morphome.training.loop import PRECISIONS, Loop
from morphome.training.objective import HazardObjective
from morphome.training.trainer import NeuralModel, torch_state

#: Columns of the six gene families in the signature table of TCGA-BLCA.
GROUPS = {"suppressors": 94, "oncogenes": 334, "kinases": 521, "markers": 468, "factors": 1496, "cytokines": 479}
SEED = 0
#: A round is about this many patches, and 8 to 32 patients.
ROUND_PATCHES = 32_768
#: Patients after which the peak of memory is read; it comes with the first step.
MEMORY_PATIENTS = 3
_PEER = (
    "fp32, bags read with h5py each time, Adam and dropout of torch, attention by the formulas of the published layer "
    "(zero tokens in front, all rows), every expert of MoME with its graph"
)
_OURS = "the loop of the trainer with the default settings of the model; bags stay in memory after the first round"
_EPOCH = "training patients once; no evaluation, no reading of tables, no preparation"


@dataclass(frozen=True)
class Trial:
    """What is measured, in a form that goes to a child process.

    Attributes:
        model: registry key. settings: overrides of its defaults. patients: of the cohort, with labels and genes.
        timed: how many of them have a bag and are trained on. bag, dim: patches and width. precision: of our loop.
        groups: columns per gene group. threads: of torch.
    """

    model: str
    settings: Mapping[str, Any]
    patients: int
    timed: int
    bag: int
    dim: int
    precision: str
    groups: Mapping[str, int]
    threads: int


def bench_train(
    model: str = "mome",
    patients: int = 300,
    bag: int = 4096,
    dim: int = 1024,
    rounds: int = 3,
    precision: str = "fp32",
    timed: int | None = None,
    threads: int = 1,
    settings: Mapping[str, Any] | None = None,
    groups: Mapping[str, int] | None = None,
    memory: bool = True,
) -> dict[str, Any]:
    """Measure seconds of an epoch and the peak of memory.

    Args:
        model: key of a network.
        patients: of an epoch. bag, dim: patches of each and their width.
        rounds: interleaved rounds; medians are reported.
        precision: of our loop, fp32 or bf16; the plain loop is in fp32.
        timed: patients that a round trains on; None: about :data:`ROUND_PATCHES` patches. The time of an epoch is
            theirs times patients / timed.
        threads: threads of torch, for both.
        settings: of the model, over its defaults. groups: columns per gene group.
        memory: also run both once in a process of their own, for the peak.

    Returns:
        JSON-able: the sizes; ``extrapolated`` (bool); ``peer`` and ``ours``, CPU seconds of an epoch, ``ratio``, the
        same elapsed as ``peer_wall``, ``ours_wall``, ``ratio_wall``; ``ratio_of_rounds`` (least, most);
        ``peer_peak_mb``, ``ours_peak_mb`` with ``memory``, of a process with :data:`MEMORY_PATIENTS` patients, and
        ``ours_bags_mb``, what the bags of all patients add to it; ``max_difference`` of the logits between plain and
        our code with the same formulas; ``peer_is``, ``ours_is``, ``epoch_is`` (in words).

    Raises:
        MorphomeError: no such network, setting or precision, or fewer than 12 patients.
    """
    if patients < 12:
        raise MorphomeError(f"{patients} patients are too few for time bins", "measure with 12 or more")
    if precision not in ("fp32", *PRECISIONS):
        raise MorphomeError(f"precision {precision!r} is not known", f"fp32 or {', '.join(PRECISIONS)}")
    timed = min(patients, timed or max(8, min(32, ROUND_PATCHES // bag)))
    trial = Trial(model, dict(settings or {}), patients, timed, bag, dim, precision, dict(groups or GROUPS), threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_cohort(trial, folder)
        ways: dict[str, Callable[[], Any]] = {"peer": Plain(trial, folder), "ours": Ours(trial, folder)}
        difference = ways["peer"].difference()
        measured = interleaved(rounds, ways)
        peaks = {name: _peak(name, trial, folder) for name in ways} if memory else {}
    scale = patients / timed
    pairs = zip(measured.seconds["peer"], measured.seconds["ours"], strict=True)
    ratios = [peer / ours for peer, ours in pairs if ours > 0]
    return {
        "model": model,
        "settings": trial.settings,
        "patients": patients,
        "bag": bag,
        "dim": dim,
        "precision": precision,
        "threads": threads,
        "rounds": rounds,
        "timed": timed,
        "extrapolated": timed < patients,
        "peer": scale * measured.median("peer"),
        "ours": scale * measured.median("ours"),
        "ratio": measured.ratio(),
        "ratio_of_rounds": [min(ratios), max(ratios)] if ratios else None,
        "peer_wall": scale * measured.median_wall("peer"),
        "ours_wall": scale * measured.median_wall("ours"),
        "ratio_wall": measured.median_wall("peer") / measured.median_wall("ours"),
        **{f"{name}_peak_mb": peak for name, peak in peaks.items()},
        "ours_bags_mb": min(CACHE_BYTES, patients * bag * (2 * dim + 12)) / 1e6,
        "max_difference": difference,
        "peer_is": _PEER,
        "ours_is": _OURS,
        "epoch_is": _EPOCH,
    }


def read_settings(text: str) -> dict[str, Any]:
    """Settings of a model from a JSON object.

    Raises:
        MorphomeError: it is none.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise MorphomeError(f"--settings {text}: not a JSON object", 'for example \'{"router": "frozen"}\'')
    return found


# -- the cohort -----------------------------------------------------------------------------------------------
def write_cohort(trial: Trial, folder: Path) -> None:
    """Bags, their index and a table of genes, all of random numbers; bags of the timed patients only."""
    rng = np.random.default_rng(SEED)
    rows = []
    for patient in _ids(trial)[: trial.timed]:
        path = _bag_file(folder, patient)
        grid = np.arange(trial.bag, dtype=np.int32)
        side = int(np.ceil(np.sqrt(trial.bag)))
        with h5py.File(path, "w") as handle:
            handle.attrs.update(stamp("morphome.tile-features", {}))
            handle.attrs["status"] = "ok"
            handle["features"] = rng.standard_normal((trial.bag, trial.dim), np.float32).astype(np.float16)
            handle["coords"] = np.column_stack([grid % side, grid // side]) * 256
        rows.append({"slide_id": patient, "path": str(path), "layout": "h5", "start": 0, "stop": trial.bag})
        rows[-1] |= {"n_tiles": trial.bag, "dim": trial.dim, "has_coords": True, "encoder": "random numbers"}
        rows[-1] |= {"fingerprint": "0", "content_key": patient, "status": "ok", "reason_code": "", "reason": ""}
    facts = {"fingerprint": "0", "encoder": "random numbers", "dim": trial.dim}
    write_parquet(index_table(rows), folder / "index.parquet", INDEX_FORMAT, {}, facts)
    genes = [f"g{i}" for i in range(sum(trial.groups.values()))]
    values = pd.DataFrame(rng.standard_normal((trial.patients, len(genes)), np.float32), columns=genes)
    values.insert(0, "patient_id", _ids(trial))
    write_parquet(values, folder / "rna.parquet", "morphome.panel", {}, {"panel": "rna"})


def _ids(trial: Trial) -> list[str]:
    return [f"P{i:05d}" for i in range(trial.patients)]


def _bag_file(folder: Path, patient: str) -> Path:
    return folder / f"{patient}.h5"


def _fold(trial: Trial, folder: Path) -> FoldData:
    rng = np.random.default_rng(SEED + 1)
    ids = _ids(trial)
    table = pd.DataFrame(
        {
            "patient_id": ids,
            "role": "train",
            "slide_ids": [[patient] for patient in ids],
            "time_months": rng.exponential(30.0, len(ids)) + 0.1,
            "event": np.arange(len(ids)) % 2,
        }
    )
    genes = iter(range(sum(trial.groups.values())))
    groups = {name: [("rna", f"g{next(genes)}") for _ in range(size)] for name, size in trial.groups.items()}
    return FoldData(
        table, index=folder / "index.parquet", panels={"rna": folder / "rna.parquet"}, groups=groups, where="the bench"
    )


# -- the two ways ---------------------------------------------------------------------------------------------
class Ours:
    """Our loop; a call is one pass over the timed patients."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        training = {name: part.get("default") for name, part in schema()["$defs"]["training"]["properties"].items()}
        training |= {"search": {}, "precision": trial.precision, "device": "cpu", "max_patches": trial.bag}
        training |= {"bin_edges": "quantile"}
        self.trial, self.fold = trial, _fold(trial, folder)
        self.settings = {**defaults(trial.model), **trial.settings}
        model = NeuralModel(trial.model, self.settings, training, SEED, trial.threads)
        everybody = self.fold.outcomes("train")
        self.train = Outcomes(*(part[: trial.timed] for part in everybody))
        if model.network.head == "cox":
            self.objective: HazardObjective | CoxObjective = CoxObjective()
        else:
            edges = hazard.bin_edges(everybody.time, everybody.event, training["time_bins"], self.fold.where, None)
            self.objective = HazardObjective(edges, beta=training["beta"])
        self.inputs = model.inputs
        self.inputs.fit(self.fold, self.train, [])
        bins = self.objective.bins(self.train.time)
        self.inputs.fit_parts(model.network, self.settings, self.fold, self.train, bins)
        self.training, self.epoch = training, 0
        module = self.module()
        self.loop = Loop(
            trial.model, module, self.objective, self.inputs, self.fold, self.train, self.train, training, SEED
        )

    def module(self, **changes: Any) -> nn.Module:
        """The network with the same weights at the start each time."""
        with torch_state(self.trial.threads, SEED):
            return build(self.trial.model, self.settings | changes, self.inputs.dims(self.objective.width))

    def __call__(self) -> float:
        self.epoch += 1
        with torch_state(self.trial.threads, SEED):
            return self.loop._epoch(self.epoch, self.training["learning_rate"])


class Plain:
    """The plain loop; a call is one pass over the timed patients, in the order of our loop."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        # What is not timed is prepared by our own code: scaled genes, labels, order of the patients.
        ours = Ours(trial, folder)
        self.ours, self.folder, self.epoch = ours, folder, 0
        published = {"attention": "nystrom_compat"} if "attention" in ours.settings else {}
        self.reference = ours.module(**published)
        self.module = plain(ours.module(**published))
        self.optimizer = torch.optim.Adam(
            self.module.parameters(), lr=ours.training["learning_rate"], weight_decay=ours.training["weight_decay"]
        )
        self.genes = []
        for i, patient in enumerate(ours.train.ids):
            batch = ours.inputs.batch(ours.fold, patient, training=True)
            labels = {"bin": int(ours.loop.bins[i]), "event": int(ours.train.event[i])}
            self.genes.append(replace(batch, path=None, pos=None, **labels))
        ours.fold._cache.clear()

    def batch(self, i: int) -> Batch:
        """Patient i of the timed ones, read from the file."""
        genes = self.genes[i]
        with h5py.File(_bag_file(self.folder, genes.patient_id), "r") as handle:
            features = torch.from_numpy(handle["features"][:]).float()
            places = torch.from_numpy(handle["coords"][:])
        return replace(genes, path=features, pos=F.pad(places, (1, 0)))

    @torch.no_grad()
    def difference(self) -> float:
        """Largest difference of the outputs to our code with the same weights and the published attention."""
        key, batch = self.ours.objective.output, self.batch(0)
        batch = replace(batch, bin=None, event=None)
        a, b = (module.eval()(batch)[key] for module in (self.module, self.reference))
        return float((a - b).abs().max())

    def __call__(self) -> float:
        self.epoch += 1
        torch.set_num_threads(self.ours.trial.threads)
        self.module.train()
        windows = self.ours.loop.windows(self.epoch)
        return sum(self._window([int(i) for i in window]) for window in windows)

    def _window(self, members: Sequence[int]) -> float:
        objective, train = self.ours.objective, self.ours.train
        total, risks = 0.0, []
        self.optimizer.zero_grad()
        for i in members:
            output = self.module(self.batch(i))
            loss = sum(output["extra_losses"].values()) / len(members)
            if objective.whole_window:  # the graphs of all patients stay until their common loss is known
                risks.append(output[objective.output].squeeze(0) + loss)
                continue
            loss = objective.loss(output[objective.output], train.time[i], train.event[i]) / len(members) + loss
            loss.backward()
            total += loss.item()
        if risks:
            together = torch.cat(risks)
            g, total = objective.coefficients(together.detach(), train.time[members], train.event[members])
            (g.float() * together).sum().backward()
        self.optimizer.step()
        return float(total)


# -- the model by its formulas --------------------------------------------------------------------------------
def plain(module: nn.Module) -> nn.Module:
    """The same network, same weights, computed as the formulas are written; changes ``module`` itself.

    Dropout is torch's, Nyström attention fills up with zeros and computes every row, and MoME's straight-through
    router builds the graph of all experts.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, layers.Dropout):
                kind = nn.AlphaDropout if isinstance(child, layers.AlphaDropout) else nn.Dropout
                setattr(parent, name, kind(child.p))
        if isinstance(parent, NystromAttention):
            parent.forward = functools.partial(_plain_attention, parent)
        if isinstance(parent, layers.TransLayer):
            parent.forward = functools.partial(_plain_trans_layer, parent)
        if isinstance(parent, layers.RMSNorm):
            parent.forward = functools.partial(_plain_rms_norm, parent)
        if isinstance(parent, MoMELayer) and parent.router == "straight_through":
            parent._mix = functools.partial(_plain_mix, parent)
    return module


def _plain_attention(
    layer: NystromAttention, x: Tensor, keep: tuple[int, int] | None = None, lengths: Tensor | None = None
) -> Tensor:
    """The published layer: x (B, n, D) -> (B, n, D), or the rows ``keep`` of it."""
    n, m, heads = x.shape[1], layer.landmarks, layer.heads
    x = F.pad(x, (0, 0, -n % m, 0))
    q, k, v = (
        part(x).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
        for part in (layer.query, layer.key, layer.value)
    )
    q = q * q.shape[-1] ** -0.5
    landmark_q, landmark_k = (a.unflatten(2, (m, -1)).mean(3) for a in (q, k))
    a1 = (q @ landmark_k.transpose(-1, -2)).softmax(-1)
    a2 = (landmark_q @ landmark_k.transpose(-1, -2)).softmax(-1)
    a3 = (landmark_q @ k.transpose(-1, -2)).softmax(-1)
    out = (a1 @ _plain_inverse(a2, layer.iterations)) @ (a3 @ v)
    if layer.value_kernel is not None:
        kernel = layer.value_kernel[:, None, :, None]
        out = out + F.conv2d(v, kernel, padding=(kernel.shape[2] // 2, 0), groups=heads)
    out = layer.out(out.transpose(1, 2).flatten(2))[:, -n:]
    return out if keep is None else out[:, keep[0] : keep[1]]


def _plain_inverse(a: Tensor, iterations: int) -> Tensor:
    rows, columns = a.abs().sum(-1), a.abs().sum(-2)
    z = a.transpose(-1, -2) / (rows.max() * columns.max())
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


def _plain_rms_norm(norm: layers.RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _plain_trans_layer(layer: layers.TransLayer, x: Tensor, keep: tuple[int, int] | None = None) -> Tensor:
    out = layer.omega * x + layer.dropout(layer.attention(layer.norm(x).unsqueeze(0)).squeeze(0))
    return out if keep is None else out[keep[0] : keep[1]]


def _plain_mix(layer: MoMELayer, x: Tensor, ref: Tensor, pi: Tensor, chosen: int) -> Tensor:
    """y = sum_e g_e E_e with g = onehot - sg(pi) + pi; one expert in evaluation."""
    if not layer.training:
        return layer._expert(chosen, x, ref)
    g = F.one_hot(torch.tensor(chosen), len(EXPERTS)) - pi.detach() + pi
    return sum(g[e] * layer._expert(e, x, ref) for e in range(len(EXPERTS)))


# -- memory ---------------------------------------------------------------------------------------------------
def _peak(name: str, trial: Trial, folder: Path) -> float:
    """Largest resident memory in MB (10^6 bytes) of a process that trains on a few patients in one way."""
    few = replace(trial, timed=min(trial.timed, MEMORY_PATIENTS))
    asked = json.dumps([name, vars(few), str(folder)])
    command = [sys.executable, "-c", "from morphome.bench.train import child; child()"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MorphomeError(f"the process for the memory of '{name}' failed: {done.stderr.strip()[-500:]}", "see above")
    return float(done.stdout.split()[-1])


def child() -> None:
    """Train in one way as asked on standard input; print the peak of memory."""
    name, trial, folder = json.load(sys.stdin)
    {"peer": Plain, "ours": Ours}[name](Trial(**trial), Path(folder))()
    print(peak_mb())


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its peak is inherited from the process that started this one.
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
