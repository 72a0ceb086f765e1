"""Text to token ids and back: byte-level BPE, trained here, encoded by tiktoken.

A vocabulary starts with the 256 single bytes, so every text can be written. Each
merge adds one token: the two neighbours that stand together most often. Encoding
replays the merges in the order they were learned. Control tokens (<s>, [INST], ...)
have ids of their own below the bytes; no text is ever encoded to one of them.
"""

import codecs
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Self

import regex
import tiktoken

from minimistral import tokenizer_files
from minimistral.shipped import find_model
from minimistral.tokenizer_files import check_text

# False: Tokenizer encodes by encode_plain, which gives the same ids more slowly.
FAST = True

# Tekken's pattern: a text is cut into words first, and no merge crosses a cut.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}"  # one digit at a time
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The names of ids 0 to 19 in Tekken v3, in order.
CONTROL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
    "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip

Pair = tuple[int, int]


def count_words(texts: Iterable[str], pattern: str = PATTERN) -> Counter[bytes]:
    """Cut texts into words by `pattern`; how often does each (as UTF-8) occur?"""
    cut, counts = regex.compile(pattern), Counter()
    for text in texts:
        check_text(text)
        counts.update(cut.findall(text))
    return Counter({word.encode("utf-8"): n for word, n in counts.items()})


def merge_pair(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """Replace `pair` by `new_id` wherever it stands in `ids`, left to right."""
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def train_bpe_plain(word_counts: Mapping[bytes, int], n_merges: int) -> list[Pair]:
    """Learn up to `n_merges` merges; merge number i makes token 256 + i.

    All pairs are counted anew for every merge. The most frequent pair wins; among
    equals the smallest one (left id, then right id), that is the older tokens.
    Fewer merges come back when every word has become a single token.
    Sennrich et al. 2016 (arXiv:1508.07909), section 3.2, on bytes.
    """
    words = [(list(word), n) for word, n in word_counts.items()]
    merges = []
    for new_id in range(256, 256 + n_merges):
        pair_counts = Counter()
        for ids, n in words:
            for pair in zip(ids, ids[1:]):
                pair_counts[pair] += n
        if not pair_counts:
            break
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        merges.append(best)
        words = [(merge_pair(ids, best, new_id), n) for ids, n in words]
    return merges


def train_bpe(word_counts: Mapping[bytes, int], n_merges: int) -> list[Pair]:
    """The merges of `train_bpe_plain`, fast: recount only words that change.

    A heap holds (-count, pair), so its smallest entry obeys the same rule for ties.
    A changed count makes an entry stale; it is dropped when it comes up.
    """
    words, counts = [list(word) for word in word_counts], list(word_counts.values())
    pair_counts, found_in = Counter(), defaultdict(set)
    for i, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pair_counts[pair] += counts[i]
            found_in[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)

    merges = []
    while heap and len(merges) < n_merges:
        count, best = heappop(heap)
        if -count != pair_counts[best]:
            continue
        new_id = 256 + len(merges)
        merges.append(best)
        change = Counter()
        for i in found_in.pop(best):
            old, words[i] = words[i], merge_pair(words[i], best, new_id)
            for pair in zip(old, old[1:]):
                change[pair] -= counts[i]
            for pair in zip(words[i], words[i][1:]):
                change[pair] += counts[i]
                found_in[pair].add(i)
        for pair, difference in change.items():
            if difference:
                pair_counts[pair] += difference
                if pair_counts[pair]:
                    heappush(heap, (-pair_counts[pair], pair))
    return merges


def ranks_from_merges(merges: Iterable[Pair]) -> dict[bytes, int]:
    """Spell every token out in bytes: {bytes: rank}, the form tiktoken takes."""
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return {token: rank for rank, token in enumerate(tokens)}


def learn_ranks(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Ranks for a vocabulary of 20 control tokens, 256 bytes and merges of `texts`.

    Raises ValueError when `vocab_size` is too small for the first two, or more than
    the texts can fill.
    """
    smallest = len(CONTROL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(CONTROL_TOKENS)} control"
            f" tokens and 256 bytes need at least {smallest}"
        )
    texts = [texts] if isinstance(texts, str) else texts
    merges = train_bpe(count_words(texts), vocab_size - smallest)
    if smallest + len(merges) < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too large for this text: with"
            f" {smallest + len(merges)} every word of it is a token; give more text"
        )
    return ranks_from_merges(merges)


def encode_plain(
    text: str, ranks: Mapping[bytes, int], pattern: str = PATTERN
) -> list[int]:
    """Encode without tiktoken: within a word, join the pair of lowest rank first.

    Returns ranks. A Tokenizer's ids are these plus its number of control tokens.
    """
    check_text(text)
    encoded = []
    for word in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in word.encode("utf-8")]
        while len(parts) > 1:
            joined = [left + right for left, right in zip(parts, parts[1:])]
            best = min(joined, key=lambda token: ranks.get(token, len(ranks)))
            if best not in ranks:
                break
            i = joined.index(best)
            parts[i : i + 2] = [best]
        encoded += [ranks[part] for part in parts]
    return encoded


def fast_encode(
    encoding: tiktoken.Encoding, texts: list[str]
) -> Iterable[list[int]]:
    """The ranks of each text by tiktoken; of long texts on several threads."""
    if len(texts) > 1 and sum(map(len, texts)) > 10_000 * len(texts):
        n = os.cpu_count() or 1  # handing over a short text costs too much
        return encoding.encode_ordinary_batch(texts, num_threads=n)
    return map(encoding.encode_ordinary, texts)


class Vocabulary:
    """What each id stands for: the way back from ids to text.

    tokens: the bytes of every id in order, b"" for a control token.
    control_tokens: name -> id; pad_id is None where there is no <pad>.
    """

    def __init__(self, tokens: list[bytes], control_tokens: dict[str, int]):
        self.tokens = tokens
        self.control_tokens = control_tokens
        self.vocab_size = len(tokens)
        self.unk_id = control_tokens.get("<unk>")
        self.bos_id = control_tokens["<s>"]
        self.eos_id = control_tokens["</s>"]
        self.pad_id = control_tokens.get("<pad>")

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, b"" for a control token."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is not in 0 to {self.vocab_size - 1}:"
                " do the ids come from another tokenizer?"
            )
        return self.tokens[token_id]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The tokens' bytes joined; they may begin or end within a character."""
        return b"".join(map(self.id_to_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text; what is no valid UTF-8 becomes the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `decode`, piece by piece, each of whole characters.

        A character whose bytes are spread over several tokens waits for the last.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            if text := decoder.decode(self.id_to_bytes(token_id)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class Tokenizer(Vocabulary):
    """Text to ids and back. Control tokens come first: id = rank + n_control.

    ranks: {bytes: rank} in order of rank from 0, the 256 single bytes first.
    version: the generation of Mistral's chat format that the control tokens serve.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str = PATTERN,
        control_names: Iterable[str] = CONTROL_TOKENS,
        version: str = "v3",
    ):
        control_tokens = {name: i for i, name in enumerate(control_names)}
        self.n_control = len(control_tokens)
        super().__init__([b""] * self.n_control + list(ranks), control_tokens)
        self.ranks, self.pattern, self.version = ranks, pattern, version
        self.encoding = tiktoken.Encoding(
            "minimistral", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn a vocabulary: 20 control tokens, 256 bytes, the rest merges."""
        return cls(learn_ranks(texts, vocab_size))

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text. Names of control tokens in it are ordinary text."""
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(
        self, texts: list[str], bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """The ids of each text; long texts are encoded on several threads."""
        for text in texts:
            check_text(text)
        begin, end = [self.bos_id] * bos, [self.eos_id] * eos
        return [begin + ids + end for ids in self.encode_texts(texts)]

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Ids without <s> and </s>, of texts that have been checked."""
        if FAST:
            batch = fast_encode(self.encoding, texts)
        else:
            batch = [encode_plain(text, self.ranks, self.pattern) for text in texts]
        return [[rank + self.n_control for rank in ranks] for ranks in batch]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tekken.json (ours too), a SentencePiece model, or a folder."""
        return tokenizer_files.load(path, cls)

    def save(self, path: str | Path) -> Path:
        """Write tekken.json, in Mistral's format, to a file or into a folder."""
        return tokenizer_files.save_tekken(self, path)


def load_tokenizer(folder_or_name: str | Path) -> Tokenizer:
    """The tokenizer that belongs to a model: its folder, or a shipped model's name.

    Of several files the newest wins: tekken.json, then tokenizer.model.v7, .v3, ...
    """
    path = Path(folder_or_name)
    return Tokenizer.load(path if path.is_file() else find_model(path))
