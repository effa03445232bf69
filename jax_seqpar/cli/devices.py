"""Findings about devices: their number, the meshes they make, and a test run of attention."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .._checks import divisors
from ..attention import dot_product_attention
from ..exact import certify
from ..mesh_layout import MeshLayout
from .finding import Finding, State, in_one_line

# Files that are there where a driver is: the platform that JAX should have found, what it is
# called, the extra.
DRIVERS = {
    "/dev/nvidiactl": ("gpu", "an NVIDIA GPU", "cuda"),
    "/dev/accel0": ("tpu", "a TPU", "tpu"),
}
# Products of a TPU have 8 bits by default, in the logits, too; a wrong order of tokens gives 1.
LARGEST_ERROR = 0.05


def devices() -> Iterator[Finding]:
    """The devices of JAX's default backend, and accelerators that it does not use."""
    try:
        found = jax.devices()
    except Exception as error:
        says = f"JAX finds none ({in_one_line(error)}). Write JAX_PLATFORMS=cpu for the CPU."
        yield Finding("devices", State.FAILS, says)
        return
    n, platform = len(found), found[0].platform
    says = f"{n} of platform {platform} ({found[0].device_kind})."
    yield Finding("devices", State.OK, says)
    yield Finding("meshes", State.OK, meshes(n, platform))
    for file, (expected, called, extra) in DRIVERS.items():
        if platform != expected and Path(file).exists():
            says = f"There is {called} here ({file}), and JAX does not use it."
            advice = f'Write pip install "jax-seqpar[{extra}]", and leave JAX_PLATFORMS unset.'
            yield Finding(expected, State.NOTE, f"{says} {advice}")


def meshes(n: int, platform: str) -> str:
    """Meshes that `n` devices make, in sentences."""
    if n == 1:
        more = ' Write jax.config.update("jax_num_cpu_devices", 8) first for simulated devices.'
        return f"One device makes degree 1.{more if platform == 'cpu' else ''}"
    degrees = f"One axis has up to {n} devices; degrees {', '.join(map(str, divisors(n)))} use all."
    pairs = [f"{d} x {n // d}" for d in divisors(n) if 1 < d < n]
    return f"{degrees} Two axes have {', '.join(pairs)}." if pairs else degrees


def attention() -> Finding:
    """Test of causal attention on all devices of this process, against float64."""
    try:
        error = attention_error()
    except Exception as raised:
        return Finding("attention", State.FAILS, f"It does not run ({in_one_line(raised)}).")
    n = len(jax.local_devices())
    on = f"on {n} device{'s' * (n > 1)}"
    if not error <= LARGEST_ERROR:
        says = f"It is wrong {on}: it differs from float64 by {error:.2g}."
        return Finding("attention", State.FAILS, says)
    return Finding("attention", State.OK, f"It runs {on}, within {error:.1g} of float64.")


def attention_error() -> float:
    """The largest difference of a small attention on all devices from NumPy's in float64."""
    n = len(jax.local_devices())
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 8 * n, n, 8))
    layout = MeshLayout(mesh=Mesh(np.array(jax.local_devices()), ("seq",)))
    operands = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    out = dot_product_attention(*operands, is_causal=True, layout=layout)
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8)
    weights = np.exp(logits) * np.tri(8 * n)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", weights, value)
    return float(np.abs(np.asarray(out) - expected).max())


def exact_arithmetic() -> Finding:
    """Self-test of exact attention's bits here; `seqpar certify` lists its questions."""
    try:
        certificate = certify()
    except Exception as error:
        says = f"It was not certified ({in_one_line(error)}); other kernels do not need it."
        return Finding("exact attention", State.NOTE, says)
    if certificate.trusted:
        return Finding("exact attention", State.OK, str(certificate))
    says = f"{certificate} Other kernels do not need it."
    return Finding("exact attention", State.NOTE, says)
