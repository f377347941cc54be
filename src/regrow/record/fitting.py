"""The images of a run's page: as many, and as large, as the page's size allows."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence

LEAST_BYTES = 12_000  # of an image in a full page: 55 x 55 pixels even of coloured noise


def fit(images: Sequence[bytes], room: int) -> list[str]:
    """Return PNG images in base64 that take at most `room` bytes in all; "" is left out.

    Images above an equal share of the room are scaled down. If a share has less than
    `LEAST_BYTES`, the last images are left out.
    """
    share, found = _share([in_base64(image) for image in images], room), []
    for image in images:
        is_large = len(image) > share // 4 * 3
        text = b64encode(_scaled(image, share // 4 * 3) if is_large else image).decode("ascii")
        found.append(text if len(text) <= room else "")
        room -= len(found[-1])
    return found


def in_base64(image: bytes) -> int:
    return -(-len(image) // 3) * 4


def _share(sizes: Sequence[int], room: int) -> int:
    """Return the most bytes of one image: what smaller ones leave goes to the larger ones."""
    for count in range(len(sizes), 0, -1):
        rest, share = room, max(sizes)
        for place, size in enumerate(sorted(sizes[:count])):
            if size > rest // (count - place):
                share = rest // (count - place)
                break
            rest -= size
        if share >= min(LEAST_BYTES, max(sizes)):
            return share
    return LEAST_BYTES


def _scaled(image: bytes, most: int) -> bytes:
    """Return the image with fewer pixels, in at most `most` bytes; nothing if it is unreadable."""
    from PIL import Image  # reading a page does not need it

    try:
        with Image.open(io.BytesIO(image), formats=("PNG",)) as file:
            scale = (most / len(image)) ** 0.5
            while min(file.size) * scale >= 1:
                size = (int(file.width * scale), int(file.height * scale))
                buffer = io.BytesIO()
                file.resize(size, Image.Resampling.BOX).save(buffer, "PNG")
                if buffer.tell() <= most:
                    return buffer.getvalue()
                scale *= 0.9
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # also of a bad chunk
        pass
    return b""
