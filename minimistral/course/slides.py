"""Slides of a chapter from its executed notebook: one HTML file that needs no network.

    minimistral slides 08 OUT       OUT/08_sliding_window.html (or OUT itself, if it ends in .html)

What becomes a slide follows from what a cell is:

    a heading                    a slide with the first sentences below it
    lists, tables, formulas      on a slide; other prose goes into the notes
    **In short:** ...            a slide of its own
    predict(), bet()             the question and its choices, to vote on by hands
    reveal(), verdict()          the answer, below its question
    a figure                     the figure alone, without the code that drew it
    explore()                    its first picture, and a reminder to run it live
    your-turn                    the stub, with the exercise's minutes
    other code                   the code without asserts, and what it prints
    imports, library cells       left out; so are the sections under Further, unless asked for

A cell tagged ``slide-skip`` is left out, prose tagged ``slide`` is shown whole.
"""

from __future__ import annotations

import ast
import base64
import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .exercises import chapter_exercises
from .sections import Part, Section, output_text, read_sections
from .syllabus import CHAPTERS, Chapter, chapter

LEAD = 45        # words of prose below a heading
CODE_LINES = 18  # on one slide; longer code is cut in two
OUT_LINES = 19   # printed lines shown
NEAR = 6         # of them, where the cut may fall at an empty line
UNDER = 5        # and fewer than this many below a figure
TOGETHER = 85    # words of short texts that share a slide
WIDE = 79        # columns of code that fit in the usual size
BESIDE = 16      # lines of code and output together that fit on one slide
USUAL, LARGEST, SMALLEST = 23, 30, 18  # pixels of code, on a screen 720 high
HEAD = ("", "")  # lines of code that a small heading takes
ASKED = "Predict · "
SILENT = {"predict", "reveal", "bet", "verdict", "show", "explore", "display", "check", "hint"}
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.S)
MATHTEXT = ((r"\\le\b", r"\leq"), (r"\\ge\b", r"\geq"), (r"\\bmod\b", r"\;\mathrm{mod}\;"))
TAG = re.compile(r"<[^>]+>")


@dataclass
class Slide:
    """One slide: a small title, its content as HTML, and what the speaker may say as Markdown."""

    title: str
    body: str
    kind: str = ""
    notes: list[str] = field(default_factory=list)


def make_slides(number: int, *, further: bool = False, root: Path | None = None) -> list[Slide]:
    """The slides of a chapter."""
    sections = read_sections(chapter(number), root=root)
    if not sections:
        raise ValueError(f"chapter {number} has no notebook here")
    slides: list[Slide] = []
    asked = _questions(sections)
    for section in sections:
        if section.further and not further:
            break
        _section(section, slides, asked)
    return slides


def _questions(sections: list[Section]) -> dict[str | int, str]:
    """What predict() asks, by the prediction's name; a headline has its number."""
    found: dict[str | int, str] = {
        h.number: f"“{h.text}”" for c in CHAPTERS for h in c.headlines}
    for part in (part for section in sections for part in section.parts if part.kind == "code"):
        calls = [arguments for _, arguments in _calls(part.text, "predict")]
        shown = [text for text in map(output_text, part.outputs) if text.startswith(ASKED)]
        if len(calls) == len(shown):
            found |= {a[0]: text.removeprefix(ASKED).splitlines()[0] for a, text in zip(calls, shown)}
    return found


def _calls(text: str, *names: str) -> list[tuple[str, list]]:
    """The calls of these functions in a cell, in order: name and literal positional arguments."""
    try:
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    except SyntaxError:
        return []
    called = [n for n in nodes if isinstance(n.func, ast.Name) and n.func.id in names]
    called.sort(key=lambda n: (n.lineno, n.col_offset))
    return [(n.func.id, [a.value for a in n.args if isinstance(a, ast.Constant)]) for n in called]


def _section(section: Section, slides: list[Slide], asked: dict[str | int, str]) -> None:
    one, title = section.chapter, section.title
    if section.level == 1:
        lead = section.parts[0].text if section.parts else ""
        question, *rest = lead.split("\n\n")
        slides.append(Slide(title, f"<h1>{html.escape(title)}</h1>{markdown(question)}", "title", rest))
        return
    opening = Slide(title, f"<h2>{markdown(title, inline=True)}</h2>", "opening")
    slides.append(opening)
    for number, part in enumerate(section.parts):
        if "slide-skip" in part.tags:
            continue
        if part.kind == "markdown":
            _prose(part, slides, title, lead=number == 0)
        elif not part.tags & {"imports", "library"}:
            _code(part, slides, title, one, asked)
    if opening.body.endswith("</h2>"):  # no heading stands alone: what is answered here stands below it
        opening.body += "".join(_asked(question) for part in section.parts if part.kind == "code"
                                for question in _answered(part, asked))


def _prose(part: Part, slides: list[Slide], title: str, lead: bool) -> None:
    if "recall" in part.tags:
        asked = re.findall(r"<summary>(.*?)</summary>(.*?)</details>", part.text, re.S)
        body = "".join(f"<li>{markdown(q, inline=True)}</li>" for q, _ in asked)
        answers = [f"{q} {' '.join(a.split())}" for q, a in asked]
        slides.append(Slide(title, f"<h3>From before</h3><ol>{body}</ol>", "text", answers))
        return
    paragraphs = re.split(r"\n\s*\n", part.text)
    for number, text in enumerate(paragraphs):
        if text.startswith("**In short:**"):
            said = text.removeprefix("**In short:**").strip()
            slides.append(Slide(title, f"<h3>In short</h3>{markdown(said[:1].upper() + said[1:])}", "short"))
        elif "slide" in part.tags or re.match(r"\s*(\$\$|\||[-*] |\d+\. |>|In words:)", text):
            last = slides[-1]
            if last.kind in ("opening", "text") and len(TAG.sub(" ", last.body + text).split()) <= TOGETHER:
                last.body += markdown(text)
            else:
                slides.append(Slide(title, markdown(text), "text"))
        elif lead and number == 0:
            words = _first_sentences(text)
            slides[-1].body += markdown(words)
            slides[-1].notes.append(text[len(words):].strip() if text.startswith(words) else text)
        else:
            slides[-1].notes.append(text)


def _first_sentences(text: str) -> str:
    """As many sentences as are short enough to stand on a slide, the first in any case."""
    sentences = re.split(r"(?<=[.?!])\s+", text)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(f"{kept} {sentence}".split()) > LEAD:
            break
        kept += text[len(kept):text.index(sentence, len(kept))] + sentence
    return kept


def _code(part: Part, slides: list[Slide], title: str, one: Chapter, asked: dict[str | int, str]) -> None:
    answered = _answered(part, asked)
    shown = [_output(output) for output in part.outputs]
    if "your-turn" in part.tags:
        _your_turn(part, slides, title, one)
        return
    printed = "\n".join(said.rstrip("\n") for kind, said in shown if kind == "printed").strip("\n")
    explorer = "explore(" in part.text
    figure = any(kind == "figure" for kind, _ in shown)
    if not explorer and not figure:
        _listing(part.text, printed, slides, title)
    for kind, said in shown:
        if kind == "figure":
            head = "<h3>Explorer: run it live</h3>" if explorer else ""
            if printed.count("\n") >= UNDER:
                _listing("", printed, slides, title)
                printed = ""
            slides.append(Slide(title, head + said + (_pre(printed.splitlines()) if printed else ""), "figure"))
            printed = ""
        elif kind != "printed":
            if kind == "panel" and "<table" in said and (told := re.search(r"<pre>(.*?)</pre>", said, re.S)):
                lines = shortened(html.unescape(told[1]).splitlines())
                name = re.search(r"<strong>(.*?)</strong>", said)
                slides.append(Slide(title, (f"<h3>{name[1]}</h3>" if name else "") + _pre(lines, HEAD), "code"))
                said = said.replace(told[0], "")
            question = answered.pop(0) if kind == "reveal" and answered else ""
            slides.append(Slide(title, _asked(question) + said, kind))


def _answered(part: Part, asked: dict[str | int, str]) -> list[str]:
    """The questions that a cell answers, in order."""
    return [asked.get(a[0], "") if a else "" for _, a in _calls(part.text, "reveal", "verdict")]


def _asked(question: str) -> str:
    return f"<p class=asked>{html.escape(question)}</p>" if question else ""


def _listing(text: str, printed: str, slides: list[Slide], title: str) -> None:
    """Code as it is taught: without asserts and without questions, then what it prints."""
    lines = taught(text)
    out = shortened(printed.splitlines())
    if not out and len(lines) < 3:
        return
    *before, last = _parts(lines) or [[]]
    slides += [Slide(title, code(part), "code") for part in before]
    if last and len(last) + len(out) <= BESIDE:
        slides.append(Slide(title, code(last, out) + (_pre(out, last) if out else ""), "code"))
        return
    if last:
        slides.append(Slide(title, code(last), "code"))
    if out:
        slides.append(Slide(title, "<h3>It prints</h3>" + _pre(out, HEAD), "code"))


def shortened(lines: list[str]) -> list[str]:
    """As many printed lines as a slide holds, cut between paragraphs if one ends near."""
    if len(lines) <= OUT_LINES + 1:
        return lines
    ends = [n for n in range(OUT_LINES - NEAR, OUT_LINES + 1) if not lines[n].strip()]
    return [*lines[:min(ends[-1] + 1, OUT_LINES) if ends else OUT_LINES], "…"]


def _parts(lines: list[str]) -> list[list[str]]:
    """Code in as few parts as fit on slides, cut at an empty line outside of functions if one is near."""
    if len(lines) <= CODE_LINES:
        return [lines] if lines else []
    half = len(lines) / math.ceil(len(lines) / CODE_LINES)
    fits = range(1, CODE_LINES + 1)
    cut = min(fits, key=lambda n: abs(n - half) + 5 * bool(lines[n].strip())
              + 5 * (lines[n] or lines[n + 1]).startswith(" "))
    return [lines[:cut], *_parts(lines[cut + (not lines[cut].strip()):])]


def taught(text: str) -> list[str]:
    """The lines of a cell without asserts, questions and calls that only show something."""
    lines = text.splitlines()
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return lines
    for node in reversed(list(_untaught(body))):
        del lines[node.lineno - 1:node.end_lineno]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(_comments(lines))).strip("\n").splitlines()


def _comments(lines: list[str]) -> list[str]:
    """Comments beside code moved to the left, below each other where that fits."""
    beside = [re.fullmatch(r"(.*\S) {2,}(# .*)", line) for line in lines]
    column = max((len(match[1]) for match in beside if match), default=0)
    if any(match and column + 2 + len(match[2]) > WIDE for match in beside):
        column = 0
    return [f"{match[1]:{column}}  {match[2]}" if match else line for match, line in zip(beside, lines)]


def _untaught(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Asserts, also inside loops, calls that only show something, and what would be empty without them."""
    for node in body:
        call = node.value if isinstance(node, ast.Expr) else None
        name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
        inner = getattr(node, "body", []) if isinstance(node, (ast.For, ast.If, ast.With)) else []
        gone = list(_untaught(inner))
        if isinstance(node, ast.Assert) or name in SILENT or inner and gone == inner and not getattr(node, "orelse", ()):
            yield node
        elif gone != inner:
            yield from gone


def _your_turn(part: Part, slides: list[Slide], title: str, one: Chapter) -> None:
    names = re.findall(r"""\bcheck\(\s*["'](\w+)["']""", part.text)
    found = [e for e in chapter_exercises(one.number) if e.name in names]
    heading = "; ".join(f"{e.title}, {e.minutes} minutes" for e in found) or title
    body = taught(part.text)[:CODE_LINES]
    notes = [f"**Ask:** {e.hints[0].text}" for e in found if e.hints]
    slides.append(Slide(title, f"<h3>Your turn: {html.escape(heading)}</h3>{code(body, HEAD)}", "turn", notes))


# ---------------------------------------------------------------- outputs


def _output(output: dict) -> tuple[str, str]:
    """(kind, HTML or text) of a cell's output."""
    text = output_text(output)
    page = "".join(output.get("data", {}).get("text/html", ""))
    if text.startswith(ASKED):
        return "predict", _question(text)
    if text.startswith("What happened"):
        _, *lines = text.splitlines()
        return "reveal", "<h3>What happened</h3>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    if picture := re.search(r'<img src="data:image[^>]*>', page):
        return "figure", picture[0]
    if page:
        return "panel", re.sub(r"<details.*?</details>", "", page, flags=re.S)
    if output["output_type"] == "error":
        return "printed", f"{output['ename']}: {output['evalue']}"
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {}) or text.startswith("explorer:")
    return "printed", "" if widget else text


def _question(text: str) -> str:
    """A prediction as a question for hands."""
    question, *rest = text.removeprefix(ASKED).splitlines()
    options = [line for line in rest if re.match(r"[A-Z]  ", line)]
    listed = "".join(f"<li>{html.escape(line[3:])}</li>" for line in options)
    choices = f'<ol type="A">{listed}</ol>' if options else "<p>Say a number.</p>"
    return f"<h3>Predict</h3><p class=question>{html.escape(question)}</p>{choices}"


def _pre(lines: list[str], beside: Sequence[str] = ()) -> str:
    """What was printed, in the size of the code that stands beside it."""
    text = html.escape("\n".join(lines))
    return f'<pre class="out" style="font-size:{_size([*lines, *beside])}px">{text}</pre>'


# ---------------------------------------------------------------- Markdown, code, formulas


def markdown(text: str, *, inline: bool = False) -> str:
    """Markdown as HTML; formulas as pictures, so that no program has to be loaded for them."""
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    formulas: list[str] = []

    def keep(match: re.Match) -> str:
        formulas.append(formula((match[1] or match[2]).strip(), display=bool(match[1])))
        return f"FORMULA{len(formulas) - 1}END"

    text = re.sub(r"\[([^\]]+)\]\([^)]*\.ipynb[^)]*\)", r"\1", MATH.sub(keep, text))
    page = re.sub(r"FORMULA(\d+)END", lambda m: formulas[int(m[1])], markdown2html_mistune(text)).strip()
    return page.removeprefix("<p>").removesuffix("</p>") if inline else page


def formula(tex: str, *, display: bool) -> str:
    """A formula as a picture with its source as alternative text; as source where it cannot be drawn."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    wanted = re.sub(r"\s+", " ", tex)
    for ours, theirs in MATHTEXT:
        wanted = re.sub(ours, lambda _, t=theirs: t, wanted)
    picture = io.BytesIO()
    try:
        depth = math_to_image(f"${wanted}$", picture, prop=FontProperties(size=26), dpi=120, format="png")
    except ValueError:
        return f"<code>{html.escape(tex)}</code>"
    png = picture.getvalue()
    height = int.from_bytes(png[20:24], "big") * 72 / 120  # in points, as the depth below the line
    look = "" if display else f' style="height:{height / 26:.2f}em;vertical-align:{-depth / 26:.2f}em"'
    data = base64.b64encode(png).decode("ascii")
    return (f'<img class="{"display" if display else "inline"}"{look} alt="{html.escape(tex)}" '
            f'src="data:image/png;base64,{data}">')


def code(lines: list[str], beside: Sequence[str] = ()) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    size = f"font-size:{_size([*lines, *beside])}px"
    look = HtmlFormatter(noclasses=True, cssclass="code", nobackground=True, prestyles=size)
    return highlight("\n".join(lines), PythonLexer(), look)


def _size(lines: list[str]) -> int:
    """Pixels of a letter: as large as the longest line, and so many lines, allow."""
    widest = max(map(len, lines), default=0)
    fits = min(USUAL * WIDE // max(widest, 1), 410 // max(len(lines), 1))
    return max(min(fits, LARGEST), USUAL if widest <= WIDE else SMALLEST)


# ---------------------------------------------------------------- the page

CSS = """
*{box-sizing:border-box} body{margin:0;background:#444;font:32px/1.35 system-ui,"Segoe UI",Roboto,Arial,sans-serif;color:#111}
.slide{position:relative;width:1280px;height:720px;background:#fff;margin:0 auto 24px;padding:56px 72px 60px;overflow:hidden}
.slide>header{position:absolute;top:14px;left:72px;right:72px;font-size:20px;color:#555;display:flex;justify-content:space-between}
.main{height:100%;transform-origin:0 0;display:flex;flex-direction:column;justify-content:safe center}
.main>*{max-width:100%} h1{font-size:76px;margin:0 0 24px} h2{font-size:58px;line-height:1.15;margin:0 0 24px}
h3{font-size:30px;color:#005a8c;margin:0 0 16px} p{margin:0 0 18px} .short p,.question{font-size:42px;line-height:1.3} .asked{color:#555;margin-bottom:40px}
li{margin:0 0 12px} ol[type=A]{font-size:38px;padding-left:1.5em} pre{font:23px/1.35 ui-monospace,Consolas,"DejaVu Sans Mono",monospace;margin:0 0 14px;white-space:pre-wrap}
.code pre{background:#f6f6f6;padding:12px 16px} pre.out{border-left:6px solid #0072B2;padding:6px 16px}
code{font-family:ui-monospace,Consolas,"DejaVu Sans Mono",monospace;font-size:.9em}
img{max-width:100%} .figure .main>img{width:100%;height:580px;object-fit:contain} .figure h3+img{height:530px!important}
img.display{max-height:190px;max-width:1130px;display:block;margin:12px auto}
table{border-collapse:collapse;font-size:26px} td,th{border:1px solid #767676;padding:4px 12px;text-align:left}
.notes{display:none;width:1280px;margin:0 auto 24px;background:#fff;padding:16px 72px;font-size:20px}
body.noted .notes{display:block} .notes:empty{display:none!important}
body.live{overflow:hidden} body.live .slide,body.live .notes{display:none;margin:0;position:absolute;left:0;top:0;transform-origin:0 0}
body.live .slide.now{display:block}
body.live.noted .notes.now{display:block;top:auto;bottom:0;width:100%;max-height:45%;overflow:auto;border-top:4px solid #0072B2}
@media print{@page{size:A4 portrait;margin:12mm} body{background:#fff}
.slide{display:block!important;position:relative!important;zoom:.54;transform:none!important;border:1px solid #767676;break-inside:avoid}
.notes{display:block!important;position:static!important;width:auto!important;max-height:none!important;font-size:15px;padding:0;border:0!important}}
"""

SCRIPT = """
const slides=[...document.querySelectorAll('.slide')],notes=[...document.querySelectorAll('.notes')];
let now=Math.max(0,Math.min(slides.length-1,(parseInt(location.hash.slice(1))||1)-1));
function fit(slide){const main=slide.querySelector('.main');let size=1;
 while(size>.56&&(main.scrollHeight>main.clientHeight+2||main.scrollWidth>main.clientWidth+2)){size-=.04;
  main.style.transform=`scale(${size})`;main.style.width=main.style.height=100/size+'%'}
 if(size<1)slide.dataset.size=size.toFixed(2)}
function draw(){document.body.classList.add('live');
 const scale=Math.min(innerWidth/1280,innerHeight/720);
 slides.forEach((s,i)=>{s.classList.toggle('now',i==now);notes[i].classList.toggle('now',i==now);
  s.style.transform=`translate(${(innerWidth-1280*scale)/2}px,${(innerHeight-720*scale)/2}px) scale(${scale})`});
 if(!slides[now].dataset.fit){fit(slides[now]);slides[now].dataset.fit=1}
 history.replaceState(null,'','#'+(now+1));
 document.getElementById('where').textContent=`${slides[now].getAttribute('aria-label')}, ${now+1} of ${slides.length}`}
function go(n){now=Math.max(0,Math.min(slides.length-1,n));draw()}
addEventListener('keydown',e=>{if(e.ctrlKey||e.metaKey||e.altKey)return;
 const step={ArrowRight:1,PageDown:1,' ':1,ArrowDown:1,ArrowLeft:-1,PageUp:-1,ArrowUp:-1}[e.key];
 if(step){go(now+(e.key==' '&&e.shiftKey?-1:step));e.preventDefault()}
 else if(e.key=='Home')go(0);else if(e.key=='End')go(slides.length-1);
 else if(e.key=='n'||e.key=='N')document.body.classList.toggle('noted');
 else if(e.key=='f'||e.key=='F')document.documentElement.requestFullscreen?.()});
addEventListener('resize',draw);addEventListener('hashchange',()=>go((parseInt(location.hash.slice(1))||1)-1));
addEventListener('beforeprint',()=>{slides.forEach(s=>{s.style.display='block';fit(s);s.style.display=''})});
draw();
"""


def page(one: Chapter, slides: list[Slide]) -> str:
    """The whole file. Without JavaScript all slides stand below each other."""
    parts = []
    for number, slide in enumerate(slides, start=1):
        notes = "".join(markdown(note) for note in slide.notes if note.strip())
        notes = notes.replace("<details>", "<details open>")  # paper does not unfold
        heads = f"<span>{one.number}. {html.escape(one.title)} · {html.escape(slide.title)}</span>"
        heads = "" if slide.kind in ("title", "opening") else heads
        parts.append(
            f'<section class="slide {slide.kind}" aria-label="Slide {number}: {html.escape(TAG.sub("", slide.title))}">'
            f'<header>{heads or "<span></span>"}<span>{number}</span></header>'
            f'<div class=main>{slide.body}</div></section>\n<aside class=notes aria-label="Notes {number}">{notes}</aside>')
    title = f"{one.number}. {one.title}: slides"
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width">\n<style>{CSS}</style>\n</head>\n<body>\n'
            '<!-- Arrow keys, space, Home, End: go. N: notes. F: full screen. Printing gives slides with notes. -->\n'
            f'<main>\n{chr(10).join(parts)}\n</main>\n<p id="where" role="status" '
            'style="position:absolute;left:-9999px"></p>\n'
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n")


def write_slides(number: int, out: Path, *, further: bool = False, root: Path | None = None) -> tuple[Path, int]:
    """Write the slides of a chapter; the file, and how many slides it has."""
    one = chapter(number)
    path = out if out.suffix == ".html" else out / f"{one.name}.html"
    slides = make_slides(number, further=further, root=root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(one, slides), encoding="utf-8", newline="\n")
    return path, len(slides)
