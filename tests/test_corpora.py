"""The corpora: what they hold, their floor, and one clear error for each bad text."""

import functools
import hashlib
import http.server
import math
import threading

import pytest

from minimistral import corpora_files
from minimistral.corpora import load_corpus, split, tales_floor
from minimistral.corpora_files import fetch_file
from minimistral.tales import log_probability, parse_tale

PLAY = b"".join(b"Line %d of a play that nobody wrote.\n" % i for i in range(20_000))


class Words:
    """A tokenizer by spaces: enough to count with."""

    def encode_batch(self, texts):
        return [text.split() for text in texts]


# ------------------------------------------------------------------ tales


def test_tales_come_in_the_number_asked_for_and_the_same_for_a_seed():
    corpus = load_corpus("tales", n_tales=50, val_tales=20, seed=3)
    assert len(corpus.train_documents) == 50 and len(corpus.val_documents) == 20
    assert corpus == load_corpus("tales", n_tales=50, val_tales=20, seed=3)
    assert corpus != load_corpus("tales", n_tales=50, val_tales=20, seed=4)
    assert corpus.train == "\n\n".join(corpus.train_documents)
    assert not set(corpus.train_documents) & set(corpus.val_documents)
    longer = load_corpus("tales", n_tales=60, val_tales=20, seed=3)
    assert longer.train_documents[:50] == corpus.train_documents
    assert longer.val_documents == corpus.val_documents
    text = (corpus.train + corpus.val).encode()
    assert hashlib.sha256(text).hexdigest() == (
        "2e7c0feb1b6c89466cab5e84d6c298e338739870d1a9269db29fdf6ae14904c1")


def test_tales_come_in_the_size_asked_for():
    corpus = load_corpus("tales", n_bytes=30_000, val_tales=5)
    assert 30_000 <= len(corpus.train.encode()) + 2 < 31_000
    assert len(load_corpus("tales", n_bytes=1, val_tales=1).train_documents) == 1


def test_the_floor_is_minus_the_log_probability_of_the_validation_tales():
    corpus = load_corpus("tales", n_tales=2, val_tales=200)
    nats = -sum(map(log_probability, corpus.val_documents))
    assert corpus.floor == pytest.approx(nats / len(corpus.val.encode()), rel=1e-12)
    tokens = sum(len(tale.split()) + 1 for tale in corpus.val_documents)
    assert corpus.floor_per_token(Words()) == pytest.approx(nats / tokens, rel=1e-12)


def test_a_language_that_was_given_need_not_be_guessed():
    corpus = load_corpus("tales", n_tales=5, val_tales=50, language="de")
    assert {parse_tale(tale).language for tale in corpus.val_documents} == {"de"}
    size = len(corpus.val.encode())
    saved = tales_floor(corpus.val_documents) - corpus.floor
    assert saved * size / 50 == pytest.approx(-math.log(0.15), rel=1e-9)


@pytest.mark.parametrize("options, message", [
    ({"n_tales": 0}, "n_tales = 0: ask for 1 or more"),
    ({"val_tales": -3}, "val_tales = -3"),
    ({"n_tales": 5, "n_bytes": 7}, "give only one"),
    ({"tales": 5}, "no option 'tales'.*n_tales, n_bytes, val_tales, seed, language"),
    ({"language": "german"}, "'german'.*en, fr, de, es, it"),
])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        load_corpus("tales", **options)


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="'tale'.*tales, python, shakespeare.*did you mean"):
        load_corpus("tale")
    with pytest.raises(ValueError, match="no option 'seed'; its options: max_bytes"):
        load_corpus("python", seed=1)
    with pytest.raises(ValueError, match="no option 'n_tales'; its options: none"):
        load_corpus("some/file.txt", n_tales=1)


# ------------------------------------------------------------------ Python's library


def test_the_library_is_real_code_without_tests():
    corpus = load_corpus("python", max_bytes=2_000_000)
    texts = corpus.train_documents + corpus.val_documents
    assert 1_000_000 < sum(len(text.encode()) for text in texts) <= 2_000_000
    assert any("class JSONDecoder" in text or "class ArgumentParser" in text
               for text in texts)
    assert corpus.floor is None and corpus.floor_per_token(Words()) is None
    assert len(corpus.val_documents) == len(texts) // 20


def test_what_of_the_library_is_left_out(tmp_path, monkeypatch):
    for name, content in {
        "b.py": b"b = 1\n", "a/x.py": "é = 1\r\n".encode(), "a.py": b"a = 1\n",
        "old.py": b"# \xe9\n", "empty.py": b"\n", "test/t.py": b"t\n", "a/tests/t.py": b"t",
        "site-packages/s.py": b"s", "idlelib/i.py": b"i", "lib2to3/l.py": b"l",
        "notes.txt": b"n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(corpora_files.sysconfig, "get_path", lambda name: str(tmp_path))
    assert corpora_files.library_texts() == ["a = 1\n", "é = 1\n", "b = 1\n"]
    assert corpora_files.library_texts(max_bytes=14) == ["a = 1\n", "é = 1\n"]
    with pytest.raises(ValueError, match="1 files of Python's library.*max_bytes = 7"):
        corpora_files.library_texts(max_bytes=7)


# ------------------------------------------------------------------ your own text


def test_a_text_file_is_cut_once(tmp_path):
    path = tmp_path / "novel.txt"
    text = "Il était une fois…\n" * 100
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    corpus = load_corpus(path)
    assert corpus.name == "novel.txt"
    assert corpus.train + corpus.val == text
    assert len(corpus.train) == len(text) * 9 // 10
    assert load_corpus(str(path)) == corpus


def test_a_folder_of_texts_is_split_by_file(tmp_path):
    for i in range(23):
        (tmp_path / f"{i:02}.txt").write_text(f"story {i} " * 20, encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    (tmp_path / "99 empty.txt").write_text(" \n", encoding="utf-8")
    corpus = load_corpus(tmp_path)
    assert [text.split()[1] for text in corpus.val_documents] == ["9", "19"]
    assert len(corpus.train_documents) == 21
    few = split("few", ["a", "b", "c"], every=10)
    assert (few.train_documents, few.val_documents) == (["a", "b"], ["c"])


def test_text_that_is_not_utf8_names_the_byte_and_the_repair(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"x" * 5_000 + "é".encode("latin-1") + b"y" * 50)
    with pytest.raises(ValueError, match="latin.txt: byte 0xe9 at offset 5000 is not UTF-8"):
        load_corpus(path)
    with pytest.raises(ValueError, match="read_text..latin-1"):
        load_corpus(tmp_path)  # in a folder too
    path.write_bytes(b"\xef\xbb\xbf" + b"x" * 7 + b"\xff" * 2)
    with pytest.raises(ValueError, match="byte 0xff at offset 10 "):
        load_corpus(path)


@pytest.mark.parametrize("content", [b"", b" \n" * 2_000, b"too short", b"x" * 999])
def test_too_little_text(tmp_path, content):
    path = tmp_path / "little.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"little.txt: \d+ bytes of text are too little"):
        load_corpus(path)


def test_a_folder_without_texts(tmp_path):
    with pytest.raises(ValueError, match="no .txt file"):
        load_corpus(tmp_path)


# ------------------------------------------------------------------ shakespeare


class Server(http.server.BaseHTTPRequestHandler):
    """Serves PLAY, whole or from an offset; its first answers may break in the middle."""

    def do_GET(self):
        box = self.server.box
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if box["ranges"] else 0
        box["starts"].append(start)
        if start >= len(PLAY):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(PLAY) - start))
        self.end_headers()
        end = box["breaks"].pop(0) if box["breaks"] else len(PLAY)
        self.wfile.write(PLAY[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.box = {"starts": [], "breaks": [], "ranges": True}
        threading.Thread(target=functools.partial(server.serve_forever, 0.02)).start()
        server.box["url"] = f"http://127.0.0.1:{server.server_port}/input.txt"
        yield server.box
        server.shutdown()


GOOD = hashlib.sha256(PLAY).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMISTRAL_DATA", str(tmp_path))
    monkeypatch.setattr(corpora_files, "SHAKESPEARE_SHA256", GOOD)
    return tmp_path


def test_shakespeare_is_found_in_the_folder_of_data(folder):
    (folder / "tinyshakespeare.txt").write_bytes(PLAY)
    corpus = load_corpus("shakespeare")
    assert (corpus.train + corpus.val).encode() == PLAY
    assert len(corpus.train) == len(PLAY) * 9 // 10 and corpus.floor is None


def test_another_file_by_that_name_is_refused(folder):
    (folder / "tinyshakespeare.txt").write_bytes(PLAY[:-1] + b"!")
    with pytest.raises(ValueError, match="another checksum.*delete the file"):
        load_corpus("shakespeare")


def test_without_the_file_the_message_says_what_to_do(folder):
    with pytest.raises(FileNotFoundError, match="download=True.*Without one.*MINIMISTRAL_DATA"):
        load_corpus("shakespeare")
    assert not list(folder.iterdir())


def test_a_download_on_request(folder, server, monkeypatch):
    monkeypatch.setattr(corpora_files, "SHAKESPEARE_URL", server["url"])
    assert load_corpus("shakespeare", download=True) == load_corpus("shakespeare")
    assert server["starts"] == [0]
    assert [path.name for path in folder.iterdir()] == ["tinyshakespeare.txt"]


def test_without_a_network(folder, monkeypatch):
    monkeypatch.setattr(corpora_files, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(ConnectionError, match="without a network, bring the file as"):
        load_corpus("shakespeare", download=True)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(tmp_path, server, ranges):
    server.update(breaks=[100_000, 300_000], ranges=ranges)
    path = tmp_path / "play.txt"
    for _ in range(2):
        with pytest.raises(ConnectionError, match="What came is kept"):
            fetch_file(server["url"], path, GOOD)
        assert not path.exists()  # never a half file under the real name
    fetch_file(server["url"], path, GOOD)
    assert path.read_bytes() == PLAY
    assert server["starts"] == ([0, 100_000, 300_000] if ranges else [0, 0, 0])
    assert [file.name for file in tmp_path.iterdir()] == ["play.txt"]


def test_a_download_that_only_lacked_its_new_name(tmp_path, server):
    (tmp_path / "play.txt.part").write_bytes(PLAY)
    fetch_file(server["url"], tmp_path / "play.txt", GOOD)
    assert (tmp_path / "play.txt").read_bytes() == PLAY


def test_another_content_is_deleted(tmp_path, server):
    with pytest.raises(ValueError, match="another checksum and was deleted"):
        fetch_file(server["url"], tmp_path / "play.txt", "0" * 64)
    assert not list(tmp_path.iterdir())
