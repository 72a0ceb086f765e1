"""The postcard: one self-contained page about a trained model, and one line where there is none."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from minimistral import cli, postcard
from minimistral.tokenizer import Tokenizer

ASSETS = Path(__file__).parents[1] / "minimistral" / "assets" / "models"
SMALL = "--dim 16 --layers 1 --heads 2 --vocab-size 280 --seq-len 16 --batch-size 2 --device cpu".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a secret place")
    text = folder / "sea & <song>.txt"
    text.write_text("il était un petit navire, qui n'avait jamais navigué. " * 40, encoding="utf-8")
    out = folder / "little ship"
    assert cli.main(["train", "--corpus", str(text), "--out", str(out), "--steps", "7", *SMALL]) == 0
    return out


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def make(folder, out, *options) -> str:
    assert cli.main(["postcard", str(folder), "--out", str(out), *options]) == 0
    return out.read_text(encoding="utf-8")


def refused(capsys, *command) -> str:
    capsys.readouterr()
    assert cli.main(["postcard", *(str(part) for part in command)]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("minimistral: ") and len(error.splitlines()) == 1 and not out
    return error


class Page(HTMLParser):
    """Tags, attributes and text; every tag closed in order."""

    EMPTY = {"meta", "line", "circle", "polyline", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(trained, tmp_path):
    text = make(trained, tmp_path / "card.html")
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.tags.count("h1") == 1 and page.tags.count("svg") == 1


def test_the_page_says_what_was_done(trained, tmp_path):
    page = Page(make(trained, tmp_path / "card.html"))
    record = json.loads((trained / "record.json").read_text("utf-8"))
    for words in ("little ship", "sea & <song>.txt", "7 steps", "1 layer, width 16", "batch size 2",
                  f"{record['tokens']:,}", f"{record['evaluations'][-1][1]:.4f}",
                  f"torch {torch.__version__}", f"{record['about']['train_bytes']:,} bytes",
                  "knowing nothing", "frequencies of tokens alone"):
        assert words in page.text, words
    label = dict(page.attributes)["aria-label"]
    assert "in 7 steps" in label and f"{math.log(280):.2f}" in label


def test_the_page_keeps_private_folders_private(trained, tmp_path):
    assert "secret" not in make(trained, tmp_path / "card.html")


def test_words_of_the_learner_are_only_words(trained, tmp_path):
    text = make(trained, tmp_path / "card.html", "--title", "<script>x</script>", "--prompt", "<b>un & ")
    page = Page(text)
    assert "script" not in page.tags and "b>un" in page.text
    assert "<script>x</script>" in page.text


def test_the_same_seed_gives_the_same_page(trained, tmp_path):
    one, two = (make(trained, tmp_path / f"{n}.html", "--seed", "5") for n in "ab")
    assert one == two != make(trained, tmp_path / "c.html", "--seed", "6")


def test_the_record_knows_how_much_is_known(trained):
    about = json.loads((trained / "record.json").read_text("utf-8"))["about"]
    tokenizer = Tokenizer.load(trained / "tekken.json")
    assert about["corpus"] == "sea & <song>.txt" and about["val_tokens"] > 10
    assert 0 < about["frequencies"] < math.log(tokenizer.vocab_size)
    assert set(about["versions"]) == {"minimistral", "python", "torch"}


def test_a_shipped_model_has_a_postcard_too(tmp_path):
    page = Page(make(ASSETS / "tales-dense", tmp_path / "card.html", "--title", "Tales"))
    assert "floor: no model can do better" in page.text and "tales: " in page.text
    assert page.tags.count("circle") >= 2


def test_a_record_of_before_the_postcard_still_serves(copied, tmp_path):
    path = copied / "record.json"
    record = json.loads(path.read_text("utf-8"))
    del record["about"]
    path.write_text(json.dumps(record), "utf-8")
    page = Page(make(copied, tmp_path / "card.html"))
    assert "not recorded" in page.text and "knowing nothing" in page.text


# ---------------------------------------------------------------- bad input


def test_an_existing_file_is_kept_unless_told(trained, tmp_path, capsys):
    card = tmp_path / "card.html"
    card.write_text("mine", "utf-8")
    assert "--replace" in refused(capsys, trained, "--out", card)
    assert card.read_text("utf-8") == "mine"
    assert make(trained, card, "--replace").startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["card.html"]


def test_a_place_that_cannot_be_written_is_said_first(trained, tmp_path, capsys):
    assert "is a folder" in refused(capsys, trained, "--out", tmp_path)
    assert "there is no folder" in refused(capsys, trained, "--out", tmp_path / "no" / "card.html")


def test_a_folder_without_a_run_is_said(tmp_path, capsys):
    out = tmp_path / "card.html"
    assert "is no folder" in refused(capsys, tmp_path / "nothing", "--out", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no record.json" in refused(capsys, empty, "--out", out)
    (empty / "training").mkdir()
    assert "--resume goes on" in refused(capsys, empty, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(("change", "said"), [
    (lambda r: "{", "record.json cannot be read"),
    (lambda r: "", "record.json cannot be read"),
    (lambda r: "[1, 2]", "cannot be read as the record of a run"),
    (lambda r: json.dumps({**r, "losses": []}), "it has no losses"),
    (lambda r: json.dumps({**r, "losses": [1.0, float("nan")]}), "not finite"),
    (lambda r: json.dumps({**r, "losses": "many"}), "cannot be read"),
    (lambda r: json.dumps({**r, "seconds": None}), "cannot be read"),
    (lambda r: json.dumps({k: v for k, v in r.items() if k != "tokens"}), "it has no 'tokens'"),
    (lambda r: json.dumps({**r, "evaluations": [[1]]}), "cannot be read"),
    (lambda r: json.dumps({**r, "about": {"corpus": "x"}}), "it has no 'train_bytes'"),
])
def test_a_broken_record_is_one_line(copied, tmp_path, capsys, change, said):
    path = copied / "record.json"
    path.write_text(change(json.loads(path.read_text("utf-8"))), "utf-8")
    out = tmp_path / "card.html"
    assert said in refused(capsys, copied, "--out", out)
    assert not out.exists()


def test_a_record_that_is_not_utf8_is_one_line(copied, tmp_path, capsys):
    (copied / "record.json").write_bytes(b"\xff\xfe{}")
    assert "cannot be read" in refused(capsys, copied, "--out", tmp_path / "card.html")


def test_missing_weights_are_said(copied, tmp_path, capsys):
    (copied / "consolidated.safetensors").unlink()
    assert "copied" in refused(capsys, copied, "--out", tmp_path / "card.html")


# ---------------------------------------------------------------- its parts


@pytest.mark.parametrize("count", [1, 2, 149, 150, 151, 1000])
def test_the_curve_is_averaged_and_keeps_its_mean(count):
    losses = [10 - n / count for n in range(count)]
    curve = postcard.averaged(losses)
    assert len(curve) <= postcard.POINTS and 1 <= curve[0][0] <= curve[-1][0] <= count
    assert curve[0][1] >= curve[-1][1] and max(losses) >= curve[0][1]
    if count <= postcard.POINTS:
        assert curve == [(n + 1, loss) for n, loss in enumerate(losses)]


def test_ticks_are_round_and_inside():
    assert postcard.ticks(0, 6.9) == [0, 2, 4, 6]
    assert postcard.ticks(0, 7) == pytest.approx([0, 2, 4, 6])
    assert postcard.ticks(0, 4500)[-1] == 4000


def test_variety_sees_repetition():
    assert postcard.variety([1, 2] * 20) < 0.1 and postcard.variety(list(range(30))) == 1
    assert postcard.variety([1, 2]) == 1


def test_a_model_that_ends_at_once_has_a_page(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(postcard.mm, "generate", lambda model, starts, *a, **o: [[] for _ in starts])
    assert "ends the text at once" in make(trained, tmp_path / "card.html")


def test_labels_of_the_lines_stay_apart():
    card = postcard.Card([(1, 5.0), (10, 2.0)], [(10, 2.1)], 10, 100, 1.0,
                         {"frequencies": 4.99, "floor": 2.05})
    svg = postcard.curve_svg(card, 150)  # ln 150 = 5.01
    heights = [float(y) for y in re.findall(r'<text x="744" y="([\d.]+)" text-anchor="end">[a-z]', svg)]
    assert len(heights) == 3
    assert all(abs(a - b) >= 16 for i, a in enumerate(heights) for b in heights[:i])


@pytest.mark.parametrize("minutes, said", [(0.005, "under a second"), (0.5, "30 seconds"), (90, "90 minutes")])
def test_a_duration_is_never_nothing(minutes, said):
    assert postcard.duration(minutes) == said
