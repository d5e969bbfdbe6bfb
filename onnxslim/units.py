"""Numbers with their units, as people read them."""

from __future__ import annotations

from pydantic import ByteSize

__all__ = ["human_bytes"]


def human_bytes(size: int) -> str:
    """Bytes in decimal units, such as 1.0 MB."""
    return ByteSize(size).human_readable(decimal=True, separator=" ")
