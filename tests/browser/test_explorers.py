"""Every explorer, moved by hand and by keyboard in a real JupyterLab."""

from functools import cache
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import TimeoutError, expect

from minimistral.course.site_check import HOW

ROOT = Path(__file__).resolve().parents[2]
SOON = 60_000  # milliseconds; a figure takes one second, but other tests run beside this one
# An empty element stands in a box for each of its widgets that is not drawn yet.
PLACEHOLDER = ':scope > .lm-Widget:not([class*="widget-"], .jupyter-button)'


@cache
def explorers() -> dict[str, tuple[int, ...]]:
    """The stories with explorers: file name -> the indices of their cells."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        places = tuple(i for i, cell in enumerate(cells)
                       if cell.cell_type == "code" and "\nexplore(" in f"\n{cell.source}")
        if places:
            found[path.name] = places
    return found


def test_nearly_every_chapter_has_one():
    assert len(explorers()) >= 12


@pytest.mark.parametrize("name", explorers())
def test_hand_and_keyboard_move_every_control(name, lab, tab):
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
    places = explorers()[name]
    lab.open(tab, ROOT / "notebooks" / name, cells=range(places[-1] + 1))
    boxes = (tab.locator(".jp-CodeCell").filter(has_text="explore(")
             .locator(".widget-vbox:has([role=status])"))
    expect(boxes).to_have_count(len(places), timeout=SOON)  # the kernel is done before the page is
    for box in boxes.all():
        expect(box.locator(PLACEHOLDER)).to_have_count(0, timeout=SOON)
        box.scroll_into_view_if_needed()
        assert box.locator("[role=status]").inner_text().strip()
        moved = [move(tab, box, control) for kind, move in KINDS.items()
                 for control in box.locator(kind).all()]
        assert moved, f"{name}: an explorer without controls"
        assert any(moved), f"{name}: no control changed what the figure shows"
    found = Axe().run(tab, context=".widget-vbox:has([role=status])", options=HOW).response["violations"]
    assert not found, [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]
    assert not tab.problems, tab.problems


# ---------------------------------------------------------------- one function for each kind


def follows(tab, box, act) -> bool:
    """Do something; the text or the figure must follow. True if both did (an explorer without
    figure: if the text did)."""
    page = box.locator(".widget-html-content:has([role=status])")
    handle, before = page.element_handle(), page.inner_html()
    said = box.locator("[role=status]").inner_text()
    act()
    try:
        tab.wait_for_function("([page, old]) => page.innerHTML !== old", arg=[handle, before],
                              timeout=SOON)
    except TimeoutError as slow:
        pytest.fail(f"nothing moved after {act.__qualname__}: {said!r} ({slow})")
    status = box.locator("[role=status]").inner_text()
    assert status and not status.startswith("Not with this setting"), status
    return status != said


def named(control) -> str:
    """A control says what it is."""
    label = control.locator(".widget-label").first
    assert label.get_attribute("title") != "null"  # ipywidgets' own tip
    assert (name := label.inner_text().strip())
    return name


def move_slider(tab, box, control) -> bool:
    name = named(control)
    handle = control.get_by_role("slider", name=name, exact=True)
    expect(handle).to_have_count(1, timeout=SOON)
    expect(control.get_by_role("textbox", name=name, exact=True)).to_have_count(1)

    def press():
        handle.focus()
        at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        tab.keyboard.press("ArrowLeft" if at_end else "ArrowRight")

    def click():
        track = control.locator(".noUi-target").bounding_box()
        middle = track["x"] + track["width"] / 2
        on_the_right = handle.bounding_box()["x"] > middle
        tab.mouse.click(track["x"] + track["width"] * (0.2 if on_the_right else 0.8),
                        track["y"] + track["height"] / 2)

    control.scroll_into_view_if_needed()
    return follows(tab, box, press) | follows(tab, box, click)


def choose(tab, box, control) -> bool:
    named(control)
    options = control.locator("input[type=radio]")
    assert all(label.strip() for label in control.locator("label").all_inner_texts())

    def press():
        options.nth(1 if options.first.is_checked() else 0).focus()
        tab.keyboard.press("Space")

    def click():
        options.nth(0 if options.last.is_checked() else options.count() - 1).click()

    return follows(tab, box, press) | follows(tab, box, click)


def write(tab, box, control) -> bool:
    named(control)

    def press():
        control.locator("input").click()
        tab.keyboard.press("End")
        tab.keyboard.type(" and Leo")
        tab.keyboard.press("Enter")

    return follows(tab, box, press)


def press_button(tab, box, control) -> bool:
    assert control.inner_text().strip()

    def press():
        control.focus()
        tab.keyboard.press("Space")

    return follows(tab, box, press) | follows(tab, box, control.click)


KINDS = {".widget-slider": move_slider, ".widget-radio": choose, ".widget-text": write,
         ".jupyter-button": press_button}
