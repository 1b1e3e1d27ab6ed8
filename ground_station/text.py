"""Text <-> token ids by the bundle's own tokenizer.json, and streaming text that never shows half a character."""

from __future__ import annotations

from pathlib import Path

from node_agent.shard import BundleError, Manifest, verify_file

MAX_PROMPT_BYTES = 1 << 20


class Text:
    """The tokenizer of a bundle.  Raises: BundleError when there is none, or it is altered or cannot be read."""

    def __init__(self, root: Path, manifest: Manifest):
        from tokenizers import Tokenizer

        path = root / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{root} has no tokenizer.json: it can be benchmarked, but not read or write text")
        for entry in manifest.files:
            if entry.path == path.name:
                verify_file(root, entry)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for every kind of bad file
            raise BundleError(f"{path} is not a tokenizer ({str(error)[:80]}): copy the bundle again") from None

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens (the caller puts the bundle's bos_id in front).

        Raises: ValueError for an empty or oversized text, or one that is not Unicode (bytes of another encoding).
        """
        if not text:
            raise ValueError("the prompt is empty: give at least one character")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise ValueError("the prompt is not valid UTF-8: give text in UTF-8") from None
        if size > MAX_PROMPT_BYTES:
            raise ValueError(f"the prompt is over {MAX_PROMPT_BYTES} bytes: give a shorter one")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def stream(self) -> Stream:
        return Stream(self)


class Stream:
    """Turns tokens into printable pieces as they come; an unfinished UTF-8 character is held back."""

    def __init__(self, text: Text):
        self.text, self.ids, self.shown = text, [], 0

    def push(self, token_id: int) -> str:
        self.ids.append(token_id)
        whole = self.text.decode(self.ids)
        if whole.endswith("\ufffd") and len(whole) - self.shown < 8:
            return ""
        piece, self.shown = whole[self.shown :], len(whole)
        return piece
