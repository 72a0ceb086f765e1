"""Chapter 1: its short parallel texts, its pictures, its explorer, and the first rung of the ladder."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from zlib import crc32

import torch
from torch import nn

from minimistral.tokenizer import Tokenizer, encode_plain, ranks_from_merges

from ..figures import BLACK, BLUE, GREEN, ORANGE, new_figure

# ---------------------------------------------------------------- parallel texts

# The same few sentences, written for this course. In the Chinese one, blanks mark the words;
# they are taken out before it is encoded. Code has no translation: it is a text like any other.
TEXTS = {
    "English": (
        "The old woman opened the window and looked at the snow. Her grandson had written a letter"
        " from the city: he would come home before the end of winter. She read it twice, smiled,"
        " and put it next to the lamp. Outside, the children were already building a castle, and"
        " nobody thought of school."
    ),
    "French": (
        "La vieille femme ouvrit la fenêtre et regarda la neige. Son petit-fils avait écrit une"
        " lettre de la ville : il rentrerait à la maison avant la fin de l'hiver. Elle la lut deux"
        " fois, sourit et la posa à côté de la lampe. Dehors, les enfants construisaient déjà un"
        " château, et personne ne pensait à l'école."
    ),
    "German": (
        "Die alte Frau öffnete das Fenster und sah in den Schnee. Ihr Enkel hatte einen Brief aus"
        " der Stadt geschrieben: Er würde vor dem Ende des Winters nach Hause kommen. Sie las ihn"
        " zweimal, lächelte und legte ihn neben die Lampe. Draußen bauten die Kinder schon ein"
        " Schloss, und niemand dachte an die Schule."
    ),
    "Spanish": (
        "La anciana abrió la ventana y miró la nieve. Su nieto había escrito una carta desde la"
        " ciudad: volvería a casa antes del final del invierno. La leyó dos veces, sonrió y la dejó"
        " junto a la lámpara. Fuera, los niños ya construían un castillo, y nadie pensaba en la"
        " escuela."
    ),
    "Italian": (
        "La vecchia aprì la finestra e guardò la neve. Suo nipote aveva scritto una lettera dalla"
        " città: sarebbe tornato a casa prima della fine dell'inverno. La lesse due volte, sorrise"
        " e la mise accanto alla lampada. Fuori i bambini costruivano già un castello, e nessuno"
        " pensava alla scuola."
    ),
    "Polish": (
        "Stara kobieta otworzyła okno i spojrzała na śnieg. Jej wnuk napisał list z miasta: wróci"
        " do domu przed końcem zimy. Przeczytała go dwa razy, uśmiechnęła się i położyła obok"
        " lampy. Na dworze dzieci już budowały zamek i nikt nie myślał o szkole."
    ),
    "Greek": (
        "Η γριά γυναίκα άνοιξε το παράθυρο και κοίταξε το χιόνι. Ο εγγονός της είχε γράψει ένα"
        " γράμμα από την πόλη: θα γύριζε σπίτι πριν από το τέλος του χειμώνα. Το διάβασε δύο φορές,"
        " χαμογέλασε και το άφησε δίπλα στη λάμπα. Έξω τα παιδιά έχτιζαν ήδη ένα κάστρο και κανείς"
        " δεν σκεφτόταν το σχολείο."
    ),
    "Chinese": (
        "老 奶奶 打开 窗户 ， 看着 外面 的 雪 。 她 的 孙子 从 城里 写 了 一封 信 ： 他 会 在 冬天 结束"
        " 之前 回家 。 她 读 了 两遍 ， 笑了笑 ， 把 信 放在 灯 旁边 。 外面 ， 孩子们 已经 在 堆 一座"
        " 城堡 ， 谁 也 没有 想到 上学 。"
    ),
    "Python code": (
        "def unread(letters, today):\n"
        '    """The letters that came before today, the oldest first."""\n'
        "    found = []\n"
        "    for letter in letters:\n"
        "        if letter.date < today and not letter.opened:\n"
        "            letter.opened = True\n"
        "            found.append(letter)\n"
        "    return sorted(found, key=lambda letter: letter.date)\n"
    ),
}


def text_in(language: str) -> str:
    """The text as it is encoded."""
    return TEXTS[language].replace(" ", "") if language == "Chinese" else TEXTS[language]


def words_in(language: str) -> int:
    """How many words it has: runs of letters and digits, the Chinese ones cut by hand."""
    return len(re.findall(r"\w+", TEXTS[language]))


def tokens_per_word(tokenizer: Tokenizer) -> list[float]:
    """For each of the texts, in their order."""
    return [len(tokenizer.encode(text_in(name))) / words_in(name) for name in TEXTS]


@cache
def real_vocabularies() -> dict[str, Tokenizer]:
    """Two vocabularies of Mistral's, from the installed mistral-common; says what is missing."""
    try:
        import mistral_common
    except ImportError:
        print("mistral-common is not installed, so Mistral's own vocabularies are missing here;"
              "\npip install 'mistral-common[sentencepiece]' brings them. We go on with ours.")
        return {}
    folder = Path(mistral_common.__file__).parent / "data"
    found = {}
    for name, pattern in (("Mistral 7B", "tokenizer.model.v1"), ("Tekken", "tekken_*.json")):
        try:
            found[name] = Tokenizer.load(min(folder.glob(pattern)))
        except (ImportError, ValueError) as error:
            kind = "sentencepiece is not installed" if isinstance(error, ImportError) else "no file"
            print(f"{name}'s vocabulary cannot be read ({kind}). We go on without it.")
    return found


# ---------------------------------------------------------------- tokens as text

FONT = "DejaVu Sans Mono"  # comes with Matplotlib
WIDTH = 78  # characters in a line
TINTS = ("#CFE6F5", "#FBDCC4", "#CBEBDD", "#F4DCE9")  # black text on each is over 12:1


@cache
def _letters() -> set[int]:
    """The characters that the font of the pictures has."""
    from matplotlib import font_manager

    path = font_manager.findfont(FONT)
    return set(font_manager.get_font(path).get_charmap())


def visible(token: bytes) -> str:
    """A token as one can read it: its text, or its bytes in hexadecimal where it has none."""
    try:
        text = token.decode("utf-8").replace("\n", "⏎").replace("\t", "⇥")
    except UnicodeDecodeError:
        text = ""
    if text and all(c.isprintable() and ord(c) in _letters() for c in text):
        return text
    return "".join(f"‹{byte:02X}›" for byte in token)


def quoted(token: bytes) -> str:
    return f"“{visible(token)}”".replace(" ", "\u00a0")  # a line must not end at the blank


def cut(text: str, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The text as its tokens' bytes."""
    spelled = {rank: token for token, rank in ranks.items()}
    return [spelled[rank] for rank in encode_plain(text, ranks)]


def set_in_lines(tokens: Sequence[bytes], width: int = WIDTH) -> list[list[tuple[int, int, str]]]:
    """Tokens set in lines: (index, column, text). A line ends where the next token has no room."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for i, token in enumerate(tokens):
        text = visible(token)
        if column and column + len(text) > width:
            lines.append([])
            column = 0
        lines[-1].append((i, column, text))
        column += len(text)
        if token.endswith(b"\n") and i + 1 < len(tokens):
            lines.append([])
            column = 0
    return lines


def draw_tokens(ax, line: Sequence[tuple[int, int, str]], tokens: Sequence[bytes], y: float) -> None:
    """One line of boxes: tinted for a merged token, equal tokens alike; white for a byte."""
    from matplotlib.patches import Rectangle

    for i, column, text in line:
        face = "white" if len(tokens[i]) == 1 else TINTS[crc32(tokens[i]) % len(TINTS)]
        ax.add_patch(Rectangle((column, y), len(text), 0.8, facecolor=face, edgecolor="#444444",
                               linewidth=1))
        ax.text(column + len(text) / 2, y + 0.38, text, family=FONT, fontsize=12, ha="center",
                va="center", color=BLACK)


def token_picture(tokens: Sequence[bytes], title: str, fewest_lines: int = 2):
    """A text with a box around every token."""
    lines = set_in_lines(tokens)
    count = max(len(lines), fewest_lines)
    figure, ax = new_figure(8.6, 0.36 * count + 0.6)
    for row, line in enumerate(lines):
        draw_tokens(ax, line, tokens, -row)
    ax.set(xlim=(-0.5, WIDTH + 1), ylim=(-count + 0.9, 1.0), title=title)
    ax.axis("off")
    return figure


def steps_picture(steps: Sequence[Sequence[bytes]], labels: Sequence[str], title: str):
    """The same text cut in more and more merged tokens, a line for each step."""
    figure, ax = new_figure(7.6, 0.42 * len(steps) + 0.5)
    for row, (tokens, label) in enumerate(zip(steps, labels)):
        column, line = 0, []
        for i, token in enumerate(tokens):
            line.append((i, column, visible(token)))
            column += len(visible(token))
        draw_tokens(ax, line, tokens, -row)
        ax.text(column + 1.5, -row + 0.38, label, va="center", color=BLACK)
    longest = max(sum(len(visible(t)) for t in tokens) for tokens in steps)
    ax.set(xlim=(-0.5, longest + 30), ylim=(-len(steps) + 0.9, 1.0), title=title)
    ax.axis("off")
    return figure


# ---------------------------------------------------------------- the explorer's logic


def first_tokens(ranks: Mapping[bytes, int], size: int) -> dict[bytes, int]:
    """The vocabulary as it was when it had ``size`` tokens: the first of the list."""
    return {token: rank for token, rank in ranks.items() if rank < size}


def vocabulary_explorer(merges: Mapping[str, Sequence[tuple[int, int]]]) -> Callable:
    """The explorer's function: draw(text, vocabulary, size).

    merges: name of a vocabulary -> its merges. A size beyond the last merge is the whole list.
    """
    ranks = {name: ranks_from_merges(pairs) for name, pairs in merges.items()}

    def draw(text: str, vocabulary: str, size: int):
        all_ranks = ranks[vocabulary]
        some = first_tokens(all_ranks, size)
        tokens = cut(text, some)
        count, length = len(tokens), len(text.encode("utf-8"))
        merged = sorted({t for t in tokens if len(t) > 1}, key=lambda t: (-len(t), tokens.index(t)))
        sentence = f"With {len(some)} tokens of {vocabulary}: {length} bytes become {count} tokens"
        if count:
            sentence += f", {length / count:.1f} bytes each"
        sentence += "."
        if merged:
            sentence += f" The longest: {', '.join(map(quoted, merged[:3]))}."
        if size > len(all_ranks):
            sentence += (f" Its training text gives no more than {len(all_ranks)}:"
                         " every word of it is a token.")
        listed = (merged or list(dict.fromkeys(tokens)))[:12]
        table = {"token": [quoted(t) for t in listed], "number": [some[t] for t in listed]}
        title = f"With {len(some)} tokens to choose from, {length} bytes become {count}"
        return token_picture(tokens, title), sentence, table
    return draw


def becomes_whole(word: str, ranks: Mapping[bytes, int]) -> int | None:
    """The size of the vocabulary at which ``word`` is a single token; None if it never is."""
    rank = ranks.get(word.encode("utf-8"))
    return None if rank is None else rank + 1


# ---------------------------------------------------------------- pictures of numbers


def cost_picture(costs: Mapping[str, Sequence[float]], title: str):
    """Tokens per word: a row for each text, a mark for each vocabulary, slightly apart in height."""
    names = list(TEXTS)
    figure, ax = new_figure(7.8, 4.4)
    styles = ((BLACK, "s"), (ORANGE, "^"), (BLUE, "o"), (GREEN, "D"))
    for n, ((name, values), (colour, marker)) in enumerate(zip(costs.items(), styles)):
        rows = [row + 0.2 * (n - (len(costs) - 1) / 2) for row in range(len(names))]
        ax.scatter(values, rows, s=70, color=colour, marker=marker, label=name, zorder=3)
    ax.set_yticks(range(len(names)), names)
    ax.grid(axis="y", color="#dddddd")
    ax.set(title=title, xlabel="tokens per word", xlim=(0, None), ylim=(len(names) - 0.5, -0.5))
    ax.legend(loc="upper right", framealpha=1, edgecolor="white")  # where no mark is
    return figure


def cost_table(costs: Mapping[str, Sequence[float]]) -> tuple[list[str], list[list]]:
    """The numbers of ``cost_picture``."""
    rows = [[name, *(round(values[i], 2) for values in costs.values())]
            for i, name in enumerate(TEXTS)]
    return ["text", *costs], rows


def best_of(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the quickest of some runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


# ---------------------------------------------------------------- the ladder


def bigram(ids: torch.Tensor | None = None, size: int | None = None) -> nn.Module:
    """The row "bigram": how often each token follows each other one; no pair is impossible."""
    if ids is None:
        from ..ladder import ladder

        ids, size = ladder.tokens.ids, ladder.tokenizer.vocab_size
    counts = torch.zeros(size, size)
    counts.index_put_((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
    return nn.Embedding.from_pretrained((counts + 0.1).log())
