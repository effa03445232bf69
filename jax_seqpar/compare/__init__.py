"""Comparison of arrays across frameworks: bit for bit, and where two records of a model diverge.

Takes arrays of JAX, NumPy and PyTorch; needs none of them but NumPy to be installed.
"""

from .bits import compare_bits as compare_bits
from .divergence import Divergence as Divergence
from .divergence import first_divergence as first_divergence
from .divergence_table import divergence_table as divergence_table
from .report import BitsReport as BitsReport
from .report import LeafReport as LeafReport
