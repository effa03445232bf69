"""The parity run: the same attention on PyTorch ranks and on JAX devices, every bit compared.

`seqpar parity` is its command. `cases` has the inputs, `checks` what is computed on both sides,
`plan` which checks a run makes, `run` runs them, `report` prints them, `golden` holds the hashes
that exact attention has on every machine.
"""
