"""purprune: pruning for PyTorch as pure functions."""

from purprune.config import PruneConfig as PruneConfig
from purprune.config import Rule as Rule
from purprune.errors import ConfigError as ConfigError
from purprune.errors import NaNError as NaNError
from purprune.errors import SelectionError as SelectionError
from purprune.given import infer_masks as infer_masks
from purprune.layer_scores import LAMP as LAMP
from purprune.layer_scores import RIA as RIA
from purprune.layer_scores import Wanda as Wanda
from purprune.masks import Count as Count
from purprune.masks import Sparsity as Sparsity
from purprune.masks import apply_masks as apply_masks
from purprune.masks import compute_masks as compute_masks
from purprune.masks import iter_masks as iter_masks
from purprune.masks import sparsity as sparsity
from purprune.packing import pack_masks as pack_masks
from purprune.packing import unpack_masks as unpack_masks
from purprune.patterns import NM as NM
from purprune.patterns import Block as Block
from purprune.patterns import Channel as Channel
from purprune.patterns import GlobalGroup as GlobalGroup
from purprune.patterns import Kernel as Kernel
from purprune.patterns import Pattern as Pattern
from purprune.patterns import Unstructured as Unstructured
from purprune.planning import Plan as Plan
from purprune.planning import plan as plan
from purprune.schedules import ConstantSparsity as ConstantSparsity
from purprune.schedules import PolynomialDecay as PolynomialDecay
from purprune.schedules import Ramp as Ramp
from purprune.scores import Fisher as Fisher
from purprune.scores import Given as Given
from purprune.scores import Gradient as Gradient
from purprune.scores import Magnitude as Magnitude
from purprune.scores import Random as Random
from purprune.scores import ScoreContext as ScoreContext
from purprune.scores import Taylor as Taylor
from purprune.selection import LazyParams as LazyParams
from purprune.sparsegpt import sparsegpt as sparsegpt

__version__ = "0.1.0"
