"""The tokenizers of Mistral 7B, Mixtral and Large 2: SentencePiece models, v1 to v7.

Encoding is the sentencepiece library's, an extra of this package. Bytes and text of the ids
come from the model's own list of pieces.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from minimistral.files import write_whole
from minimistral.tokenizer import Tokenizer, Vocabulary
from minimistral.tokenizer_files import model_file_version, what_it_is

SPACE = "\u2581"  # SentencePiece's visible sign for a space


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model[.vN]` behind the interface of Tokenizer; pad_id is None.

    A space is put in front of every text before it is encoded, and taken away again from the
    decoded one. To continue a text, decode prompt and new ids together. From v3 on a few pieces
    such as [REF] are user-defined: text may become them, unlike the control tokens. Raises
    ImportError without the sentencepiece library, ValueError for a damaged file.
    """

    def __init__(self, path: str | Path):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ImportError(
                f"{path} is a SentencePiece model, which the sentencepiece library reads:"
                ' pip install "minimistral[real]"'
            ) from None
        path = Path(path)
        raw = path.read_bytes()
        try:
            if problem := what_it_is(raw):
                raise RuntimeError(problem)
            self.model = SentencePieceProcessor(model_proto=raw)
        except RuntimeError as error:
            raise ValueError(f"{path}: no SentencePiece model ({error})") from None
        pieces = range(self.model.vocab_size())
        control_tokens = {
            self.model.id_to_piece(i): i
            for i in pieces
            if self.model.IsControl(i) or self.model.IsUnknown(i)
        }
        if not {"<s>", "</s>"} <= control_tokens.keys():
            raise ValueError(f"{path}: a SentencePiece model without <s> and </s>, not Mistral's")
        self.n_control = len(control_tokens)
        control_ids = set(control_tokens.values())
        tokens = [b"" if i in control_ids else self._bytes(i) for i in pieces]
        Vocabulary.__init__(self, tokens, control_tokens)
        number = model_file_version(path)
        self.version = f"v{number}" if number else _version(control_tokens)

    def _bytes(self, token_id: int) -> bytes:
        piece = self.model.id_to_piece(token_id)
        if self.model.IsByte(token_id):  # "<0x0A>"
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode("utf-8")

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        return self.model.encode(texts)

    def decode(self, ids: Iterable[int]) -> str:
        return super().decode(ids).removeprefix(" ")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        pieces = super().decode_stream(ids)
        for first in pieces:
            if text := first.removeprefix(" "):
                yield text
            yield from pieces

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        raise ValueError("SentencePiece models are read, not trained here: use Tokenizer.train")

    def save(self, path: str | Path) -> Path:
        """Write the model unchanged: to a file, or as tokenizer.model.vN into a folder."""
        path = Path(path)
        if ".model" not in path.name:
            path = path / f"tokenizer.model.{self.version}"
        return write_whole(path, self.model.serialized_model_proto())


def _version(control_tokens: dict[str, int]) -> str:
    """The version of a bare tokenizer.model, by the first control token that it introduced."""
    for name, version in (("[SYSTEM_PROMPT]", "v7"), ("[PREFIX]", "v3"), ("[INST]", "v2")):
        if name in control_tokens:
            return version
    return "v1"
