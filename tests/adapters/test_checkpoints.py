"""Masks of checkpoints, one tensor at a time, on real safetensors files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from purprune import LazyParams, PruneConfig, Rule, Unstructured, compute_masks, iter_masks, plan
from purprune_adapters import Checkpoint

safetensors = pytest.importorskip("safetensors.torch")

SHAPES = [(40, 50), (30, 20, 3), (7, 9), (64, 64), (5,)]


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{i}.weight": torch.randn(shape, generator=generator).to(dtype)
        for i, shape in enumerate(SHAPES)
    }


def sharded(folder: Path, params: Mapping[str, Tensor], shards: int = 2) -> Path:
    """Write a folder as Hugging Face lays it out."""
    names, index = list(params), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        own = names[i::shards]
        safetensors.save_file({name: params[name] for name in own}, folder / file)
        index.update(dict.fromkeys(own, file))
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_masks_of_a_checkpoint_are_those_of_its_tensors_in_memory(tmp_path, dtype, scope, layout):
    """Defends streaming: one tensor at a time decides as all together do."""
    params = weights(dtype)
    if layout == "file":
        safetensors.save_file(params, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(
        sharded(tmp_path, params) if layout == "folder" else tmp_path / "model.safetensors"
    )
    rule = Rule(0.7, pattern=Unstructured(scope=scope))
    expected = compute_masks({name: params[name] for name in checkpoint}, 0, rule)
    got = dict(iter_masks(checkpoint, 0, rule))
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert str(plan(checkpoint, rule)) == str(plan({n: params[n] for n in checkpoint}, rule))


def test_selecting_and_planning_read_headers_only(tmp_path, monkeypatch):
    """Defends that nothing is mapped before masks are made."""
    checkpoint = Checkpoint(sharded(tmp_path, weights()))
    monkeypatch.setattr(Checkpoint, "__getitem__", None)
    assert len(plan(checkpoint, Rule(0.5)).tensors) == 4
    with pytest.raises(ValueError, match="decoder"):
        iter_masks(checkpoint, 0, PruneConfig().set_module_name("decoder", Rule(0.5)))
    iter_masks(checkpoint, 0, Rule(0.5))


def test_checkpoints_are_compared_by_identity_and_name_near_misses(tmp_path, monkeypatch):
    """Defends `==` and `in` a list, which compared tensors one by one, and a name nearly right."""
    safetensors.save_file(weights(), tmp_path / "model.safetensors")
    checkpoint, other = (Checkpoint(tmp_path / "model.safetensors") for _ in range(2))
    with pytest.raises(KeyError, match=r"got 'layers.0.wieght'. Did you mean 'layers.0.weight'"):
        checkpoint["layers.0.wieght"]
    assert checkpoint.get("layers.9") is None
    assert "layers.9" not in checkpoint
    monkeypatch.setattr(Checkpoint, "__getitem__", None)  # nothing is mapped
    assert checkpoint == checkpoint
    assert checkpoint != other
    assert checkpoint != dict.fromkeys(checkpoint)
    assert {checkpoint: 1}[checkpoint] == len({checkpoint, other}) - 1


class Counted(LazyParams):
    """Counts how often each tensor is asked for."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params, self.reads = params, Counter[str]()

    def shapes(self):
        return {name: param.to("meta") for name, param in self.params.items()}

    def __getitem__(self, name):
        self.reads[name] += 1
        return self.params[name]

    def __iter__(self):
        return iter(self.params)

    def __len__(self):
        return len(self.params)


@pytest.mark.parametrize(
    ("scope", "dtype", "most"),
    [
        ("tensor", torch.float32, 1),
        ("tensor", torch.bfloat16, 1),
        ("global", torch.float32, 3),
        ("global", torch.bfloat16, 2),
        ("global", torch.float16, 2),
    ],
)
def test_each_tensor_is_read_once_or_in_a_global_group_twice_and_for_a_sample(scope, dtype, most):
    """Defends the number of passes over a file: a sample but for 16 bits, a count, the masks."""
    generator = torch.Generator().manual_seed(0)
    params = Counted(
        {f"w{i}": torch.randn(300, 300, generator=generator).to(dtype) for i in range(3)}
    )
    rule = Rule(0.7, pattern=Unstructured(scope=scope))
    masks = dict(iter_masks(params, 0, rule))
    assert params.reads == dict.fromkeys(masks, most)


_PEAK = """
import sys, torch
from pathlib import Path
from purprune import *
from purprune_adapters import Checkpoint
def kb(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
folder, scope = sys.argv[1:]
rule = Rule(0.7, pattern=Unstructured(scope=scope))
small = {"w": torch.randn(1024, 1024)}
compute_masks(small, 0, rule)  # imports and pools of threads are not the question
Path("/proc/self/clear_refs").write_text("5")
before = kb("VmRSS")
for name, mask in iter_masks(Checkpoint(folder), 0, rule):
    del mask
print(kb("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_peak_of_memory_does_not_grow_with_the_number_of_tensors(tmp_path, scope):
    """Defends checkpoints larger than memory: 64 tensors of 4 MB need what 16 need."""
    peaks = []
    for number in (16, 64):
        folder = tmp_path / str(number)
        folder.mkdir()
        params = {f"w{i:02}": torch.randn(1024, 1024) for i in range(number)}
        sharded(folder, params)
        command = [sys.executable, "-c", _PEAK, str(folder), scope]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(found.stdout) * 1024)
    assert peaks[1] < peaks[0] + 12e6  # of 192 MB more


def test_a_missing_shard_is_named(tmp_path):
    """Defends against masks of half a model."""
    folder = sharded(tmp_path, weights())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        Checkpoint(folder)


@pytest.mark.parametrize("left", [3, 200, 20_000])
def test_a_truncated_file_is_refused(tmp_path, left):
    """Defends against zeros, or a crash, where a download broke off."""
    file = tmp_path / "model.safetensors"
    safetensors.save_file(weights(), file)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"whole safetensors file; got .*model\.safetensors"):
        Checkpoint(file)


def test_a_name_in_two_files_is_refused(tmp_path):
    """Defends against masks of the tensor that is not loaded later."""
    for file in ("a.safetensors", "b.safetensors"):
        safetensors.save_file({"w": torch.ones(2, 2)}, tmp_path / file)
    with pytest.raises(ValueError, match=r"'w' is in .*a\.safetensors and in .*b\.safetensors"):
        Checkpoint(tmp_path)


def test_an_index_that_differs_from_its_files_is_refused(tmp_path):
    """Defends against an index of another checkpoint."""
    folder = sharded(tmp_path, weights())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["layers.1.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"differ in 'layers\.1\.weight'\."):
        Checkpoint(folder)
    path.write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        Checkpoint(folder)


def test_nothing_to_read_is_refused(tmp_path):
    """Defends clear words for a wrong path."""
    with pytest.raises(FileNotFoundError, match=r"index\.json or \.safetensors files in"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Checkpoint(tmp_path / "nowhere.safetensors")


def test_the_extra_is_named_where_safetensors_is_missing(tmp_path, monkeypatch):
    """Defends the optional dependency."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"purprune\[safetensors\]"):
        Checkpoint(tmp_path / "model.safetensors")
