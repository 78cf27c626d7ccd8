"""Adapters that put purprune's pure core into training loops and onto Apple devices."""

from purprune_adapters.asserting import assert_sparse as assert_sparse
from purprune_adapters.calibration import collect_stats as collect_stats
from purprune_adapters.checkpoints import Checkpoint as Checkpoint
from purprune_adapters.coreml import ExportError as ExportError
from purprune_adapters.coreml import ExportReport as ExportReport
from purprune_adapters.coreml import VerificationError as VerificationError
from purprune_adapters.coreml import evaluate_coreml as evaluate_coreml
from purprune_adapters.coreml import export_coreml as export_coreml
from purprune_adapters.coreml import verify_coreml as verify_coreml
from purprune_adapters.files import load_pruner as load_pruner
from purprune_adapters.files import save_pruner as save_pruner
from purprune_adapters.layerwise import prune_layerwise as prune_layerwise
from purprune_adapters.pruner import Pruner as Pruner
from purprune_adapters.pruning_at_init import grasp_masks as grasp_masks
from purprune_adapters.pruning_at_init import snip_masks as snip_masks
from purprune_adapters.pruning_at_init import synflow_masks as synflow_masks
from purprune_adapters.report import Report as Report
from purprune_adapters.report import ReportRow as ReportRow
from purprune_adapters.resolve import resolve as resolve
from purprune_adapters.sensitivity import measure_sensitivity as measure_sensitivity
from purprune_adapters.sensitivity import plot_sensitivity as plot_sensitivity
