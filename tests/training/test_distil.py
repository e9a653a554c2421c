"""Distillation: honest targets, formulas, and nothing of it in evaluation."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from morphome.config import schema
from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.fusion import Encoded, FusionModel
from morphome.training.data import Column, FoldData, load_fold
from morphome.training.distil import LOSSES, Distiller, log_risk
from morphome.training.trainer import NeuralModel

K = 3
SETTINGS = {
    "teacher": "mcat",
    "settings": {},
    "weight": 1.0,
    "temperature": 2.0,
    "folds": 3,
    "bin_weights": "equal",
    "feature_loss": "cosine",
    "hidden": 16,
}
GENES = [Column("rna", f"G{j}") for j in range(4)]


def distiller(loss, seed=5, **settings):
    return Distiller({**SETTINGS, "loss": loss, **settings}, seed)


@pytest.fixture(scope="module")
def cohort(planted):
    return planted()


@pytest.fixture(scope="module")
def open_fold(tmp_path_factory):
    def load(cohort, fold=0):
        files = cohort.write(tmp_path_factory.mktemp("cohort"))
        files.pop("split_facts")
        return load_fold(**files, repeat=0, fold=fold)[0]

    return load


@pytest.fixture(scope="module")
def fold(cohort, open_fold):
    return open_fold(cohort)


class Pair(FusionModel):
    """A tiny model of slides and genes; hazard or Cox head."""

    def __init__(self, d_in, width=K):
        super().__init__()
        self.path, self.omic, self.out = nn.Linear(d_in, 5), nn.Linear(len(GENES), 4), nn.Linear(9, width)
        self.head = "hazard" if width > 1 else "cox"

    def encode(self, batch):
        tokens = torch.stack([torch.tanh(self.omic(batch.omic_all))] * 2)
        return Encoded({"path": torch.tanh(self.path(batch.path)), "omic": tokens * torch.tensor([[0.5], [1.5]])})

    def fuse(self, z):
        return self.out(torch.cat([z["path"].mean(0), z["omic"].mean(0)]))[None]


class FittedTeacher:
    """A teacher that is really trained, on what its fold offers it."""

    def __init__(self, key, settings, fold, seed, edges, width=K):
        self.fold, self.seed, self.settings = fold, seed, settings
        self.train, inner = fold.outcomes("train"), fold.outcomes("inner_val")
        self.inner = inner.ids
        # Inner outcomes choose epochs in the trainer: here they choose the number of steps.
        steps = 4 + int(inner.event.sum()) % 3
        torch.manual_seed(seed)
        values = fold.gene_matrix(GENES, self.train.ids)
        self.mean, self.sd = np.nanmean(values, 0), np.nanstd(values, 0)
        self.module = Pair(fold.bag(self.train.ids[0])[0].shape[1], width)
        self.objective = type("Objective", (), {"edges": np.asarray(edges)})
        adam = torch.optim.Adam(self.module.parameters(), lr=0.02)
        bins = torch.from_numpy(hazard.bin_index(self.train.time, edges))
        event, time = torch.tensor(self.train.event), torch.tensor(self.train.time)
        batches = [self.batch(fold, i) for i in self.train.ids]
        for _ in range(steps):
            adam.zero_grad()
            outputs = [self.module(batch) for batch in batches]
            if width > 1:
                loss = hazard.nll_loss(torch.cat([o["logits"] for o in outputs]), bins, event)
            else:
                loss = hazard.cox_loss(torch.cat([o["log_risk"] for o in outputs]), time, event)
            loss.backward()
            adam.step()
        adam.zero_grad()
        self.after = {k: v.clone() for k, v in self.module.state_dict().items()}

    def batch(self, fold, patient):
        z = (np.nan_to_num(fold.gene_matrix(GENES, [patient])[0]) - self.mean) / self.sd
        return Batch(path=torch.from_numpy(fold.bag(patient)[0]), omic_all=torch.from_numpy(z.astype("f4")))

    def read(self, fold, ids, reader):
        self.module.eval()
        return [reader(self.module, self.batch(fold, i)) for i in ids]


class School:
    """Trains the teachers and keeps them."""

    def __init__(self, fold, width=K, edges=None):
        train = fold.outcomes("train")
        self.edges = hazard.bin_edges(train.time, train.event, K, fold.where) if edges is None else edges
        self.width = width
        self.teachers: list[FittedTeacher] = []

    def __call__(self, key, settings, fold, seed):
        self.teachers.append(FittedTeacher(key, settings, fold, seed, self.edges, self.width))
        return self.teachers[-1]


def prepared(loss, fold, width=K, seed=5, **settings):
    school, notes, found = School(fold, width), [], distiller(loss, seed, **settings)
    found.prepare(fold, school, notes, school.edges)
    return found, school, notes


class Student(nn.Module):
    """Slides alone."""

    def __init__(self, d_in, width=K):
        super().__init__()
        self.project, self.out = nn.Linear(d_in, 6), nn.Linear(6, width)

    def forward(self, batch):
        pooled = nn.functional.dropout(self.project(batch.path).relu(), 0.2, self.training).mean(0, keepdim=True)
        return {"logits": self.out(pooled), "extra_losses": {}, "attn": {}, "aux": {"pooled": pooled}}


def teach(fold, distil, epochs=1):
    """The loop of the trainer, in small: one patient a time, heads in the same optimiser."""
    train = fold.outcomes("train")
    edges = hazard.bin_edges(train.time, train.event, K, fold.where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        student = Student(8)
        heads = distil.build(6) if distil else nn.Module()
        adam = torch.optim.Adam([*student.parameters(), *heads.parameters()], lr=0.01)
        for _ in range(epochs):
            for i, patient in enumerate(train.ids):
                output = student(Batch(path=torch.from_numpy(fold.bag(patient)[0])))
                bins = torch.from_numpy(hazard.bin_index(train.time[i : i + 1], edges))
                loss = hazard.nll_loss(output["logits"], bins, torch.tensor([train.event[i]]))
                if distil:
                    loss = loss + distil.loss(output, patient)
                adam.zero_grad()
                loss.backward()
                adam.step()
    return student.eval(), heads


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# -- honest targets ---------------------------------------------------------------------------------------------


class Marked(nn.Module):
    """Says which teacher it is."""

    head = "hazard"

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, batch):
        return {"logits": torch.full((1, K), float(self.number)), "extra_losses": {}, "attn": {}, "aux": {}}


@pytest.mark.parametrize("scheme", ["random", "site"])
def test_the_target_of_a_patient_comes_from_a_teacher_that_never_saw_this_patient(fold, scheme):
    shown = []

    class Spy:
        objective = type("Objective", (), {"edges": np.array([1.0, 2.0])})

        def __init__(self, fold):
            self.module = Marked(len(shown))
            shown.append(fold)

        def read(self, fold, ids, reader):
            return [reader(self.module, Batch(patient_id=i)) for i in ids]

    other = fold.with_roles(dict(fold.table.loc[list(fold.ids("train", "inner_val")), "role"]))
    other.scheme = scheme
    notes, found = [], distiller("kd_logit")
    found.prepare(other, lambda key, settings, sub, seed: Spy(sub), notes)
    assert len(shown) == 3
    assert set(found.targets) == set(fold.ids("train"))
    for patient, target in found.targets.items():
        sub = shown[int(target[0])]
        assert sub.table.at[patient, "role"] == "test"
        assert math.isnan(sub.table.at[patient, "time_months"]) and math.isnan(sub.table.at[patient, "event"])
    for sub in shown:
        assert set(sub.ids()) == set(fold.ids("train"))  # neither inner nor test patients of the student
        assert len(sub.ids("inner_val")) > 0  # its own, for the choice of the epoch
        assert sub.outcomes("train").event.any() and sub.outcomes("inner_val").event.any()
        if scheme == "site":
            held, fitted = (set(sub.table.loc[list(ids), "site"]) for ids in (sub.ids("test"), sub.ids("train")))
            assert not held & fitted
    assert len({sub.where for sub in shown}) == 3
    assert "no better than chance" in notes[0]  # marks are no risks


@pytest.fixture(scope="module")
def permuted(cohort, open_fold):
    @functools.cache
    def load(*roles):
        """The fold with the outcomes of these roles permuted."""
        rows = cohort.patients.copy()
        part = cohort.splits[(cohort.splits["fold"] == 0) & cohort.splits["role"].isin(roles)]
        at = rows.index[rows["patient_id"].isin(part["patient_id"])]
        rows.loc[at, ["time_months", "event"]] = rows.loc[at[::-1], ["time_months", "event"]].to_numpy()
        rows["event"] = rows["event"].astype("int8")
        return open_fold(cohort.with_(patients=rows))

    return load


@pytest.mark.parametrize("loss", LOSSES)
def test_outcomes_of_test_and_inner_patients_change_no_target(permuted, fold, loss):
    plain = prepared(loss, fold)[0]
    assert set(plain.targets) == set(fold.ids("train"))
    canary = permuted("test", "inner_val")
    assert not np.array_equal(canary.outcomes("inner_val").time, fold.outcomes("inner_val").time)
    for found in (prepared(loss, canary)[0], prepared(loss, fold)[0]):
        assert all(torch.equal(target, found.targets[i]) for i, target in plain.targets.items())
    if loss != "gene_aux":  # the test can fail: outcomes of training patients do matter, and so does the seed
        for found in (prepared(loss, permuted("train"))[0], prepared(loss, fold, seed=6)[0]):
            assert any(not torch.equal(target, found.targets[i]) for i, target in plain.targets.items())


def test_targets_are_what_the_teachers_say(fold):
    found, school, _ = prepared("kd_logit", fold, settings={"dim": 16})
    assert len(school.teachers) == 3 and len({teacher.seed for teacher in school.teachers}) == 3
    assert all(teacher.settings == {"dim": 16} for teacher in school.teachers)
    for teacher in school.teachers:
        for patient in teacher.fold.ids("test"):
            logits = teacher.module(teacher.batch(fold, patient))["logits"][0]
            assert torch.equal(found.targets[patient], logits)
    assert 0.0 <= found.teacher_c <= 1.0
    found, school, _ = prepared("kd_feature", fold)
    (teacher,) = school.teachers
    assert set(teacher.train.ids) | set(teacher.inner) == set(fold.ids("train")) and teacher.inner
    raw = []
    for patient in fold.ids("train"):
        z = teacher.module.encode(teacher.batch(fold, patient)).z
        raw.append(torch.cat([z["path"].mean(0), z["omic"].mean(0)]).detach().double().numpy())
    raw = np.stack(raw)
    got = torch.stack([found.targets[i] for i in fold.ids("train")])
    np.testing.assert_allclose(got, (raw - raw.mean(0)) / raw.std(0), atol=1e-4)


@pytest.mark.parametrize("width", [K, 1], ids=["hazard", "cox"])
def test_log_risks_of_different_teachers_have_no_level(fold, width):
    found, school, _ = prepared("kd_risk_rank", fold, width)
    for teacher in school.teachers:
        ids = teacher.fold.ids("test")
        raw = torch.stack([log_risk(teacher.module(teacher.batch(fold, i))) for i in ids])
        got = torch.cat([found.targets[i] for i in ids])
        torch.testing.assert_close(got, (raw - raw.mean()).detach(), atol=1e-5, rtol=1e-5)


def test_pathway_scores(fold, cohort):
    found, school, _ = prepared("gene_aux", fold)
    assert not school.teachers
    ids = list(fold.ids("train"))
    panels = {panel: table.set_index("patient_id").loc[ids].astype(float) for panel, table in cohort.panels.items()}
    for g, columns in enumerate(cohort.groups.values()):
        scores = []
        for c in columns:
            x = panels[c["panel"]][c["gene"]]
            filled = x.fillna(x.median())
            scores.append(((x - filled.mean()) / filled.std(ddof=0)).clip(-6, 6))
        score = np.nanmean(np.stack(scores), axis=0)
        want = (score - score.mean()) / score.std()
        got = np.array([found.targets[i][g] for i in ids])
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_patient_without_genes_is_not_asked_for_scores(fold, cohort, open_fold):
    absent = fold.ids("train")[0]
    panels = {panel: table[table["patient_id"] != absent] for panel, table in cohort.panels.items()}
    found = distiller("gene_aux")
    found.prepare(open_fold(cohort.with_(panels=panels)), School(fold), [])
    assert found.targets[absent].isnan().all()
    found.build(6)
    pooled = torch.ones(1, 6, requires_grad=True)
    loss = found.loss({"aux": {"pooled": pooled}}, absent)
    loss.backward()
    assert loss.item() == 0 and not pooled.grad.any()


# -- losses -----------------------------------------------------------------------------------------------------


def given(loss, targets, **settings):
    found = distiller(loss, **settings)
    found.targets = {i: torch.tensor(t) for i, t in targets.items()}
    return found


def test_kd_logit_is_the_formula():
    student, teacher, t = [0.5, -1.0, 0.2], [1.0, 0.3, -2.0], 3.0
    found = given("kd_logit", {"a": teacher}, temperature=t, weight=0.7)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    terms = [
        -sigmoid(b / t) * math.log(sigmoid(a / t)) - sigmoid(-b / t) * math.log(sigmoid(-a / t))
        for a, b in zip(student, teacher, strict=True)
    ]
    got = found.loss({"logits": torch.tensor([student])}, "a")
    assert got.shape == () and got.item() == pytest.approx(0.7 * t * t * sum(terms) / 3, rel=1e-6)
    # Weighted by S and with T = 1: the cross-entropy of the two distributions of the time bin, over K.
    found = given("kd_logit", {"a": teacher}, temperature=1.0, bin_weights="survival")
    cross, s, u = 0.0, 1.0, 1.0
    for a, b in zip(student, teacher, strict=True):
        cross -= s * sigmoid(b) * math.log(u * sigmoid(a))
        s, u = s * sigmoid(-b), u * sigmoid(-a)
    cross -= s * math.log(u)
    assert found.loss({"logits": torch.tensor([student])}, "a").item() == pytest.approx(cross / 3, rel=1e-5)


def test_kd_logit_is_least_at_the_teacher():
    found = given("kd_logit", {"a": [1.0, 0.3, -2.0]})
    logits = torch.tensor([[1.0, 0.3, -2.0]], requires_grad=True)
    found.loss({"logits": logits}, "a").backward()
    assert logits.grad.abs().max() < 1e-6


def test_window_loss_is_the_formula_and_needs_pairs():
    tau = {"a": [0.2], "b": [-1.0], "c": [0.7], "d": [0.1]}
    found = given("kd_risk_rank", tau, weight=2.0)
    ids, time, event = ["a", "b", "c", "d", "b"], np.array([3.0, 1.0, 3.0, 0.5, 1.0]), np.array([1, 1, 0, 0, 1])
    risks = torch.tensor([0.4, 0.1, -0.3, 2.0, 0.9], requires_grad=True)
    terms = []
    for i in range(5):
        for j in range(5):
            if event[i] and time[i] < time[j]:
                terms.append(((risks[i] - risks[j]).item() - (tau[ids[i]][0] - tau[ids[j]][0])) ** 2)
    got = found.window_loss(risks, ids, time, event)
    assert len(terms) == 4 and got.item() == pytest.approx(2 * np.mean(terms), rel=1e-6)
    got.backward()
    assert risks.grad[3] == 0 and risks.grad[:3].all()  # patient d is in no pair
    assert abs(risks.grad.sum()) < 1e-6
    none = found.window_loss(risks, ids, time, np.zeros(5))
    assert none.item() == 0 and none.requires_grad
    assert found.pairwise and found.loss({"logits": torch.zeros(1, K)}, "a").item() == 0


def test_log_risk_of_both_heads():
    logits = torch.tensor([[0.5, -1.0, 0.2]])
    assert log_risk({"logits": logits}).item() == pytest.approx(
        math.log(-hazard.log_survival(logits)[0, -1].item()), rel=1e-6
    )
    assert log_risk({"log_risk": torch.tensor([[0.3]])}).item() == pytest.approx(0.3)
    tiny = torch.full((1, K), -300.0, requires_grad=True)
    log_risk({"logits": tiny}).backward()
    assert tiny.grad.isfinite().all() and tiny.grad.sum().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_kd_feature_is_the_formula(kind):
    target = [0.3, -1.0, 0.8, 0.1]
    found = given("kd_feature", {"a": target}, feature_loss=kind, weight=0.5)
    heads = found.build(6)
    pooled = torch.linspace(-1, 1, 6)[None]
    (layer,) = heads
    read = (layer.weight @ pooled[0] + layer.bias).detach().numpy()
    cosine = read @ target / np.linalg.norm(read) / np.linalg.norm(target)
    want = 1 - cosine if kind == "cosine" else np.mean((read - target) ** 2)
    assert found.loss({"aux": {"pooled": pooled}}, "a").item() == pytest.approx(0.5 * want, rel=1e-5)


@pytest.mark.parametrize("loss", ["kd_feature", "gene_aux"])
def test_heads_learn_and_the_gradient_reaches_the_student(fold, loss):
    found = prepared(loss, fold)[0]
    before = torch.random.get_rng_state()
    heads = found.build(6)
    assert torch.equal(before, torch.random.get_rng_state())
    assert same(heads, prepared(loss, fold)[0].build(6))
    assert not same(heads, found.build(6, torch.Generator().manual_seed(3)))
    heads = found.build(6)
    ids = fold.ids("train")
    pooled = nn.Parameter(torch.randn(len(ids), 6, generator=torch.Generator().manual_seed(0)))
    adam = torch.optim.Adam([pooled, *heads.parameters()], lr=0.05)
    values = []
    for _ in range(60):
        adam.zero_grad()
        total = sum(found.loss({"aux": {"pooled": pooled[i : i + 1]}}, ids[i]) for i in range(len(ids))) / len(ids)
        total.backward()
        if not values:
            assert all(p.grad is not None and p.grad.any() for p in [pooled, *heads.parameters()])
        adam.step()
        values.append(total.item())
    assert values[-1] < 0.3 * values[0]


def test_a_resumed_run_has_heads_and_targets(fold):
    first, later = prepared("gene_aux", fold)[0], prepared("gene_aux", fold, seed=8)[0]
    assert first.head_parameters() == []
    assert not same(first.build(6), later.build(6)) and len(first.head_parameters()) == 4
    later.load_state_dict(first.state_dict())
    assert same(first.heads, later.heads) and later.targets.keys() == first.targets.keys()
    output, patient = {"aux": {"pooled": torch.ones(1, 6)}}, fold.ids("train")[0]
    assert torch.equal(first.loss(output, patient), later.loss(output, patient))


# -- in training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_weight_0_is_plain_training(fold, loss):
    found, school, notes = prepared(loss, fold, weight=0.0)
    assert not school.teachers and not notes and not found.pairwise and not found.reads_pooled
    student, heads = teach(fold, found)
    assert not list(heads.parameters())
    plain, _ = teach(fold, None)
    assert same(student, plain)
    if loss != "kd_risk_rank":  # with a weight it does something, by its seed and nothing else
        first, _ = teach(fold, prepared(loss, fold)[0])
        assert not same(first, plain)
        assert same(first, teach(fold, prepared(loss, fold)[0])[0])


@pytest.mark.parametrize("loss", LOSSES[:3])
def test_teachers_get_no_gradient(fold, loss):
    found, school, _ = prepared(loss, fold)
    assert not any(target.requires_grad for target in found.targets.values())
    student, ids = Student(8), fold.ids("train")
    heads = found.build(6)
    outputs = [student(Batch(path=torch.from_numpy(fold.bag(i)[0]))) for i in ids]
    train = fold.outcomes("train")
    if found.pairwise:
        total = found.window_loss(torch.stack([log_risk(o) for o in outputs]), ids, train.time, train.event)
    else:
        total = sum(found.loss(o, i) for o, i in zip(outputs, ids, strict=True))
    total.backward()
    assert student.project.weight.grad.any() and all(p.grad is not None for p in heads.parameters())
    for teacher in school.teachers:
        assert all(p.grad is None for p in teacher.module.parameters())
        assert all(torch.equal(v, teacher.after[k]) for k, v in teacher.module.state_dict().items())


def test_a_student_predicts_without_genes(fold):
    """What the genes taught lies in the student's weights: patients without any molecular table are predicted."""
    student, _ = teach(fold, prepared("gene_aux", fold)[0])
    plain, _ = teach(fold, None)
    bare = FoldData(fold.table.reset_index(drop=True)[["patient_id", "slide_ids"]], index=fold._index)
    assert not bare.groups and not bare.gene_panels
    for patient in bare.ids():
        alone = student(Batch(path=torch.from_numpy(bare.bag(patient)[0])))["logits"]
        genes = tuple(torch.ones(3) for _ in range(3))
        given = Batch(path=torch.from_numpy(fold.bag(patient)[0]), groups=genes, omic_all=torch.ones(9))
        assert torch.equal(alone, student(given)["logits"])
        assert not torch.equal(alone, plain(given)["logits"])


@pytest.mark.parametrize("loss", ["kd_logit", "kd_risk_rank"])
def test_the_trainer_distils(fold, permuted, tiny_models, settings_of, loss):
    """ABMIL, taught by MCAT: plain with weight 0, without test outcomes, the same without genes."""
    defaults = {name: part.get("default") for name, part in schema()["$defs"]["training"]["properties"].items()}
    training = {**defaults, **settings_of("abmil")["model"]["training"], "search": {}, "epochs": 1}
    abmil, mcat = tiny_models["abmil"], tiny_models["mcat"]

    def predictions(fold, **distil):
        distil = {**SETTINGS, "loss": loss, "settings": mcat, "folds": 2, **distil} if distil else None
        model = NeuralModel("abmil", abmil, {**training, "distil": distil}, seed=4)
        model.fit(fold, [])
        risk = model.predict(fold, fold.ids(), np.array([2.0]))[0]
        bare = FoldData(fold.table.reset_index(drop=True)[["patient_id", "slide_ids"]], index=fold._index)
        np.testing.assert_array_equal(model.predict(bare, bare.ids(), np.array([2.0]))[0], risk)
        return risk

    plain, taught = predictions(fold), predictions(fold, weight=1.0)
    np.testing.assert_array_equal(predictions(fold, weight=0.0), plain)
    assert not np.array_equal(taught, plain)
    np.testing.assert_array_equal(predictions(permuted("test"), weight=1.0), taught)


# -- faults a user can make -------------------------------------------------------------------------------------


def test_faults_are_named(fold):
    with pytest.raises(MorphomeError, match="needs a teacher"):
        distiller("kd_logit", teacher=None)
    with pytest.raises(MorphomeError, match=r"distil\.loss is 'kd'"):
        distiller("kd")
    assert distiller("gene_aux", teacher=None).kind == "gene_aux"
    school = School(fold)
    with pytest.raises(MorphomeError, match="time bins of the teacher"):
        distiller("kd_logit").prepare(fold, school, [], school.edges + 1.0)
    with pytest.raises(MorphomeError, match="teacher has no time bins"):
        distiller("kd_logit").prepare(fold, School(fold, 1), [])
    found = prepared("kd_logit", fold)[0]
    with pytest.raises(MorphomeError, match="student has no time bins"):
        found.loss({"log_risk": torch.zeros(1, 1)}, fold.ids("train")[0])
    with pytest.raises(MorphomeError, match="4 time bins, the teacher 3"):
        found.loss({"logits": torch.zeros(1, 4)}, fold.ids("train")[0])
    for patient in (fold.ids("test")[0], fold.ids("inner_val")[0]):
        with pytest.raises(MorphomeError, match="only training patients"):
            found.loss({"logits": torch.zeros(1, K)}, patient)
    found = prepared("gene_aux", fold)[0]
    with pytest.raises(MorphomeError, match="pooled bag, which this model does not give"):
        found.loss({"logits": torch.zeros(1, K), "aux": {}}, fold.ids("train")[0])
    with pytest.raises(MorphomeError, match="pooled bag, which this model does not give"):
        found.build(0)
    few = fold.with_roles({i: "train" if i in fold.ids("train")[:3] else "test" for i in fold.ids("train")})
    with pytest.raises(MorphomeError, match="too few for teachers"):
        distiller("kd_logit").prepare(few, school, [])
    few.groups = {}
    with pytest.raises(MorphomeError, match="needs gene groups"):
        distiller("gene_aux").prepare(few, school, [])


def test_with_roles_shares_bags_and_hides_outcomes(cohort, open_fold):
    fold = open_fold(cohort)
    train = fold.ids("train")
    sub = fold.with_roles({i: "test" if k % 2 else "train" for k, i in enumerate(train)})
    assert sub.ids() == train and sub.ids("test") == train[1::2]
    assert sub.table.loc[list(sub.ids("test")), ["time_months", "event"]].isna().all(axis=None)
    assert sub.outcomes("train").ids == train[::2]
    assert fold.outcomes("train").ids == train  # the fold itself is as before
    left = int(fold._cache_left)
    features, _ = sub.bag(train[0])
    assert int(fold._cache_left) < left and int(fold._cache_left) == int(sub._cache_left)
    assert train[0] in fold._cache and np.array_equal(features, fold.bag(train[0])[0])
    assert np.array_equal(sub.gene_matrix(GENES, train), fold.gene_matrix(GENES, train), equal_nan=True)
    for roles in ({fold.ids("test")[0]: "train"}, {"nobody": "train"}, {train[0]: "other"}):
        with pytest.raises(MorphomeError, match="new roles"):
            fold.with_roles(roles)
