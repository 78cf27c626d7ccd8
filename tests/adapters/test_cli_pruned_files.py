"""Pruned checkpoints on the disk: the masks of the core, whole or absent, resumed after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from purprune import (
    NM,
    Block,
    Channel,
    ConfigError,
    NaNError,
    PolynomialDecay,
    PruneConfig,
    Rule,
    SelectionError,
    Unstructured,
    apply_masks,
    compute_masks,
    unpack_masks,
)
from purprune_adapters import Checkpoint

safetensors = pytest.importorskip("safetensors.torch")

from purprune_adapters import places, prune_jobs, shard_files  # noqa: E402
from purprune_adapters.pruned_files import prune_checkpoint  # noqa: E402
from purprune_adapters.tensor_files import Span, map_tensor, new_layout, read_layout  # noqa: E402

GLOBAL = Rule(0.6, pattern=Unstructured(scope="global"))
RULES = {
    "2:4": Rule(pattern=NM(2, 4)),
    "unstructured": Rule(0.7),
    "global": GLOBAL,
    "global channels": Rule(0.4, pattern=Channel(scope="global")),
    "blocks": Rule(0.5, pattern=Block((4, 1))),
    "dense": Rule(0.0),
    "scheduled": Rule(0.8, PolynomialDecay(range(0, 900, 100))),
}


def tensors() -> list[dict[str, Tensor]]:
    """Two files: several dtypes, ties, tensors that no rule is for, an empty one, a scalar."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        {
            "layers.0.weight": normal(40, 33).bfloat16(),
            "layers.0.bias": normal(7),
            "layers.1.weight": normal(30, 20, 3, 3),
            "ids": torch.arange(5),
            "scalar": torch.tensor(3.0),
        },
        {
            "layers.2.weight": normal(50, 24).half(),
            "layers.3.weight": torch.ones(16, 16),  # ties only
            "empty": torch.empty(0, 3),
            "norm": normal(9),
        },
        {"layers.4.weight": normal(64, 64).to(torch.bfloat16)},
    ]


def folder(tmp_path: Path) -> Path:
    """Write a folder as Hugging Face lays it out, with its other files."""
    source = tmp_path / "source"
    source.mkdir()
    index = {}
    for i, shard in enumerate(tensors()):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        safetensors.save_file(shard, source / file, metadata={"format": "pt", "by": f"{i}"})
        index.update(dict.fromkeys(shard, file))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (source / "model.safetensors.index.json").write_text(text)
    (source / "config.json").write_text('{"hidden": 4}')
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.txt").write_text("a\nb")
    (source / "pytorch_model.bin").write_bytes(b"dense")
    (source / ".cache").mkdir()
    (source / ".cache" / "x.txt").write_text("x")
    return source


def everything(path: Path) -> dict[str, bytes]:
    """Return all files by name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_pruned_files_are_the_masks_applied_and_all_else_is_as_before(tmp_path, rule):
    """Defends the output: exact masks, dtypes, shards, headers; dense tensors bit for bit."""
    source, out = folder(tmp_path), tmp_path / "out"
    params = dict(Checkpoint(source))
    step = 800 if rule is RULES["scheduled"] else 0
    masks = compute_masks(params, step, rule)
    wanted = apply_masks(params, masks)
    result = prune_checkpoint(source, out, rule, masks=tmp_path / "m.safetensors")
    got = dict(Checkpoint(out))
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
    for file in source.glob("*.safetensors"):
        assert read_layout(out / file.name) == read_layout(file)
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert {name: count.zeros for name, count in result.tensors.items()} == zeros
    packed = unpack_masks(safetensors.load_file(tmp_path / "m.safetensors"))
    assert set(packed) == set(masks)
    assert all(torch.equal(packed[name], masks[name]) for name in masks)


def test_other_files_are_copied_but_for_weights_and_hidden_ones(tmp_path):
    """Defends a folder that loads: config and tokenizer go along, dense weights do not."""
    source, out = folder(tmp_path), tmp_path / "out"
    result = prune_checkpoint(source, out, Rule(0.5))
    wanted = set(everything(source)) - {"pytorch_model.bin", ".cache/x.txt"}
    assert set(everything(out)) == wanted
    for name in ("config.json", "tokenizer/vocab.txt", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert result.left_out == ("pytorch_model.bin",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]  # nothing left beside


def test_a_single_file_becomes_a_single_file(tmp_path):
    """Defends the other layout, and the rule by name."""
    source = tmp_path / "model.safetensors"
    safetensors.save_file(tensors()[0], source)
    config = PruneConfig().set_module_name("layers.1", Rule(0.9))
    prune_checkpoint(source, tmp_path / "out.safetensors", config)
    got, before = safetensors.load_file(tmp_path / "out.safetensors"), tensors()[0]
    assert {name for name in got if not torch.equal(got[name], before[name])} == {"layers.1.weight"}
    assert int((got["layers.1.weight"] == 0).sum()) == 30 * 20 * 9 * 9 // 10


def test_a_pruned_inf_becomes_zero_and_nan_leaves_nothing_behind(tmp_path):
    """Defends law 8 on the disk: NaN raises, and no half result or folder stays."""
    file, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    safetensors.save_file({"w": torch.tensor([[float("inf"), 1.0]])}, file)
    prune_checkpoint(file, out, Rule(1.0))
    assert safetensors.load_file(out)["w"].tolist() == [[0.0, 0.0]]
    out.unlink()
    safetensors.save_file({"a": torch.ones(2, 2), "w": torch.full((2, 2), torch.nan)}, file)
    with pytest.raises(NaNError, match="'w'"):
        prune_checkpoint(file, out, Rule(0.5))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


_KILLED = """
import os, signal, sys
from purprune import *
from purprune_adapters.pruned_files import prune_checkpoint
source, out, masks, rule, stop = sys.argv[1:]
written = 0
def progress(what, size):
    global written
    written += what == "written"
    if written == int(stop):
        os.kill(os.getpid(), signal.SIGKILL)
prune_checkpoint(source, out, eval(rule), masks=masks, progress=progress)
"""


@pytest.mark.parametrize(
    ("rule", "stop"),
    [
        ('Rule(0.6, pattern=Unstructured(scope="global"))', 8),
        pytest.param("Rule(pattern=NM(2, 4))", 10, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, rule, stop):
    """Defends resume: kill -9 in the second or third file, then the same call again."""
    source, calm = folder(tmp_path), tmp_path / "calm"
    prune_checkpoint(source, calm, eval(rule), masks=tmp_path / "calm.safetensors")
    out, masks = tmp_path / "out", tmp_path / "masks.safetensors"
    command = [sys.executable, "-c", _KILLED, str(source), str(out), str(masks), rule, str(stop)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    assert not masks.exists()
    result = prune_checkpoint(source, out, eval(rule), masks=masks)
    assert result.resumed >= 1
    assert everything(out) == everything(calm)
    assert masks.read_bytes() == (tmp_path / "calm.safetensors").read_bytes()
    assert result.total == prune_checkpoint(source, calm, eval(rule), overwrite=True).total
    assert not (tmp_path / ".out.purprune").exists()


@pytest.mark.parametrize("rule", [Rule(0.5), GLOBAL])
def test_parts_that_divide_no_tensor_change_no_byte(tmp_path, monkeypatch, rule):
    """Defends tensors larger than a part, ragged ends, and disks that are behind."""
    source = folder(tmp_path)
    syncs: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(shard_files.os, "fsync", lambda file: syncs.append(file) or fsync(file))
    prune_checkpoint(source, tmp_path / "calm", rule, masks=tmp_path / "calm.safetensors")
    at_the_end = len(syncs)
    monkeypatch.setattr(shard_files, "_PART", 101)
    monkeypatch.setattr(shard_files, "_SYNC_EVERY", 999)
    prune_checkpoint(source, tmp_path / "out", rule, masks=tmp_path / "m.safetensors")
    assert len(syncs) - at_the_end > at_the_end + 20
    assert everything(tmp_path / "out") == everything(tmp_path / "calm")
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "calm.safetensors").read_bytes()


def test_a_disk_that_fails_is_told_and_the_file_does_not_count(tmp_path, monkeypatch):
    """Defends errors of the thread that waits for the disk: they end the run, none is lost."""
    source, out = folder(tmp_path), tmp_path / "out"
    monkeypatch.setattr(shard_files, "_SYNC_EVERY", 1 << 13)

    def fail(file: int) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(shard_files.os, "fsync", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            prune_checkpoint(source, out, Rule(0.5))
    assert not out.exists()
    assert prune_checkpoint(source, out, Rule(0.5)).resumed == 0


def test_a_checkpoint_that_is_cut_short_meanwhile_is_told(tmp_path):
    """Defends against a mapping of what is not there."""
    source = folder(tmp_path)
    file = source / "model-00003-of-00003.safetensors"

    def progress(what: str, size: int) -> None:
        if file.stat().st_size > 4000:
            os.truncate(file, 4000)

    with pytest.raises(OSError, match=r"00003.safetensors'; it was cut short"):
        prune_checkpoint(source, tmp_path / "out", Rule(0.5), progress=progress)


def test_a_mapped_tensor_is_that_of_the_file_which_stays_as_it_is(tmp_path):
    """Defends odd places in a file, of which torch makes no views, empty tensors, scalars."""
    file = tmp_path / "odd"
    values = {"b": torch.tensor([1.5, -2.0]).bfloat16(), "i": torch.arange(3), "s": torch.tensor(7)}
    for start in (16, 17, 20):
        for value in (*values.values(), torch.empty(0, 3)):
            data = bytes(value.reshape(-1).view(torch.uint8).tolist())
            file.write_bytes(bytes(start) + data)
            span = Span(value.dtype, tuple(value.shape), start, start + len(data))
            mapped = map_tensor(file, span)
            assert torch.equal(mapped, value)
            assert mapped.data_ptr() % value.dtype.itemsize == 0
            mapped.fill_(0)
            assert file.read_bytes() == bytes(start) + data


class StoppedError(Exception):
    """Stands for what interrupts a run."""


def interrupted(source: Path, out: Path, rule: Rule, after: int) -> list[str]:
    """Run until so many tensors are written; return which tensors were read."""
    calls: list[str] = []

    def progress(what: str, size: int) -> None:
        calls.append(what)
        if calls.count("written") == after:
            raise StoppedError

    with pytest.raises(StoppedError):
        prune_checkpoint(source, out, rule, progress=progress)
    return calls


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "gone", "another header"])
def test_a_file_that_was_damaged_meanwhile_is_written_again(tmp_path, damage):
    """Defends the check of what an earlier run left."""
    source, out = folder(tmp_path), tmp_path / "out"
    interrupted(source, out, Rule(0.5), 8)
    (file, *_) = sorted((tmp_path / ".out.purprune" / "result").glob("*1-of*"))
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[{"a flipped bit": -3, "cut short": -1, "another header": 20}[damage]] ^= 1
        file.write_bytes(data[:-8] if damage == "cut short" else data)
    assert prune_checkpoint(source, out, Rule(0.5)).resumed == 0
    prune_checkpoint(source, tmp_path / "calm", Rule(0.5))
    assert everything(out) == everything(tmp_path / "calm")


@pytest.mark.parametrize(("rule", "all_again"), [(Rule(0.5), False), (GLOBAL, True)])
def test_what_is_resumed_is_read_again_only_where_tensors_share_a_count(tmp_path, rule, all_again):
    """Defends that a local rule goes on where it stopped."""
    source, out = folder(tmp_path), tmp_path / "out"
    interrupted(source, out, rule, 8)  # in the second file
    calls: list[str] = []
    result = prune_checkpoint(source, out, rule, progress=lambda what, size: calls.append(what))
    assert result.resumed == 1
    assert calls.count("found") == 1
    assert calls.count("read") >= 2 * 6 if all_again else calls.count("read") == 4


def test_another_job_does_not_go_on_with_what_is_there(tmp_path):
    """Defends against a result of two rules."""
    source, out = folder(tmp_path), tmp_path / "out"
    interrupted(source, out, Rule(0.5), 8)
    with pytest.raises(FileExistsError, match=r"differs in rules.*--restart"):
        prune_checkpoint(source, out, Rule(0.6))
    assert prune_checkpoint(source, out, Rule(0.6), restart=True).resumed == 0
    prune_checkpoint(source, tmp_path / "calm", Rule(0.6))
    assert everything(out) == everything(tmp_path / "calm")


def test_what_is_at_the_destination_stays_unless_it_may_go(tmp_path):
    """Defends other people's files."""
    source, out = folder(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        prune_checkpoint(source, out, Rule(0.5))
    with pytest.raises(FileExistsError, match="folder of safetensors files to replace"):
        prune_checkpoint(source, out, Rule(0.5), overwrite=True)
    assert (out / "diary.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="another place than the checkpoint's own"):
        prune_checkpoint(source, source, Rule(0.5), overwrite=True)
    with pytest.raises(FileExistsError, match="another place than the checkpoint's own"):
        prune_checkpoint(source, source / "pruned", Rule(0.5))
    with pytest.raises(FileNotFoundError, match="Make it"):
        prune_checkpoint(source, tmp_path / "no" / "out", Rule(0.5))
    prune_checkpoint(source, tmp_path / "twice", Rule(0.5))
    prune_checkpoint(source, tmp_path / "twice", Rule(0.9), overwrite=True)
    prune_checkpoint(source, tmp_path / "once", Rule(0.9))
    assert everything(tmp_path / "twice") == everything(tmp_path / "once")


def test_files_that_the_new_checkpoint_does_not_hold_are_not_deleted(tmp_path):
    """Defends what somebody put beside a checkpoint: notes, another model, a repository."""
    source, out = folder(tmp_path), tmp_path / "out"
    prune_checkpoint(source, out, Rule(0.5))
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("main")
    for name in ("a.txt", "tokenizer/mine.txt", "other.safetensors"):
        (out / name).write_text("mine")
    before = everything(out)
    words = r"'\.git', 'a\.txt', 'other\.safetensors' and 1 more would be gone\. Choose another"
    with pytest.raises(FileExistsError, match=words):
        prune_checkpoint(source, out, Rule(0.9), overwrite=True)
    assert everything(out) == before
    (out / ".git" / "HEAD").unlink()
    for name in ("a.txt", "tokenizer/mine.txt", "other.safetensors"):
        (out / name).unlink()
    with pytest.raises(FileExistsError, match=r"hold; '\.git' would be gone"):
        prune_checkpoint(source, out, Rule(0.9), overwrite=True)
    (out / ".git").rmdir()
    prune_checkpoint(source, out, Rule(0.9), overwrite=True)
    prune_checkpoint(source, tmp_path / "once", Rule(0.9))
    assert everything(out) == everything(tmp_path / "once")


def test_what_came_to_the_destination_meanwhile_is_not_deleted(tmp_path):
    """Defends notes that somebody writes beside a checkpoint while it is made anew."""
    source, out = folder(tmp_path), tmp_path / "out"
    prune_checkpoint(source, out, Rule(0.5))

    def write_notes(what: str, size: int) -> None:
        (out / "notes.txt").write_text("mine")

    with pytest.raises(FileExistsError, match=r"'notes\.txt' would be gone"):
        prune_checkpoint(source, out, Rule(0.9), overwrite=True, progress=write_notes)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert prune_checkpoint(source, out, Rule(0.9), overwrite=True).resumed > 0


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    """Defends a folder elsewhere, and against an error after the work."""
    source, out, real = folder(tmp_path), tmp_path / "out", tmp_path / "real"
    prune_checkpoint(source, real, Rule(0.5))
    before = everything(real)
    out.symlink_to(real)
    prune_checkpoint(source, out, Rule(0.9), overwrite=True)
    assert everything(real) == before
    assert not out.is_symlink()


@pytest.mark.parametrize("target", ["result", "masks"])
def test_only_a_safetensors_file_is_replaced_and_its_header_tells(tmp_path, target):
    """Defends a file whose name alone looks right."""
    source = tmp_path / "model.safetensors"
    safetensors.save_file(tensors()[0], source)
    out, masks = tmp_path / "out.safetensors", tmp_path / "masks.safetensors"
    diary = out if target == "result" else masks
    diary.write_text("mine")
    with pytest.raises(FileExistsError, match=r"safetensors file to replace at .*; got some"):
        prune_checkpoint(source, out, Rule(0.5), masks=masks, overwrite=True)
    assert diary.read_text() == "mine"
    diary.unlink()
    for rule in (Rule(0.9), Rule(0.5)):
        prune_checkpoint(source, out, rule, masks=masks, overwrite=True)
    packed = unpack_masks(safetensors.load_file(masks))
    assert int((~packed["layers.1.weight"]).sum()) == 30 * 20 * 9 // 2


def test_masks_replace_neither_the_checkpoint_nor_are_they_replaced_by_the_result(tmp_path):
    """Defends the dense weights against --masks, and masks against the result."""
    source = folder(tmp_path)
    (file, *_) = source.glob("*.safetensors")
    before, out, one = everything(source), tmp_path / "out", tmp_path / "one.safetensors"
    prune_checkpoint(source, out, Rule(0.5))
    for masks in (file, source / "masks.safetensors"):
        with pytest.raises(FileExistsError, match="another place than the checkpoint's own"):
            prune_checkpoint(source, out, Rule(0.5), masks=masks, overwrite=True)
    with pytest.raises(FileExistsError, match="masks beside the result"):
        prune_checkpoint(source, out, Rule(0.5), masks=out / "m.safetensors", overwrite=True)
    with pytest.raises(FileExistsError, match="another place than the checkpoint's own"):
        prune_checkpoint(file, one, Rule(0.5), masks=file, overwrite=True)
    with pytest.raises(FileExistsError, match="masks beside the result"):
        prune_checkpoint(file, one, Rule(0.5), masks=one, overwrite=True)
    assert everything(source) == before
    assert not one.exists()


def test_a_read_only_folder_is_found_before_the_work(tmp_path, monkeypatch):
    """Defends an hour of work; `os.access` is replaced, since root may write everywhere."""
    source, closed = folder(tmp_path), tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(places.os, "access", lambda path, mode: path != closed)
    for out, masks in ((closed / "out", None), (tmp_path / "out", closed / "m.safetensors")):
        with pytest.raises(PermissionError, match=r"folder that can be written to for .*closed"):
            prune_checkpoint(source, out, Rule(0.5), masks=masks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["closed", "source"]


def test_bad_configs_are_refused_before_anything_is_made(tmp_path):
    """Defends an empty place after an error."""
    source = folder(tmp_path)
    with pytest.raises(SelectionError, match="decoder"):
        prune_checkpoint(source, tmp_path / "out", PruneConfig().set_module_name("decoder", GLOBAL))
    with pytest.raises(ValueError, match="Expected a step"):
        prune_checkpoint(source, tmp_path / "out", Rule(schedule=lambda step: 0.5))
    for score, need in (("wanda", "input_norm"), ("taylor", "gradient")):
        words = f"weights alone.*'layers.0.weight' needs '{need}'.*collect_stats.*prune_layerwise"
        with pytest.raises(ConfigError, match=words):
            prune_checkpoint(source, tmp_path / "out", Rule(0.5, score=score))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_run_that_fails_before_a_file_is_whole_leaves_nothing_behind(tmp_path):
    """Defends the corrected call: it is no other job than one that did nothing."""
    source, out = folder(tmp_path), tmp_path / "out"
    bad = Rule(0.5, score=lambda weight, context: context.stat("mine"))
    with pytest.raises(ValueError, match="needs the statistic 'mine'"):
        prune_checkpoint(source, out, bad, masks=tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="needs the statistic 'mine'"):
        prune_checkpoint(source, out, bad)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert prune_checkpoint(source, out, Rule(0.5)).resumed == 0


def test_what_an_earlier_run_did_stays_when_the_next_one_fails_at_once(tmp_path):
    """Defends the work of hours: a file is whole, so that a failure before the next keeps it."""
    source, out = folder(tmp_path), tmp_path / "out"
    interrupted(source, out, Rule(0.5), 8)
    interrupted(source, out, Rule(0.5), 1)
    assert prune_checkpoint(source, out, Rule(0.5)).resumed >= 1


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    """Defends an hour of work."""
    source = folder(tmp_path)
    usage = prune_jobs.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(prune_jobs.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"free bytes .* there are 1,000"):
        prune_checkpoint(source, tmp_path / "out", Rule(0.5))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_two_runs_do_not_write_the_same_result(tmp_path):
    """Defends against two processes in one folder."""
    source, out = folder(tmp_path), tmp_path / "out"

    def progress(what: str, size: int) -> None:
        prune_checkpoint(source, out, Rule(0.5))

    with pytest.raises(BlockingIOError, match="another one is at work"):
        prune_checkpoint(source, out, Rule(0.5), progress=progress)


def test_a_new_layout_is_read_by_safetensors(tmp_path):
    """Defends the format: sizes, order, alignment, names that are no ASCII, empty tensors."""
    layout = new_layout(
        {"é.bits": (torch.uint8, (3,)), "s": (torch.int64, (2,)), "e": (torch.float16, (0, 4))},
        {"by": "me"},
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(layout.head + bytes(layout.size - len(layout.head)))
    found = safetensors.load_file(path)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == {
        "é.bits": (torch.uint8, (3,)), "s": (torch.int64, (2,)), "e": (torch.float16, (0, 4)),
    }  # fmt: skip
    assert read_layout(path) == layout
    assert all(span.start % span.dtype.itemsize == 0 for span in layout.spans.values())
