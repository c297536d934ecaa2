"""The printed words: short, upper-case, and split once into words to train on and words held out.

Upper case, because the tokenizer merges only lower-case text: a printed word is read letter by letter.
"""

from pathlib import Path

__all__ = ["HELD_OUT_WORDS", "TRAIN_WORDS"]

_WORDS = (Path(__file__).parent / "words.txt").read_text().split()

HELD_OUT_WORDS: tuple[str, ...] = tuple(_WORDS[4::5])
"""Every fifth word: printed only in the held-out split."""

TRAIN_WORDS: tuple[str, ...] = tuple(word for word in _WORDS if word not in HELD_OUT_WORDS)
"""The other words. Training prints random letters as well, so that it learns letters and not a list."""
