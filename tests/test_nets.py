"""The stacks layer by layer, and the training loop against one written out by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from initlab.training.fit import accuracy, fit
from initlab.training.nets import Decoder, FrozenStatistics, Reader, Residual, conv_stack


def kinds(model):
    return [type(layer).__name__ for layer in model]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def data():
    x = torch.randn(40, 1, 8, 8, generator=generator(), dtype=torch.float64)
    return x, (x.mean((1, 2, 3)) > 0).long()


def test_plain_stack():
    model = conv_stack(3, 5)
    assert type(model) is nn.Sequential
    assert kinds(model) == ["Conv2d", "ReLU"] * 3
    assert [(c.in_channels, c.out_channels) for c in model[::2]] == [(1, 5), (5, 5), (5, 5)]
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 5, 28, 28)


def test_leaky_stack():
    assert [layer.negative_slope for layer in conv_stack(2, 5, slope=0.2)[1::2]] == [0.2] * 2


def test_batchnorm_stack_and_head():
    model = conv_stack(3, 5, norm="batch", downsample=2, classes=10)
    assert kinds(model) == ["Conv2d", "BatchNorm2d", "ReLU"] * 3 + [
        "AdaptiveAvgPool2d",
        "Flatten",
        "Linear",
    ]
    assert [c.stride for c in model[:9:3]] == [(2, 2), (2, 2), (1, 1)]
    assert model[:9](torch.zeros(2, 1, 28, 28)).shape == (2, 5, 7, 7)
    x = torch.randn(2, 1, 28, 28, generator=generator())
    by_hand = model[-1](model[:9].eval()(x).mean((2, 3)))
    torch.testing.assert_close(model.eval()(x), by_hand)


def test_group_norm_normalises_each_picture():
    model = conv_stack(1, 5, norm="group")
    assert kinds(model) == ["Conv2d", "GroupNorm", "ReLU"]
    y = model[:2](torch.randn(3, 1, 8, 8, generator=generator()))
    torch.testing.assert_close(y.square().mean((1, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)


def test_pooled_head():
    model = conv_stack(1, 5, classes=10, pooled=2)
    x = torch.randn(2, 1, 8, 8, generator=generator())
    quarters = model[:2](x).unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
    torch.testing.assert_close(model(x), model[-1](quarters.flatten(1)))


@pytest.mark.parametrize(("depth", "downsample", "stem"), [(5, 0, 1), (5, 1, 1), (6, 2, 2)])
def test_residual_stack(depth, downsample, stem):
    model = conv_stack(depth, 4, downsample=downsample, residual=True)
    assert kinds(model) == ["Conv2d", "ReLU"] * stem + ["Residual"] * 2
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == depth
    block, x = model[-1], torch.randn(2, 4, 6, 6, generator=generator())
    assert kinds(block) == ["Conv2d", "ReLU", "Conv2d"]
    torch.testing.assert_close(block(x), x + block[2](block[0](x).relu()))


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_branch_set_to_zero_is_the_identity(norm):
    block = conv_stack(3, 4, norm=norm, residual=True)[-1]
    assert isinstance(block, Residual)
    assert kinds(block)[-1] == ("BatchNorm2d" if norm == "batch" else "Conv2d")
    x = torch.randn(2, 4, 6, 6, generator=generator())
    assert not torch.equal(block(x), x)
    nn.init.zeros_(block[-1].weight)
    nn.init.zeros_(block[-1].bias)
    assert torch.equal(block(x), x)


def test_conv_stack_errors():
    with pytest.raises(ValueError, match="depth >= 1"):
        conv_stack(0)
    with pytest.raises(ValueError, match="downsample <= depth"):
        conv_stack(1, downsample=2)
    with pytest.raises(ValueError, match="known are none, batch, frozen"):
        conv_stack(1, norm="layer")
    with pytest.raises(ValueError, match="3 convolutions after the first 1 do not pair"):
        conv_stack(4, residual=True)


def test_fit_is_the_loop_written_out(data):
    x, y = data
    model = conv_stack(2, 3, norm="batch", classes=2).double()
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = fit(model, x, y, optimizer=sgd, steps=4, batch_size=16, generator=generator(3))

    expected = []
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    draws = generator(3)
    orders = [torch.randperm(40, generator=draws) for _ in range(2)]  # two batches each, 8 left out
    for batch in [part for order in orders for part in order[:32].split(16)]:
        loss = functional.cross_entropy(twin(x[batch]), y[batch])
        expected.append(loss.item())
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert losses == pytest.approx(expected)
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fit_learns(data):
    x, y = data
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    before = accuracy(model, x, y)
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = fit(model, x, y, optimizer=adam, steps=50, batch_size=20, generator=generator())
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert accuracy(model, x, y) > max(before, 0.95)


def test_fit_uses_only_its_generator_and_leaves_it_alike_after_a_divergence(data):
    x, y = data
    states = []
    global_state = torch.get_rng_state()
    for rate in (1e-3, 1e308):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, dtype=torch.float64))
        torch.set_rng_state(global_state)
        sgd, draws = torch.optim.SGD(model.parameters(), lr=rate), generator(5)
        losses = fit(model, x, y, optimizer=sgd, steps=6, batch_size=8, generator=draws)
        states.append(draws.get_state())
        assert math.isnan(losses[-1]) == (rate > 1)
    assert torch.equal(*states)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_fit_stops_at_the_first_loss_that_is_not_finite(data):
    x, y = data
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))

    class Explode(nn.Module):
        def forward(self, logits):
            return logits * (math.nan if len(calls) == 2 else 1.0)

    model.append(Explode())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = fit(model, x, y, optimizer=sgd, steps=6, batch_size=8, generator=generator())
    assert [math.isfinite(loss) for loss in losses] == [True] * 2 + [False] * 4
    assert len(calls) == 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_after_each_step_and_an_early_end(data):
    x, y = data
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    seen = []
    losses = fit(
        model,
        x,
        y,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        steps=6,
        batch_size=8,
        generator=generator(),
        after=lambda step: seen.append((step, model.training)) or step == 3,
    )
    assert seen == [(1, True), (2, True), (3, True)]
    assert [math.isfinite(loss) for loss in losses] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_layer_by_layer(data, training):
    x, y = data
    model = conv_stack(1, 3, norm="batch", classes=2).double().train(training)
    model[1].train(not training)
    modes = [m.training for m in model.modules()]
    seen = []
    model[1].register_forward_hook(lambda m, *args: seen.append(m.training))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, x, y, optimizer=sgd, steps=1, batch_size=8, generator=generator())
    accuracy(model, x, y)
    assert seen == [True, False]
    assert [m.training for m in model.modules()] == modes
    model.append(nn.Linear(7, 7))
    with pytest.raises(RuntimeError):
        accuracy(model, x, y)
    assert [m.training for m in model[:-1].modules()][1:] == modes[1:]


def test_accuracy_counts_over_uneven_batches():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 5.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 1, 1])
    assert accuracy(nn.Identity(), logits, labels, batch_size=2) == 3 / 5


def test_a_nan_is_a_wrong_answer():
    logits = torch.tensor([[math.nan, math.nan], [1.0, 0.0]])
    assert logits.argmax(1).tolist() == [0, 0]
    assert accuracy(nn.Identity(), logits, torch.tensor([0, 0])) == 0.5


def test_lengths_must_agree(data):
    x, y = data
    with pytest.raises(ValueError, match="40 inputs but 39 labels"):
        accuracy(nn.Flatten(), x, y[:-1])
    with pytest.raises(ValueError, match="40 inputs but 39 labels"):
        fit(None, x, y[:-1], optimizer=None, steps=1, batch_size=1, generator=generator())
    with pytest.raises(ValueError, match="a batch of 41 from 40 inputs"):
        fit(None, x, y, optimizer=None, steps=1, batch_size=41, generator=generator())
    with pytest.raises(ValueError, match="0 inputs but 0 labels"):
        accuracy(nn.Flatten(), x[:0], y[:0])


def test_a_slice_of_a_residual_adds_nothing():
    block, x = Residual(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    assert torch.equal(block[:1](x), block[0](x))
    assert type(block[:1]) is nn.Sequential


def test_separable_convolutions_and_other_activations():
    model = conv_stack(3, 4, act=nn.GELU, norm="frozen", separable=True, downsample=2)
    assert kinds(model) == (
        ["Conv2d", "FrozenStatistics", "GELU"]
        + ["Conv2d", "FrozenStatistics", "GELU", "Conv2d", "FrozenStatistics", "GELU"] * 2
    )
    assert [m.groups for m in model if isinstance(m, nn.Conv2d)] == [1, 4, 1, 4, 1]
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 4, 7, 7)


def test_frozen_statistics_stay_as_they_are():
    model, x = nn.Sequential(FrozenStatistics(3)).train(), 5 + torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(model(x), x / math.sqrt(1 + model[0].eps))
    assert not model[0].running_mean.any()
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(("steps", "pieces"), [(28, 28), (98, 2)])
def test_an_lstm_reads_the_picture_in_order(steps, pieces):
    torch.manual_seed(0)
    model, x = Reader(steps, 5, forget=1.0), torch.rand(3, 1, 28, 28)
    gates = model.lstm.bias_ih_l0 + model.lstm.bias_hh_l0
    assert torch.equal(gates[5:10], torch.ones(5))
    assert gates[:5].count_nonzero() == 5
    assert gates[10:].count_nonzero() == 10
    rows = (
        x[:, 0]
        if steps == 28
        else (x[:, 0, ::2, ::2] + x[:, 0, 1::2, ::2] + x[:, 0, ::2, 1::2] + x[:, 0, 1::2, 1::2]) / 4
    )
    hidden, _ = model.lstm(rows.reshape(3, steps, pieces))
    torch.testing.assert_close(model(x), model.head(hidden[:, -1]))


def test_a_decoder_sees_no_later_token_and_is_drawn_as_it_says():
    torch.manual_seed(0)
    model, x = Decoder(3, 16).eval(), torch.randint(11, (2, 32))
    later = x.clone()
    later[:, 20:] = (later[:, 20:] + 1) % 11
    same = (model(x) - model(later)).abs().amax((0, 1))
    assert (same[:4] < 1e-6).all()  # answers 16 to 19
    assert (same[4:] > 1e-6).all()
    layers = [block.linear1.weight for block in model.blocks]
    assert not torch.equal(layers[0], layers[1])
    for scaled, shrink in ((False, 1), (True, math.sqrt(6))):
        model.draw_as_gpt2_(scaled)
        for name in ("linear1.weight", "linear2.weight", "self_attn.in_proj_weight"):
            weight = model.blocks[2].get_parameter(name)
            std = 0.02 / (shrink if name == "linear2.weight" else 1)
            assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
        assert not model.blocks[0].linear1.bias.any()
        assert torch.equal(model.norm.weight, torch.ones(16))
