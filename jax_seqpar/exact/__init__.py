"""Attention whose bits do not depend on how it is computed.

Every sum is exact and every rounding is at a stated place, so the result is a mathematical function
of the inputs: tiling, FMA, thread count, device count, mesh and framework cannot change a bit of
it. This page is that function. `jax_seqpar.exact`, `torch_ref.exact` and the integer oracle of the
tests are written from it, not from one another.

Notation. All arithmetic is float64 unless said otherwise; integers are float64 values, exact while
below 2^53. rint rounds half to even. Inputs are float32, bfloat16 or float16.

    flush(x)        x, and 0 where |x| < 2^-126: XLA flushes the subnormals of float32
    round32(x)      flush(x) rounded to float32
    E(x)            along an axis: the smallest integer e with max |x| < 2^e, but at least -400,
                    and -400 for 0. Any NaN or infinity on that axis: not a number
    grid(x, e, b)   rint(x * 2^(b - e)), an integer of magnitude at most 2^b; NaN if e is not a
                    number
    C               min(32, 38 - ceil(log2 H)): 32 up to H = 64, 31 for 128
    dot(x, y)       sum over channels. X = grid(x, E(x), 31) and Y = grid(y, E(y), C), E along the
                    channels; hi = rint(X * 2^-16), lo = X - hi * 2^16. It is
                    ((sum hi * Y) * 2^16 + (sum lo * Y)) * 2^(E(x) - 31) * 2^(E(y) - C): both sums
                    exact (15 bits, C and log2 H), one rounding in the addition
    contract(a, b)  sum over tokens of a * b, |a|, |b| at most 2^32. b in three digits of 11 bits:
                    b2 = rint(b * 2^-22), b' = b - b2 * 2^22, b1 = rint(b' * 2^-11),
                    b0 = b' - b1 * 2^11; S_i = sum a * b_i. It is
                    (S2 * 2^11 + S1) * 2^11 + S0: each S_i exact (32 + 10 + 11 bits for 2048 tokens;
                    more, but fewer than 2^21, are added as int64 and rounded once to float64), and
                    two roundings of additions
    exp(x)          of a float32: the float32 nearest to e^x; 0 for x < -80
    out(x, dtype)   round32(x), -0 as +0, any NaN as the quiet NaN with sign and payload 0; a
                    16-bit dtype is rounded from that, any NaN again to that one

Keys that nothing attends to: k_j and v_j are replaced by 0, in the forward and the backward pass,
unless some query i of the sequence has i < its query_seq_length, j < its key_value_seq_length and
the segment of j, as far as these are given. Neither masks nor positions matter here, so the rule is
the same for every head and on every device.

Forward, for query i and the keys j of one head; q, k, v, do and bias are flushed first:

    s   = round32(dot(q_i, k_j))
    z   = s * scale                        scale: the nearest float32, 1 / sqrt(H) by default
    z   = cap * tanh(z, cap)               where there is a logits_soft_cap, see below
    z   = z + bias_ij                      where there is a bias
    z   = z - alibi * d_ij                 where the head has an ALiBi slope; d_ij is the distance
                                           of their positions, but at most 2^29
    z   = -inf                             where i may not attend to j
    m_i = max_j z                          NaN if any z is; the larger of it and the head's sink,
                                           where there are sinks; 0 in its place where it is -inf
    p   = exp(round32(z - m_i))            0 where z = -inf
    P   = rint(p * 2^32)
    r_i = 1 / sum_j P                      0 where the sum is 0; a sink adds the P of z = sink
    P   = 0                                where the weight of i and j is dropped, see below
    o_i = out(contract(P, grid(v, E, 32)) * 2^(E - 32) * (r_i * c))   E = E(v) over all the keys

c is 1 without dropout. Slopes and sinks are float32 and flushed. Where every z is -inf (no key to
attend to, for whatever reason), o_i and dq_i are 0, whatever v, k and do hold, and in the gradients
q_i and do_i are replaced by 0.

Backward, with the gradient do and o in float32, before any rounding to 16 bits:

    dp  = dot(do_i, v_j) * c               0 where the weight is dropped
    D_i = dot(do_i, o_i)
    w   = p * (r_i * 2^32)                 0 where p = 0
    ds  = w * (dp - D_i)                   0 where p = 0
    ds  = ds * slope                       where there is a logits_soft_cap; 0 where p = 0
    dq  = out(contract(grid(ds, E, 32), grid(k, E', 32)) * 2^(E - 32) * 2^(E' - 32) * scale)
    dk  = out(contract(grid(ds, E, 32), grid(q, E', 32)) * 2^(E - 32) * 2^(E' - 32) * scale)
    w   = p * ((r_i * c) * 2^32)           0 where p = 0 and where the weight is dropped
    dv  = out(contract(grid(w,  E, 32), grid(do, E', 32)) * 2^(E - 32) * 2^(E' - 32))

dq sums over keys: E(ds) over the keys of query i, E'(k) over all the keys. dk and dv sum over the
queries of every query head that shares the KV head, on whatever device: E(ds), E(w) over all those
for key j, E'(q), E'(do) over all those for a channel. Integer sums meet before any rounding.

Soft cap (cap: the nearest float32; u and the result of tanh are float32):

    u     = round32(z * (1 / cap)),  t = exp(-2 |u|)
    tanh  = round32(f(|u|)) with the sign of u, where f(u) = (1 - t) / (1 + t), but for |u| < 1/2
            the fraction u / (1 + u^2/(3 + u^2/(5 + u^2/(7 + u^2/(9 + u^2/11)))))
    slope = ((4 t) * g) * g,  g = 1 / (1 + t)

Dropout at a rate below 1 - 2^-32, with the two words of a threefry key: threefry(key, x) is
threefry2x32 of 20 rounds (Salmon et al. 2011), two words of 32 bits from two. b, n, t and s count
the batch, the query heads, the queries and the keys of the whole attention, from 0:

    word  = the first of threefry(threefry(key, (b, n)), (t, s))
    limit = rint(rate * 2^32);  the weight is dropped where word < limit
    c     = 2^32 / (2^32 - limit)

So every product that feeds an addition is exact, and no compiler can change a bit by fusing them.

A NaN or infinity follows these rules like any number: E of its row and of its column is not a
number, 2^E of that is NaN, and NaN times 0 is NaN. So one in query i makes row i of o and dq NaN,
one in v its channel of o in the whole head; a masked key can do no more than its column does. In
the gradients one in query i makes its channel of dk NaN, and one in do its channel of dv, for every
key of the KV head, also for those that query i does not attend to.
Tokens that were replaced by 0 above can do nothing, whatever they hold. A key that only a mask, a
bias, causality or a window hides from every query is not replaced: a NaN of it reaches its channel
in the whole head, and a large value of it sets E for its channel, so that the others lose bits (all
of them, where it is 2^33 times larger). Padding is to be told by lengths or segments, not by masks.

Under `--xla_cpu_enable_fast_math=true` with `--xla_cpu_fast_math_honor_nans=false` XLA:CPU assumes
that no number is NaN, so results that are NaN have other bits and `certify`, asked under the same
flags, does not trust the backend. With the first flag alone it does.

What it costs: numbers are rounded to 31 or 32 bits below the largest of their row or column, where
float32 keeps 24 bits of each. A weight below 2^-33 of its row's largest is 0: where the values of
the heavy keys are 0 and others have all the say, that is an error float32 does not make.
"""

from .arithmetic import contract as contract
from .arithmetic import exact_dot as exact_dot
from .attention import exact_attention as exact_attention
from .certificate import certify as certify
