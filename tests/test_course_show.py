"""Figures with their alt text, explorers, panels, the syllabus."""

import base64
import io
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from minimistral.course import Button, Choice, Slider, Text, show, syllabus
from minimistral.course.exercises import chapter_exercises
from minimistral.course.explorers import Explorer, StaticView, explore
from minimistral.course.figures import (
    COLOURS, bars_chart, figure_html, heatmap, lines_chart, new_figure, table_of,
)
from minimistral.course.panel import Panel, html_table, text_table

ALT = "The weights of the second word are highest on the first word."


def simple():
    fig, ax = new_figure(4, 3)
    lines_chart(ax, [1, 2, 3], {"loss": [3, 2, 1], "floor": [1, 1, 1]}, title="It falls", xlabel="step")
    return fig


def picture(page: str) -> bytes:
    return base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', page)[1])


def test_a_figure_has_its_alt_text_and_its_numbers():
    page = figure_html(simple(), ALT + ' <"quoted">', {"step": [1, 2], "loss": torch.tensor([0.123456, 2])})
    assert 'alt="The weights' in page and "&lt;&quot;quoted&quot;&gt;" in page
    assert "<details>" in page and "0.1235" in page and 'scope="col"' in page


def test_a_figure_is_the_same_each_time_and_white_and_closed():
    pyplot.close("all")  # what other tests left open
    first, second = picture(figure_html(simple(), ALT)), picture(figure_html(simple(), ALT))
    assert first == second and not pyplot.get_fignums()
    assert Image.open(io.BytesIO(first)).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("alt", ["", "A plot.", " " * 40])
def test_a_short_alt_text_is_refused(alt):
    with pytest.raises(ValueError, match="at least 30"):
        show(simple(), alt=alt)


def test_small_text_is_refused():
    fig = simple()
    fig.axes[0].text(1, 1, "tiny", fontsize=8)
    with pytest.raises(ValueError, match="'tiny' has 8 points"):
        show(fig, alt=ALT)


def test_in_a_terminal_the_alt_text_is_printed(capsys):
    show(simple(), alt=ALT)
    assert capsys.readouterr().out.strip() == ALT


def contrast(colour: str) -> float:
    """Contrast with white (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))
    return 1.05 / (luminance + 0.05)


# the lowest is #CC79A7 with 3.05; WCAG asks 3 of graphics
@pytest.mark.parametrize("colour", COLOURS)
def test_lines_can_be_seen(colour):
    assert contrast(colour) > 3


def test_lines_are_told_apart_without_colour():
    fig = simple()
    a, b = fig.axes[0].lines
    assert a.get_linestyle() != b.get_linestyle() and a.get_marker() != b.get_marker()
    pyplot.close(fig)


@pytest.mark.parametrize("size, numbers", [(8, 64), (9, 0)])
def test_a_small_heat_map_carries_its_numbers(size, numbers):
    fig, ax = new_figure(6, 6)
    heatmap(ax, torch.rand(size, size), range(size), range(size), title="t", rows="query", columns="key")
    assert len(ax.texts) == numbers
    figure_html(fig, ALT, table_of(torch.rand(size, size), range(size), range(size), "query"))


def test_too_much_for_one_figure_is_refused():
    fig, ax = new_figure()
    with pytest.raises(ValueError, match="at most 5"):
        lines_chart(ax, [1], {str(n): [n] for n in range(6)})
    with pytest.raises(ValueError, match="at most 6"):
        bars_chart(ax, {str(n): n for n in range(7)})
    bars_chart(ax, {"a": 1.0, "b": 2.0}, ylabel="bytes")
    assert [text.get_text() for text in ax.texts] == ["1.00", "2.00"]
    pyplot.close(fig)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="'a': 1, 'b': 2"):
        figure_html(simple(), ALT, {"a": [1], "b": [1, 2]})


# ---------------------------------------------------------------- explorers


def draw(window, text="Anna", again=0):
    fig, ax = new_figure(3, 2)
    bars_chart(ax, {"seen": window})
    if text == "bad":
        raise ValueError("no such word")
    return fig, f"With window {window}, {text} sees {window} words (drawn {again} times)."


CONTROLS = {"window": Slider(1, 9, 3), "text": Text("Anna"), "again": Button("Draw again")}
SETTINGS = [{"window": 1}, {"window": 3}, {"window": 9}]


def test_an_explorer_follows_its_controls():
    pyplot.close("all")  # what other tests left open
    explorer = Explorer(draw, CONTROLS)
    before = explorer.page.value
    assert explorer.set(window=5).startswith("With window 5, Anna")
    assert explorer.page.value != before and 'role="status"' in explorer.page.value
    assert "With window 5" in re.search(r'alt="([^"]+)"', explorer.page.value)[1]
    explorer.widgets["window"].value = 2  # as a hand would
    assert explorer.sentence.startswith("With window 2")
    explorer.widgets["again"].click()
    assert "drawn 1 times" in explorer.sentence
    assert not pyplot.get_fignums()


def test_every_control_has_its_name():
    explorer = Explorer(draw, {**CONTROLS, "text": Choice(("Anna", "Leo"))})
    assert [w.description for w in explorer.widgets.values()] == ["window", "text", "Draw again"]


def test_what_cannot_be_drawn_is_said_and_survived():
    explorer = Explorer(draw, CONTROLS)
    assert explorer.set(text="bad") == "Not with this setting: no such word"
    assert explorer.set(text="Leo").startswith("With window 3, Leo")
    with pytest.raises(ValueError, match="there are window, text, again"):
        explorer.set(size=3)


def test_whole_and_broken_sliders():
    assert type(Slider(1, 9).widget("x")).__name__ == "IntSlider"
    assert type(Slider(0.0, 1.0, 0.5, 0.1).widget("x")).__name__ == "FloatSlider"


def test_the_static_page_has_three_pictures_and_their_sentences():
    view = StaticView(draw, CONTROLS, SETTINGS, opened=True)
    assert view.html.count("<img ") == 3 and view.html.startswith("<details open>")
    assert repr(view).splitlines()[2].startswith("window = 9: With window 9")


def test_where_no_widget_can_be_shown_the_pictures_stand_open(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    explore(draw, settings=SETTINGS, **CONTROLS)
    (view,) = shown
    assert view.html.startswith("<details open>")


def test_a_long_text_is_told_in_lines_that_fit_the_page(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    explore(draw, settings=SETTINGS, **CONTROLS | {"text": Text(20 * "Anna ")})
    lines = repr(shown[0]).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 84 and " ".join(lines).endswith("Anna ', again=0")


def test_explore_shows_widgets_and_pictures(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    explore(draw, settings=SETTINGS, **CONTROLS)
    box, view = shown
    assert repr(box) == "explorer: window=3, text='Anna', again=0"
    plain = box._repr_mimebundle_()["text/plain"]
    assert "base64" not in plain and "0x" not in plain
    assert isinstance(view, StaticView)
    assert view.html.startswith("<details><summary>3 settings")  # they may answer an open question
    with pytest.raises(ValueError, match="at least three"):
        explore(draw, settings=SETTINGS[:2], **CONTROLS)


# ---------------------------------------------------------------- panels


def test_a_panel_says_the_same_in_text_and_html():
    panel = Panel("Heading", ["a < b"], table=(("name", "n"), [("x", "1"), ("long name", "20")]), code="<code>")
    assert "a < b" in str(panel) and "a &lt; b" in panel._repr_html_()
    assert "&lt;code&gt;" in panel._repr_html_()
    assert str(panel).splitlines()[-1] == "long name  20"


def test_numbers_stand_to_the_right():
    text = text_table(("what", "share"), [("a", "5%"), ("b", "100%"), ("c", "-")])
    assert [line[-1] for line in text.splitlines()[2:]] == ["%", "%", "-"]
    assert 'text-align:right">5%' in html_table(("what", "share"), [("a", "5%")])


# ---------------------------------------------------------------- the syllabus


def test_chapters_are_numbered_and_need_only_earlier_ones():
    assert [c.number for c in syllabus.CHAPTERS] == list(range(15))
    for c in syllabus.CHAPTERS:
        assert all(need < c.number for need in c.needs)
        assert c.core_minutes == 10 if c.number == 0 else 45 <= c.core_minutes <= 60  # as readers needed
        assert c.core_minutes < c.total_minutes
        assert re.fullmatch(r"\d\d_[a-z_]+", c.name) and c.question.endswith("?")
        assert bool(c.headlines) == (c.number not in (0, 3, 4))


@pytest.mark.parametrize("c", syllabus.CHAPTERS, ids=lambda c: c.name)
def test_with_everything_holds_the_core_and_every_exercise_outside_of_it(c):
    core = (Path(__file__).parent.parent / f"notebooks/src/{c.name}.py").read_text("utf-8").split("# ## Further")[0]
    later = sum(e.minutes for e in chapter_exercises(c.number) if f'check("{e.name}"' not in core)
    assert c.core_minutes + later <= c.total_minutes <= c.core_minutes + later + 40  # and what stands under Further


def test_headlines_stand_in_one_chapter_each():
    numbers = [h.number for c in syllabus.CHAPTERS for h in c.headlines]
    assert sorted(numbers) == list(range(1, 26))
    assert "black boxes" in syllabus.headline(21).text


def test_every_definition_has_a_chapter():
    for module, definitions in syllabus.DEFINITIONS.items():
        assert module in syllabus.TEACHING_MODULES
        assert all(number in range(15) for number in definitions.values())


def test_the_law_of_the_house_assigns_these():
    d = syllabus.DEFINITIONS
    assert {d["config"]["ModelConfig"], d["model"]["Block"], d["model"]["Transformer"]} == {4}
    assert d["attention"]["Attention"] == 7 and d["cache"]["KVCache"] == 8
    assert d["config"]["MODELS"] == d["config"]["count_parameters"] == 10


def test_the_table_and_its_chapters():
    assert syllabus.readme_table().count("\n") == 17 and "12 hours" in syllabus.readme_table()
    with pytest.raises(ValueError, match="no chapter 15"):
        syllabus.chapter(15)
