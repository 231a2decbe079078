"""The engine of the training experiment, on runs of a few steps; its plan, on results made up."""

import argparse
import itertools
import math
import multiprocessing
import re
import time
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from filelock import FileLock
from torch import nn

from initlab.mnist import Splits
from initlab.training import plan as planning
from initlab.training import record as record_
from initlab.training import run as running
from initlab.training import sweep as engine
from initlab.training.nets import Residual, conv_stack
from initlab.training.plan import CLOSE, FINAL_SEEDS, FIRST, PARTS, RATES, network, plan
from initlab.training.record import EPOCH, LOOKS, Run, read, runs_of, to_line
from initlab.training.run import build, look, train
from initlab.training.sweep import sweep

FORKS = multiprocessing.get_context("spawn")
SHORT = [
    Run(depth=2, width=4, steps=3, seed=4),
    Run(depth=4, width=4, steps=2, norm="batch", optimizer="adam", rate=1e-3),
    Run(net="linear", depth=2, width=8, steps=2, scheme="kaiming_normal", a=0.0, bias="zeros"),
    Run(net="residual", depth=4, width=4, steps=2, zeroed=True, slope=0.3),
    Run(net="lstm", depth=28, width=4, steps=2, forget=1.0, optimizer="adamw", warmup=2),
]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "one.csv"
    return sweep(SHORT, path), path


@pytest.fixture
def few(monkeypatch):
    """Of the pictures and sequences that are looked at, take few: for time."""
    whole = running._data

    def data(name):
        x_train, y_train, x_valid, y_valid, mean, std, x_test, y_test = whole(name)
        valid, test = (x_valid[:500], y_valid[:500]), (x_test[:100], y_test[:100])
        return Splits(x_train, y_train, *valid, mean, std, *test)

    monkeypatch.setattr(running, "_data", data)


def lines(path):
    return path.read_text().splitlines()


def test_a_record_has_the_settings_and_the_results(record):
    frame, path = record
    assert set(runs_of(frame)) == set(SHORT)
    assert len(frame) == len(SHORT)
    assert read(path, SHORT).equals(frame)
    assert not frame["diverged"].any()
    assert frame["step_90"].isna().all()
    for column in ("loss_1", "loss_2", "valid_1", "valid_2", "signal", "grad_rms"):
        assert frame[column].notna().all()
    assert frame["loss_4"].isna().all()
    assert frame["loss_1"].between(2, 3.5).all()


def test_processes_and_dask_give_the_same_records(record, tmp_path):
    import dask.config
    from distributed import LocalCluster

    expected = sorted(lines(record[1]))
    sweep(SHORT, tmp_path / "two.csv", jobs=2)
    assert sorted(lines(tmp_path / "two.csv")) == expected
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    forked = dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    with forked, LocalCluster(**options) as cluster:
        sweep(SHORT, tmp_path / "dask.csv", dask=cluster.scheduler_address)
    assert sorted(lines(tmp_path / "dask.csv")) == expected


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    path, runs = tmp_path / "runs.csv", [Run(depth=2, width=4, steps=2, seed=s) for s in range(4)]
    # By spawn, as on Windows and macOS
    process = multiprocessing.get_context("spawn").Process(target=sweep, args=(runs, path))
    process.start()
    while process.is_alive() and not (path.exists() and len(lines(path)) > 2):
        time.sleep(0.01)
    process.kill()
    process.join()
    before = lines(path)
    assert len(before) > 2
    read(path, runs)  # no torn and no doubled row
    frame = sweep(runs, path)
    assert lines(path)[: len(before)] == before
    assert sorted(frame["seed"]) == list(range(4))


def test_a_row_cut_short_is_done_again(record, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(record[1].read_text()[:-40])
    assert len(read(path)) == len(SHORT) - 1  # as the command reads it, to see what is left
    assert sweep(SHORT, path).equals(sweep(SHORT, path))
    assert sorted(lines(path)) == sorted(lines(record[1]))
    path.write_text(lines(record[1])[0][:50])  # killed within the header
    assert len(read(path)) == 0
    sweep(SHORT[:1], path)
    assert len(lines(path)) == 2


def test_two_sweeps_on_one_file(tmp_path):
    path = tmp_path / "runs.csv"
    message = "another sweep is writing to it"
    with FileLock(f"{path}.lock"), pytest.raises(RuntimeError, match=message):
        sweep(SHORT, path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: [rows[0].replace("rate,", "lr,"), *rows[1:]], "line 1: not the header"),
        (lambda rows: [*rows, rows[2]], r"line 7: Run\(.* stands there twice"),
        (lambda rows: [*rows[:2], rows[2][:30], *rows[3:]], "line 3: damaged .*cells, not"),
        (
            lambda rows: [*rows[:2], re.sub(",[0-9]+,", ",x,", rows[2], count=1), *rows[3:]],
            "line 3: damaged",
        ),
        (lambda rows: [*rows[:2], "", *rows[2:]], "line 3: damaged"),
        (lambda rows: [*rows, rows[2].replace("tune,", "final,")], "line 7: of another plan"),
        (lambda rows: [rows[0], rows[1].replace("False", "no")], "line 2: damaged"),
    ],
)
def test_a_damaged_record_is_refused_by_line_and_kept(record, tmp_path, damage, message):
    path = tmp_path / "runs.csv"
    text = "\n".join(damage(lines(record[1]))) + "\n"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        sweep(SHORT, path)
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["a file of one line", "a file of two lines,\nnot whole"])
def test_a_file_that_is_no_record_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "notes.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="line 1: not the header"):
        sweep(SHORT, path)
    assert path.read_text() == text


@pytest.mark.parametrize(("column", "value"), [("test_accuracy", 1.2), ("step_90", 99)])
def test_values_out_of_range_are_damage(column, value, few):
    row = train(SHORT[0]) | {column: value}
    with pytest.raises(ValueError, match=f"{column} is {value}"):
        record_._row(to_line(row))


def test_a_diverged_run_is_a_result(tmp_path, few):
    runs = [Run(depth=2, width=4, steps=4, rate=1e30), SHORT[0]]
    frame = sweep(runs, tmp_path / "runs.csv")
    diverged = frame[frame["rate"] == 1e30].iloc[0]
    assert diverged["diverged"]
    assert frame["diverged"].sum() == 1
    assert diverged["test_accuracy"] == 0  # a network that puts out nan recognises nothing
    assert frame["loss_4"].isna().all()


def test_build_draws_what_the_run_says():
    model = build(Run(depth=3, scheme="orthogonal", a=0.0, bias="zeros"))
    last = model[4].weight.flatten(1)  # 16 filters of 144 weights, orthogonal rows
    torch.testing.assert_close(last @ last.T, 2 * torch.eye(16), rtol=0, atol=1e-5)
    xavier = build(Run(depth=8, scheme="xavier_normal", a=1.0, bias="zeros", seed=1))[4].weight
    assert 144 * xavier.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / xavier.numel()))
    zeroed = build(Run(net="residual", depth=4, zeroed=True, scheme="kaiming_normal", a=0.0))
    branch = next(block for block in zeroed if isinstance(block, Residual))
    assert not branch[-1].weight.any()
    assert branch[0].weight.any()
    linear = build(Run(net="linear", depth=3, width=7, slope=0.3))
    assert [type(layer).__name__ for layer in linear] == (
        ["Flatten", *["Linear", "LeakyReLU"] * 3, "Linear"]
    )
    # The literal default: what torch draws for a new layer
    default = build(Run(depth=2, seed=5))
    g = torch.Generator().manual_seed(5)
    twin = conv_stack(2, 16, downsample=2, classes=10, pooled=2)
    nn.init.kaiming_uniform_(twin[0].weight, a=math.sqrt(5), generator=g)
    assert torch.equal(default[0].weight, twin[0].weight)


def test_parts_of_the_net_are_drawn_by_the_scheme():
    kaiming = Run(depth=3, scheme="kaiming_normal", a=0.0, bias="zeros", seed=7)
    whole, default = build(kaiming), build(Run(depth=3, seed=7))
    for layers, convolutions, last in (("convolutions", whole, default), ("last", default, whole)):
        mixed = build(replace(kaiming, drawn=layers))
        for k in (0, 2, 4):
            assert torch.equal(mixed[k].weight, convolutions[k].weight)
            assert torch.equal(mixed[k].bias, convolutions[k].bias)
        assert torch.equal(mixed[-1].weight, last[-1].weight)
        assert torch.equal(mixed[-1].bias, last[-1].bias)
    assert torch.equal(build(replace(kaiming, last=0.5))[-1].weight, whole[-1].weight / 2)


def test_gains_and_schemes_of_the_remedies():
    plain = Run(depth=3, scheme="kaiming_normal", a=1.0, bias="zeros", seed=3)
    for layer, twin in zip(build(replace(plain, gain=1.5, act="gelu")), build(plain), strict=True):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert torch.equal(layer.weight, 1.5 * twin.weight)
    wide = build(replace(plain, net="separable", mode="fan_out"))[2].weight  # depthwise: fan_in 9
    assert 9 * wide.var().item() == pytest.approx(1 / 16, rel=5 * math.sqrt(2 / wide.numel()))
    model, pictures = build(Run(scheme="lsuv", seed=1)), running._data("mnist").x_train[:500]
    assert torch.equal(model[0].weight, build(Run(scheme="lsuv", seed=1))[0].weight)
    for k in range(0, 16, 2):
        assert model[: k + 1](pictures).std().item() == pytest.approx(1, abs=0.1)  # its tolerance
    gpt = Run(net="gpt", depth=2, width=8, data="sort", seed=1)
    drawn = {scheme: build(replace(gpt, scheme=scheme)) for scheme in ("default", "gpt2")}
    assert drawn["default"].token.weight.std() > 0.5
    assert drawn["gpt2"].token.weight.std() < 0.05


def test_sequences_are_sorted(few):
    data = running.sequences()
    x, y = data.x_train, data.y_train
    assert torch.equal(x[:, :16].sort(1).values, y)
    assert (x[:, 16] == 10).all()
    assert torch.equal(x[:, 17:], y[:, :-1])
    found = train(Run(net="gpt", depth=1, width=8, data="sort", steps=2, goal=0.99))
    assert 0 < found["test_accuracy"] < 1


def test_schedules_and_clipping_move_the_weights_as_they_say():
    run = Run(optimizer="adamw", rate=0.1, weight_decay=0.5, warmup=4, cosine=True, steps=8)
    model = nn.Linear(1, 1)
    optimizer, schedule = running._optimizer(run, model)
    rates = []
    for _ in range(run.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    down = [0.05 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, *down])
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, _ = running._optimizer(Run(rate=1.0, clip=0.1), model)
    (100 * model(torch.ones(1, 1))).sum().backward()
    optimizer.step()
    moved = [(value - before[name]).item() for name, value in model.state_dict().items()]
    assert moved == pytest.approx([-0.1 / math.sqrt(2)] * 2, rel=1e-5)


def test_look_leaves_the_model_as_it_is_and_agrees_with_the_hand():
    model = build(Run(depth=2, norm="batch"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(50, 1, 28, 28), torch.arange(50) % 10
    found = look(model, x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    nn.functional.cross_entropy(logits := model(x), y).backward()
    by_hand = logits.std(0).square().mean().sqrt(), model[0].weight.grad.square().mean().sqrt()
    assert found == pytest.approx([value.item() for value in by_hand], rel=1e-4)


def test_the_first_step_with_90_percent(monkeypatch):
    # Of 2,000 pictures it is reached at the second look, at steps 1 to 32 before and after
    shares = iter([0.1] * 5 + [0.8995, 0.95, 0.9, 0.5, 0.5])
    seen = []
    monkeypatch.setattr(running, "accuracy", lambda *args: seen.append(args) or next(shares))
    found = train(Run(depth=2, width=4, steps=60))
    assert found["step_90"] == 50
    assert [len(args[1]) for args in seen] == [2000] * 8 + [10_000] * 2


# ---- The plan, on made-up results


def made_up(run, best):
    """Return a validation accuracy that falls with the distance to the best rate."""
    if run.stage == "late":
        return 0.95
    rate = best(run)
    return 0.106 if rate is None else 0.97 - 0.1 * abs(math.log10(run.rate / rate))


def follow(best, kill=1.0):
    done = {}
    for _ in range(99):
        rows = [asdict(run) | {"valid_accuracy": value} for run, value in done.items()]
        runs = plan(pd.DataFrame(rows) if rows else None)
        assert len(set(runs)) == len(runs)
        assert set(done) <= set(runs)  # what was done stays in the plan
        left = [run for run in runs if run not in done]
        if not left:
            return done
        done |= {run: made_up(run, best) for run in left[: math.ceil(kill * len(left))]}
    raise AssertionError("the plan does not end")


def test_the_plan_ends_and_no_arm_is_best_at_an_end(monkeypatch):
    few = [Run(depth=16), Run(depth=2, optimizer="adam")], [Run(norm="batch")]
    monkeypatch.setattr(planning, "PARTS", few)

    def best(run):
        if run.scheme == "default" and run.depth == 16 and run.norm == "none":
            return None
        return {"sgd": 1e-3, "adam": 3.16e-3}[run.optimizer]

    done = follow(best)
    assert done.keys() == follow(best, kill=0.6).keys()  # however often it is killed
    for arm in (arm for part in few for arm in part):
        rates = sorted({run.rate for run in done if replace(arm, **vary(run)) == run})
        final = {run.rate for run in done if replace(arm, **vary(run, "final")) == run}
        (chosen,) = final
        if best(arm) is None:
            assert len(rates) == 5
            late = [run for run in done if replace(arm, **vary(run, "late")) == run]
            assert len(late) == 4
            assert {run.steps for run in late} == {7800}
        else:
            assert chosen == best(arm)
            assert rates[0] < chosen < rates[-1]
        assert [RATES.index(b) - RATES.index(a) for a, b in itertools.pairwise(rates)] == (
            [1] * (len(rates) - 1)
        )
        seeds = [run.seed for run in done if replace(arm, **vary(run, "final")) == run]
        assert seeds == list(FINAL_SEEDS)


def vary(run, stage="tune"):
    steps = 7800 if stage == "late" else 1170
    return {"stage": stage, "rate": run.rate, "seed": run.seed, "steps": steps}


def test_arms_are_all_different():
    arms = [arm for part in PARTS for arm in part]
    assert len(set(arms)) == len(arms)


def test_a_name_says_what_a_network_is():
    assert network("Fashion, 16 layers, residual, zeroed, Adam, Kaiming") == (
        Run(
            **{"data": "fashion", "goal": 0.8, "depth": 16, "net": "residual", "zeroed": True},
            **{"optimizer": "adam", "scheme": "kaiming_normal", "a": 0.0, "bias": "zeros"},
        )
    )
    assert network("slope 0.3, Kaiming").a == 0.3
    with pytest.raises(ValueError, match="nonsense"):
        network("8 layers, nonsense")


def test_a_slope_is_that_of_all_networks_and_what_kaimings_init_assumes(monkeypatch):
    few = [network(name) for name in ("8 layers", "8 layers, Kaiming", "slope 0.3", "LSUV")]
    monkeypatch.setattr(planning, "PARTS", [few])
    settings = {(run.slope, run.scheme, run.a) for run in plan(slope=0.1)}
    kaiming = (0.1, "kaiming_normal", 0.1)
    assert settings >= {(0.1, "default", math.sqrt(5)), kaiming, (0.3, "default", math.sqrt(5))}
    assert len(plan(slope=0.3)) == len(plan(slope=0.1)) - 6  # its own check is left out


def test_a_third_seed_decides_between_close_rates(monkeypatch):
    arm = Run(depth=2)
    first = [[Run(depth=16)]] * FIRST
    monkeypatch.setattr(planning, "PARTS", [*first, [arm]])

    def tuned(third, gap=0.9 * CLOSE):
        def value(run):
            if run.depth == 16 or run.rate == 1e-1:
                return 0.5
            if run.seed == 2:
                return third[run.rate]
            return 0.9 + gap * (run.rate == 1e-2)

        done = {}
        while left := [run for run in plan(frame(done)) if run not in done]:
            done |= {run: value(run) for run in left}
        return [run for run in done if run.depth == 2]

    def frame(done):
        rows = [asdict(run) | {"valid_accuracy": value} for run, value in done.items()]
        return pd.DataFrame(rows) if rows else None

    for third, chosen in (({1e-2: 0.9, 3.16e-2: 0.92}, 3.16e-2), ({1e-2: 0.9, 3.16e-2: 0.9}, 1e-2)):
        runs = tuned(third)
        assert {run.rate for run in runs if run.seed == 2} == {1e-2, 3.16e-2}
        assert {run.rate for run in runs if run.stage == "final"} == {chosen}
    assert not any(run.seed == 2 for run in tuned({}, gap=1.1 * CLOSE))


# ---- The command


def command(*words):
    parser = argparse.ArgumentParser()
    engine.add_command(parser.add_subparsers())
    args = parser.parse_args(["sweep", "--jobs", "1", *words])
    return args.func(args)


def test_command_sweeps_until_the_record_is_complete(tmp_path, monkeypatch, capsys, few):
    first, second = SHORT[:1], SHORT[:2]
    monkeypatch.setattr(engine, "plan", lambda record, *_: first if record is None else second)
    path = tmp_path / "new" / "runs.csv"
    assert command("--out", str(path)) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{path}: complete, 2 runs\n"
    assert "1 runs known, 1 to do: about 0 minutes" in shown.err
    assert len(read(path, second)) == 2
    assert command("--out", str(path)) == 0  # nothing is left to do
    monkeypatch.setattr(engine, "plan", lambda record, *_: first)
    with pytest.raises(ValueError, match="line 3: of another plan"):
        command("--out", str(path))


def test_command_takes_the_arms_asked_for(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(engine, "_minutes", lambda runs, *_: asked.extend(runs) or "")
    monkeypatch.setattr(engine, "sweep", lambda runs, *_: pd.DataFrame(map(asdict, runs)))
    monkeypatch.setattr(engine, "plan", lambda record, *rest: plan(None, *rest))
    words = ["depth=8", "optimizer=adamw", "norm=none", "cosine=True"]
    assert command("--out", str(tmp_path / "mine.csv"), "--only", *words) == 0
    assert {run.scheme for run in asked} == {"default", "kaiming_normal"}
    assert {(run.depth, run.optimizer, run.norm) for run in asked} == {(8, "adamw", "none")}
    for words, message in (
        (["layers=8"], "no setting 'layers'; known are stage, net,"),
        (["depth=eight"], "invalid literal"),
        (["cosine=yes"], "cosine is yes"),
        (["depth=7"], "no arm of the plan has these settings"),
    ):
        assert command("--only", *words) == 2
        assert message in capsys.readouterr().err


def test_looks_reach_over_the_long_runs():
    assert LOOKS[-1] <= 20 * EPOCH < 2 * LOOKS[-1]
