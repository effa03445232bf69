"""Pictures and histograms as HTML without a file beside it: PNG as data, and SVG."""

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from ..compare.picture import Picture

RED = (214, 39, 40)
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(name: str, picture: Picture, panels: tuple[str, str]) -> str:
    """One picture with its caption: where the bits differ and, if anything moved, what lies where.

    Args:
      name: of the output, for the caption.
      panels: what to call the right array and the other one.
    """
    _, S, N, _ = picture.shape
    masks = _panel("where the bits differ", picture, mask_colours(picture))
    moved = ""
    if picture.source is not None:
        for label, places in zip(panels, (picture.places, picture.source), strict=True):
            moved += _panel(label, picture, place_colours(places, picture.shape))
        moved = f'<div class="panels">{moved}</div>'
    cell = f"{_cells(S, len(picture.tokens), 'token')} by {_cells(N, len(picture.heads), 'head')}"
    share = (picture.share > 0).mean()
    caption = f"<b>{escape(name)}</b>: {100 * share:.3g} % of the cells differ. A cell is {cell}."
    return (
        f'<figure><div class="panels">{masks}{moved}</div>{histogram(picture.ulp)}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _cells(size: int, parts: int, noun: str) -> str:
    n = -(-size // parts)
    return f"1 {noun}" if n == 1 else f"up to {n:,} {noun}s"


def _panel(label: str, picture: Picture, colours: np.ndarray) -> str:
    """One image for each sequence of a picture, of colours `[sequences, rows, columns, 4]`."""
    _, S, N, _ = picture.shape
    rows, columns = colours.shape[1:3]
    size = min(16, max(3, 192 // max(rows, 2 * columns)))
    images = "".join(
        f'<span><img src="{png(image)}" width="{size * columns}" height="{size * rows}" '
        f'alt="{escape(label)}, sequence {b}: {S} tokens down, {N} heads across"><br>{b}</span>'
        for b, image in zip(picture.sequences.tolist(), colours, strict=True)
    )
    return f"<div><p>{escape(label)}</p>{images}</div>"


def mask_colours(picture: Picture) -> np.ndarray:
    """Red where something differs, the fuller the more of the cell; transparent elsewhere."""
    colours = np.zeros((*picture.share.shape, 4), np.uint8)
    colours[..., :3] = RED
    colours[..., 3] = np.where(picture.share > 0, 96 + picture.share * (159 / 255), 0)
    return colours


def place_colours(places: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A hue for each token of each sequence, from red to violet, lighter with the head.

    Args:
      places: indices of `[B, S, N]`, flattened; -1 is transparent.
      shape: `[B, S, N, H]`.
    """
    B, S, N, _ = shape
    hue, head = np.divmod(np.maximum(places, 0), N)
    lightness = 0.3 + 0.45 * head / max(N - 1, 1)
    rgb = _rgb(300 * hue / max(B * S - 1, 1), lightness)
    return np.concatenate([rgb, np.where(places < 0, 0, 255)[..., None]], axis=-1).astype(np.uint8)


def _rgb(hue: np.ndarray, lightness: np.ndarray) -> np.ndarray:
    """Colours of hue in degrees, as CSS defines its hsl(), of 70 % saturation."""
    k = (np.array([0, 8, 4]) + hue[..., None] / 30) % 12
    chroma = 0.7 * np.minimum(lightness, 1 - lightness)[..., None]
    part = np.minimum(np.minimum(k - 3, 9 - k), 1).clip(min=-1)
    return np.round(255 * (lightness[..., None] - chroma * part))


def png(rgba: np.ndarray) -> str:
    """The data URI of a PNG, of uint8 `[rows, columns, 4]`."""
    rows, columns, _ = rgba.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    # 8 bits of red, green, blue and alpha; each row starts with its filter, 0 for none.
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    lines = np.zeros((rows, 1 + 4 * columns), np.uint8)
    lines[:, 1:] = rgba.reshape(rows, -1)
    data = zlib.compress(lines.tobytes(), 9)
    file = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def histogram(counts: Sequence[int]) -> str:
    """SVG of how many elements differ by 0, 1, 2 to 3, 4 to 7, ... units in the last place."""
    if not sum(counts):
        return ""
    width, step = 320 / len(counts), -(-len(counts) // 6)
    bars = "".join(
        f'<rect x="{i * width:.2f}" y="{64 - height:.2f}" width="{0.85 * width:.2f}" '
        f'height="{height:.2f}"><title>{_distance(i)} ULP: {n:,}</title></rect>'
        for i, n in enumerate(counts)
        if (height := max(60 * n / max(counts), n > 0))
    )
    labels = "".join(
        f'<text x="{i * width:.2f}" y="78">{_power(i)}</text>' for i in range(0, len(counts), step)
    )
    title = f"Finite elements by distance in ULP, {max(counts):,} in the highest bar"
    svg = f'<svg viewBox="0 0 320 82" role="img" aria-label="{title}">{bars}{labels}</svg>'
    return f'<p class="title">{title}</p>{svg}'


def _power(i: int) -> str:
    return ("0", "1")[i] if i < 2 else "2" + str(i - 1).translate(SUPERSCRIPTS)


def _distance(i: int) -> str:
    return _power(i) if i < 2 else f"{_power(i)} to {_power(i + 1)}"
