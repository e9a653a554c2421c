"""PIBD: size, blocks against plain formulas, labels, private noise, sub-bags, CLUB among patients, planted signal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.hazard import nll_loss, risk
from morphome.models.pibd import PIBD
from morphome.models.pibd_blocks import (
    CLUB,
    DisentanglingLayer,
    PrototypeBottleneck,
    kl_standard_normal,
    product_of_experts,
    proxy_loss,
)

GROUPS = {"a": 5, "b": 3, "c": 9, "d": 2, "e": 4}
SMALL = {"dim": 16, "hidden": 12, "head_dim": 8, "sub_bag": 8, "sub_bags": 4, "club_batch": 4}
LOSSES = {"proxy", "prototype_nll", "prototype_kl", "club"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, missing_tokens: bool = False, **settings) -> PIBD:
    torch.manual_seed(seed)
    return PIBD(12, GROUPS, 4, missing_tokens, **(SMALL | settings))


def patient(n: int = 20, seed: int = 0, **parts) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, 12, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        patient_id=f"P{seed}",
        **parts,
    )


def logits(model: PIBD, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)["logits"]


def bottleneck(**settings) -> PrototypeBottleneck:
    given = {"keep": 0.5, "samples": 5, "noise_seed": 1, "dropout": 0.2} | settings
    return PrototypeBottleneck(6, 8, 4, 2, **given)


def test_parameter_count_of_the_published_size():
    """Outside the pathway networks nothing depends on their number."""
    for count in (331, 50):
        with torch.device("meta"):
            model = PIBD(768, {f"p{i}": 29 for i in range(count)}, 4)
        outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.pathways.parameters())
        assert outside == 2_574_094


@pytest.mark.parametrize(("n", "keep", "k"), [(512, 0.5, 256), (331, 0.8, 264), (5, 0.8, 4), (1, 0.5, 1)])
def test_the_published_shares_are_kept(n, keep, k):
    kept = bottleneck(keep=keep)(torch.randn(n, 6), torch.arange(n)[None], None)
    assert kept.rows.shape == (1, k) and kept.tokens.shape == (1, k, 4)


def test_kl_is_the_formula_and_zero_at_the_prior():
    assert kl_standard_normal(torch.zeros(3, 5), torch.ones(3, 5)).tolist() == [0, 0, 0]
    mean, sigma = torch.randn(3, 5), torch.rand(3, 5) + 0.2
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, sigma), normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl_standard_normal(mean, sigma), expected)


def test_product_of_experts_is_the_formula():
    means, sigmas, alpha = torch.randn(2, 3, 4), torch.rand(2, 3, 4) + 0.2, torch.tensor([0.3, 0.7])
    for variance, power in (("sigma2", 2), ("sigma_legacy", 1)):
        mean, scale = product_of_experts(means, sigmas, alpha, variance)
        for at in [(0, 0), (2, 3)]:
            t = [alpha[u].item() / sigmas[u][at].item() ** power for u in range(2)]
            v = 1 / sum(t)
            assert mean[at].item() == pytest.approx(v * sum(w * means[u][at].item() for u, w in enumerate(t)), rel=1e-5)
            assert scale[at].item() == pytest.approx(math.sqrt(v) if power == 2 else v, rel=1e-5)
    # Two equal experts with half a vote each are one expert.
    one, scale = product_of_experts(means[:1].expand(2, -1, -1), sigmas[:1].expand(2, -1, -1), alpha, "sigma2")
    torch.testing.assert_close(one, means[0])
    torch.testing.assert_close(scale, sigmas[0])


def test_bottleneck_is_the_formula():
    """Similarities pair by pair; the k best pairs, votes of the prototypes, means of the k best by prototype."""
    block = bottleneck().eval()
    x, bags = torch.randn(9, 6), torch.tensor([[0, 2, 4, 6], [1, 3, 5, 8]])
    with torch.no_grad():
        kept = block(x, bags, None)
        z = block.encoder(x)
        prototypes = block.mean + torch.log1p(block.spread.exp()) * block.noise / math.sqrt(5)
        torch.testing.assert_close(kept.prototypes, prototypes)
        for s, bag in enumerate(bags.tolist()):
            cos = {
                (n, j): (z[n] @ prototypes[j] / z[n].norm() / prototypes[j].norm()).item()
                for n in bag
                for j in range(4)
            }
            best = sorted(cos, key=cos.get, reverse=True)[:2]
            assert kept.rows[s].tolist() == [n for n, _ in best]
            torch.testing.assert_close(kept.tokens[s], torch.stack([z[n] for n, _ in best]))
            votes = [sum(j == i for _, j in best) for i in range(4)]
            assert kept.chosen[s].item() == votes.index(max(votes))
            for j in range(4):
                top = sorted((cos[n, j] for n in bag), reverse=True)[:2]
                assert kept.similarity[s, j].item() == pytest.approx(sum(top) / 2, abs=1e-5)
        assert block(x, bags, 3).chosen.tolist() == [3, 3]


def test_proxy_loss_is_the_formula():
    similarity = torch.rand(2, 4)
    rows = [-(row[1] - (row[0] + row[2] + row[3]) / 3) for row in similarity.tolist()]
    assert proxy_loss(similarity, 1).item() == pytest.approx(sum(rows) / 2, abs=1e-6)


def test_layer_keeps_modalities_apart_and_the_global_token_reads_all():
    """Against torch's own layer with the same weights, set by set; P serves both sub-bags."""
    layer = DisentanglingLayer(8, 2, 1.0, 0.1).eval()
    torch_layer = torch.nn.TransformerEncoderLayer(8, 2, 8, 0.1, "gelu", norm_first=True, batch_first=True).eval()
    attention = torch_layer.self_attn
    pairs = (
        (attention.in_proj_weight, layer.qkv.weight),
        (attention.in_proj_bias, layer.qkv.bias),
        (attention.out_proj.weight, layer.out.weight),
        (attention.out_proj.bias, layer.out.bias),
        (torch_layer.linear1.weight, layer.first.weight),
        (torch_layer.linear1.bias, layer.first.bias),
        (torch_layer.linear2.weight, layer.second.weight),
        (torch_layer.linear2.bias, layer.second.bias),
    )
    h, p, g = torch.randn(2, 5, 8), torch.randn(1, 3, 8), torch.randn(2, 1, 8)
    with torch.no_grad():
        for theirs, ours in pairs:
            ours.normal_(std=0.5)
            theirs.copy_(ours)
        new_h, new_p, new_g = layer(h, p, g)
        torch.testing.assert_close(new_h, torch_layer(h))
        torch.testing.assert_close(new_p, torch_layer(p))
        # Row 0 of a full layer over {global, H, P} is the global token.
        full = torch_layer(torch.cat([g, h, p.expand(2, -1, -1)], 1))
        torch.testing.assert_close(new_g, full[:, :1])


def test_club_is_the_formula():
    club = CLUB(3, 2, 4)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    with torch.no_grad():
        bound, fit = club(x, y)
        mu = club.net(x)
    d = [[sum((a - b) ** 2 for a, b in zip(m, t, strict=True)) for t in y.tolist()] for m in mu.tolist()]
    assert bound.item() == pytest.approx(sum(-d[i][i] / 2 + sum(d[i]) / 10 for i in range(5)) / 5, abs=1e-5)
    assert fit.item() == pytest.approx(sum(d[i][i] for i in range(5)) / 5, abs=1e-5)
    assert club(x[:1], y[:1])[0].item() == 0


def test_club_is_about_zero_for_independent_inputs_and_large_for_dependent_ones():
    club = CLUB(4, 4, 32)
    x = torch.randn(3000, 4)
    optimiser = torch.optim.Adam(club.parameters(), lr=0.03)
    for _ in range(80):
        optimiser.zero_grad()
        club(x[:1000], x[:1000])[1].backward()
        optimiser.step()
    with torch.no_grad():
        dependent, independent = club(x[1000:], x[1000:])[0].item(), club(x[1000:], torch.randn(2000, 4))[0].item()
    assert abs(independent) < 0.3 and dependent > 3


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 31, 32, 33, 50])
def test_sub_bags_cover_evenly(n):
    """Equal length, at most 4 x 8, each patch of a short bag present; the same in evaluation, drawn in training."""
    model = make().eval()
    bags = model.bags(n, torch.device("cpu"))
    assert bags.shape[0] == min(-(-n // 8), 4) and bags.shape[1] <= 8
    assert torch.equal(bags, model.bags(n, torch.device("cpu")))
    assert all(len(set(bag)) == len(bag) for bag in bags.tolist())
    found = bags.unique()
    assert len(found) == min(n, 32)
    if n > 32:
        assert found.diff().max() <= 2 and found[0] == 0 and found[-1] >= n - 2
    model.train()
    assert model.bags(n, torch.device("cpu")).shape == bags.shape
    if n == 50:
        assert not torch.equal(model.bags(n, torch.device("cpu")), model.bags(n, torch.device("cpu")))


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_any_bag(n):
    model = make().eval()
    with torch.no_grad():
        out = model(patient(n))
    assert out["logits"].shape == (1, 4) and -4 <= risk(out["logits"]).item() <= 0
    assert out["attn"]["path_kept"].shape == (n,) and out["attn"]["omic_kept"].shape == (5,)
    for share in out["attn"].values():
        assert share.sum().item() == pytest.approx(1, abs=1e-5)


def test_order_of_patches_matters_beyond_one_sub_bag_only():
    model = make().eval()
    assert model.order_sensitive
    for n in (8, 60):
        bag = patient(n)
        difference = logits(model, bag) - logits(model, replace(bag, path=bag.path[torch.randperm(n)]))
        assert (difference.abs().max().item() > 1e-6) == (n > 8)


def test_evaluation_is_repeatable_saved_whole_and_blind_to_labels():
    model, other = make(), make(seed=9)
    for seed in range(3):
        model(patient(seed=seed, bin=1, event=1))
    other.load_state_dict(model.state_dict())
    model.eval()
    other.eval()
    before, seen = torch.get_rng_state(), model.seen.item()
    first = logits(model, patient(50))
    assert seen == 3 == other.seen.item() and torch.equal(model.earlier, other.earlier)
    assert torch.equal(first, logits(model, patient(50))) and torch.equal(first, logits(other, patient(50)))
    for bin_ in range(4):
        for event in (0, 1):
            out = model(patient(50, bin=bin_, event=event))
            assert torch.equal(first, out["logits"]) and out["extra_losses"] == {}
    assert torch.equal(before, torch.get_rng_state()) and model.seen.item() == seen


def test_evaluation_does_not_read_the_label_networks():
    """What serves the losses alone leaves no trace in a prediction; what stands for the noise does."""
    model = make().eval()
    first = logits(model, patient())
    for part in (model.path.decoder, model.omic.decoder, model.club_pair, model.club_global):
        for p in part.parameters():
            p.data.add_(1)
    model.earlier += 1
    assert torch.equal(first, logits(model, patient()))
    model.noise *= 2
    assert not torch.equal(first, logits(model, patient()))


def test_labels_choose_the_own_prototype_in_training_only():
    model = make()
    aux = model(patient(bin=1, event=0))["aux"]["prototype"]
    assert aux["path"].tolist() == [5] * 3 and aux["omic"].tolist() == [5]
    assert set(model(patient(bin=1, event=0))["extra_losses"]) == LOSSES
    assert model(patient(bin=3, event=1))["aux"]["prototype"]["omic"].tolist() == [3]
    assert model(patient())["extra_losses"] == {}
    voted, blind = make(training_prototype="voted", bottleneck_dropout=0.0), make(bottleneck_dropout=0.0)
    states = []
    for one, batch in ((voted, patient(bin=1, event=0)), (blind, patient())):
        torch.manual_seed(3)
        states.append(one(batch))
    assert torch.equal(states[0]["aux"]["prototype"]["path"], states[1]["aux"]["prototype"]["path"])
    torch.testing.assert_close(states[0]["logits"], states[1]["logits"])


def test_losses_are_the_formula():
    """Without random parts; one patient, then another who is compared with it."""
    settings = {"dropout": 0.0, "bottleneck_dropout": 0.0, "attention_dropout": 0.0, "sub_bags": 1}
    model = make(**settings, prototype_beta=0.3)
    batches = [patient(6, seed, bin=2, event=0) for seed in (0, 1)]
    rows = []
    for count, batch in enumerate(batches, 1):
        torch.manual_seed(5)
        out = model(batch)
        torch.manual_seed(5)
        with torch.no_grad():
            bags = model.bags(6, torch.device("cpu"))
            path = model.path(batch.path, bags, 6)
            omic = model.omic(model.pathways(batch.groups), torch.arange(5)[None], 6)
            z = {"path": path.tokens[0], "omic": omic.tokens[0], "global": model.global_token(path, omic)}
            torch.testing.assert_close(out["logits"], model.fuse(z))
            rows.append(model.means(z)[0])
            h, p, g = torch.stack(rows).split(16, 1)
            club = sum(model.club_pair(h, p)) + sum(model.club_global(torch.cat([h, p], 1), g))
            where, censored = torch.tensor([2]), torch.tensor([0])
            nll = sum(
                nll_loss(part.decoder(kept.prototypes[6])[None], where, censored, 0.3)
                for part, kept in ((model.path, path), (model.omic, omic))
            )
            kl = sum(kl_standard_normal(part.mean, part.sigma).mean() for part in (model.path, model.omic))
        expected = {
            "proxy": proxy_loss(path.similarity, 6) + proxy_loss(omic.similarity, 6),
            "prototype_nll": 0.1 * nll,
            "prototype_kl": 0.01 * kl,
            "club": 0.1 * club,
        }
        assert len(rows) == count and set(out["extra_losses"]) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(out["extra_losses"][name], value, atol=1e-4, rtol=1e-4)


def test_the_patient_of_the_moment_has_the_gradient_of_a_whole_batch():
    """The sum of what each patient gets in its turn is n times the gradient of the mean over the batch."""
    model = make(club_batch=4)
    rows = torch.randn(4, 48)
    whole = rows.clone().requires_grad_()
    h, p, g = whole.split(16, 1)
    value = sum(model.club_pair(h, p)) + sum(model.club_global(torch.cat([h, p], 1), g))
    (gradient,) = torch.autograd.grad(value, whole)
    for i in range(4):
        model.earlier[:] = torch.cat([rows[:i], rows[i + 1 :]])
        model.seen.fill_(3)
        live = rows[i].clone().requires_grad_()
        one = model._club(live)
        torch.testing.assert_close(one, value)
        torch.testing.assert_close(torch.autograd.grad(one, live)[0], 4 * gradient[i], atol=1e-4, rtol=1e-4)
        assert torch.equal(model.earlier[0], rows[i]) and model.seen.item() == 4


def test_earlier_patients_are_forgotten_in_their_order():
    model = make(club_batch=3)
    for value in range(5):
        model._club(torch.full((48,), float(value)))
    assert model.earlier[:, 0].tolist() == [4, 3]
    with torch.no_grad():
        model._club(torch.zeros(48))
    assert model.seen.item() == 5
    assert make(club_batch=1)(patient(bin=0, event=1))["extra_losses"]["club"].item() > 0


def test_a_weight_of_zero_leaves_its_loss_out():
    model = make(proxy_weight=0, nll_weight=0, kl_weight=0, club_weight=0)
    assert model(patient(bin=0, event=1))["extra_losses"] == {} and model.seen.item() == 0


def test_training_follows_the_seed_and_evaluation_does_not():
    model = make()
    batch = patient(60)
    torch.manual_seed(1)
    first = logits(model, batch)
    torch.manual_seed(1)
    assert torch.equal(first, logits(model, batch))
    assert not torch.equal(first, logits(model, batch))


def test_the_fusion_sees_nothing_but_z():
    model, batch = make().eval(), patient(20)
    with torch.no_grad():
        encoded = model.encode(batch)
        shapes = {u: tuple(x.shape) for u, x in encoded.z.items()}
        # 20 patches: three sub-bags of 7, of which 3 are kept
        assert shapes == {"path": (9, 16), "omic": (4, 16), "global": (3, 16)}
        assert torch.equal(model.fuse(encoded.z), model(batch)["logits"])
        mean = {u: x.mean(0, keepdim=True) if u != "global" else x for u, x in encoded.z.items()}
        assert model.fuse(mean).shape == (1, 4)
    owned = [id(p) for parameters in model.branch_parameters().values() for p in parameters]
    assert len(owned) == len(set(owned)) and model.branch_widths == {"path": 16, "omic": 16}


def test_every_parameter_gets_a_gradient_within_a_few_patients():
    model = make(missing_tokens=True)
    for seed in range(16):
        bin_, event = seed % 4, seed // 4 % 2
        batch = patient(20, seed, bin=bin_, event=event)
        out = model(replace(batch, groups=None) if seed == 3 else batch)
        loss = nll_loss(out["logits"], torch.tensor([bin_]), torch.tensor([event]))
        (loss + sum(out["extra_losses"].values())).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


def test_tokens_for_missing_genes_are_asked_for():
    plain, model = make().eval(), make(missing_tokens=True).eval()
    assert torch.equal(logits(plain, patient()), logits(model, patient()))
    without = replace(patient(), groups=None)
    assert not torch.equal(logits(model, without), logits(model, patient()))
    with pytest.raises(MorphomeError, match="P0"):
        plain(without)


def test_what_does_not_fit_is_refused():
    for wrong in ({"poe_variance": "sigma"}, {"training_prototype": "best"}, {"keep_path": 0.0}, {"keep_omic": 1.5}):
        with pytest.raises(MorphomeError, match=next(iter(wrong))):
            make(**wrong)
    for wrong in ({"heads": 3}, {"samples": 0}, {"club_batch": 0}):
        with pytest.raises(MorphomeError, match="heads of width"):
            make(**wrong)
    with pytest.raises(MorphomeError, match="P0"):
        make()(replace(patient(), path=torch.randn(3, 13)))


def planted(seed: int, where: str) -> tuple[Batch, bool]:
    """A patient who dies early when one column is raised: of all patches, or of all pathways."""
    batch, early = patient(6, seed), seed % 2 == 0
    for column in [batch.path[:, 2]] if where == "slides" else [x[:1] for x in batch.groups]:
        column += 2.0 if early else -2.0
    return batch, early


@pytest.mark.parametrize("where", ["genes", "slides"])
def test_planted_signal_is_found(where):
    """With the labels off the global token, which would otherwise tell the head the answer in training."""
    model = make(dropout=0.0, bottleneck_dropout=0.0, attention_dropout=0.0, training_prototype="voted")
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        batch, early = planted(step, where)
        bin_ = 0 if early else 3
        out = model(replace(batch, bin=bin_, event=1))
        loss = nll_loss(out["logits"], torch.tensor([bin_]), torch.tensor([1])) + sum(out["extra_losses"].values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    tested = [planted(seed, where) for seed in range(500, 540)]
    early, late = ([risk(logits(model, b)).item() for b, yes in tested if yes == side] for side in (True, False))
    assert sum(a > b for a in early for b in late) / (len(early) * len(late)) > 0.8
