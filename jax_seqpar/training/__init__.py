"""What training on sharded tokens needs besides attention: batches, losses, tiles.

One convention for loss and gradient: the loss is the sum over all labels that count, divided by
their number, both of the whole mesh. It is one number, and its gradient is the gradient: the same
at every degree, with nothing left to multiply or divide by a number of devices. A mean of the
devices' means is another number as soon as labels are masked unevenly, and NaN where a device has
none.

With global arrays under `jax.jit` that is what `jax.grad` gives. Inside a `jax.shard_map` of your
own, name the mesh axes in `cross_entropy(axis_name=...)` and leave `check_vma=True`: then JAX adds
up the gradients of what all devices have, once.
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
