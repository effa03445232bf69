"""`python -m jax_seqpar` is the `seqpar` command."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="seqpar")
