"""A short training in exact arithmetic, run by JAX on meshes and by PyTorch on ranks.

`task` has the model and its text, `recipe` the options of a step, `jax_decoder` and
`jax_side` train it in JAX, `torch_side` in PyTorch, `steps` compares every bit of every step,
`step_files` keeps a step so that another side can go on, `run` is what
`seqpar parity --training` does, and `table` shows it.
"""
