"""TransMIL and the pyramid transformer: size, position encoding, grids, order."""

from __future__ import annotations

import io

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.hazard import nll_loss
from morphome.models.pyramid import PPEG, PyramidTransformer, grid_neighbours
from morphome.models.transmil import TransMIL

ATTENTION = {"heads": 2, "landmarks": 8}


def make(seed: int = 0, **settings) -> TransMIL:
    torch.manual_seed(seed)
    return TransMIL(12, 4, **({"dim": 16, "heads": 2, "landmarks": 8} | settings))


def square(side: int, step: int = 512, slide: int = 0, origin: tuple[int, int] = (77, 1030)) -> torch.Tensor:
    """Patches of a full square, row by row."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    xy = torch.stack([x.flatten() * step + origin[0], y.flatten() * step + origin[1]], 1)
    return torch.cat([torch.full((side * side, 1), slide), xy], 1).int()


def patient(n: int = 20, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    side = int(n**0.5) + 1
    return Batch(path=torch.randn(n, 12, generator=generator), pos=square(side)[:n], patient_id=f"P{seed}")


def test_parameter_count():
    with torch.device("meta"):
        model = TransMIL(1024, 4)
    assert sum(p.numel() for p in model.parameters()) == 2_673_172
    assert sum(p.numel() for p in model.transformer.position.parameters()) == 512 * (49 + 25 + 9 + 3)


def test_class_token_of_the_transformer_over_projected_patches():
    model, bag = make().eval(), patient()
    with torch.no_grad():
        cls, _ = model.transformer(torch.relu(bag.path @ model.project.weight.T + model.project.bias))
        torch.testing.assert_close(model(bag)["logits"], model.classifier(cls), atol=1e-5, rtol=1e-5)
        assert model(bag)["attn"] == {} and model(bag)["extra_losses"] == {}
        torch.testing.assert_close(model(bag)["aux"]["pooled"], cls, atol=1e-5, rtol=1e-5)


def test_the_error_of_the_pseudo_inverse_is_noted_in_evaluation():
    model = make(attention="nystrom_masked")
    assert set(model(patient(40))["aux"]) == {"pooled"}
    model.eval()
    with torch.no_grad():
        aux = model(patient(40))["aux"]
        errors = [layer.attention.pinv_error for layer in (model.transformer.first, model.transformer.second)]
        assert aux["pinv_error"] == max(errors) and min(errors) > 0
        assert set(model(patient(4))["aux"]) == {"pooled"}


def slow_ppeg(ppeg: PPEG, x: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """x + three convolutions, patch by patch from the definition; cells (n, 3) = slide, column, row."""
    at = {tuple(cell): row for row, cell in enumerate(cells.tolist())}
    out = x.clone()
    for row, (slide, column, line) in enumerate(cells.tolist()):
        for conv in ppeg.convs:
            out[row] += conv.bias
            half = conv.weight.shape[-1] // 2
            for dy in range(-half, half + 1):
                for dx in range(-half, half + 1):
                    there = at.get((slide, column + dx, line + dy))
                    if there is not None:
                        out[row] += conv.weight[:, 0, dy + half, dx + half] * x[there]
    return out


def test_position_encoding_equals_its_definition_on_the_square():
    torch.manual_seed(0)
    ppeg, x = PPEG(6), torch.randn(25, 6)
    with torch.no_grad():
        torch.testing.assert_close(ppeg(x, 5), slow_ppeg(ppeg, x, square(5, step=1)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ppeg.scattered(x, grid_neighbours(square(5))), ppeg(x, 5), atol=1e-5, rtol=1e-5)


def test_position_encoding_on_slides_of_several_strides_with_holes():
    torch.manual_seed(0)
    ppeg = PPEG(4)
    cells = torch.cat([square(6, 1, 0, (0, 0)), square(4, 1, 1, (0, 0))])
    pos = torch.cat([square(6, 448, 3), square(4, 1024, 7, (5, 9))])
    kept = torch.randperm(len(pos))[:35].sort().values
    cells, pos = cells[kept], pos[kept]
    x = torch.randn(35, 4)
    with torch.no_grad():
        out = ppeg.scattered(x, grid_neighbours(pos))
        torch.testing.assert_close(out, slow_ppeg(ppeg, x, cells), atol=1e-5, rtol=1e-5)
        order = torch.randperm(35)
        mixed = ppeg.scattered(x[order], grid_neighbours(pos[order]))
        torch.testing.assert_close(mixed, out[order], atol=1e-5, rtol=1e-5)


def test_neighbours_of_patches_off_the_grid():
    """A patch a little beside its cell, two in one cell, a column, the same places twice, and a lonely patch."""
    pos = torch.tensor([[0, 0, 0], [0, 100, 0], [0, 200, 0], [0, 290, 0], [0, 300, 0]])
    near = grid_neighbours(pos).view(7, 7, 5)
    assert near[3, 3].tolist() == [0, 1, 2, 3, 4]
    assert near[3, 4].tolist() == [1, 2, 3, -1, -1] and near[3, 2].tolist() == [-1, 0, 1, 2, 2]
    assert bool((near[[0, 1, 2, 4, 5, 6]] == -1).all())
    column = torch.tensor([[0, 5, 0], [0, 5, 100], [0, 5, 200], [0, 5, 400]])
    assert grid_neighbours(column).view(7, 7, 4)[4, 3].tolist() == [1, 2, -1, -1]
    twice = torch.cat([square(2), square(2)])
    assert grid_neighbours(twice).view(7, 7, 8)[3, 4].tolist() == [1, -1, 3, -1, 1, -1, 3, -1]
    alone = grid_neighbours(torch.tensor([[4, 123, 456]]))
    assert alone[24].tolist() == [0] and int((alone >= 0).sum()) == 1


def test_gradient_of_the_scattered_convolution():
    """Gradients into patches, kernels and biases, against the definition."""
    torch.manual_seed(0)
    ppeg, kept = PPEG(3).double(), torch.randperm(16)[:11]
    x, weight = torch.randn(2, 11, 3, dtype=torch.double)
    x.requires_grad_()
    wanted = [x, *ppeg.parameters()]
    out = ppeg.scattered(x, grid_neighbours(square(4)[kept]))
    ours = torch.autograd.grad((out * weight).sum(), wanted)
    slow = slow_ppeg(ppeg, x, square(4, 1, 0, (0, 0))[kept])
    theirs = torch.autograd.grad((slow * weight).sum(), wanted)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17])
def test_pyramid_transformer_by_definition(n):
    torch.manual_seed(0)
    model = PyramidTransformer(16, ATTENTION).eval()
    x = torch.randn(n, 16)
    side = next(s for s in range(1, 9) if s * s >= n)
    with torch.no_grad():
        filled = torch.cat([x, x])[: side * side]
        h = model.first(torch.cat([model.cls, filled]))
        h = torch.cat([h[:1], slow_ppeg(model.position, h[1:], square(side, 1, 0, (0, 0)))])
        h = model.norm(model.second(h))
        cls, tokens = model(x)
        torch.testing.assert_close(cls, h[:1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens, h[1 : 1 + n], atol=1e-5, rtol=1e-5)
        only, none = model(x, cls_only=True)
        torch.testing.assert_close(only, cls, atol=1e-5, rtol=1e-5)
        assert none.shape == (0, 16)
        torch.testing.assert_close(model(x, keep_copies=True)[1], h[1:], atol=1e-5, rtol=1e-5)


def test_class_token_starts_near_zero():
    cls = PyramidTransformer(64, ATTENTION).cls.detach()
    assert 0 < cls.abs().max() < 1e-5


def test_true_neighbours_add_no_copies():
    """On a full square both grids agree; on a broken one the true grid sees n tokens, not s * s."""
    a, b = make().eval(), make(grid="true_xy").eval()
    full = Batch(path=patient(25).path, pos=square(5))
    with torch.no_grad():
        torch.testing.assert_close(a(full)["logits"], b(full)["logits"], atol=1e-5, rtol=1e-5)
    seen = []
    for model in (a, b):
        model.transformer.second.register_forward_hook(lambda _m, inputs, _out: seen.append(len(inputs[0])))
        with torch.no_grad():
            model(patient(20))
    assert seen == [26, 21]


@pytest.mark.parametrize(
    ("settings", "sensitive"),
    [
        ({}, True),
        ({"attention": "exact", "value_conv": False}, True),
        ({"grid": "true_xy"}, True),
        ({"grid": "true_xy", "attention": "exact"}, True),
        ({"grid": "true_xy", "attention": "exact", "value_conv": False}, False),
    ],
)
def test_patch_order(settings, sensitive):
    model, bag = make(**settings).eval(), patient(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = model(bag)["logits"] - model(Batch(bag.path[order], bag.pos[order]))["logits"]
    assert model.order_sensitive == sensitive == (difference.abs().max().item() > 2e-6)


@pytest.mark.parametrize("attention", ["nystrom_masked", "nystrom_compat", "exact"])
@pytest.mark.parametrize("grid", ["sorted", "true_xy"])
def test_any_bag_trains_every_parameter(attention, grid):
    model = make(attention=attention, grid=grid)
    for n in (1, 2, 3, 40):
        out = model(patient(n, seed=n))
        assert out["logits"].shape == (1, 4) and bool(torch.isfinite(out["logits"]).all())
        nll_loss(out["logits"], torch.tensor([n % 4]), torch.tensor([n % 2])).backward()
    for name, p in model.named_parameters():
        assert bool(torch.isfinite(p.grad).all()) and bool((p.grad != 0).any()), name


@pytest.mark.parametrize("grid", ["sorted", "true_xy"])
def test_evaluation_is_repeatable_saved_and_blind_to_labels_and_genes(grid):
    model, other, bag = make(grid=grid).eval(), make(seed=4, grid=grid).eval(), patient(33)
    with torch.no_grad():
        first = model(bag)["logits"]
        assert torch.equal(first, model(bag)["logits"])
        labelled = Batch(bag.path, bag.pos, (bag.path[0],), bin=3, event=1)
        assert torch.equal(first, model(labelled)["logits"])
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(first, other(bag)["logits"])


def test_wrong_settings_and_missing_positions_are_refused():
    with pytest.raises(MorphomeError, match="grid"):
        make(grid="hexagons")
    with pytest.raises(MorphomeError, match="true_xy"):
        make(grid="true_xy")(Batch(path=torch.randn(4, 12)))
    with pytest.raises(MorphomeError, match="P3"):
        make()(Batch(patient_id="P3"))
