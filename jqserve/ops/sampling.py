"""Drawing tokens, as the engine's sampler asks for it: in one kernel where there is one, and its parts in XLA."""

from pallas_kernels.sample.api import sample as sample
from pallas_kernels.sample.reference import argmax as argmax
from pallas_kernels.sample.reference import gumbel as gumbel
from pallas_kernels.sample.reference import if_any as if_any
from pallas_kernels.sample.reference import scale as scale
