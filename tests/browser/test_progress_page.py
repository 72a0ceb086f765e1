"""The progress page and the search in a real JupyterLab: by keyboard, and links that open notebooks."""

import nbformat

from minimistral.course.notebook_source import KERNEL

CELLS = ["from minimistral.course import bet, progress_page, search", 'bet(21, answer="B")', "progress_page()",
         'search("rolling buffer")']


def notebook(*cells):
    return nbformat.v4.new_notebook(cells=list(cells), metadata=KERNEL)


def test_the_page_follows_the_keyboard_and_a_result_opens_its_chapter(lab, tab, tmp_path):
    from playwright.sync_api import expect

    (lab.folder / "notebooks").mkdir(exist_ok=True)
    heading = nbformat.v4.new_markdown_cell("# 8. The sliding window\n\n## The ring")
    nbformat.write(notebook(heading), lab.folder / "notebooks" / "08_sliding_window.ipynb")
    path = tmp_path / "progress.ipynb"
    nbformat.write(notebook(*map(nbformat.v4.new_code_cell, CELLS)), path)
    lab.open(tab, path)

    rows = tab.locator(".widget-html table tbody tr")
    expect(rows).to_have_count(15)
    begun = tab.locator('.widget-radio-box input[type="radio"]').nth(1)
    begun.focus()
    tab.keyboard.press("Space")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("2 Attention")
    summary = tab.locator(".widget-html summary")
    summary.focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_text("open: Who may look at whom")).to_be_visible()

    tab.get_by_role("link", name="Chapter 8, “The ring”").click()
    expect(tab.get_by_role("heading", name="The ring")).to_be_visible()
    assert not tab.problems, tab.problems
