"""Logging while training: exact counts of what changed, told once per update, to any tracker."""

from __future__ import annotations

import csv
import json
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from purprune import PolynomialDecay, Random, Regrow, Rule, Unstructured
from purprune_adapters import Pruner
from purprune_adapters.html_report import write_html
from purprune_adapters.trackers import SparsityLog, TensorBoard, changes, flat

SCHEDULE = PolynomialDecay([1, 3, 5])
SHARES = (0, 0.7, 0.8)  # at updates 1, 3 and 5: 0.8 * (1 - (1 - i / 2) ** 3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def prepared(rule: Rule | None = None) -> Pruner:
    pruner = Pruner(network(), rule or Rule(0.8, SCHEDULE))
    pruner.prepare(inplace=True)
    return pruner


def run(pruner: Pruner, log: SparsityLog, steps: int = 6) -> None:
    for _ in range(steps):
        pruner.step()
        log.step()


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40), st.sampled_from([(), (1, 1)])
)
def test_changes_are_counted_entry_by_entry(pairs, shape):
    """Defends exact counts against the plain loop, of any shape."""
    before, after = (
        torch.tensor([pair[i] for pair in pairs], dtype=torch.bool).reshape(-1, *shape)
        for i in (0, 1)
    )
    found = changes({"w": before}, {"w": after})["w"]
    assert found.newly_pruned == sum(old and not new for old, new in pairs)
    assert found.regrown == sum(new and not old for old, new in pairs)


def test_a_parameter_without_a_mask_before_was_dense():
    """Defends the first update: everything pruned is new then."""
    assert changes({}, {"w": torch.tensor([True, False, False])}) == {"w": (2, 0)}


@pytest.mark.parametrize("after", [{}, {"w": torch.ones(2, 3, dtype=torch.bool)}])
def test_masks_of_another_model_are_refused(after: dict[str, Tensor]):
    """Defends counts that compare nothing."""
    with pytest.raises(ValueError, match=r"'w'.*shape \(2,\).*another model"):
        changes({"w": torch.ones(2, dtype=torch.bool)}, after)


def test_each_update_is_told_once_and_exactly():
    """Defends steps, integers and shares at updates, and silence between them."""
    pruner = prepared()
    told: list[dict[str, Any]] = []
    log = SparsityLog(pruner, told.append)
    assert log.step() is not None, "the masks of step 0"
    run(pruner, log)
    assert [record["step"] for record in told] == [0, 1, 3, 5]
    pruned = [sum(math.floor(n * share) for n in (128, 32)) for share in (0, *SHARES)]
    assert [record["pruned_by_mask"] for record in told] == pruned
    assert [record["zeros"] for record in told] == pruned
    assert [record["newly_pruned"] for record in told] == [0, 0, pruned[2], pruned[3] - pruned[2]]
    assert {record["regrown"] for record in told} == {0}
    assert [record["scheduled_sparsity"] for record in told] == pytest.approx([0, *SHARES])
    assert told[-1]["sparsity"] == pruned[-1] / 160 == float(pruner.report().total)
    assert log.history == told
    assert all(type(told[-1][key]) is int for key in ("step", "zeros", "entries", "newly_pruned"))


def test_layers_add_up_to_the_total():
    """Defends the records by parameter."""
    pruner = prepared(Rule(0.8, SCHEDULE, pattern=Unstructured(scope="global")))
    log = SparsityLog(pruner, layers=True)
    run(pruner, log)
    for record in log.history:
        layers = record["layers"].values()
        assert list(record["layers"]) == ["0.weight", "2.weight"]
        for key in ("zeros", "entries", "pruned_by_mask", "newly_pruned", "regrown"):
            assert record[key] == sum(layer[key] for layer in layers), key


def test_what_regrew_is_counted():
    """Defends the other direction: masks that came from elsewhere than the schedule."""
    pruner = prepared()
    log = SparsityLog(pruner)
    run(pruner, log, 3)
    other = Pruner(network(), Rule(0.8, SCHEDULE))
    with torch.no_grad():
        other.model[0].weight.copy_(other.model[0].weight.flip(0))
    other.prepare(inplace=True)
    for _ in range(3):
        other.step()
    before = pruner.masks["0.weight"]
    pruner.load_state_dict(other.state_dict())
    record = log.step()
    assert record is not None
    kept_anew = int((pruner.masks["0.weight"] & ~before).sum())
    assert record["regrown"] == record["newly_pruned"] == kept_anew > 0


def test_an_exchange_of_units_is_told_in_both_directions():
    """Defends methods that regrow: as many come back as go, and the sparsity stays."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = Rule(0.8, regrow=Regrow(every=2, end_step=8, score=Random(1)), score=Random(0))
    pruner = Pruner(model, rule, optimizer=optimizer)
    pruner.prepare(inplace=True)
    log = SparsityLog(pruner)
    log.step()
    for step in range(8):
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizer.step()
        pruner.step()
        record = log.step()
        flips = sum(int((mask & ~before[name]).sum()) for name, mask in pruner.masks.items())
        assert (record["regrown"] if record else 0) == flips
        assert record is None or record["newly_pruned"] == record["regrown"]
    assert sum(record["regrown"] for record in log.history) > 0
    assert {record["pruned_by_mask"] for record in log.history} == {127}


def test_every_nth_update_adds_up_what_was_not_told():
    """Defends counts against updates that nobody saw, and the schedule's last update."""
    schedule = PolynomialDecay(range(1, 6))
    pruner = prepared(Rule(0.8, schedule))
    log = SparsityLog(pruner, every=3)
    run(pruner, log, 8)
    assert [record["step"] for record in log.history] == [3, 5]
    assert sum(record["newly_pruned"] for record in log.history) == math.floor(128 * 0.8) + 25


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_is_a_whole_number(every):
    """Defends an error where the log is made."""
    with pytest.raises(ValueError, match="every"):
        SparsityLog(prepared(), every=every)


def test_a_log_changes_no_bit_and_costs_no_masks_of_its_own():
    """Defends the fold, and that the log keeps what the pruner has."""
    plain, logged = prepared(), prepared()
    log = SparsityLog(logged, layers=True)
    for _ in range(6):
        plain.step()
        logged.step()
        log.step()
    for name, mask in logged.masks.items():
        assert log._masks[name] is mask
        assert torch.equal(mask, plain.masks[name])
        assert torch.equal(logged.model.get_parameter(name), plain.model.get_parameter(name))


def test_records_are_lines_of_json_and_rows_of_csv(tmp_path):
    """Defends plain values for every tracker that takes a dict."""
    pruner, path = prepared(), tmp_path / "pruning.jsonl"
    with path.open("w") as file:
        log = SparsityLog(pruner, lambda record: print(json.dumps(record), file=file), layers=True)
        run(pruner, log)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == log.history
    with (tmp_path / "pruning.csv").open("w", newline="") as file:
        rows = [{"step": record["step"], **flat(record)} for record in log.history]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = (tmp_path / "pruning.csv").read_text()
    *_, last = csv.DictReader(text.splitlines())
    assert (last["step"], last["pruning/zeros"]) == ("5", str(log.history[-1]["zeros"]))
    assert last["pruning/layers/0.weight/regrown"] == "0"


class Writer:
    """What TensorBoard's writer is, as far as it is used."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, tag: str, number: float, step: int) -> None:
        self.scalars.append((tag, number, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_is_told_every_number_at_its_step():
    """Defends tags and steps, and a writer that the user has."""
    pruner, writer = prepared(), Writer()
    board = TensorBoard(writer)
    log = SparsityLog(pruner, board)
    run(pruner, log)
    board.close()
    assert writer.closed
    assert ("pruning/sparsity", 127 / 160, 5) in writer.scalars
    assert {tag for tag, *_ in writer.scalars} == {
        f"pruning/{key}" for key in log.history[0].keys() - {"step"}
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_writes_a_file_that_it_reads(tmp_path):
    """Defends the real writer."""
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pruner, board = prepared(), TensorBoard(tmp_path)
    run(pruner, SparsityLog(pruner, board))
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("pruning/newly_pruned")
    assert [(event.step, event.value) for event in events] == [(1, 0), (3, 111), (5, 16)]


def test_the_extra_is_named_where_tensorboard_is_missing(tmp_path, monkeypatch):
    """Defends the optional dependency."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"purprune\[tensorboard\]"):
        TensorBoard(tmp_path)


def _moved(pruner: Pruner, log: SparsityLog) -> None:
    """Step with weights that change the same way, whole or in shards."""
    for step in range(6):
        with torch.no_grad():
            for param in pruner.model.parameters():
                param.add_(0.01 * (step + 1))
        pruner.step()
        log.step()


@on_ranks(2)
def test_a_log_of_shards_tells_every_process_the_counts_of_the_whole():
    """Defends sums over processes: each has a part of the flips. A page of shards is refused."""
    rule = Rule(0.8, SCHEDULE, 0.2, Unstructured(scope="global"))
    whole = prepared(rule)
    log = SparsityLog(whole, layers=True)
    log.step()
    _moved(whole, log)
    model = network()
    fully_shard(model)
    pruner = Pruner(model, rule)
    pruner.prepare(inplace=True)
    parts = SparsityLog(pruner, layers=True)
    parts.step()
    _moved(pruner, parts)
    assert parts.history == log.history
    assert [record["step"] for record in log.history] == [0, 1, 3, 5]
    with pytest.raises(ValueError, match=r"shards.*pruner\.report\(\) in all processes"):
        write_html("report.html", pruner)
