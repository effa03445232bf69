"""Mutation that breaks causality of bits: one exponent for all tokens, not one for each.

A sum that scales its channels has such an exponent. Both frameworks' bits are then not causal.
"""

import jax.numpy as jnp
import torch

from jax_seqpar.exact import arithmetic
from torch_ref.exact import arithmetic as exact_arithmetic


def digits_of_one_exponent(x):
    """Digits on one exponent, in place of `arithmetic.token_digits`."""
    e = arithmetic.exponent(x, (-2, -1))
    integers = jnp.rint(x * arithmetic.power_of_two(32 - e))
    high = jnp.rint(integers * 2.0**-16)
    digits = jnp.concatenate([high, integers - high * 2.0**16], axis=-1)
    e = jnp.broadcast_to(e, (*x.shape[:-1], 1))
    return e, jnp.where(e == arithmetic.NOT_A_NUMBER, 0.0, digits)


def token_of_one_exponent(x):
    """Digits on one exponent, in place of `exact_arithmetic.token`."""
    e = exact_arithmetic.exponent(x.flatten(-2), dim=-1)
    integers = torch.round(x * exact_arithmetic.power(32 - e))
    high = torch.round(integers * 2.0**-16)
    return e.expand(*x.shape[:-1], 1), high, integers - high * 2.0**16
