"""`trace` against forward and backward passes written out by hand."""

import copy
import dataclasses
import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import pytest
import torch
import torch.utils.checkpoint
import torchvision
from torch import nn
from torch.nn import functional

from initlab.diagnose.report import Trace, plot_trace, trace
from initlab.diagnose.rows import LayerTrace
from initlab.diagnose.watch import measured


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
    assert by_name[1].parents == (0,)
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


def test_a_module_without_parts_gives_its_functions_its_name():
    class Inner(nn.Module):
        def forward(self, x):
            return functional.relu(x) + functional.relu(-x) + functional.softmax(x, -1)

    names = [e.name for e in trace(nn.Sequential(Inner(), nn.Linear(2, 2)), torch.randn(3, 2))]
    assert names == ["0", "0#2", "1"]


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_shows_its_layers_in_eval_mode_too(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    x = torch.randn(3, 4, 8)
    expected = model(x)
    assert torch.backends.mha.get_fastpath_enabled()
    entries = trace(model, x)
    assert torch.backends.mha.get_fastpath_enabled()
    names = ["self_attn.in_proj_weight", "self_attn.out_proj", "norm1"]
    names += ["linear1", "relu", "linear2", "norm2"]
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
    assert (act.dead, act.above, act.features) == (0.5, 1, 4)
    nn.init.zeros_(linear.weight)
    linear.bias.data = torch.tensor([-1.0, 1.0, 1.0, 1.0, 0.0])
    act = trace(nn.Sequential(linear, nn.ReLU()), torch.randn(2, 3, 4))[1]
    assert (act.dead, act.above, act.features) == (0.4, 3, 5)
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
    assert not any(m._forward_pre_hooks for m in model.modules())
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


def test_features_of_a_subclass_are_those_of_its_layer():
    class Own(nn.Linear):
        pass

    entry, act = trace(nn.Sequential(Own(4, 7), nn.ReLU()), torch.randn(3, 5, 4))
    assert (entry.kind, entry.features, act.features) == ("Own", 7, 7)
    (entry,) = trace(torchvision.models.convnext.LayerNorm2d(6), torch.randn(2, 6, 4, 4))
    assert (entry.kind, entry.features) == ("LayerNorm2d", 6)


class Weights(nn.Module):
    """Weights that no layer holds, each used in another way."""

    def __init__(self):
        super().__init__()
        for name, shape in {
            "a": (8, 8),
            "b": (8, 8),
            "c": (8, 8),
            "d": (8, 8),
            "e": (9, 8),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 3))
        self.kernel = nn.Parameter(torch.randn(8, 8, 3) / 5)
        self.experts = nn.Parameter(torch.randn(2, 8, 8) / 3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("mask", torch.ones(8, 8).tril())

    def forward(self, x, tokens):
        h = x @ self.a + self.e[tokens] + self.token
        h = torch.einsum("btc,cd->btd", h, self.b)
        h = functional.linear(h, self.c * self.mask).relu()
        h = functional.conv1d(h.transpose(1, 2), self.kernel, padding=1).transpose(1, 2)
        h = torch.bmm(h.reshape(2, -1, 8), self.experts).reshape(h.shape)
        return h + h @ (self.d @ self.a)


def test_every_weight_that_multiplies_data_has_a_row_and_its_parents():
    torch.manual_seed(0)
    model, x = Weights(), (torch.randn(4, 5, 8), torch.randint(9, (4, 5)))
    rows = trace(model, x, loss=lambda y: y.square().sum())
    names = ["a", "e", "b", "c", "relu", "kernel", "experts", "Weights"]
    assert [e.name for e in rows] == names
    parents = [(), (), (0, 1), (2,), (3,), (4,), (5,), (6,)]
    assert [e.parents for e in rows] == parents
    assert [e.weights[0].fan_in for e in rows if e.weights] == [8, 1, 8, 8, 24, 8, 8]
    assert rows[-1].weights[0].names == ("d", "a")
    assert rows.seen() == "98.8% of the weights seen and judged, not token"
    assert all(e.grad_rms is not None for e in rows)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda m: nn.utils.parametrizations.weight_norm(m),
        lambda m: nn.utils.parametrizations.spectral_norm(m),
        lambda m: nn.utils.parametrizations.orthogonal(m),
    ],
)
def test_a_weight_may_be_computed_from_parameters(wrapped):
    layer = wrapped(nn.Linear(4, 6))
    before = copy.deepcopy(layer.state_dict())
    (row,) = trace(nn.Sequential(layer), torch.randn(5, 4), loss=torch.sum)
    assert (row.name, row.kind) == ("0", type(layer).__name__)
    assert all(torch.equal(v, layer.state_dict()[n]) for n, v in before.items())
    assert row.weights[0].std == pytest.approx(layer.weight.std(correction=0).item(), rel=0.3)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.parts, self.reentrant = nn.ModuleList([stateful()[1:3]]), reentrant
        self.first = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return torch.utils.checkpoint.checkpoint(self.parts[0], x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_buffer_and_no_gradient(x, reentrant):
    model = Checkpointed(reentrant)
    model.first.weight.grad = kept = torch.ones_like(model.first.weight)
    before = copy.deepcopy(model.state_dict())
    rows = trace(model, x, loss=lambda y: y.square().sum())
    assert [e.name for e in rows] == ["first", "parts.0.1", "parts.0.2"]
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.first.weight.grad is kept
    assert model.first.bias.grad is None
    assert torch.equal(kept, torch.ones_like(kept))
    assert rows[0].weight_grad_rms is not None
    assert rows[1].weight_grad_rms is not None
    assert rows.problems() == []


def test_models_that_wrap_another_are_unwrapped(block, x, target):
    expected = trace(block, x, target, block_loss)
    assert trace(nn.DataParallel(block), x, target, block_loss) == expected
    assert trace(torch.compile(block), x, target, block_loss) == expected


def test_a_compiled_part_runs_as_it_was_written(x):
    model = nn.Sequential(torch.compile(nn.Conv2d(2, 3, 1)), nn.ReLU())
    assert [(e.name, e.kind) for e in trace(model, x)] == [("0", "Conv2d"), ("1", "ReLU")]


def test_what_cannot_be_traced_is_refused_by_name(x):
    with pytest.warns(FutureWarning):
        script = torch.jit.script(nn.ReLU())
    with pytest.raises(ValueError, match="1 is a RecursiveScriptModule"):
        trace(nn.Sequential(nn.Conv2d(2, 2, 1), script), x)
    with pytest.raises(ValueError, match="meta"):
        trace(nn.Linear(4, 2, device="meta"), x)


def test_sparse_gradients_integers_and_half_precision():
    embedding = nn.Embedding(10, 4, sparse=True)
    tokens = torch.tensor([[1, 2], [3, 1]])
    (row,) = trace(embedding, tokens, loss=torch.sum)
    assert row.weight_grad_rms == pytest.approx(math.sqrt((4 + 1 + 1) * 4 / 40))
    rows = trace(
        nn.Sequential(embedding, nn.Linear(4, 3), nn.ReLU()).bfloat16(), tokens, loss=torch.sum
    )
    assert [type(e.rms) for e in rows] == [float] * 3
    assert trace(nn.Sequential(nn.ReLU(), nn.Embedding(10, 4)), tokens)[0].name == "1"
    with torch.autocast("cpu", torch.bfloat16):
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        model(torch.randn(3, 4))
        rows = trace(model, torch.randn(5, 4), loss=torch.sum)
    assert [e.name for e in rows] == ["0", "1"]
    assert rows[0].weights[0].names == ("0.weight",)


def test_inputs_in_any_nest_are_copied(x):
    @dataclasses.dataclass
    class Batch:
        pictures: torch.Tensor
        more: dict

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1)

        def forward(self, batch):
            return self.conv(batch.pictures.relu_() + batch.more["list"][0].neg_())

    batch, before = Batch(x, {"list": [x + 1]}), x.clone()
    rows = trace(Model(), (batch,), loss=torch.sum)
    assert [e.name for e in rows] == ["relu", "conv"]
    assert torch.equal(batch.pictures, before)
    assert torch.equal(batch.more["list"][0], before + 1)


def test_eight_threads_and_two_on_one_model(x, target):
    def judge(model):
        return trace(model, x, target, block_loss)

    torch.manual_seed(0)
    models = [nn.Sequential(nn.BatchNorm2d(2), Block()) for _ in range(8)]
    expected = [judge(model) for model in models]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(judge, [m for m in models for _ in range(2)])) == [
            rows for rows in expected for _ in range(2)
        ]
    assert not any(model[0].num_batches_tracked for model in models)


def test_writing_into_a_slice_keeps_the_path():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            out = torch.zeros_like(x)
            for t in range(x.shape[1]):
                out[:, t] = self.step(x[:, t])
            return self.head(out)

    rows = trace(Loop(), torch.randn(4, 2, 3))
    assert [(e.name, e.parents) for e in rows] == [("step", ()), ("step#2", ()), ("head", (0, 1))]


def test_a_constant_made_on_the_way_has_no_parents():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other, self.last = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            h = self.first(x)
            for _ in range(20):
                self.other(x).sum()  # freed at once: the constant may get its storage
                h = h * torch.tensor(1.0)
            return self.last(h)

    assert trace(Model(), torch.randn(4, 3))[-1].parents == (0,)


def test_norms_written_out_are_norms():
    class RMS(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))

    model = nn.Sequential(nn.Linear(6, 6), RMS(), nn.Linear(6, 6))
    rows = trace(model, torch.randn(4, 6))
    assert [(e.name, e.role) for e in rows] == [("0", "layer"), ("1", "norm"), ("2", "layer")]
    model[0].weight.data.mul_(1000)
    assert trace(model, torch.randn(4, 6)).problems() == []


def test_attention_passes_on_its_values():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.o(functional.scaled_dot_product_attention(q, k, v)) + self.o(
                (q @ k.transpose(1, 2)).softmax(-1) @ v
            )

    rows = trace(Attention(), torch.randn(4, 5, 6))
    assert [(e.name, e.parents) for e in rows[3:]] == [("o", (2,)), ("o#2", (2,))]


def test_the_sums_do_not_depend_on_threads_or_layout():
    y = 1000 + torch.randn(64, 33, 17, 5, generator=torch.Generator().manual_seed(0))
    exact, v = measured(y, 64), y.double()
    assert exact["mean"] == pytest.approx(v.mean().item(), rel=1e-14)
    assert exact["std"] == pytest.approx(v.std().item(), rel=1e-12)
    assert exact["rms"] == pytest.approx(v.square().mean().sqrt().item(), rel=1e-14)
    assert exact["signal"] == pytest.approx(v.var(0).mean().sqrt().item(), rel=1e-12)
    other = measured(y.to(memory_format=torch.channels_last), 64)
    assert other == pytest.approx(exact, rel=1e-12)
    tiny = v * 1e-12 + 5  # a signal of a share that no square shows
    assert measured(tiny, 64)["signal"] == pytest.approx(tiny.var(0).mean().sqrt().item(), rel=1e-3)
