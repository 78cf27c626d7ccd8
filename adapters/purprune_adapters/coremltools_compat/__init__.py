"""The names of ``coremltools.optimize.torch.pruning``, on top of :class:`purprune_adapters.Pruner`.

Code written for coremltools' magnitude pruner runs with the import line changed; coremltools is not
needed. The modules have its names too. docs/coremltools.md lists what is different, and why.
"""

from purprune_adapters.coremltools_compat.magnitude_pruner import (
    MagnitudePruner as MagnitudePruner,
)
from purprune_adapters.coremltools_compat.magnitude_pruner import (
    MagnitudePrunerConfig as MagnitudePrunerConfig,
)
from purprune_adapters.coremltools_compat.magnitude_pruner import (
    ModuleMagnitudePrunerConfig as ModuleMagnitudePrunerConfig,
)
from purprune_adapters.coremltools_compat.pruning_scheduler import (
    ConstantSparsityScheduler as ConstantSparsityScheduler,
)
from purprune_adapters.coremltools_compat.pruning_scheduler import (
    PolynomialDecayScheduler as PolynomialDecayScheduler,
)
from purprune_adapters.coremltools_compat.pruning_scheduler import (
    PruningScheduler as PruningScheduler,
)
