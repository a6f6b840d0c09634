"""The two tokenizers: a byte-level BPE for CLIP and a unigram for T5, both knowing our caption words whole.

Any other word falls back to bytes (CLIP) or letters (T5), so every prompt can be read.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import pairwise
from random import Random
from typing import Any

from transformers import CLIPTokenizer, T5Tokenizer

from tools.tiny_models.captions import ENDINGS, OPENINGS, caption
from tools.tiny_models.scenes import draw_scene

CLIP_TOKENS = 77
T5_TOKENS = 512
EXTRA_WORDS = """and the with in of to no not very bright dark light colorful shape shapes background object
style night day sky water space red-hot flower dog bird car person man woman mountain sea ocean forest city
portrait realistic cinematic lighting five six seven eight nine ten outline outlined mosaic pixel neon tiles
moonlight""".split()
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?-:;()'\"&/"
SENTINELS = 8  # T5's <extra_id_n>


def caption_words(captions: int) -> dict[str, int]:
    """Every word and sign of this many captions with its frequency, most frequent first."""
    random = Random(1)
    counts: Counter[str] = Counter()
    for seed in range(captions):
        text = caption(draw_scene(seed), random, plain=True)
        counts.update(re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text))
    for text in (*OPENINGS, *ENDINGS, *EXTRA_WORDS):
        counts.update(re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def clip_tokenizer(words: dict[str, int]) -> Any:
    """A CLIPTokenizer in whose vocabulary every given word is one token."""
    byte_signs = list(_byte_signs().values())
    merges = _merges_until_whole(words)
    pieces = byte_signs + [sign + "</w>" for sign in byte_signs] + [a + b for a, b in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    as_declared: Any = merges  # declared as strings, but pairs are what it takes
    return CLIPTokenizer(vocab=vocabulary, merges=as_declared, model_max_length=CLIP_TOKENS)


def _byte_signs() -> dict[int, str]:
    """GPT-2's printable sign for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        signs.setdefault(byte, chr(256 + len(signs) - len(printable)))
    return signs


def _merges_until_whole(words: dict[str, int]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until no word has two pieces."""
    splits = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: defaultdict[tuple[str, str], float] = defaultdict(float)
        for word, pieces in splits.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word] ** 0.5
        if not pairs:
            return merges
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(best)
        for word, pieces in splits.items():
            splits[word] = _merged(pieces, best)


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    answer: list[str] = []
    for piece in pieces:
        if answer and (answer[-1], piece) == pair:
            answer[-1] += piece
        else:
            answer.append(piece)
    return answer


def t5_tokenizer(words: dict[str, int]) -> Any:
    """A T5Tokenizer with each word as one piece, also Capitalised and in CAPITALS: T5 keeps case."""
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -6.0}
    for word in words:
        if word.isalnum():
            for form in (word, word.capitalize(), word.upper()):
                scores.setdefault("▁" + form, -2.0)
        else:
            scores.setdefault("▁" + word, -4.0)
            scores.setdefault(word, -4.0)
    for letter in LETTERS:
        scores.setdefault(letter, -10.0)
    for index in reversed(range(SENTINELS)):
        scores[f"<extra_id_{index}>"] = 0.0
    return T5Tokenizer(vocab=list(scores.items()), extra_ids=SENTINELS, model_max_length=T5_TOKENS)


def lower_case_pieces(tokenizer: Any) -> dict[int, int]:
    """Piece index of each capitalised word -> that of its lower-case form, whose embedding it borrows."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    lower_pieces = {index: vocabulary.get(piece.lower(), index) for piece, index in vocabulary.items()}
    return {index: lower for index, lower in lower_pieces.items() if lower != index}
