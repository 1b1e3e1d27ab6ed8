"""What can be wrong with an image file; each error is one line that names the file and the next step."""

from __future__ import annotations

from pathlib import Path


class ImageError(ValueError):
    """An image, its block map or its checksum file cannot be used."""


class ImageTooLarge(ImageError):
    """An image's raw size is more than a card holds. `bytes` is how much it is, or, with `more`, was when counting stopped."""

    def __init__(self, path: Path, count: int, most_bytes: int, more: bool = False) -> None:
        word = "at least " if more else ""
        super().__init__(
            f"{path} does not fit: {word}{count} bytes unpacked, the card holds {most_bytes}: take a larger card"
        )
        self.bytes, self.most_bytes = count, most_bytes
