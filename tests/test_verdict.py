"""Verdicts on sound nets, on planted faults and on what is no fault. Counts: tools/calibrate."""

import copy
import csv
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from cases import FAULT, LM, SOUND, tok
from tools.calibrate import (
    FAULTS,
    dense,
    found,
    judge,
    kaiming,
    pooled,
    random_direction,
    sound,
    stacks,
)
from torch import nn
from torch.nn import functional as F

from initlab import gain, trace
from initlab.diagnose.report import Trace
from initlab.diagnose.rows import LayerTrace
from initlab.diagnose.verdict import SLACK


@pytest.mark.parametrize("seed", range(8))
def test_sound_stacks(seed):
    torch.manual_seed(seed)
    name, net, x = stacks(seed)
    assert judge(net, x).problems() == [], name


@pytest.mark.parametrize("seed", range(24))
def test_an_average_over_positions_is_no_fault(seed):
    torch.manual_seed(seed)
    name, net, x = pooled(seed)
    assert judge(net, x).problems() == [], name
    last = [layer for layer in net if isinstance(layer, nn.Conv2d)][-1]
    last.bias.data.fill_(100)
    assert [p.kind for p in judge(net, x).problems()] == ["alike"], name


def test_sound_networks_of_torchvision():
    for name, net, x in list(sound(3))[1:]:
        assert judge(net, x[:4]).problems() == [], name


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    right, problems = found(fault, seed=100)
    assert right, problems
    assert len(problems) == 1
    assert all(p.reason and p.advice and p.layer in str(p) for p in problems)


class Residual(nn.Module):
    """x + last(relu(first(x))), then a head."""

    def __init__(self, norm=False):
        super().__init__()
        self.first, self.last, self.head = (nn.Linear(64, 64) for _ in range(3))
        self.norm = nn.BatchNorm1d(64) if norm else nn.Identity()

    def forward(self, x):
        for _ in range(2):
            x = x + self.norm(self.last(self.first(x).relu()))
        return self.head(x)


@pytest.mark.parametrize("case", ["last", "norm", "last before norm", "head", "last x 0.01"])
@torch.no_grad()
def test_a_branch_or_head_that_starts_at_zero_is_no_problem(case):
    torch.manual_seed(0)
    net = Residual(norm="norm" in case)
    layer = net.get_submodule(case.split()[0])
    layer.weight.mul_(0.01 if "0.01" in case else 0)
    if "0.01" not in case:
        layer.bias.zero_()
    assert judge(net, torch.randn(32, 64)).problems() == []


@torch.no_grad()
def test_a_branch_that_starts_at_zero_and_stays_there_is_one():
    net = Residual()
    net.first.weight.zero_()
    net.first.bias.zero_()
    (problem,) = judge(net, torch.randn(32, 64)).problems()
    assert (problem.layer, problem.kind) == ("first", "constant")


def test_a_layer_that_a_normalisation_follows_may_have_any_scale():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(5)))
    net[2][0].weight.data.mul_(1000)
    assert judge(net, torch.randn(32, 64)).problems() == []


def test_outputs_that_are_alike():
    torch.manual_seed(0)
    net = kaiming(dense(4, 64))
    net[2].bias.data.fill_(100)
    (problem,) = judge(net, torch.randn(32, 64)).problems()
    assert (problem.layer, problem.kind) == ("2", "alike")
    assert problem.value < math.exp(-SLACK)
    assert judge(net, torch.zeros(32, 64)).problems() == []  # so are the inputs: no verdict


@pytest.mark.parametrize(
    ("bias", "act"), [(-5, nn.Identity()), (0, nn.Sigmoid()), (0, nn.LogSoftmax(1))]
)
def test_what_the_last_layer_adds_to_all_outputs_is_no_fault(bias, act):
    torch.manual_seed(0)
    net = kaiming(dense(4, 64)).append(act)
    net[-2].weight.data.mul_(0.1)
    net[-2].bias.data.fill_(bias)  # -5: as where a class is rare
    assert judge(net, torch.randn(32, 64)).problems() == []
    assert judge(net, torch.randn(1, 64)).problems() == []


def test_some_dead_units_are_luck_and_many_are_not():
    torch.manual_seed(0)
    net, x = kaiming(dense(2, 256)), torch.randn(4, 256)  # of 4 inputs, 1/16 of the units are dead
    entries = judge(net, x)
    assert 0.02 < entries[1].dead < 0.12
    assert entries.problems() == []
    net[0].bias.data[:80] = -9
    (problem,) = judge(net, x).problems()
    assert (problem.layer, problem.kind) == ("0", "dead")
    assert 80 / 256 <= problem.value < 0.5


def chain(sizes, grads=None, shape=(4, 100)):
    """Layers of 100 features, one after the other, whose outputs have these sizes."""
    grads = grads or [None] * len(sizes)
    return Trace(
        LayerTrace(
            str(i),
            "Linear",
            shape,
            0.0,
            y,
            y,
            y,
            g,
            in_rms=x,
            in_signal=x,
            features=shape[1],
            parents=(i - 1,) if i else (),
        )
        for i, (x, y, g) in enumerate(zip([1.0, *sizes], sizes, grads, strict=False))
    )


def kinds(entries):
    return [(p.layer, p.kind) for p in entries.problems()]


@pytest.mark.parametrize(
    ("factor", "kind"), [(-1.0, "vanishes"), (1.0, "explodes"), (-0.2, None), (0.2, None)]
)
def test_gradients(factor, kind):
    grads = [math.exp(-factor * i) for i in range(15)]
    expected = [("13", f"gradient {kind}")] if kind else []
    assert kinds(chain([1.0] * 15, grads)) == expected
    grads[5] = math.inf
    assert kinds(chain([1.0] * 15, grads)) == [("5", "not finite")]


def test_gradients_may_grow_by_a_fifth_through_each_normalisation():
    grads = [1.2 ** (60 - i) for i in range(60)]
    assert kinds(chain([1.0] * 60, grads)) == [("58", "gradient explodes")]
    norms = Trace(dataclasses.replace(e, role="norm") for e in chain([1.0] * 60, grads))
    assert kinds(norms) == []


def test_thresholds_follow_width_and_depth():
    fall = [math.exp(-0.25 * i) for i in range(1, 21)]  # e^-4.75 in the end
    assert kinds(chain(fall)) == [("0", "shrinks")]
    assert kinds(chain(fall, shape=(4, 16))) == []
    assert kinds(chain(fall[:8])) == []
    assert kinds(chain([1 / size for size in fall])) == [("0", "grows")]


def test_the_first_cause_comes_first_and_its_consequences_not_at_all():
    sizes = [1.0] * 5 + [1e-3] * 10
    assert kinds(chain(sizes)) == [("5", "scale")]
    assert kinds(chain([*sizes, math.nan, math.nan])) == [("5", "scale"), ("15", "not finite")]


def test_a_layer_is_named_once_for_all_that_follow_it():
    trunk = chain([math.exp(-0.4 * i) for i in range(1, 21)])
    other = (
        dataclasses.replace(e, name=f"{e.name}b", parents=(4 if i == 5 else i + 14,))
        for i, e in enumerate(trunk[5:], 5)
    )
    (problem,) = Trace([*trunk, *other]).problems()
    assert (problem.layer, problem.kind) == ("0", "shrinks")
    assert "The same holds" not in problem.reason


def test_a_single_input_is_judged_by_its_rms():
    torch.manual_seed(0)
    net = kaiming(dense(8, 64))
    assert trace(net, torch.randn(1, 64)).problems() == []
    net[4].weight.data.mul_(100)
    assert [p.layer for p in trace(net, torch.randn(1, 64)).problems()] == ["4"]


def test_no_rows_no_problems():
    assert Trace().problems() == []


def traced(made):
    net, x, *loss = made
    loss = loss[0] if loss else lambda y: random_direction(y[0] if isinstance(y, tuple) else y)
    return trace(net, x, loss=loss)


@pytest.mark.parametrize("name", SOUND)
def test_what_its_authors_meant_is_left_in_peace(name):
    torch.manual_seed(0)
    assert traced(SOUND[name]()).problems() == []


@pytest.mark.parametrize("name", FAULT)
def test_faults_in_networks_of_all_kinds_are_found_and_named(name):
    torch.manual_seed(0)
    build, layers = FAULT[name]
    problems = traced(build()).problems()
    assert problems
    assert not layers or problems[0].layer in layers


def test_advice_can_be_pasted():
    torch.manual_seed(0)
    net, x = kaiming(dense(8, 64)), torch.randn(32, 64)
    net[6].weight.data.mul_(100)
    (problem,) = judge(net, x).problems()
    call, comment = problem.fix.split("  # ")
    assert call == 'nn.init.kaiming_normal_(net[6].weight, nonlinearity="relu")'
    assert comment.startswith("std 0.177, is 17.")
    exec(call, {"nn": nn, "net": net})
    assert judge(net, x).problems() == []


def test_advice_for_a_tied_weight_says_that_it_is():
    torch.manual_seed(0)
    fixes = {e.name: e.fix for e in traced(FAULT["tied"][0]())}
    assert fixes["head"].startswith("nn.init.normal_(net.e.weight, std=0.0625)  # std 0.0625, is 1")
    assert fixes["head"].endswith("; tied")
    assert [name for name, fix in fixes.items() if "tied" in fix] == ["head"]


def test_a_limit_just_passed_is_called_so():
    fall = [math.exp(-0.33 * i) for i in range(1, 21)]
    (problem,) = chain(fall).problems()
    assert problem.reason.endswith(", a little less.")


def test_remarks_are_no_problems():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    rows = judge(nn.TransformerEncoder(layer, 2), torch.randn(4, 5, 16))
    assert rows.problems() == []
    (remark,) = rows.remarks()
    assert remark.startswith("Weights that are copies of each other: layers.0.")
    assert remark in str(rows)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    assert judge(net, torch.randn(1 + 7, 8)).remarks() == []
    assert "BatchNorm in eval mode" in judge(net.eval(), torch.randn(8, 8)).remarks()[0]
    assert "one input" in judge(net, torch.randn(1, 8)).remarks()[0]
    nn.init.normal_(net[1].weight)
    assert "trained" in judge(net, torch.randn(8, 8)).remarks()[0]


def test_a_fault_behind_another_problem_is_found_past_a_norm():
    torch.manual_seed(0)
    net = LM()
    net.blocks[0].v.weight.data.add_(1)
    net.blocks[2].a.weight.data.mul_(100)
    problems = judge(net, tok()).problems()
    assert [(p.layer, p.kind) for p in problems] == [
        ("blocks.0.v", "mean"),
        ("blocks.2.a", "scale"),
    ]
    for block in net.blocks:
        block.v.weight.data.add_(1)
    mean, _ = judge(net, tok()).problems()
    assert mean.reason.endswith("The same holds for blocks.1.v, blocks.2.v and 1 more.")
    nn.init.zeros_(net.blocks[3].a.weight)
    told = [(p.layer, p.kind) for p in judge(net, tok()).problems()]
    assert told[1:] == [("blocks.2.a", "scale"), ("blocks.3.a", "constant")]


def cross_entropy(net, classes=10):
    x, target = torch.randn(32, 64), torch.arange(32) % classes
    return trace(net, x, target, F.cross_entropy)


def test_the_first_loss_is_held_against_that_of_a_guess():
    torch.manual_seed(0)
    net = kaiming(dense(3, 64))
    assert (cross_entropy(net).problems(), cross_entropy(net).remarks()) == ([], [])
    nn.init.normal_(net[-1].weight, std=3)
    (problem,) = cross_entropy(net).problems()
    assert (problem.layer, problem.kind) == ("6", "loud output")
    net[-1].weight.data.mul_(0.1)
    net[-1].bias.data[0] = 25  # all say the first class
    (problem,) = cross_entropy(net).problems()
    assert (problem.layer, problem.kind) == ("6", "loud output")
    assert "where a guess has ln 10 = 2.3" in problem.reason
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    rows = cross_entropy(net)
    assert rows.problems() == []
    assert rows.remarks() == ["An output is the same for all inputs, of rms 0: no signal."]


def test_an_output_without_the_signal_of_its_layer_is_silent():
    torch.manual_seed(0)
    (problem,) = traced(FAULT["softmax_over_one_value"][0]()).problems()
    assert problem.kind == "silent output"


def batch_normed(depth, factor):
    layers = [m for _ in range(depth) for m in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    net = kaiming(nn.Sequential(*layers, nn.Linear(64, 10)))
    for layer in net[:-1:3]:
        layer.weight.data.mul_(factor)
    return net


@pytest.mark.parametrize("factor", [0.7, 1.4, 1])
def test_an_idle_norm_is_named_as_the_cause(factor):
    torch.manual_seed(0)
    net, x = batch_normed(20, factor), torch.randn(32, 64)
    if factor == 1:  # the gradient alone
        net = nn.Sequential(*(m for k, m in enumerate(net) if k % 3 != 2))
        for layer in net[:-1:2]:
            nn.init.orthogonal_(layer.weight)
        net[20].register_full_backward_hook(lambda _m, grads, _outputs: (grads[0] * 1e-5,))
    assert factor == 1 or judge(net, x).problems() == []
    (problem,) = judge(net.eval(), x).problems()
    kind = {0.7: "shrinks", 1.4: "grows", 1: "gradient vanishes"}[factor]
    assert problem.kind == kind
    assert problem.advice.startswith("BatchNorm in eval mode does nothing before training")
    assert problem.fix == ""  # nothing to draw anew
    assert "Draw" not in str(problem)


@pytest.mark.parametrize(("kind", "bias", "factor"), [("dead", -10, 1), ("scale", 0, 100)])
def test_an_idle_norm_is_named_whatever_is_wrong(kind, bias, factor):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9), nn.Linear(9, 9), nn.ReLU())
    net.append(nn.Linear(9, 3))
    nn.init.constant_(net[2].bias, bias)
    with torch.no_grad():
        net[4].weight *= factor
    for model, said in ((net.eval(), 1), (copy.deepcopy(net).train(), 0)):
        text = " ".join(str(judge(model, torch.randn(32, 9))).split())
        assert f": {kind}" in text
        assert text.count("BatchNorm in eval mode does nothing before training") == said


def test_the_first_line_says_what_was_judged():
    torch.manual_seed(0)
    net = kaiming(dense(7, 64))
    net[6].weight.data.mul_(100)
    first = str(judge(net, torch.randn(32, 64))).splitlines()[0]
    found = "1 problem found; 100% of the weights seen; "
    assert first == found + "55.9% judged, not 8.weight, 10.weight and 2 more"
    first = str(judge(nn.ReLU(), torch.randn(3, 4))).splitlines()[0]
    assert first == "no problems found; it has no weights"
    first = str(judge(kaiming(dense(1, 8)), torch.ones(3, 8))).splitlines()[:2]
    assert "; 0.0% judged, not 2.weight, 0.weight" in first[0]
    assert first[1] == "All inputs are the same: there is no signal, only sizes were judged."


def test_each_row_knows_the_std_drawn_and_asked():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.ConvTranspose1d(1, 3, 4, 2), nn.GELU())
    net.insert(2, nn.Unflatten(1, (1, 40)))
    rows = judge(net, torch.randn(8, 50)).to_frame()
    assert rows.loc["0", "weight_std"] == pytest.approx(1 / 150**0.5, rel=0.05)
    assert rows.loc["0", "asked_std"] == pytest.approx((2 / 50) ** 0.5)
    assert rows.loc["3", "asked_std"] == pytest.approx(gain(F.gelu) / 2**0.5)  # 2 of 4 at a time
    assert math.isnan(rows.loc["1", "asked_std"])


def test_what_the_readme_says_of_the_survey():
    folder = Path(__file__).resolve().parents[1] / "data" / "survey"
    with (folder / "sound.csv").open(encoding="utf8") as file:
        runs = [row for row in csv.DictReader(file) if row["mode"] == "train"]
    with (folder / "judged.csv").open(encoding="utf8") as file:
        true = {(r["network"], r["kind"]) for r in csv.DictReader(file) if r["verdict"] == "true"}
    said = [
        {(run["network"], told.rpartition(": ")[2]) for told in run["problems"].split("; ")}
        for run in runs
        if run["problems"]
    ]
    assert (len(runs), len({run["network"] for run in runs})) == (801, 267)
    assert sum(not kinds <= true for kinds in said) == 4
    with (folder / "faults.csv").open(encoding="utf8") as file:
        assert [row["found"] for row in csv.DictReader(file)] == ["True"] * 120
