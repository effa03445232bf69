"""Batches, losses and tiles for training on sharded tokens.

One convention for loss and gradient: the loss is the sum over all labels that count, divided by
their number, both of the whole mesh. It is one number, and its gradient is the gradient: the same
at every degree, with nothing left to multiply or divide by a number of devices. A mean of the
devices' means is another number as soon as labels are masked unevenly, and NaN where a device has
no label.

With global arrays under `jax.jit`, `jax.grad` gives this gradient. Inside your `jax.shard_map`,
name the mesh axes in `cross_entropy(axis_name=...)` and leave `check_vma=True`: then JAX adds up
the gradients of replicated arrays over the devices, once.
"""

from .batch import Batch as Batch
from .batch import TokenLayout as TokenLayout
from .digests import digest_arrays as digest_arrays
from .loss import IGNORE as IGNORE
from .loss import cross_entropy as cross_entropy
from .loss import tiled_cross_entropy as tiled_cross_entropy
from .micro_batches import micro_batches as micro_batches
from .offload import offload_policy as offload_policy
from .offload import offloaded as offloaded
from .packing import pack_documents as pack_documents
from .tiles import map_tiles as map_tiles
