"""A short training in exact arithmetic, run by JAX on meshes and by PyTorch on ranks.

`task` says what is trained, `recipe` how a step finds loss and gradients, `jax_decoder` and
`jax_side` train it in JAX, `torch_side` in PyTorch, `steps` compares every bit of every step,
`step_files` keeps a step so that another side can go on, `run` is what
`seqpar parity --training` does, and `table` shows it.
"""
