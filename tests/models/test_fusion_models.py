"""One interface of slides and genes: encode, fuse, branches; and patients without genes."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.cmta import CMTA
from morphome.models.fusion import FusionModel
from morphome.models.hazard import nll_loss
from morphome.models.mcat import MCAT
from morphome.models.mome import MoME
from morphome.models.mome_ablations import MoMENoMoE
from morphome.models.motcat import MOTCat
from morphome.models.porpoise import PORPOISE
from morphome.models.survpath import SurvPath

GROUPS = {"a": 5, "b": 3, "c": 9}
N_OMIC = 11
TOKENS = {"dim": 16, "heads": 2, "landmarks": 16}
COATTENTION = {"dim": 16, "heads": 2, "feedforward": 24, "attention_dim": 8}
#: Class, constructor, and the shape of what stands in for the genes.
MODELS = {
    "porpoise": (
        lambda **s: PORPOISE(12, N_OMIC, 4, dim=16, attention_dim=8, fusion_dim=32, scale=2, **s),
        "genes.missing",
        (32,),
    ),
    "mcat": (lambda **s: MCAT(12, GROUPS, 4, **COATTENTION, **s), "groups.missing", (3, 16)),
    "motcat": (lambda **s: MOTCat(12, GROUPS, 4, **COATTENTION, **s), "groups.missing", (3, 16)),
    "cmta": (lambda **s: CMTA(12, GROUPS, 4, gene_dim=24, **TOKENS, **s), "missing", (3, 16)),
    "survpath": (
        lambda **s: SurvPath(12, GROUPS, 4, dim=16, attention_dim=8, head_dim=8, **s),
        "pathways.missing",
        (3, 16),
    ),
    "mome": (lambda **s: MoME(12, GROUPS, 4, router="soft", **TOKENS, **s), "groups.missing", (3, 16)),
    "mome_no_moe": (lambda **s: MoMENoMoE(12, GROUPS, 4, **TOKENS, **s), "groups.missing", (3, 16)),
}
#: (branch, z) where nothing of the branch reaches the z of the other modality. In MCAT and CMTA the genes query the
#: patches, attention mixes both in SurvPath and MoME; the plan of MOTCat carries no gradient.
APART = {
    "porpoise": {("path", "omic"), ("omic", "path")},
    "mome_no_moe": {("path", "omic"), ("omic", "path")},
    "mcat": {("path", "omic")},
    "motcat": {("path", "omic"), ("omic", "path")},
    "cmta": set(),
    "survpath": set(),
    "mome": set(),
}
every = pytest.mark.parametrize("key", list(MODELS))


def make(key: str, seed: int = 0, **settings) -> FusionModel:
    torch.manual_seed(seed)
    return MODELS[key][0](**settings)


def patient(n: int = 20, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, 12, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        omic_all=torch.randn(N_OMIC, generator=generator),
        patient_id=f"P{seed}",
    )


def without_genes(batch: Batch) -> Batch:
    return replace(batch, groups=None, omic_all=None)


def loss_of(model: FusionModel, batch: Batch, bin_: int = 1) -> torch.Tensor:
    out = model(batch)
    return nll_loss(out["logits"], torch.tensor([bin_]), torch.tensor([1])) + sum(out["extra_losses"].values())


@every
def test_forward_is_fuse_of_encode_and_fuse_sees_both_branches(key):
    model = make(key).eval()
    assert isinstance(model, FusionModel)
    with torch.no_grad():
        z, other = model.encode(patient()).z, model.encode(patient(seed=1)).z
        logits = model(patient())["logits"]
        assert torch.equal(logits, model.fuse(z))
        assert set(z) == {"path", "omic"} and {u: rows.shape[1] for u, rows in z.items()} == model.branch_widths
        for branch in z:
            assert not torch.equal(logits, model.fuse(z | {branch: other[branch]})), branch


@every
def test_the_fusion_has_no_parameter_of_a_branch(key):
    model = make(key)
    branches = model.branch_parameters()
    ids = {branch: {id(p) for p in parameters} for branch, parameters in branches.items()}
    assert set(ids) == {"path", "omic"} and not ids["path"] & ids["omic"]
    assert all(len(ids[branch]) == len(branches[branch]) > 0 for branch in ids)
    assert all(p.requires_grad for parameters in branches.values() for p in parameters)
    z = {branch: rows.detach() for branch, rows in model.encode(patient()).z.items()}
    model.fuse(z).sum().backward()
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    assert reached and not reached & (ids["path"] | ids["omic"])


@every
def test_every_parameter_of_a_branch_reaches_its_own_z(key):
    """And the z of the other modality wherever the model mixes them before the fusion."""
    model = make(key)
    branches = model.branch_parameters()
    reached = {(own, to): torch.zeros(len(branches[own])) for own in branches for to in branches}
    for seed in range(4):
        z = model.encode(patient(seed=seed)).z
        for (own, to), hits in reached.items():
            # squares: the sum of a normed row is constant
            gradients = torch.autograd.grad(
                z[to].square().sum() + z[to][:, 0].sum(), branches[own], retain_graph=True, allow_unused=True
            )
            hits += torch.tensor([g is not None and bool((g != 0).any()) for g in gradients])
    for (own, to), hits in reached.items():
        if own == to:
            assert bool((hits > 0).all()), own
        else:
            assert bool((hits == 0).all()) == ((own, to) in APART[key]), (own, to)


@every
def test_tokens_for_missing_genes_change_nothing_else(key):
    """The last weights to be drawn: the model of the same seed without them predicts the same."""
    plain, model = make(key), make(key, missing_tokens=True)
    _, name, shape = MODELS[key]
    assert set(model.state_dict()) - set(plain.state_dict()) == {name}
    assert all(torch.equal(p, model.state_dict()[other]) for other, p in plain.state_dict().items())
    tokens = dict(model.named_parameters())[name]
    assert tokens.shape == shape and bool((tokens != 0).all())
    assert id(tokens) in {id(p) for p in model.branch_parameters()["omic"]}
    assert "missing_omic" in model.supports
    outputs = []
    for one in (plain, model):
        torch.manual_seed(5)
        outputs.append(one.train()(patient()))
    assert torch.equal(outputs[0]["logits"], outputs[1]["logits"])
    assert {k: v.item() for k, v in outputs[0]["extra_losses"].items()} == {
        k: v.item() for k, v in outputs[1]["extra_losses"].items()
    }


@every
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_a_patient_without_genes(key, n):
    model = make(key, missing_tokens=True)
    tokens = dict(model.named_parameters())[MODELS[key][1]]
    batch = without_genes(patient(n))
    loss_of(model, batch).backward()
    assert bool((tokens.grad != 0).any())
    encoder = {"porpoise": "genes.layers", "survpath": "pathways.first"}.get(key, "groups.")
    # the penalty of PORPOISE is on its gene network, not on the patient
    for name, p in model.named_parameters():
        if name.startswith(encoder) and "missing" not in name and key != "porpoise":
            assert p.grad is None or not p.grad.any(), name
    model.eval()
    with torch.no_grad():
        out = model(batch)
        assert out["logits"].shape == (1, 4) and bool(torch.isfinite(out["logits"]).all())
        assert torch.equal(out["logits"], model(batch)["logits"])
        assert not torch.equal(out["logits"], model(patient(n))["logits"])
        tokens += 1
        assert not torch.equal(out["logits"], model(batch)["logits"])


@every
def test_learned_tokens_survive_saving(key):
    model, other = make(key, missing_tokens=True).eval(), make(key, seed=9, missing_tokens=True).eval()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        for batch in (patient(), without_genes(patient())):
            assert torch.equal(model(batch)["logits"], other(batch)["logits"])


@every
def test_every_parameter_learns_from_patients_with_and_without_genes(key):
    model = make(key, missing_tokens=True)
    for seed in range(10):
        batch = patient(seed=seed)
        loss_of(model, without_genes(batch) if seed % 3 == 0 else batch, seed % 4).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and bool((p.grad != 0).any())), name


@every
def test_without_tokens_a_patient_without_genes_is_refused(key):
    with pytest.raises(MorphomeError, match=r"P7: no (gene groups|molecular values)"):
        make(key)(replace(without_genes(patient()), patient_id="P7"))
    # groups that are there must still be the right ones
    wrong = replace(patient(), groups=patient().groups[:2], omic_all=patient().omic_all[:3])
    with pytest.raises(MorphomeError, match=r"2 gene groups|molecular columns"):
        make(key, missing_tokens=True)(wrong)
