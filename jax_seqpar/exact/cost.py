"""Memory and transfers of exact attention besides operands and results, by formula.

Arrays are counted as XLA:CPU has them (`parity_tests/test_strategies_memory.py`). A slice is one of
two float64 that the sum of a number is in, a digit one of two that a number is split into.
"""

from .._checks import Shape


def workspace(
    query: Shape, key: Shape, value: Shape, *, rows: int, itemsize: int, gradients: bool
) -> int:
    """Bytes besides operands and results: the output in float32, and of one KV head float64.

    Forward that is its key on the grid and the digits of its value in both layouts (of one query
    head XLA frees one or two of these four arrays), beside the digits of one head's queries in both
    layouts; or the value as it is brought there, beside rows of weights. With gradients seven
    arrays each of all the queries and their gradients: the numbers, and digits as they are, in
    columns and as operands of sums; eight of the key and three of the value, with the slices of dk
    and dv. One KV head has no loop over heads, so operands are gone once they have been read.

    Args:
      query, key, value: shapes of what the kernel is given.
      rows: of weights at a time.
    """
    (B, T, N, H), (_, S, K, V) = query, value
    group, out = N // max(K, 1), 4 * B * T * N * V
    if gradients:
        return out + 8 * (7 * group * T * (H + V) + S * (8 * H + 3 * V))
    weighted = 8 * S * (H + 4 * V) + _weights(T, S, rows)
    queried = 8 * S * (H + (4 if group > 1 else 3) * V) + 8 * 4 * T * H
    read = itemsize * (T * N * H + S * (H + V)) if B * K == 1 else 0
    return out + max(weighted, queried) - read


def workspace_in_turns(
    query: Shape,
    key: Shape,
    value: Shape,
    *,
    rows: int,
    degree: int,
    itemsize: int,
    gradients: bool,
    directions: int = 1,
) -> int:
    """The same of one device of a ring: sums of all heads, and the operands of one.

    Of the output two slices of two digits of each number, in four arrays: what is found so far and
    in one part, and what loops over heads write them to. With gradients five arrays with the slices
    of dk and dv: those here, on their way and those that came home. The operands and their digits
    are of one query head forward, and of all those of a KV head backward. Two devices have one
    round, which is no loop: an array of the output less and two of dk and dv, and with gradients
    two of dq beside either the sums of the output or the operands. Keys from both directions have a
    part each, with its own arrays; most are there when these meet, and no operands are. Forward
    that is of seven devices and more, of which more than one round is in a loop.

    Args:
      query, key, value: shapes of what one device has.
      degree: devices of the ring.
      directions: from which keys come in one round.
    """
    (B, T, N, H), (_, S, K, V) = query, value
    sums, slices = 8 * 4 * B * T * N * V, 8 * 2 * B * S * K * (H + V)
    operands = 8 * 12 * (N // max(K, 1)) * T * (H + V)
    if gradients and degree <= 2:
        return max(3 * sums, operands) + 2 * 8 * 2 * B * T * N * H + 3 * slices
    if gradients and directions > 1:
        return 10 * sums + 7 * slices
    if gradients:
        return 4 * sums + 5 * slices + operands
    scaled = itemsize * B * T * N * H
    if degree <= 2:
        return 3 * sums + scaled + _weights(T, S, rows)
    one_way = 4 * sums + 8 * T * (20 * H + 2 * V)
    return scaled + (max(8 * sums, one_way) if directions > 1 and degree > 6 else one_way)


def sharing_traffic(key: Shape, value: Shape, devices: int, of: int) -> int:
    """Bytes that a device receives to add up the gradients of KV heads that several devices have.

    Two anchors of each key in 4 bytes, and the slices of each number of dk and dv. All-reduces,
    counted as a scatter and a gather; but the slices of a part of an axis are gathered whole
    (`SharedHeads.sum`).

    Args:
      key, value: shapes of what the kernel is given.
      devices: that have these KV heads.
      of: devices along the mesh axis.
    """
    (B, S, K, H), V = key, value[3]
    reduced = 2 * (devices - 1) / devices
    slices = reduced if devices == of else devices - 1
    return round(B * S * K * (8 * reduced + 16 * (H + V) * slices))


def _weights(queries: int, keys: int, rows: int) -> int:
    """Bytes of the rows of weights that the forward pass holds at a time."""
    return 4 * keys * min(queries, rows)
