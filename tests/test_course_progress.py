"""Progress, predictions, and the learner's pieces in the library."""

import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from course_examples import ALL, causal, chapter_99, columns, weights_of

import minimistral as mm
import minimistral.attention as attention
from minimistral import lab
from minimistral.course import bet, check, mine, predict, progress, reveal, swap, verdict
from minimistral.course.pieces import load_pieces
from minimistral.course.swaps import signature_problem

progress_module = importlib.import_module("minimistral.course.progress")

TINY = mm.ModelConfig(
    dim=12, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, hidden_dim=20, vocab_size=11
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mm.Transformer(TINY)


IDS = torch.tensor([[1, 5, 2, 9, 3, 3, 8]])


# ---------------------------------------------------------------- progress


def test_attempts_passes_and_mistakes_are_kept(chapter_99):
    check("weights", columns), check("weights", columns), check("weights", weights_of)
    check("weights", columns)  # a pass is never lost again
    entry = json.loads((chapter_99 / "progress.json").read_text("utf-8"))["exercises"]["ch99.weights"]
    assert entry == {"status": "pass", "attempts": 4, "hints": 0, "misconceptions": {"columns": 3}}


def test_a_stub_is_no_attempt(chapter_99):
    check("weights", None)
    assert not (chapter_99 / "progress.json").exists()


def test_progress_says_what_is_yours(chapter_99):
    check("weights", weights_of), check("causal", causal)
    text = str(progress())
    assert "Core pieces that are yours: 1 of 1 (causal)" in text
    assert f"2 of {len(ALL)}" in text and "1 of 1" in text
    assert "<table" in progress()._repr_html_() and 'scope="col"' in progress()._repr_html_()


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"exercises": []}', '{"exercises": {"a": 1}}', "\x00\xff"]
)
def test_a_damaged_file_is_kept_beside_and_a_new_one_begun(chapter_99, damage):
    chapter_99.mkdir()
    (chapter_99 / "progress.json").write_text(damage, "latin-1")
    check("weights", weights_of)
    assert (chapter_99 / "progress.damaged-1.json").read_text("latin-1") == damage
    assert json.loads((chapter_99 / "progress.json").read_text("utf-8"))["exercises"]


def test_a_second_damage_does_not_overwrite_the_first(chapter_99):
    chapter_99.mkdir()
    for n in (1, 2):
        (chapter_99 / "progress.json").write_text(f"damage {n}", "utf-8")
        check("weights", weights_of)
    names = sorted(path.name for path in chapter_99.iterdir())
    assert names == ["progress.damaged-1.json", "progress.damaged-2.json", "progress.json"]


def test_a_folder_that_cannot_be_written_stops_nothing(chapter_99):
    chapter_99.write_text("a file where the folder should be", "utf-8")
    assert check("weights", weights_of)
    assert "1 of" in str(progress())


def test_two_writers_lose_nothing(chapter_99):
    def count():
        for _ in range(20):
            progress_module.update_progress(
                lambda data: data["predictions"].__setitem__("n", data["predictions"].get("n", 0) + 1)
            )

    threads = [threading.Thread(target=count) for _ in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert progress_module.load_progress()["predictions"]["n"] == 60
    assert not (chapter_99 / "progress.lock").exists()


def test_a_lock_left_by_a_crash_is_taken_over(chapter_99):
    chapter_99.mkdir()
    (chapter_99 / "progress.lock").touch()
    assert check("weights", weights_of)
    assert (chapter_99 / "progress.json").exists()


def test_a_copy_of_the_course_has_one_work_folder_for_all_its_notebooks(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIMISTRAL_TESTING", raising=False)
    monkeypatch.delenv("MINIMISTRAL_WORK", raising=False)
    for folder in ("notebooks", "exercises"):
        (tmp_path / "fetched" / folder).mkdir(parents=True)
    for folder in ("notebooks", "exercises"):
        monkeypatch.chdir(tmp_path / "fetched" / folder)
        assert progress_module.work_folder() == tmp_path / "fetched" / "work"


def test_the_nearest_work_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIMISTRAL_TESTING", raising=False)
    monkeypatch.delenv("MINIMISTRAL_WORK", raising=False)
    (tmp_path / "work" / "exercises").mkdir(parents=True)
    for here in (tmp_path, tmp_path / "work", tmp_path / "work" / "exercises"):
        monkeypatch.chdir(here)
        assert progress_module.work_folder() == tmp_path / "work"


def test_elsewhere_the_work_folder_is_that_of_the_course(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIMISTRAL_TESTING", raising=False)
    monkeypatch.delenv("MINIMISTRAL_WORK", raising=False)
    monkeypatch.chdir(tmp_path)
    assert progress_module.work_folder() == lab.course_work_folder() == Path(__file__).parents[1] / "work"


def test_without_a_course_the_work_folder_would_be_here(tmp_path, monkeypatch):
    def absent():
        raise FileNotFoundError

    monkeypatch.delenv("MINIMISTRAL_TESTING", raising=False)
    monkeypatch.delenv("MINIMISTRAL_WORK", raising=False)
    monkeypatch.setattr(lab, "course_folder", absent)
    monkeypatch.chdir(tmp_path)
    assert progress_module.work_folder() == lab.course_work_folder() == tmp_path / "work"


def test_automated_runs_start_from_nothing(tmp_path):
    code = "from minimistral.course.progress import work_folder; print(work_folder() == work_folder(), work_folder())"
    environment = {**os.environ, "MINIMISTRAL_TESTING": "1", "MINIMISTRAL_WORK": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        .stdout.split(maxsplit=1)
        for _ in range(2)
    ]
    assert [same for same, _ in said] == ["True", "True"]
    folders = {Path(folder.strip()) for _, folder in said}
    assert len(folders) == 2 and tmp_path not in folders  # one for each process, and not the learner's


# ---------------------------------------------------------------- predictions


def test_a_prediction_is_asked_kept_and_compared(chapter_99):
    question = "Which axis sums to one?", ("columns", "rows")
    assert "B  rows" in str(predict("axis", *question))
    assert "You say: A  columns" in str(predict("axis", *question, answer="a"))
    told = str(reveal("axis", "B", "Each query shares out one unit.", options=question[1]))
    assert "You said: A. A surprise, then." in told and "It is B: rows" in told
    assert "Right." in str(reveal("axis", "A"))


def test_numbers_are_compared_by_their_factor(chapter_99):
    assert "answer=<your number>" in str(predict("n", "How many?"))
    predict("n", "How many?", answer="1,000")
    assert "Off by a factor of 2.50." in str(reveal("n", torch.tensor(400.0)))


@pytest.mark.parametrize("typed, read", [
    ("14.5 GB", "14.5"), ("14,5", "14.5"), ("7,240 weights", "7240"), ("-3", "-3"), (14, "14"), (".5", "0.5"),
    ("1e3", "1000"),
])
def test_a_number_may_come_with_its_unit(typed, read, chapter_99):
    assert str(predict("n", "How many?", answer=typed)).endswith(f"You say: {read}")


def test_unanswered_is_fine_and_nonsense_is_not(chapter_99):
    assert "You said" not in str(reveal("never asked", 3.0))
    with pytest.raises(ValueError, match="none of A, B"):
        predict("axis", "Which?", ("a", "b"), answer="C")
    for nonsense in ("many", (14, 5)):
        with pytest.raises(ValueError, match="is no number"):
            predict("n", "How many?", answer=nonsense)


def test_bets_on_headlines(chapter_99):
    assert "D  not checkable" in str(bet(21)) and "black boxes" in str(bet(21))
    bet(21, "false")
    told = str(verdict(21, "true with a condition", "One can look, and sees little."))
    assert "You said: C." in told and "It is B: true with a condition" in told
    with pytest.raises(ValueError, match="none of true"):
        verdict(21, "maybe")
    with pytest.raises(ValueError, match="no headline 99"):
        bet(99)


# ---------------------------------------------------------------- swap


def forgetful(q, k, v, mask):
    return v.repeat_interleave(q.shape[2] // v.shape[2], 2)


@torch.no_grad()
def test_a_swapped_plain_function_runs_inside_the_model(model):
    usual = model(IDS)
    with swap("attention.attend", forgetful):
        changed = model(IDS)
    assert not torch.allclose(usual, changed)
    assert torch.equal(model(IDS), usual)


@torch.no_grad()
def test_swapping_in_the_same_function_changes_nothing(model):
    def attend(q, k, v, mask):
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)

    with swap("attention.attend", attend):
        torch.testing.assert_close(model(IDS), model(IDS))
        swapped = model(IDS)
    torch.testing.assert_close(swapped, model(IDS), rtol=1e-4, atol=1e-5)


def test_a_swap_ends_with_an_exception_too():
    original, fast = attention.attend, attention.FAST
    with pytest.raises(RuntimeError, match="inside"):
        with swap("attention.attend", forgetful):
            assert attention.attend is forgetful and not attention.FAST
            raise RuntimeError("inside")
    assert attention.attend is original and attention.FAST == fast


def test_every_name_that_refers_to_it_is_replaced():
    import minimistral.rope as rope

    original = rope.rotate
    with swap("rope.rotate", lambda x, cos, sin: x) as mine_:
        assert attention.rotate is rope.rotate is mine_
    assert attention.rotate is rope.rotate is original


def test_swaps_that_overlap_end_in_any_order():
    original = attention.attend

    def other(q, k, v, mask):
        return v

    first, second = swap("attention.attend", forgetful), swap("attention.attend", other)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert attention.attend is other
    second.__exit__(None, None, None)
    assert attention.attend is original


def test_several_swaps_and_methods():
    layers = importlib.import_module("minimistral.layers")
    forward = layers.RMSNorm.forward
    with swap({"attention.attend": forgetful, "minimistral.layers.RMSNorm.forward": lambda self, x: x}):
        assert attention.attend is forgetful
        x = torch.ones(1, 12) * 3
        assert torch.equal(layers.RMSNorm(12, 1e-5)(x), x)
    assert layers.RMSNorm.forward is forward


def test_a_swapped_class_is_used_by_models_built_inside(model):
    layers = importlib.import_module("minimistral.layers")

    class MyNorm(layers.RMSNorm):
        pass

    with swap("layers.RMSNorm", MyNorm):
        inside = mm.Transformer(TINY)
    assert type(inside.norm) is MyNorm and type(model.norm) is layers.RMSNorm


@pytest.mark.parametrize(
    "target, replacement, words",
    [
        ("attention.attend", lambda q, k, v: v, "mask is missing"),
        ("attention.attend", lambda q, v, k, mask: v, "the order differs"),
        ("attention.attend", lambda q, k, v, mask, scale: v, "scale is not in it"),
        ("attention.may_attend", lambda query_positions, key_positions, window: 1, "window needs a default"),
        ("attention.attend", 3, "must be replaced by a function or class"),
        ("layers.RMSNorm", forgetful, "is a class"),
        ("attention.atend", forgetful, "the library has nothing called"),
        ("atention.attend", forgetful, "the library has nothing called"),
        ("attention", forgetful, "say module and name"),
    ],
)
def test_an_unfit_replacement_is_refused_before_anything_changes(target, replacement, words):
    original = attention.attend
    with pytest.raises(ValueError, match=words):
        with swap(target, replacement):
            pass
    assert attention.attend is original


def test_extra_parameters_with_defaults_fit():
    assert signature_problem("attention.attend", attention.attend, lambda q, k, v, mask, p=0: v) is None
    assert signature_problem("attention.attend", attention.attend, lambda *args: args) is None


# ---------------------------------------------------------------- pieces

NEEDED = 0  # a constant of the notebook


def difference_of(a, b):
    """A helper of the notebook."""
    return torch.subtract(a[..., :, None], b[..., None, :])


def my_causal(query_positions, key_positions):
    return difference_of(query_positions, key_positions) >= NEEDED


@pytest.mark.parametrize("here, place", [(".", "work/mine"), ("work/notebooks", "../mine")])
def test_a_passed_piece_is_saved_with_what_it_needs(chapter_99, monkeypatch, here, place):
    folder = chapter_99.parent / here
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    told = check("causal", my_causal)
    assert f"saved to {Path(place) / 'attention.py'};" in told.notes[-1], told
    text = (chapter_99 / "mine" / "attention.py").read_text("utf-8")
    assert "def difference_of" in text and "NEEDED = 0" in text and "import torch" in text


def causal_entry(source):
    """A piece as a notebook would define it."""
    import linecache

    linecache.cache["<cell>"] = (len(source), None, source.splitlines(True), "<cell>")
    names = {"__name__": "__main__", "torch": torch}
    exec(compile(source, "<cell>", "exec"), names)
    return names["causal"]


GOOD = "def causal(query_positions, key_positions):\n    return key_positions[None] <= query_positions[:, None]\n"
BETTER = "def causal(query_positions, key_positions):\n    return ~(key_positions[None] > query_positions[:, None])\n"


def test_passing_again_replaces_the_section_and_nothing_else(chapter_99):
    path = chapter_99 / "mine" / "attention.py"
    check("causal", causal_entry(GOOD))
    path.write_text(path.read_text("utf-8") + "\n# my own note\n", "utf-8")
    check("causal", causal_entry(BETTER))
    text = path.read_text("utf-8")
    assert text.count("# ---- piece: causal") == 1 and "~(" in text and "<=" not in text
    assert text.endswith("# my own note\n")
    compile(text, "mine", "exec")


def test_a_wrong_piece_never_replaces_a_right_one(chapter_99):
    check("causal", causal_entry(GOOD))
    check("causal", causal_entry(GOOD.replace("<=", "<")))
    pieces, problems = load_pieces()
    assert list(pieces) == ["attention.causal"] and not problems


def test_a_saved_piece_that_broke_is_reported_and_skipped(chapter_99):
    path = chapter_99 / "mine" / "attention.py"
    for damage, words in (("<", "no longer passes"), ("<= (", "cannot be used (SyntaxError")):
        check("causal", causal_entry(GOOD))
        path.write_text(path.read_text("utf-8").replace("<=", damage), "utf-8")
        pieces, problems = load_pieces()
        assert not pieces and words in problems[0] and "the library's is" in problems[0]


def test_a_piece_that_leans_on_the_notebook_is_not_saved(chapter_99):
    source = "table = torch.ones(9, 9).tril().bool()\n" + GOOD.replace(
        "key_positions[None] <= query_positions[:, None]",
        "table[query_positions[:, None], key_positions[None]]",
    )
    result = check("causal", causal_entry(source))
    assert result.passed and "Not saved as your piece" in result.notes[-1]
    assert not (chapter_99 / "mine").exists()


def test_a_lambda_passes_but_is_not_saved(chapter_99):
    result = check("causal", lambda query_positions, key_positions:
                   key_positions[None] <= query_positions[:, None])
    assert result.passed and "Write it with def" in result.notes[-1]
    assert not (chapter_99 / "mine").exists()


def test_a_piece_takes_its_constants_along(chapter_99):
    constants = 'INF = float("-inf")\nKIND = torch.bool\nEDGES = (0, [1, "x"])\n'
    source = constants + GOOD.replace(
        "    return key_positions[None] <=",
        "    assert INF < EDGES[0]\n    return torch.ones(1, dtype=KIND) & (key_positions[None] <=",
    ).replace("query_positions[:, None]\n", "query_positions[:, None])\n")
    result = check("causal", causal_entry(source))
    assert result.passed and "It is yours now" in result.notes[-1]
    assert list(load_pieces()[0]) == ["attention.causal"]


def test_a_class_written_in_a_cell_has_a_source():
    from minimistral.course.source import source_of

    source = "import torch\n\n@torch.no_grad()\ndef f():\n    pass\n\nclass Norm:\n    def forward(self):\n        return 1\n"
    import linecache

    linecache.cache["<cell 2>"] = (len(source), None, source.splitlines(True), "<cell 2>")
    names = {"__name__": "__main__"}
    exec(compile(source, "<cell 2>", "exec"), names)
    assert source_of(names["Norm"]) == "class Norm:\n    def forward(self):\n        return 1\n"
    assert source_of(names["f"]).startswith("@torch.no_grad()")
    with pytest.raises(OSError):
        source_of(len)


@torch.no_grad()
def test_mine_is_the_model_with_the_pieces(chapter_99, tmp_path, monkeypatch):
    torch.manual_seed(0)
    original = mm.Transformer(TINY)
    mm.save_model(original, tmp_path / "model")
    used = []

    def watching(query_positions, key_positions):
        return key_positions[..., None, :] <= query_positions[..., :, None]

    check("causal", watching)
    yours = mine(str(tmp_path / "model"))
    assert list(yours.pieces) == ["attention.causal"] and isinstance(yours, mm.Transformer)
    assert "attention.causal" in repr(yours) and not yours.problems
    yours.pieces["attention.causal"] = lambda query_positions, key_positions: (
        used.append(1), attention.within_window(query_positions, key_positions, 10**9)
        & (key_positions[..., None, :] <= query_positions[..., :, None])
    )[1]
    torch.testing.assert_close(yours(IDS), original(IDS))
    assert used
    wanted = mm.generate(original, IDS[0].tolist(), 5)
    count = len(used)
    assert mm.generate(yours, IDS[0].tolist(), 5) == wanted and len(used) > count
    assert attention.causal.__module__ == "minimistral.attention"


def test_with_no_piece_mine_is_the_library(chapter_99, tmp_path):
    mm.save_model(mm.Transformer(TINY), tmp_path / "model")
    yours = mine(str(tmp_path / "model"))
    assert yours.pieces == {} and "no piece of yours yet" in repr(yours)


@torch.no_grad()
def test_mine_runs_and_writes_with_a_folder_of_a_checkpoint(chapter_99, tmp_path):
    """Not only shipped models: any folder, whose path stays out of the page."""
    folder = tmp_path / "somewhere" / "a-model"
    mm.save_model(mm.load_model("tales-dense"), folder, layout="hf")
    mm.load_tokenizer("tales-dense").save(folder / "tekken.json")
    yours = mine(folder)
    assert repr(yours).startswith("a-model, ") and "somewhere" not in repr(yours)
    prompt = "The golden ring\n"
    assert yours.write(prompt, 12) == mine().write(prompt, 12)
