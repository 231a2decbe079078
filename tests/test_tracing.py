"""`trace` against forward and backward passes written out by hand."""

import argparse
import copy
import dataclasses
import math
import weakref

import matplotlib.pyplot as plt
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from initlab.page import plot_trace
from initlab.tracing import LayerTrace, Trace, add_command, trace


class Block(nn.Module):
    """Residual, with one in-place activation used twice, and a tuple as output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        h = self.act(self.conv(x))
        h = self.act(x + self.conv(h))
        return h, {"logits": self.head(h.mean((2, 3)))}


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("boom")


@pytest.fixture
def x():
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target():
    return torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def block():
    torch.manual_seed(1)
    return Block()


def block_loss(output, target):
    return functional.cross_entropy(output[1]["logits"], target)


def rms(v):
    return v.double().square().mean().sqrt().item()


def block_by_hand(block, x, target):
    z1 = block.conv(x)
    a1 = z1.relu()
    z2 = block.conv(a1)
    a2 = (x + z2).relu()
    logits = block.head(a2.mean((2, 3)))
    value = functional.cross_entropy(logits, target)
    outputs = [z1, a1, z2, a2, logits]
    weights = [block.conv.weight, None, block.conv.weight, None, block.head.weight]
    grads = torch.autograd.grad(value, [*outputs, block.conv.weight, block.head.weight])
    of_weight = dict(zip((block.conv.weight, block.head.weight), grads[5:], strict=True))
    return outputs, grads[:5], [None if w is None else rms(of_weight[w]) for w in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_reused_inplace_tuple(block, x, target, dtype):
    block, x = block.to(dtype), x.to(dtype)
    outputs, grads, weight_grads = block_by_hand(block, x, target)
    entries = trace(block, x, target, block_loss)

    assert [e.name for e in entries] == ["conv", "act", "conv#2", "act#2", "head"]
    assert [e.kind for e in entries] == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Linear"]
    for entry, y, grad, weight_grad in zip(entries, outputs, grads, weight_grads, strict=True):
        y = y.detach()
        assert entry.shape == tuple(y.shape)
        assert entry.mean == pytest.approx(y.mean().item(), rel=1e-4, abs=1e-6)
        assert entry.std == pytest.approx(y.std().item(), rel=1e-5)
        assert entry.rms == pytest.approx(rms(y), rel=1e-5)
        assert entry.signal == pytest.approx(y.var(0).mean().sqrt().item(), rel=1e-5)
        assert entry.grad_rms == pytest.approx(rms(grad), rel=1e-5)
        if weight_grad is None:
            assert entry.weight_grad_rms is None
        else:
            assert entry.weight_grad_rms == pytest.approx(weight_grad, rel=1e-5)
        assert all(type(v) is float for v in (entry.mean, entry.std, entry.rms, entry.signal))


def test_without_loss_the_same_forward_numbers_and_no_gradients(block, x, target):
    plain, full = trace(block, x), trace(block, x, target, block_loss)
    assert [(e.mean, e.std, e.rms, e.signal) for e in plain] == [
        (e.mean, e.std, e.rms, e.signal) for e in full
    ]
    assert all(e.grad_rms is None and e.weight_grad_rms is None for e in plain)


def test_signal_is_zero_when_the_inputs_are_alike_while_std_is_not():
    entry = trace(nn.Conv2d(1, 4, 3), torch.arange(25.0).reshape(1, 1, 5, 5).repeat(3, 1, 1, 1))[0]
    assert entry.signal == 0
    assert entry.std > 1


def test_sums_in_float64():
    layer = nn.Linear(1, 1).requires_grad_(False)
    layer.weight.fill_(1)
    layer.bias.fill_(0)
    y = torch.tensor([[1e25], [-1e25]])  # whose squares overflow float32
    assert trace(layer, y)[0].rms == pytest.approx(1e25)


def test_one_input_has_no_signal_and_warns_of_nothing(block, x):
    entries = trace(block, x[:1])
    assert all(math.isnan(e.signal) for e in entries)
    assert entries[0].std == pytest.approx(block.conv(x[:1]).std().item())
    assert math.isnan(trace(nn.Linear(2, 1), torch.ones(1, 2))[0].std)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 3), (2, 2, 8)),
        (nn.Conv3d(2, 3, 3), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(2, 3, 3), (2, 2, 8)),
        (nn.ConvTranspose2d(2, 3, 3), (2, 2, 4, 4)),
        (nn.ConvTranspose3d(2, 3, 3), (2, 2, 4, 4, 4)),
        (nn.LeakyReLU(0.1), (2, 8)),
        (nn.GELU(), (2, 8)),
        (nn.Tanh(), (2, 8)),
        (nn.GLU(), (2, 8)),
        (nn.Threshold(0.1, 20), (2, 8)),
    ],
)
def test_kinds(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (entry,) = trace(layer, x)
    y = layer(x).detach()
    assert (entry.name, entry.kind) == (type(layer).__name__,) * 2
    assert entry.shape == tuple(y.shape)
    assert entry.rms == pytest.approx(rms(y))


def test_other_modules_are_not_traced():
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 3), nn.Dropout(), nn.Unflatten(1, (3, 1)))
    assert [e.name for e in trace(model, torch.randn(4, 3))] == ["1"]


@pytest.mark.parametrize(
    ("layer", "x", "role", "weight"),
    [
        (nn.MultiheadAttention(4, 2), (torch.randn(3, 5, 4),) * 3, "mixer", "in_proj_weight"),
        (nn.LSTM(4, 6), torch.randn(3, 5, 4), "mixer", "weight_ih_l0"),
        (nn.GRU(4, 6), torch.randn(3, 5, 4), "mixer", "weight_ih_l0"),
        (nn.LSTMCell(4, 6), torch.randn(3, 4), "mixer", "weight_ih"),
        (nn.Embedding(9, 4), torch.arange(6).reshape(3, 2), "mixer", "weight"),
        (nn.LayerNorm(4), torch.randn(3, 4), "norm", "weight"),
        (nn.GroupNorm(2, 4), torch.randn(3, 4, 2), "norm", "weight"),
        (nn.BatchNorm1d(4), torch.randn(3, 4), "norm", "weight"),
        (nn.BatchNorm1d(4).eval(), torch.randn(3, 4), "affine", "weight"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), torch.randn(3, 4), "norm", "weight"),
    ],
)
def test_first_tensor_of_what_a_layer_returns(layer, x, role, weight):
    output = layer(*x) if isinstance(x, tuple) else layer(x)
    y = output[0] if isinstance(output, tuple) else output
    (entry,) = trace(layer, x, loss=lambda out: (out[0] if isinstance(out, tuple) else out).sum())
    assert (entry.kind, entry.role, entry.shape) == (type(layer).__name__, role, tuple(y.shape))
    assert entry.rms == pytest.approx(rms(y.detach()), rel=1e-5)
    assert entry.grad_rms == pytest.approx(1)
    (grad,) = torch.autograd.grad(y.sum(), layer.get_parameter(weight))
    assert entry.weight_grad_rms == pytest.approx(rms(grad), rel=1e-4, abs=1e-6)


def test_arguments_as_tuple_or_dict_and_outputs_as_dataclass():
    @dataclasses.dataclass
    class Output:
        hidden: torch.Tensor
        note: str = "one"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, tokens, scale=1.0):
            return Output(self.head(scale * self.embed(tokens)))

    model, tokens = Model(), torch.tensor([[0, 1], [2, 3]])
    scale = torch.tensor(2.0)
    by_name = trace(model, {"tokens": tokens, "scale": scale}, loss=lambda out: out.hidden.sum())
    assert str(by_name) == str(trace(model, (tokens, scale), loss=lambda out: out.hidden.sum()))
    assert [e.name for e in by_name] == ["embed", "head"]
    assert by_name[1].in_rms == pytest.approx(2 * by_name[0].rms)
    assert math.isnan(by_name[0].in_rms)
    assert by_name[0].grad_rms is not None
    model.requires_grad_(False)
    frozen = trace(model, (tokens, scale), loss=lambda out: out.hidden.sum())
    assert [e.grad_rms for e in frozen] == pytest.approx([e.grad_rms for e in by_name])


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (torch.relu, "relu"),
        (torch.relu_, "relu"),
        (functional.relu, "relu"),
        (lambda h: functional.relu(h, inplace=True), "relu"),
        (lambda h: h.relu(), "relu"),
        (lambda h: h.relu_(), "relu"),
        (lambda h: functional.leaky_relu(h, 0.2), "leakyrelu"),
        (functional.gelu, "gelu"),
        (functional.silu, "silu"),
        (functional.hardswish, "hardswish"),
        (functional.sigmoid, "sigmoid"),
        (lambda h: h.tanh(), "tanh"),
        (lambda h: functional.threshold(h, 0.1, 0.0), "threshold"),
    ],
)
def test_activations_called_as_functions(call, kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            return self.inner(call(self.first(x)))

    model, x = Model(), torch.randn(5, 3)
    z = model.first(x)
    y = call(z.clone())
    out = model.inner(y)
    of_z, of_y = torch.autograd.grad(out.square().sum(), [z, y])
    entries = trace(model, x, loss=lambda out: out.square().sum())
    assert [e.name for e in entries] == ["first", kind, "inner.0", "inner.1"]
    assert entries[1].role == "activation"
    assert entries[0].rms == entries[1].in_rms == pytest.approx(rms(z.detach()))
    assert entries[1].rms == entries[2].in_rms == pytest.approx(rms(y.detach()))
    assert entries[0].grad_rms == pytest.approx(rms(of_z), rel=1e-5)
    assert entries[1].grad_rms == pytest.approx(rms(of_y), rel=1e-5)


def test_functions_are_named_after_the_module_that_calls_them():
    class Inner(nn.Module):
        def forward(self, x):
            return functional.relu(x) + functional.relu(-x) + functional.softmax(x, -1)

    names = [e.name for e in trace(nn.Sequential(Inner(), nn.Linear(2, 2)), torch.randn(3, 2))]
    assert names == ["0.relu", "0.relu#2", "1"]


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_shows_its_layers_in_eval_mode_too(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    x = torch.randn(3, 4, 8)
    expected = model(x)
    assert torch.backends.mha.get_fastpath_enabled()
    entries = trace(model, x)
    assert torch.backends.mha.get_fastpath_enabled()
    names = ["self_attn", "norm1", "linear1", "relu", "linear2", "norm2"]
    assert [e.name for e in entries] == [f"layers.{i}.{name}" for i in (0, 1) for name in names]
    assert entries[-1].rms == pytest.approx(rms(expected.detach()), rel=1e-5)
    with pytest.raises(RuntimeError, match="boom"):
        trace(nn.Sequential(model, Raises()), x)
    assert torch.backends.mha.get_fastpath_enabled()


def test_dead_features_along_channels_or_the_last_dimension():
    conv, linear = nn.Conv2d(1, 4, 1), nn.Linear(4, 5)
    nn.init.ones_(conv.weight)
    conv.bias.data = torch.tensor([-9.0, 0.0, 9.0, -9.0])
    picture = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2).repeat(3, 1, 2, 1)
    act = trace(nn.Sequential(conv, nn.ReLU(inplace=True)), picture)[1]
    assert (act.dead, act.signs, act.features) == (0.5, (2, 1), 4)
    nn.init.zeros_(linear.weight)
    linear.bias.data = torch.tensor([-1.0, 1.0, 1.0, 1.0, 0.0])
    act = trace(nn.Sequential(linear, nn.ReLU()), torch.randn(2, 3, 4))[1]
    assert (act.dead, act.signs, act.features) == (0.4, (1, 3), 5)
    assert trace(nn.Sequential(linear, nn.Tanh()), torch.randn(2, 4))[1].dead is None


def test_a_caught_exception_inside_the_model_does_not_derail_the_trace():
    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.head = Raises(), nn.Linear(2, 2)

        def forward(self, x):
            try:
                self.fails(x)
            except RuntimeError:
                return self.head(x).relu()

    assert trace(Catches(), torch.randn(3, 2))[0].name == "head"


def test_prelu_weight_and_tied_weight():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, nn.PReLU(), second)
    x = torch.randn(4, 3)
    total, slope = torch.autograd.grad(model(x).square().sum(), [first.weight, model[1].weight])
    entries = trace(model, x, loss=lambda out: out.square().sum())
    expected = [rms(total), rms(slope), rms(total)]
    assert [e.weight_grad_rms for e in entries] == pytest.approx(expected)


def test_frozen_parameters_still_give_the_gradient_of_the_output(block, x, target):
    expected = trace(block, x, target, block_loss)
    block.requires_grad_(False)
    entries = trace(block, x, target, block_loss)
    assert [e.grad_rms for e in entries] == pytest.approx([e.grad_rms for e in expected])
    assert [e.weight_grad_rms for e in entries] == [None] * 5
    assert not any(p.requires_grad for p in block.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_where_the_caller_turned_them_off(block, x, target, mode):
    expected = trace(block, x, target, block_loss)
    with mode():
        assert trace(block, x + 0, target, block_loss) == expected
        assert not torch.is_grad_enabled()


def test_unused_output_has_no_gradient():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return self.used(x), self.unused(x)

    used, unused = trace(TwoHeads(), torch.ones(3, 2), loss=lambda out: out[0].sum())
    assert (used.grad_rms, used.weight_grad_rms) == (1, 3)
    assert (unused.grad_rms, unused.weight_grad_rms) == (None, None)


def test_the_loss_may_run_the_model_again_unseen(x, block, target):
    def loss(output, target):
        block(x)
        return block_loss(output, target)

    assert trace(block, x, target, loss) == trace(block, x, target, block_loss)


def stateful():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def broken_loss(output, target):
    raise RuntimeError("boom")


def broken_hook(module, args, output):
    raise RuntimeError("boom")


@pytest.mark.parametrize("where", ["nowhere", "forward", "loss", "hook", "not a scalar"])
def test_leaves_everything_as_it_was(x, target, where):
    model = stateful()
    if where == "forward":
        model.append(Raises())
    model[0].eval()
    model[1].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    x.requires_grad_()
    calls = []
    model[1].register_forward_hook(lambda *args: calls.append(1))
    if where == "hook":
        model[5].register_forward_hook(broken_hook)
    loss = {"loss": broken_loss, "not a scalar": lambda out, target: out}.get(
        where, functional.cross_entropy
    )
    before, x_before = copy.deepcopy(model.state_dict()), x.detach().clone()
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    hooks = [list(m._forward_hooks) for m in model.modules()]
    random_state = torch.get_rng_state()

    if where == "nowhere":
        first = trace(model, x, target, loss)
        assert first == trace(model, x, target, loss)  # the same dropout mask, too
    elif where == "not a scalar":
        with pytest.raises(ValueError, match=r"scalar tensor, got shape \(6, 3\)"):
            trace(model, x, target, loss)
    else:
        with pytest.raises(RuntimeError, match="boom"):
            trace(model, x, target, loss)

    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["2.num_batches_tracked"] == 0
    assert identities == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert hooks == [list(m._forward_hooks) for m in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert [m.training for m in model] == [False] + [True] * (len(model) - 1)
    assert [p.requires_grad for p in model.parameters()] == [True, False] + [True] * 4
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    assert model[5].weight.grad is None
    assert x.grad is None
    assert torch.equal(x, x_before)
    assert len(calls) == (2 if where == "nowhere" else 1)
    assert torch.is_grad_enabled()


def test_runs_in_the_mode_the_model_is_in(x):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU())
    x = 5 + 2 * x
    in_training, in_evaluation = trace(model, x)[1], trace(model.eval(), x)[1]
    assert in_training.rms < 1
    assert in_evaluation.rms > 4


def test_keeps_no_activation_without_a_loss():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    outputs, alive = [], []

    def watch(module, args, output):
        outputs.append(weakref.ref(output))
        alive.append(sum(ref() is not None for ref in outputs))

    for layer in model:
        layer.register_forward_hook(watch)
    trace(model, torch.ones(2, 2))
    assert max(alive) <= 2
    assert len(alive) == 6


def test_errors(block, x, target):
    with pytest.raises(ValueError, match="target given without a loss"):
        trace(block, x, target)
    with pytest.raises(ValueError, match="nothing to trace"):
        trace(nn.Sequential(nn.Dropout(), nn.Flatten()), x)
    with pytest.raises(ValueError, match=r"scalar tensor, got 1\.0"):
        trace(block, x, target, lambda out, target: 1.0)
    with pytest.raises(ValueError, match="does not depend"):
        trace(block, x, target, lambda out, target: torch.tensor(1.0))
    with pytest.raises(ValueError, match="x is empty"):
        trace(block, x[:0])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_stay_lazy():
    model = nn.Sequential(nn.LazyConv2d(2, 3), nn.ReLU())
    with pytest.raises(ValueError, match="without a shape"):
        trace(model, torch.ones(1, 1, 5, 5))
    assert nn.parameter.is_lazy(model[0].weight)


def test_table():
    entries = Trace(
        [
            LayerTrace("0", "Conv2d", (2, 3, 4, 4), -1.23456e-5, 0.5, 1.234, math.nan),
            LayerTrace("1.act", "ReLU", (2, 3), 9e-7, 1234.5, 1.0, 0.03512),
        ]
    )
    assert str(entries) == repr(entries)
    assert repr(entries).splitlines() == [
        "no problems found",
        "",
        "name   kind    shape              mean        std        rms     signal",
        "0      Conv2d  (2, 3, 4, 4)  -1.23e-05      0.500       1.23        nan",
        "1.act  ReLU    (2, 3)             0.00   1.23e+03       1.00     0.0351",
    ]


def test_table_shows_gradients_where_there_are_any():
    entries = Trace([LayerTrace("0", "ReLU", (2,), 0.0, 0.0, 0.0, 0.0, grad_rms=0.25)])
    *_, header, row = repr(entries).splitlines()
    assert header.split()[-2:] == ["signal", "grad_rms"]
    assert row.split()[-2:] == ["0.00", "0.250"]
    assert len(header) == len(row)


def plain(n):
    return Trace(
        LayerTrace(str(i), "Linear", (4, 9), 0.0, 1.0, 1.0, 1.0, in_rms=1.0, in_signal=1.0)
        for i in range(n)
    )


def test_the_table_folds_what_has_no_problem():
    entries = plain(30)
    lines = str(entries).splitlines()
    assert [line.split()[0] for line in lines[3:]] == list("01234") + ["..."] + [
        str(i) for i in range(25, 30)
    ]
    assert "... 20 rows, rms 1.00 to 1.00" in lines
    entries[12] = dataclasses.replace(entries[12], rms=math.nan)
    lines = str(entries).splitlines()
    assert lines[:2] == ["1 problem found", "12: not finite"]
    assert [line for line in lines if line.startswith("...")] == [
        "... 6 rows, rms 1.00 to 1.00",
        "... 11 rows, rms 1.00 to 1.00",
    ]
    assert len(entries.to_frame()) == 30
    assert entries.to_frame().loc["3", "rms"] == 1


def test_plot_of_one_trace_of_several_and_of_sets():
    sound, faulty = plain(8), plain(6)
    faulty[3] = dataclasses.replace(faulty[3], rms=math.nan, signal=math.nan)
    figure = plot_trace(faulty)
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "log"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["3: not finite"]
    assert [line.get_xdata()[0] for line in figure.axes[1].lines] == [0, 3]
    plt.close(figure)
    figure = plot_trace({"a": sound, "b": faulty, "c": [sound, sound]}, ["rms"])
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["a", "b", "3: not finite", "c"]
    plt.close(figure)
    figure = plot_trace({"a": [sound]}, ["rms"], {"a": {"rms": [2.0] * 8}})
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "theory"]
    assert list(figure.axes[0].lines[1].get_ydata()) == [2.0] * 8
    assert figure.axes[0].lines[0].get_xdata()[0] == 1
    assert figure.axes[0].lines[0].get_linewidth() == plt.rcParams["lines.linewidth"]
    plt.close(figure)
    figure = plot_trace({"a": sound, "b": sound}, ["signal", "rms", "std"])
    below, above = (line.get_linewidth() for line in figure.axes[0].lines)
    assert below > above
    assert (figure.axes[0].get_xlabel(), figure.get_figwidth()) == ("row of the table", 9)
    plt.close(figure)
    assert not plot_trace(sound).legends
    plt.close()


def run_command(capsys, *argv):
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    args = parser.parse_args(["trace", *argv])
    status = args.func(args)
    return status, *capsys.readouterr()


def test_command(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine_for_trace.py").write_text(
        "from torch import nn\nfactory = nn.Tanh\nno = dict"
    )
    monkeypatch.syspath_prepend(tmp_path)
    png = tmp_path / "t.png"
    status, out, err = run_command(
        capsys, "mine_for_trace:factory", "--shape", "7", "--save", str(png)
    )
    assert (status, err, out.splitlines()[0]) == (0, "", "no problems found")
    assert png.read_bytes()[:4] == b"\x89PNG"
    status, out, err = run_command(
        capsys, "torchvision:mobilenet_v2", "--shape", "3,64,64", "--eval", "--batch", "4"
    )
    assert (status, err, out.splitlines()[0]) == (1, "", "1 problem found")
    for argv, match in (
        (["torchvision:nonsense"], "nonsense"),
        (["no_such_module_here:x"], "no_such_module_here"),
        (["mine_for_trace:absent"], "absent"),
        (["mine_for_trace:no"], "dict"),
        (["mine_for_trace:factory", "--shape", "3,x"], "x"),
        (["torchvision:resnet18", "--shape", "5,32,32"], "channels"),
        (["mine_for_trace:factory", "--batch", "0"], "empty"),
    ):
        status, out, err = run_command(capsys, *argv)
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert match in err


def test_features_of_a_subclass_are_those_of_its_layer():
    class Own(nn.Linear):
        pass

    entry, act = trace(nn.Sequential(Own(4, 7), nn.ReLU()), torch.randn(3, 5, 4))
    assert (entry.kind, entry.features, act.features) == ("Own", 7, 7)
    (entry,) = trace(torchvision.models.convnext.LayerNorm2d(6), torch.randn(2, 6, 4, 4))
    assert (entry.kind, entry.features) == ("LayerNorm2d", 6)
