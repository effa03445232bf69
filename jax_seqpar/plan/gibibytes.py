"""Bytes as text in GiB, with as many digits as a comparison needs."""


def gib(n: int | float) -> str:
    """Bytes in GiB, with two digits behind the point."""
    return f"{n / 2**30:.2f}"


def gib_apart(n: int | float, other: int | float) -> tuple[str, str]:
    """Two numbers of bytes in GiB, as `apart` writes them."""
    return apart(n / 2**30, other / 2**30, 2)


def apart(a: int | float, b: int | float, digits: int) -> tuple[str, str]:
    """Two numbers as text, with more digits behind the point where those would make them equal.

    Args:
      digits: behind the point, at least.

    Example:
      apart(31.2529, 31.25, 2) == ("31.253", "31.250")
    """
    # A single byte is 1e-9 GiB.
    for n in range(digits, 11):
        if f"{a:.{n}f}" != f"{b:.{n}f}":
            return f"{a:.{n}f}", f"{b:.{n}f}"
    return f"{a:.{digits}f}", f"{b:.{digits}f}"
