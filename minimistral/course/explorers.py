"""explore: an interactive figure from one function, readable without any interaction.

    def draw(window, text):
        ...
        return fig, "With window 3 the last word sees 3 words."

    explore(draw, window=Slider(1, 9), text=Text("Anna has a key"),
            settings=[{"window": 1}, {"window": 3}, {"window": 9}])

Native widgets only, each with its name, all usable by keyboard; the result is repeated as text.
Below stand the given settings as pictures, for pages that nobody runs; folded, because they may
answer what the text has just asked. The figure lives in an HTML widget, not in an Output widget,
so that a page looks the same whoever executed it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .figures import figure_html
from .panel import wrapped


@dataclass(frozen=True)
class Slider:
    """A number from ``low`` to ``high``; whole numbers if low, high and step are whole."""

    low: float
    high: float
    start: float | None = None
    step: float = 1

    def first(self):
        return self.low if self.start is None else self.start

    def widget(self, description):
        import ipywidgets

        whole = all(isinstance(n, int) for n in (self.low, self.high, self.step, self.first()))
        kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        return kind(value=self.first(), min=self.low, max=self.high, step=self.step, **_look(description))


@dataclass(frozen=True)
class Choice:
    """One of several values, all of them in view.

    Radio buttons: Tab reaches each, Space chooses it. A drop-down list would need the arrow keys,
    which JupyterLab takes to move between cells.
    """

    options: Sequence
    start: Any = None

    def first(self):
        return self.options[0] if self.start is None else self.start

    def widget(self, description):
        import ipywidgets

        across = sum(len(str(option)) + 4 for option in self.options) < 60
        return ipywidgets.RadioButtons(options=list(self.options), value=self.first(),
                                       orientation="horizontal" if across else "vertical",
                                       **_look(description))


@dataclass(frozen=True)
class Text:
    """A line of text; the figure follows when Enter is pressed or the field is left."""

    start: str = ""

    def first(self):
        return self.start

    def widget(self, description):
        import ipywidgets

        return ipywidgets.Text(value=self.start, continuous_update=False, **_look(description))


@dataclass(frozen=True)
class Button:
    """A button; the function receives how often it was pressed, 0 at first."""

    label: str = "Again"

    def first(self):
        return 0

    def widget(self, description):
        import ipywidgets

        return ipywidgets.Button(description=self.label, tooltip=f"{self.label}: {description}")


def _look(description: str) -> dict:
    """Its name in full and no tip over it (without one, ipywidgets shows "null")."""
    return {"description": description, "tooltip": "", "style": {"description_width": "initial"},
            "layout": {"width": "95%", "max_width": "600px"}}


def render(draw: Callable, settings: dict) -> tuple[str, str]:
    """One setting as (HTML, text). ``draw`` returns (figure, sentence) or (figure, sentence, data)."""
    from matplotlib import pyplot

    open_before = set(pyplot.get_fignums())
    try:
        figure, sentence, *data = draw(**settings)
        return figure_html(figure, sentence, *data), sentence
    finally:
        for number in set(pyplot.get_fignums()) - open_before:
            pyplot.close(number)


class Explorer:
    """Widgets, a figure and a sentence that follow each other. Built by ``explore``."""

    def __init__(self, draw: Callable, controls: dict):
        import ipywidgets

        self.draw = draw
        self.settings = {name: control.first() for name, control in controls.items()}
        self.widgets = {}
        for name, control in controls.items():
            widget = control.widget(name.replace("_", " "))
            if isinstance(widget, ipywidgets.Button):
                widget.on_click(lambda _, name=name: self.set(**{name: self.settings[name] + 1}))
            else:
                widget.observe(lambda change, name=name: self._moved(name, change["new"]), names="value")
            self.widgets[name] = widget
        self.page, self.sentence = ipywidgets.HTML(), ""
        self.box = told_box([*self.widgets.values(), self.page], self)
        self._draw()

    def set(self, **values) -> str:
        """Set controls as a hand would; returns the sentence. For tests and for code cells."""
        for name, value in values.items():
            if name not in self.settings:
                raise ValueError(f"no control {name!r}; there are {', '.join(self.settings)}")
            if hasattr(self.widgets[name], "value"):
                self.widgets[name].value = value  # _moved draws
            else:
                self._moved(name, value)
        return self.sentence

    def _moved(self, name, value):
        self.settings[name] = value
        self._draw()

    def _draw(self):
        try:
            picture, self.sentence = render(self.draw, self.settings)
        except Exception as error:  # a text that cannot be drawn must not kill the explorer
            picture, self.sentence = "", f"Not with this setting: {error}"
        status = f'<div role="status" aria-live="polite">{html.escape(self.sentence)}</div>'
        self.page.value = picture + status

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return wrapped(f"explorer: {values}")


# ipywidgets ties a slider's label neither to the handle nor to the number beside it: a screen reader
# would say "3, slider". This gives both the label's words, whenever a box draws a slider, anew too.
NAME_SLIDERS = """
function name(box) {
  for (const slider of box.querySelectorAll(".widget-slider")) {
    const label = slider.querySelector(".widget-label").textContent;
    slider.querySelector(".widget-readout").setAttribute("role", "textbox");
    for (const part of slider.querySelectorAll(".noUi-handle, .widget-readout"))
      part.setAttribute("aria-label", label);
  }
}
function begin(tries) {
  const box = element.closest(".widget-vbox");
  if (!box) return tries && requestAnimationFrame(() => begin(tries - 1));
  new MutationObserver(() => name(box)).observe(box, {childList: true, subtree: true});
  name(box);
}
begin(99);
"""


def told_box(children: Sequence, owner):
    """Widgets one below the other, which a terminal tells as their owner tells itself."""
    import ipywidgets

    script = {"output_type": "display_data", "data": {"application/javascript": NAME_SLIDERS}, "metadata": {}}
    naming = ipywidgets.Output(outputs=(script,), layout={"display": "none"})

    class Box(ipywidgets.VBox):
        def __repr__(self):  # the default would hold all of the widgets' HTML
            return repr(owner)

    return Box([*children, naming])


class StaticView:
    """The settings as pictures in a part of the page to open; in a terminal their sentences."""

    def __init__(self, draw: Callable, controls: dict, settings: Sequence[dict], *, opened: bool):
        first = {name: control.first() for name, control in controls.items()}
        parts, lines = [], []
        for chosen in settings:
            picture, sentence = render(draw, {**first, **chosen})
            values = ", ".join(f"{name.replace('_', ' ')} = {value}" for name, value in chosen.items())
            lines.append(f"{values}: {sentence}")
            parts.append(
                f"<p><strong>{html.escape(values)}</strong>: {html.escape(sentence)}</p>{picture}"
            )
        summary = f"{len(settings)} settings as pictures, for reading without running"
        state = " open" if opened else ""
        self.html = f"<details{state}><summary>{summary}</summary>{''.join(parts)}</details>"
        self.text = "\n".join(lines)

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def explore(draw: Callable, *, settings: Sequence[dict], **controls) -> None:
    """Show ``draw`` as an interactive figure, with ``settings`` as pictures below it.

    draw       called with one value per control; returns (figure, sentence) or
               (figure, sentence, data); the sentence is the alt text too: 30 characters or more
    settings   three dictionaries of control values, shown where nothing can be moved
    controls   Slider, Choice, Text or Button, by the name of draw's parameter
    """
    if len(settings) < 3:
        raise ValueError(f"{len(settings)} settings; at least three are wanted for the static page")
    from IPython.display import display

    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        display(StaticView(draw, controls, settings, opened=True))  # there is nothing else to see
        return
    display(Explorer(draw, controls).box)
    display(StaticView(draw, controls, settings, opened=False))
