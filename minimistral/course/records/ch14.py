"""Chapter 14, the chat and the platform: its two core pieces and its exercises."""

from __future__ import annotations

import json

import torch

from minimistral.sampling import draw
from minimistral.streaming import cut_at_stop, whole_characters

from ..chapters.ch14_le_chat import PaperModel
from ..exercises import Exercise, Hint, Misconception

# ---------------------------------------------------------------- piece: whole_characters


def whole_text():
    return ("Où est la clé ? 日本 🙂".encode(),)


def nothing_yet():
    return (b"",)


def half_an_accent():
    return ("La clé".encode()[:-1],)


def two_of_three_bytes():
    return ("in 日本".encode()[:-1],)


def one_of_three_bytes():
    return ("in 日本".encode()[:-2],)


def three_of_four_bytes():
    return ("ok 🙂".encode()[:-1],)


def one_of_four_bytes():
    return ("ok 🙂".encode()[:-3],)


def ends_with_a_whole_accent():
    return ("La clé".encode(),)


def ends_with_three_whole_bytes():
    return ("10 €".encode(),)


def ends_with_a_whole_emoji():
    return ("ok 🙂🙂".encode(),)


def a_broken_byte_inside():
    return (b"ab\xa9cd \xc3",)


def a_beginning_that_never_goes_on():
    return (b"a\xe6( b",)


def _by_lead_byte(raw):
    for n in range(1, min(3, len(raw)) + 1):
        byte = raw[-n]
        if byte >= 0xC0:
            needs = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            if needs > n:
                return raw[:-n].decode("utf-8", "replace"), raw[-n:]
            break
        if byte < 0x80:
            break
    return raw.decode("utf-8", "replace"), b""


def _by_error(raw):
    try:
        return raw.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            held = raw[error.start:]
            return raw[:error.start].decode("utf-8", "replace"), held
    for n in (3, 2, 1):
        try:
            raw[-n:].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and error.start == 0:
                return raw[:-n].decode("utf-8", "replace"), raw[-n:]
    return raw.decode("utf-8", "replace"), b""


def _by_bits(raw):
    tail = 0
    while tail < min(3, len(raw)) and raw[len(raw) - 1 - tail] & 0b11000000 == 0b10000000:
        tail += 1
    at = len(raw) - 1 - tail
    if at >= 0:
        lead = raw[at]
        size = 4 if lead >> 3 == 0b11110 else 3 if lead >> 4 == 0b1110 else 2 if lead >> 5 == 0b110 else 1
        if size > tail + 1:
            return raw[:at].decode(errors="replace"), raw[at:]
    return raw.decode(errors="replace"), b""


def _drops_the_rest(raw):
    text, _ = whole_characters(raw)
    return text, b""


def _hides_the_rest(raw):
    return raw.decode("utf-8", "ignore"), whole_characters(raw)[1]


def _two_bytes_only(raw):
    if raw and raw[-1] >= 0xC0:
        return raw[:-1].decode("utf-8", "replace"), raw[-1:]
    return raw.decode("utf-8", "replace"), b""


def _all_or_nothing(raw):
    try:
        return raw.decode("utf-8"), b""
    except UnicodeDecodeError:
        return "", raw


def _first_error_waits(raw):
    try:
        return raw.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        return raw[:error.start].decode("utf-8"), raw[error.start:]


def _always_holds_the_last(raw):
    for n in range(1, min(4, len(raw)) + 1):
        if raw[-n] >= 0xC0:
            return raw[:-n].decode("utf-8", "replace"), raw[-n:]
        if raw[-n] < 0x80:
            break
    return raw.decode("utf-8", "replace"), b""


def _holds_every_end(raw):
    end = len(raw)
    while end and raw[end - 1] >= 0x80:
        end -= 1
    return raw[:end].decode("utf-8", "replace"), raw[end:]


def _shown_and_held(raw):
    return raw.decode("utf-8", "replace"), whole_characters(raw)[1]


def _strict_cuts(raw, last=lambda raw: (raw.decode("utf-8", "replace"), b"")):
    for n in range(4):
        try:
            return raw[:len(raw) - n].decode("utf-8"), raw[len(raw) - n:]
        except UnicodeDecodeError:
            pass
    return last(raw)


def _minus_zero(raw):
    for n in range(4):
        try:
            return raw[:-n].decode("utf-8"), raw[-n:]
        except UnicodeDecodeError:
            pass
    return "", raw


def _by_the_mark(raw):
    text = raw.decode("utf-8", "replace")
    return (text[:-1], raw[-1:]) if text.endswith("\ufffd") else (text, b"")


def _any_first_byte(raw):
    waiting = 0
    for n in (1, 2, 3):
        if len(raw) >= n and raw[-n] >= 0xC0:
            waiting = n
    return raw[:len(raw) - waiting].decode(errors="replace"), raw[len(raw) - waiting:]


def _by_length(raw):
    text = raw.decode("utf-8", "ignore")
    return text, raw[len(text.encode()):]


WHOLE_CHARACTERS = Exercise(
    name="whole_characters", chapter=14, kind="piece", piece="streaming.whole_characters",
    entry="whole_characters", title="Never half a character", difficulty="medium",
    importance="essential", minutes=9, reference=whole_characters,
    fixtures=(whole_text, nothing_yet, half_an_accent, two_of_three_bytes, one_of_three_bytes,
              three_of_four_bytes, one_of_four_bytes, ends_with_a_whole_accent,
              ends_with_three_whole_bytes, ends_with_a_whole_emoji,
              a_broken_byte_inside, a_beginning_that_never_goes_on),
    equivalents={"lead byte": _by_lead_byte, "the decoder's error": _by_error, "bits": _by_bits},
    misconceptions=(
        Misconception("decoded at once", lambda raw: (raw.decode("utf-8", "replace"), b""),
            "Half a character was shown as a replacement mark, and no byte waits. The beginning "
            "of a character has to wait for its rest."),
        Misconception("the rest thrown away", _drops_the_rest,
            "The half character was not shown, but its bytes are lost: the next token can't "
            "complete it. Return them as what waits."),
        Misconception("all or nothing", _all_or_nothing,
            "One incomplete character holds back the whole text, or a broken byte does so for "
            "ever. Only the bytes of the last character wait."),
        Misconception("stuck at a broken byte", _first_error_waits,
            "After a byte that belongs to no character nothing is shown any more. Only at the "
            "end can a character be incomplete; elsewhere such bytes are replaced."),
        Misconception("only the last byte looked at", _two_bytes_only,
            "Characters of three and four bytes are still cut. The beginning of a character may "
            "stand up to three bytes before the end."),
        Misconception("decoded strictly", lambda raw: (raw.decode("utf-8"), b""),
            "Decoding stops with an error at the first half character. Cut it off before; "
            "elsewhere replace what can't be decoded."),
        Misconception("strict but for three bytes", _strict_cuts,
            "A broken byte inside spoils the whole search: then the half character at the end is "
            "shown as a mark. Look at the last bytes themselves."),
        Misconception("cut with minus zero", _minus_zero,
            "Where no byte has to wait, everything waits: a cut at minus zero is a cut at the "
            "beginning."),
        Misconception("a mark is one byte", _by_the_mark,
            "The mark at the end stands for one or more bytes, or for a byte that was really "
            "broken. Only one byte waits here: count those of the character."),
        Misconception("every first byte waits", _any_first_byte,
            "A whole character of two or three bytes at the end waits. A first byte tells how "
            "many bytes it needs: are some missing?"),
        Misconception("the rest by its length", _by_length,
            "Broken bytes are dropped, and what waits begins at the wrong byte after them. Find "
            "the bytes at the end, and replace the others."),
        Misconception("a whole character waits", _always_holds_the_last,
            "A last character that is complete waits, too. Count: its first byte tells how many "
            "bytes it has; hold it only if some are missing."),
        Misconception("everything but ASCII waits", _holds_every_end,
            "All bytes from 128 up at the end wait, so that a text in Japanese would never be "
            "shown. Only the last character can be incomplete."),
        Misconception("shown and held", _shown_and_held,
            "The incomplete bytes are returned as what waits, and shown as a mark as well. Cut "
            "them off before you decode."),
        Misconception("broken bytes dropped", _hides_the_rest,
            "Bytes that belong to no character have vanished without a trace. They are shown as "
            "the replacement mark, so that one can see that something was lost."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Look at the bytes of “é”: c3 a9. A first byte is from c0 up, the bytes after it are"
             " from 80 to bf. Which bytes of a text can be incomplete?"),
        Hint("Which bytes have to wait?",
             "Go back from the end, three bytes at most. A byte below 80: nothing waits. A byte "
             "from c0 up: it needs 2 bytes in all, from e0 up 3, from f0 up 4. Are there fewer?"),
        Hint("I have the number of bytes that wait",
             "Cut: everything before is decoded with the errors replaced, the rest is returned as"
             " bytes. If none wait, do not cut with minus zero."),
    ),
    praise="No reader of yours will ever see half a character.",
)


# ---------------------------------------------------------------- piece: cut_at_stop


def a_stop_in_the_middle():
    return "one END two", ["END"]


def the_same_stop_twice():
    return "one END two END x", ["END"]


def no_stop_anywhere():
    return "La clé dorée", ["END", "###"]


def the_beginning_of_a_stop():
    return "one EN", ["END"]


def nearly_a_stop_and_another_beginning():
    return "one ENEN", ["END"]


def the_earliest_of_two_wins():
    return "a STOP b END c", ["END", "STOP"]


def the_longest_beginning_waits():
    return "xaba", ["bac", "abax"]


def a_stop_that_begins_with_itself():
    return "abaaba", ["abac"]


def no_stops_at_all():
    return "text", []


def nothing_to_look_at():
    return "", ["END"]


def a_stop_at_the_very_end_and_a_beginning_before():
    return "E one\n\n", ["\n\n", "END"]


def _stop_by_loop(text, stops):
    for at in range(len(text)):
        for stop in stops:
            if text[at:at + len(stop)] == stop:
                return text[:at], "", True
    for at in range(len(text)):
        for stop in stops:
            if text[at:] == stop[:len(text) - at]:
                return text[:at], text[at:], False
    return text, "", False


def _stop_by_overlap(text, stops):
    where = min((text.index(s) for s in stops if s in text), default=-1)
    if where >= 0:
        return (text[:where], "", True)
    keep = 0
    for s in stops:
        for n in range(1, min(len(s), len(text) + 1)):
            if text.endswith(s[:n]):
                keep = max(keep, n)
    cut = len(text) - keep
    return (text[:cut], text[cut:], False)


def _find(text, stops):
    return [text.index(s) for s in stops if s in text]


def _longest(text, stops):
    return max((n for s in stops for n in range(1, len(s)) if n <= len(text) and text.endswith(s[:n])),
               default=0)


def _nothing_waits(text, stops):
    found = _find(text, stops)
    return (text[:min(found)], "", True) if found else (text, "", False)


def _keeps_what_follows(text, stops):
    found = _find(text, stops)
    return (text[:min(found)], text[min(found):], True) if found else cut_at_stop(text, stops)


def _stop_is_shown(text, stops):
    for stop in stops:
        if stop in text:
            return text[:text.index(stop) + len(stop)], "", True
    return cut_at_stop(text, stops)


def _first_listed(text, stops):
    for stop in stops:
        if stop in text:
            return text[:text.index(stop)], "", True
    return cut_at_stop(text, stops)


def _last_found(text, stops):
    found = [text.rindex(s) for s in stops if s in text]
    return (text[:max(found)], "", True) if found else cut_at_stop(text, stops)


def _shortest_waits(text, stops):
    if _find(text, stops):
        return cut_at_stop(text, stops)
    ends = [n for s in stops for n in range(1, len(s)) if n <= len(text) and text.endswith(s[:n])]
    keep = min(ends, default=0)
    return text[:len(text) - keep], text[len(text) - keep:], False


def _first_stop_only_waits(text, stops):
    if _find(text, stops):
        return cut_at_stop(text, stops)
    for s in stops:
        if keep := _longest(text, [s]):
            return text[:-keep], text[-keep:], False
    return text, "", False


def _always_a_stop_length(text, stops):
    if _find(text, stops):
        return cut_at_stop(text, stops)
    keep = min(max((len(s) - 1 for s in stops), default=0), len(text))
    return text[:len(text) - keep], text[len(text) - keep:], False


def _waits_and_is_shown(text, stops):
    shown, held, stopped = cut_at_stop(text, stops)
    return shown + held, held, stopped


def _only_at_the_end(text, stops):
    for stop in stops:
        if text.endswith(stop):
            return text[:-len(stop)], "", True
    keep = _longest(text, stops)
    return text[:len(text) - keep], text[len(text) - keep:], False


def _stop_by_stop(text, stops):
    for stop in stops:
        if (at := text.find(stop)) >= 0:
            return text[:at], "", True
        if keep := _longest(text, [stop]):
            return text[:-keep], text[-keep:], False
    return text, "", False


def _minus_one_is_first(text, stops):
    found = [text.find(stop) for stop in stops]
    if found and min(found) >= 0:
        return text[:min(found)], "", True
    for at in range(len(text)):
        if any(stop.startswith(text[at:]) for stop in stops):
            return text[:at], text[at:], False
    return text, "", False


def _first_fit_waits(text, stops):
    if _find(text, stops):
        return cut_at_stop(text, stops)
    for stop in stops:
        for n in range(1, len(stop)):
            if text.endswith(stop[:n]):
                return text[:-n], text[-n:], False
    return text, "", False


def _keeps_and_never_waits(text, stops):
    found = _find(text, stops)
    return (text[:min(found)], text[min(found):], True) if found else (text, "", False)


def _split_at_the_first_listed(text, stops):
    for stop in stops:
        if stop in text:
            return text.split(stop)[0], "", True
    return text, "", False


def _everything_waits(text, stops):
    found = _find(text, stops)
    return (text[:min(found)], "", True) if found else ("", text, False)


CUT_AT_STOP = Exercise(
    name="cut_at_stop", chapter=14, kind="piece", piece="streaming.cut_at_stop", entry="cut_at_stop",
    title="Stop before it is seen", difficulty="medium", importance="essential", minutes=9,
    reference=cut_at_stop,
    fixtures=(a_stop_in_the_middle, the_same_stop_twice, no_stop_anywhere, the_beginning_of_a_stop,
              nearly_a_stop_and_another_beginning, the_earliest_of_two_wins,
              the_longest_beginning_waits, a_stop_that_begins_with_itself, no_stops_at_all,
              nothing_to_look_at, a_stop_at_the_very_end_and_a_beginning_before),
    equivalents={"loops": _stop_by_loop, "overlaps": _stop_by_overlap},
    misconceptions=(
        Misconception("nothing waits", _nothing_waits,
            "The beginning of a stop sequence was shown before it was clear what it would become. "
            "An end of the text that begins a stop has to wait."),
        Misconception("text after the stop kept", _keeps_what_follows,
            "After a stop sequence the stop and what follows still wait, and would be shown at "
            "the end. They are dropped: nothing waits any more."),
        Misconception("the stop is shown", _stop_is_shown,
            "The stop sequence itself is part of what is shown. The text ends before it."),
        Misconception("the first in the list wins", _first_listed,
            "With two stop sequences in the text, the one that is listed first won. The one that "
            "stands first in the text ends it."),
        Misconception("the last place", _last_found,
            "The text was cut at the last stop sequence in it. It ends at the first one."),
        Misconception("the shortest beginning waits", _shortest_waits,
            "Too little waits: a longer end of the text begins a stop sequence, too. The longest "
            "one decides."),
        Misconception("only one stop may wait", _first_stop_only_waits,
            "What waits was decided by one stop sequence alone. Compare the ends of the text with"
            " all of them; the longest counts."),
        Misconception("always so many characters", _always_a_stop_length,
            "Text waits although it begins no stop sequence: readers would always be some "
            "characters behind. Compare the end with the beginning of the stop."),
        Misconception("one stop after the other", _stop_by_stop,
            "One stop sequence is settled before the next is looked at. First look for all of "
            "them in the text; only if none is there, ask what waits."),
        Misconception("minus one is the first", _minus_one_is_first,
            "One stop is in the text, another is not, and none was found. A search that fails "
            "gives minus one, which is the smallest."),
        Misconception("the first that fits waits", _first_fit_waits,
            "The first beginning that fits waits, where a longer one fits, too. Try all ends of "
            "the text, the longest first."),
        Misconception("kept behind the stop, and nothing waits", _keeps_and_never_waits,
            "Two things: what follows a stop is kept, where it should be dropped, and the "
            "beginning of a stop is shown, where it should wait."),
        Misconception("the first listed, and nothing waits", _split_at_the_first_listed,
            "The beginning of a stop sequence was shown before it was clear what it becomes; and "
            "of two stops the first in the list won."),
        Misconception("everything waits", _everything_waits,
            "Without a stop nothing is ever shown: readers would wait for the whole answer. Only "
            "an end that begins a stop waits."),
        Misconception("waits and is shown", _waits_and_is_shown,
            "What waits was shown as well, and would be shown twice. Cut it off from what may be "
            "shown."),
        Misconception("only at the end", _only_at_the_end,
            "A stop sequence in the middle was not seen. A piece may hold more than the stop: "
            "look for it everywhere."),
    ),
    hints=(
        Hint("I do not know where to start",
             "There are two questions, one after the other. Is a whole stop sequence in the text?"
             " If not: could the end of the text be the beginning of one?"),
        Hint("What has to wait?",
             "For “one EN” and the stop “END” it is “EN”. Try every end of the text, the longest "
             "first: is it the beginning of one of the stops?"),
        Hint("Nearly right, but one input differs",
             "Three answers: found, so what stands before the earliest, nothing, True. Else the "
             "first start whose rest begins a stop: before it, the rest, False. Else the whole "
             "text, nothing, False."),
    ),
    praise="A stop sequence may now lie across as many tokens as it likes.",
)


# ---------------------------------------------------------------- exercise 1: events


def as_events(pieces, reason):
    """pieces of text and why it ended -> the whole stream, a str"""
    said = [{"delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    said.append({"delta": {}, "finish_reason": reason})
    events = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in said]
    return "".join(events) + "data: [DONE]\n\n"


def three_pieces():
    return ["The ", "golden", " ring"], "length"


def a_piece_with_line_breaks_and_an_accent():
    return ["La clé\n\ndorée", ' "dit"'], "stop"


def no_piece_at_all():
    return [], "stop"


def _events(text):
    """A stream as a client reads it: what stands between two empty lines."""
    if not isinstance(text, str):
        return text
    parts = text.split("\n\n")
    read = []
    for part in parts:
        try:
            read.append(json.loads(part.removeprefix("data: ")) if part.startswith("data: {") else part)
        except ValueError:
            read.append(part)
    return read


def _compare_events(expected, actual):
    if not isinstance(actual, str):
        return f"expected a str, got {type(actual).__name__}"
    theirs, ours = _events(actual), _events(expected)
    if theirs == ours:
        return None
    at = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
    got = theirs[at] if at < len(theirs) else "nothing"
    want = ours[at] if at < len(ours) else "nothing"
    return f"event {at} as a client reads it: expected {str(want)[:70]!r}, got {str(got)[:70]!r}"


def _events_with(line="data: {}\n\n", done="data: [DONE]\n\n", last=True, body=None, pieces_of=list):
    def as_events(pieces, reason):
        said = [{"delta": {"content": piece}, "finish_reason": None} for piece in pieces_of(pieces)]
        if last:
            said.append({"delta": {}, "finish_reason": reason})
        dump = body or (lambda choice: json.dumps({"choices": [choice]}))
        return "".join(line.replace("{}", dump(choice)) for choice in said) + done
    return as_events


def _growing(pieces):
    return ["".join(pieces[:n + 1]) for n in range(len(pieces))]


def _reason_on_the_last_piece(pieces, reason):
    said = [{"delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    if said:
        said[-1]["finish_reason"] = reason
    return "".join(f"data: {json.dumps({'choices': [c]})}\n\n" for c in said) + "data: [DONE]\n\n"


AS_EVENTS = Exercise(
    name="as_events", chapter=14, kind="complete", entry="as_events",
    title="The server's side of the wire", difficulty="easy", importance="essential", minutes=6,
    reference=as_events, fixtures=(three_pieces, a_piece_with_line_breaks_and_an_accent, no_piece_at_all),
    compare=_compare_events,
    equivalents={"accents as they are": _events_with(
        body=lambda choice: json.dumps({"choices": [choice]}, ensure_ascii=False))},
    misconceptions=(
        Misconception("no empty line", _events_with(line="data: {}\n", done="data: [DONE]\n"),
            "A client sees one event that never ends: an empty line ends an event, so two line "
            "breaks stand behind each."),
        Misconception("no DONE", _events_with(done=""),
            "The stream ends without its last event. Clients wait for [DONE], or call the stream "
            "broken."),
        Misconception("DONE without data", _events_with(done="[DONE]\n\n"),
            "The last event has no field name. It is an event like the others and begins with "
            "data."),
        Misconception("DONE without its empty line", _events_with(done="data: [DONE]"),
            "The last event has no empty line behind it. It is an event like the others, and ends"
            " like them."),
        Misconception("DONE in quotation marks", _events_with(done='data: "[DONE]"\n\n'),
            "The last event is written as JSON, in quotation marks. It is the bare word in "
            "brackets."),
        Misconception("no data in front", _events_with(line="{}\n\n"),
            "The events hold bare JSON. In this format each line begins with the name of its "
            "field, which is data."),
        Misconception("Python instead of JSON", _events_with(body=lambda c: str({"choices": [c]})),
            "The events hold a Python dictionary as Python prints it. JSON has other quotation "
            "marks and no None."),
        Misconception("no end told", _events_with(last=False),
            "The event that says why the text ended is missing: an empty delta with the reason, "
            "before the last event."),
        Misconception("the reason on the last piece", _reason_on_the_last_piece,
            "The reason rides on the last piece, and a text without pieces has none. Here it has "
            "an event of its own."),
        Misconception("the text so far each time", _events_with(pieces_of=_growing),
            "Each event repeats the text so far, and a client that adds them shows it many times. "
            "A delta is only what is new."),
    ),
    hints=(
        Hint("What does an event look like?",
             "How does the chapter's stream look when it is printed raw: what stands before the "
             "JSON, and what behind it?"),
        Hint("The client waits for ever",
             "An event ends with an empty line: the line's own break, and one more. [DONE] is an "
             "event, too."),
        Hint("Nearly right",
             "In this order: one event for each piece; one with an empty delta and the reason; "
             "one with [DONE]. The dictionary goes through the JSON module."),
    ),
    praise="Any public client can read this stream.",
)

# ---------------------------------------------------------------- exercise 2: the loop in order

CHAT_LOOP = Exercise(
    name="chat_loop_in_order", chapter=14, kind="order", title="One turn of a chat, in order",
    difficulty="easy", importance="essential", minutes=5,
    lines=(
        'turns.append({"role": "user", "content": text})',
        "prompt, _ = encode_chat(tokenizer, turns)",
        "stream, said = TextStream(tokenizer), ''",
        "for token in mm.stream(model, prompt, 200, stop_ids=[eos]):",
        "    said += stream.feed(token)",
        "said += stream.finish()",
        'turns.append({"role": "assistant", "content": said})',
    ),
    distractors=("    turns.append({'role': 'assistant', 'content': stream.feed(token)})",),
    equivalents={"the stream first": (2, 0, 1, 3, 4, 5, 6), "the stream second": (0, 2, 1, 3, 4, 5, 6)},
    misconceptions=(
        Misconception("written down before it is asked", (1, 0, 2, 3, 4, 5, 6),
            "The prompt is made before the new message is in it: the model answers what was said "
            "before."),
        Misconception("the end not fetched", (0, 1, 2, 3, 4, 6, 5),
            "The answer is kept before what still waited was added: the last characters are "
            "missing from the history."),
        Misconception("a turn for every token", (0, 1, 2, 3, 7, 5, 6),
            "Every token becomes a turn of its own. The answer is one turn, kept when it is "
            "whole."),
        Misconception("kept before it was written", (0, 1, 2, 6, 3, 4, 5),
            "The answer enters the history while it is still empty. It is kept when it is whole."),
    ),
    hints=(
        Hint("Where does it begin?",
             "What has to be in the list of turns before the prompt is made from it?"),
        Hint("Two lines seem to fit at the end",
             "Something may still wait in the stream when no token comes any more. Does the "
             "history need it?"),
        Hint("Nearly right",
             "Message in, prompt, an empty stream, the loop, its body, the rest that waits, "
             "answer in."),
    ),
)

# ---------------------------------------------------------------- exercise 3: how it ended, and what it costs


def bill(prompt_ids, new_ids, limit, stop_ids):
    """(reason, prompt_tokens, completion_tokens, total_tokens)"""
    stopped = bool(new_ids) and new_ids[-1] in stop_ids
    written = len(new_ids) - stopped
    return "stop" if stopped else "length", len(prompt_ids), written, len(prompt_ids) + written


def ended_by_itself():
    return [1, 40, 41, 42], [7, 8, 9, 2], 20, {2}


def cut_at_the_limit():
    return [1, 40, 41], [7, 8, 9, 11, 12], 5, {2, 3}


def ended_with_the_last_token_allowed():
    return [1, 40], [7, 8, 9, 2], 4, {2}


def ended_at_once():
    return [1, 40, 2, 5, 6], [2], 9, {2}


def ended_by_another_stop():
    return [1], [4, 4, 3], 30, {2, 3}


def _bill(counted=0, reason=None, prompt=0):
    def bill_(prompt_ids, new_ids, limit, stop_ids):
        told, read, written, _ = bill(prompt_ids, new_ids, limit, stop_ids)
        written += counted if told == "stop" else 0
        told = reason(prompt_ids, new_ids, limit, stop_ids) if reason else told
        return told, read + prompt, written, read + prompt + written
    return bill_


def _always_one_less(prompt_ids, new_ids, limit, stop_ids):
    told, read, _, _ = bill(prompt_ids, new_ids, limit, stop_ids)
    return told, read, len(new_ids) - 1, read + len(new_ids) - 1


BILL = Exercise(
    name="bill", chapter=14, kind="function", entry="bill", title="How it ended, and what it costs",
    difficulty="easy", importance="useful", minutes=7, reference=bill,
    fixtures=(ended_by_itself, cut_at_the_limit, ended_with_the_last_token_allowed, ended_at_once,
              ended_by_another_stop),
    equivalents={"counted one by one": lambda prompt_ids, new_ids, limit, stop_ids: (
        "stop" if any(t in stop_ids for t in new_ids) else "length", len(prompt_ids),
        sum(t not in stop_ids for t in new_ids),
        len(prompt_ids) + sum(t not in stop_ids for t in new_ids))},
    misconceptions=(
        Misconception("the stop token counted", _bill(counted=1),
            "The token that ends the text is counted as text. Nobody sees it, and it is not "
            "charged."),
        Misconception("always one less", _always_one_less,
            "A text that was cut at its limit has no end token, and one of its tokens is missing "
            "from the count."),
        Misconception("counted in the total alone", lambda prompt_ids, new_ids, limit, stop_ids: (
            *bill(prompt_ids, new_ids, limit, stop_ids)[:3], len(prompt_ids) + len(new_ids)),
            "The end token is left out of what was written, but not of the total. The total is "
            "the sum of the two."),
        Misconception("shorter than the limit", lambda prompt_ids, new_ids, limit, stop_ids: (
            "stop" if len(new_ids) < limit else "length", len(prompt_ids), len(new_ids) - (len(new_ids) < limit),
            len(prompt_ids) + len(new_ids) - (len(new_ids) < limit)),
            "Both answers were made from the number of tokens. A text may end by itself with the "
            "last one allowed: look at the token."),
        Misconception("the limit asked first", _bill(
            reason=lambda p, new, limit, stop: "length" if len(new) >= limit else "stop"),
            "A text whose end token is the last one allowed ended by itself. Look at the token, "
            "not at the number."),
        Misconception("only one stop id known", _bill(
            reason=lambda p, new, limit, stop: "stop" if new[-1] == 2 else "length"),
            "Only one of the stop ids was recognised. There may be several."),
        Misconception("the prompt is free", lambda prompt_ids, new_ids, limit, stop_ids: (
            *bill(prompt_ids, new_ids, limit, stop_ids)[:3], bill(prompt_ids, new_ids, limit, stop_ids)[2]),
            "The total counts what was written alone. The prompt was read, and it is in the "
            "total."),
        Misconception("the first token of the prompt left out", _bill(prompt=-1),
            "The prompt is one token short. The mark that begins a text was read like any other "
            "token."),
        Misconception("the words exchanged", _bill(
            reason=lambda p, new, limit, stop: "length" if new[-1] in stop else "stop"),
            "The two words are exchanged: stop means that it ended by itself, length that it was "
            "cut."),
    ),
    hints=(
        Hint("When did it stop by itself?",
             "Which token stands last in a text that ended by itself?"),
        Hint("What counts as written?",
             "The end token is in the list, but nobody sees it. A text that was cut has none."),
        Hint("Nearly right",
             "Look at the last new token first. Then: reason, prompt's length, new ones without"
             " the end token, the sum of the two."),
    ),
)

# ---------------------------------------------------------------- exercise 4: the client's side


def read_text(chunks):
    """bytes as they arrive, cut anywhere -> the text of the stream"""
    text = b"".join(chunks).decode("utf-8")
    said = ""
    for line in text.split("\n"):
        if not line.startswith("data:") or line == "data: [DONE]":
            continue
        for choice in json.loads(line[5:])["choices"]:
            said += choice["delta"].get("content", "")
    return said


def _cut(text: str, size: int) -> list[bytes]:
    raw = text.encode()
    return [raw[i:i + size] for i in range(0, len(raw), size)]


def _wire(pieces, extra=""):
    said = [{"choices": [{"delta": {"content": p}}]} for p in pieces] + [{"choices": [{"delta": {}}]}]
    events = [f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in said]
    return "".join([events[0], extra, *events[1:], "data: [DONE]\n\n"])


def one_event_in_each_chunk():
    return ([event.encode() + b"\n\n" for event in _wire(["The ", "ring"]).split("\n\n")[:-1]],)


def cut_in_the_middle_of_characters():
    return (_cut(_wire(["La clé ", "dorée", " 日本"]), 5),)


def two_events_in_a_chunk_and_a_comment():
    return ([_wire(["data: ", "x\n\ny", "  end "], extra=": keep alive\n\n").encode()],)


def an_event_about_nothing():
    usage = 'data: {"choices": [], "usage": {"total_tokens": 5}}\n\n'
    return (_cut(_wire(["a", "b"], extra=usage), 50),)


def _client(cut="join", comments=True, done=True, strip=False, first_choice=False, decode="whole"):
    def read_text(chunks):
        if cut == "chunk":
            parts = [chunk.decode("utf-8", "replace") for chunk in chunks]
        elif decode == "each":
            parts = "".join(chunk.decode("utf-8", "replace") for chunk in chunks).split("\n")
        else:
            parts = b"".join(chunks).decode("utf-8").split("\n")
        said = ""
        for line in parts:
            line = line.strip()
            if not line or comments and not line.startswith("data:"):
                continue
            line = line[5:].strip()
            if done and line == "[DONE]":
                continue
            body = json.loads(line)
            choices = body["choices"][0:1] if not first_choice else [body["choices"][0]]
            for choice in choices:
                piece = choice["delta"].get("content", "")
                said += piece.strip() if strip else piece
        return said
    return read_text


def _split_everywhere(chunks):
    said = ""
    for part in b"".join(chunks).decode().split("data: ")[1:]:
        if part.strip() != "[DONE]":
            for choice in json.loads(part)["choices"]:
                said += choice["delta"].get("content", "")
    return said


def _read_step_by_step(chunks):
    raw, said = b"", []
    for chunk in chunks:
        raw += chunk
        while b"\n\n" in raw:
            event, raw = raw.split(b"\n\n", 1)
            if event.startswith(b"data: {"):
                said += [c["delta"].get("content") or "" for c in json.loads(event[6:])["choices"]]
    return "".join(said)


def _content_demanded(chunks):
    said = ""
    for line in b"".join(chunks).decode().splitlines():
        if line.startswith("data: {"):
            said += json.loads(line[6:])["choices"][0]["delta"]["content"]
    return said


def _each_chunk_strictly(chunks):
    said = ""
    for chunk in chunks:
        for line in chunk.decode().split("\n"):
            if line.startswith("data: {"):
                said += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    return said


READ_TEXT = Exercise(
    name="read_text", chapter=14, kind="function", entry="read_text", title="The client's side of the wire",
    difficulty="medium", importance="useful", minutes=10, reference=read_text,
    fixtures=(one_event_in_each_chunk, cut_in_the_middle_of_characters, two_events_in_a_chunk_and_a_comment,
              an_event_about_nothing),
    equivalents={"event by event": _read_step_by_step},
    misconceptions=(
        Misconception("a chunk is an event", _client(cut="chunk"),
            "A chunk was taken for an event. The network cuts where it likes: join the bytes, "
            "then look for line ends."),
        Misconception("decoded chunk by chunk", _client(decode="each"),
            "Some characters became replacement marks: a chunk may end within one. Join the bytes"
            " before you decode."),
        Misconception("DONE read as JSON", _client(done=False),
            "The last event is no JSON. Leave the one with [DONE] out."),
        Misconception("content demanded", _content_demanded,
            "The last delta is empty: it only tells why the text ended. Without a content there "
            "is nothing to add."),
        Misconception("chunks decoded strictly", _each_chunk_strictly,
            "A chunk may end within a character or a line, and can't be decoded or read alone. "
            "Join the bytes first."),
        Misconception("comments read as data", _client(comments=False),
            "A line that does not begin with data was read as an event. Lines with a colon first "
            "are comments: pass over them."),
        Misconception("blanks lost", _client(strip=True),
            "Blanks at the borders of the pieces are lost, and words run together. A piece is "
            "kept as it is."),
        Misconception("always a first choice", _client(first_choice=True),
            "An event with an empty list of choices stopped the client. The one that reports "
            "usage has none."),
        Misconception("cut at the word data", _split_everywhere,
            "The text itself may contain the word data and a colon. Only at the beginning of a "
            "line is it a field's name."),
    ),
    hints=(
        Hint("It works for one of the inputs only",
             "Print the chunks. Does each of them begin with data, and end with an empty line?"),
        Hint("JSON errors",
             "Join all bytes, decode once, go line by line. Which lines are no JSON events: "
             "empty ones, comments, and one more?"),
        Hint("Nearly right",
             "For each line that begins with data: drop five characters, skip [DONE], load the "
             "rest, and go through all its choices; an absent content is an empty text."),
    ),
)

# ---------------------------------------------------------------- exercise 5: find the bugs in the batch


def write_all(paper, prompts, limits):
    """Continuous batching: every prompt's new ids, in the order of the prompts."""
    waiting, seated = list(range(len(prompts))), {}               # place: number of its prompt
    rows = [[] for _ in prompts]
    while waiting or seated:
        for place in range(len(paper.memory)):
            if place not in seated and waiting:
                seated[place] = waiting.pop(0)
                paper.forget(place)
                paper.read(place, prompts[seated[place]])
        chosen = paper.next_ids()
        for place, number in list(seated.items()):
            rows[number].append(chosen[place])
            paper.read(place, [chosen[place]])
            if len(rows[number]) == limits[number]:
                del seated[place]
    return rows


def five_prompts_two_places():
    return 2, [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12], [13]], [3, 7, 2, 5, 4]


def four_prompts_three_places():
    return 3, [[1], [2, 3], [4, 5, 6], [7, 8]], [2, 9, 4, 5]


def fewer_prompts_than_places():
    return 4, [[5, 5], [6, 7, 8]], [6, 3]


def _run_write_all(candidate, places, prompts, limits):
    paper = PaperModel(places)
    rows = candidate(paper, [list(p) for p in prompts], list(limits))
    return [list(row) for row in rows], paper.steps


def _write_all(forget=True, own_row=True, room=True, wait=False, order=0, after=False):
    def write_all(paper, prompts, limits):
        waiting, seated = list(range(len(prompts))), {}
        rows, places = [[] for _ in prompts], range(len(paper.memory))
        while waiting or seated:
            if room or not seated:
                for place in places:
                    if place not in seated and waiting:
                        seated[place] = waiting.pop(order)
                        if forget:
                            paper.forget(place)
                        paper.read(place, prompts[seated[place]])
            chosen = paper.next_ids()
            taken = list(seated.items())
            for n, (place, number) in enumerate(taken):
                token = chosen[place] if own_row else chosen[n]
                rows[number].append(token)
                paper.read(place, [token])
                if len(rows[number]) == limits[number] + after:
                    del seated[place]
        return [row[:limit] for row, limit in zip(rows, limits)] if after else rows
    return write_all


def _never_read_back(paper, prompts, limits):
    rows = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        token = paper.follow(prompt)
        rows[number] = [token] * limits[number]
    return rows


def _in_order_of_ending(paper, prompts, limits):
    inner = write_all(paper, prompts, limits)
    return sorted(inner, key=len)


WRITE_ALL = Exercise(
    name="write_all", chapter=14, kind="bug", entry="write_all", title="Two slips in a batch",
    difficulty="medium", importance="essential", minutes=12, reference=write_all, run=_run_write_all,
    fixtures=(five_prompts_two_places, four_prompts_three_places, fewer_prompts_than_places),
    equivalents={"with the switches": _write_all()},
    misconceptions=(
        Misconception("unchanged", _write_all(forget=False, own_row=False),
            "Texts differ from those written alone, in two ways: rows are mixed up once a place "
            "is empty, and newcomers find what was read before them."),
        Misconception("the memory of a finished text", _write_all(forget=False),
            "The first texts are right, later ones in the same place are not: they go on from "
            "what a finished text has left there."),
        Misconception("rows mixed up", _write_all(own_row=False),
            "When a place is empty, texts get each other's tokens. A text's token stands at its "
            "place, not at its turn among those who are left."),
        Misconception("static batching", _write_all(room=False),
            "The texts are right, but it takes too many steps: newcomers wait until all places "
            "are empty."),
        Misconception("last come, first served", _write_all(order=-1),
            "Those who came last are served first: the steps differ, and the first may wait for "
            "ever."),
        Misconception("a step too many for each", _write_all(after=True),
            "A text keeps its place one step too long. It leaves when its last token was written."),
        Misconception("in the order of ending", _in_order_of_ending,
            "The texts come back in the order in which they ended. Each belongs to its prompt's "
            "number."),
    ),
    hints=(
        Hint("I do not see what is wrong",
             "Compare each text with the same prompt written alone. Which is the first one that"
             " differs, and when did it take its place?"),
        Hint("The first texts are right until one ends",
             "The model answers for every place, an empty one included. Which entry belongs to "
             "a text in place 1 when place 0 is empty?"),
        Hint("Later texts are wrong from their first token",
             "A place still remembers what it has read. Whoever sits down wants an empty "
             "memory."),
    ),
)

# ---------------------------------------------------------------- exercise 6: keep the first turn


def keep_the_first(messages, longest, count):
    """The system message, the first question with its answer, and the newest turns that fit."""
    first = 1 if messages[0]["role"] == "system" else 0
    kept = list(messages)
    while count(kept) > longest and len(kept) > first + 3:
        del kept[first + 2:first + 4]
    return kept


def _said(system, *words):
    roles = ("user", "assistant")
    told = [{"role": "system", "content": system}] if system else []
    return told + [{"role": roles[n % 2], "content": word} for n, word in enumerate(words)]


def words_of(messages):
    """How many words all messages have together."""
    return sum(len(message["content"].split()) for message in messages)


TALE = "One morning Anna found a ring"
LONG_TALK = ("Who has it?", "Anna.", "Where is she?", "In the mill by the lake.", "And Leo?", "Not told.", "Why?")


def two_of_the_oldest_have_to_go():
    return _said("Be brief.", TALE, "Yes.", *LONG_TALK[:5]), 21, words_of


def without_a_system_message():
    return _said("", TALE, "Yes.", *LONG_TALK[:5]), 20, words_of


def all_of_it_fits_exactly():
    messages = _said("Be brief.", TALE, "Yes.", *LONG_TALK[:3])
    return messages, words_of(messages), words_of


def one_word_too_many():
    messages = _said("Be brief.", TALE, "Yes.", *LONG_TALK)
    return messages, words_of(messages) - 1, words_of


def only_the_first_and_the_last_are_left():
    return _said("Be brief.", TALE, "Yes.", *LONG_TALK), 11, words_of


def _trim(start=2, size=2, strict=False, system=True, once=False):
    def keep_the_first(messages, longest, count):
        kept = list(messages)
        first = 1 if system and messages[0]["role"] == "system" else 0
        while (count(kept) >= longest if strict else count(kept) > longest) and len(kept) > first + start + 1:
            del kept[first + start:first + start + size]
            if once:
                break
        return kept
    return keep_the_first


def _newest_lost(messages, longest, count):
    kept = list(messages)
    while count(kept) > longest and len(kept) > 3:
        del kept[-2:]
    return kept


def _system_lost(messages, longest, count):
    kept = [m for m in messages if m["role"] != "system"]
    while count(kept) > longest and len(kept) > 3:
        del kept[2:4]
    return kept


def _in_place(messages, longest, count):
    first = 1 if messages[0]["role"] == "system" else 0
    while count(messages) > longest and len(messages) > first + 3:
        del messages[first + 2:first + 4]
    return messages


def _from_the_end(messages, longest, count):
    first = 1 if messages[0]["role"] == "system" else 0
    head, tail = messages[:first + 2], messages[first + 2:]
    for start in range(0, len(tail), 2):
        if count(head + tail[start:]) <= longest:
            return head + tail[start:]
    return head + tail[-1:]


def _pairs_of_a_list(messages, longest, count):
    system = [m for m in messages if m["role"] == "system"]
    rest = messages[len(system):]
    kept, newest = [], rest[-1:]
    pairs = [rest[i:i + 2] for i in range(2, len(rest) - 1, 2)]
    for pair in reversed(pairs):
        if count(system + rest[:2] + pair + kept + newest) > longest:
            break
        kept = pair + kept
    return system + rest[:2] + kept + newest


def _oldest_behind_the_system(messages, longest, count):
    kept = list(messages)
    while count(kept) > longest and len(kept) > 3:
        del kept[1:3]
    return kept


def _always_a_system(messages, longest, count):
    kept = list(messages)
    while count(kept) > longest and len(kept) > 4:
        del kept[3:5]
    return kept


KEEP_THE_FIRST = Exercise(
    name="keep_the_first", chapter=14, kind="function", entry="keep_the_first",
    title="A history that keeps its beginning", difficulty="medium", importance="useful", minutes=12,
    reference=keep_the_first,
    fixtures=(two_of_the_oldest_have_to_go, without_a_system_message, all_of_it_fits_exactly,
              one_word_too_many, only_the_first_and_the_last_are_left),
    equivalents={"from the end": _from_the_end, "pairs": _pairs_of_a_list},
    misconceptions=(
        Misconception("the oldest goes first", _trim(start=0),
            "The first question is lost, and with it the tale that all others are about. Begin to"
            " drop behind its answer."),
        Misconception("half a turn dropped", _trim(size=1),
            "Single messages were dropped, so that two of the same role may follow each other. "
            "Drop a question with its answer."),
        Misconception("the system message lost", _system_lost,
            "The instructions are gone: the assistant forgets how to behave. The system message "
            "stays first."),
        Misconception("counted without the system message", _trim(system=False),
            "With a system message the roles do not alternate any more: one message too early was"
            " dropped. The system message is not a turn."),
        Misconception("the oldest behind the system message", _oldest_behind_the_system,
            "The oldest turn behind the first message was dropped: the tale with its answer, or, "
            "without a system message, an answer and the next question."),
        Misconception("always a system message", _always_a_system,
            "Without a system message the wrong two are dropped: an answer and the next question."
            " Where the turns begin depends on the first role."),
        Misconception("the newest dropped", _newest_lost,
            "The newest turns were dropped, and the question that is to be answered with them. "
            "The old ones go."),
        Misconception("exactly full is too long", _trim(strict=True),
            "A conversation of exactly the length allowed was shortened. It may have that many "
            "tokens."),
        Misconception("dropped once", _trim(once=True),
            "One turn was dropped, and the rest is still too long. Go on until it fits."),
        Misconception("the given list was cut", _in_place,
            "The list that was given has lost its messages: the page above would forget them, "
            "too. Work on a copy."),
        Misconception("answer before question", _trim(start=1),
            "The first question has lost its own answer. Keep both, and drop from the next "
            "question on."),
    ),
    hints=(
        Hint("What may be dropped at all?",
             "Number the messages: system, first question, its answer, second question ... and "
             "the last one. Which of them have to stay?"),
        Hint("The roles do not alternate any more",
             "Drop two at a time, beginning with the question behind the first answer. With a "
             "system message all numbers are one larger."),
        Hint("When to stop",
             "While it is too long and there is still a pair to drop: that is, more than the "
             "system message, the first pair and the last question."),
    ),
)

# ---------------------------------------------------------------- exercise 7: chance of one's own


def choose_each(logits, temperatures, generators):
    """One token for each row, as int64 (B,)."""
    chosen = []
    for row, temperature, generator in zip(logits, temperatures, generators):
        if temperature == 0:
            chosen.append(int(row.argmax()))
        else:
            uniform = torch.rand(1, generator=generator)
            chosen.append(int(draw((row / temperature).softmax(-1)[None], uniform)))
    return torch.tensor(chosen)


def _logits(seed, rows, vocab):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) + 0.4


def four_requests_of_all_kinds():
    return _logits(1, 4, 23), [0.7, 0.0, 1.3, 0.7], [5, 6, 7, 5]


def three_greedy_and_one_not():
    return _logits(2, 4, 11), [0.0, 0.0, 1.0, 0.0], [1, 2, 3, 4]


def rows_of_large_logits():
    return 60 * _logits(3, 3, 17), [0.3, 2.0, 0.0], [8, 9, 10]


def _run_choose(candidate, logits, temperatures, seeds):
    """Three steps, as a server takes them: generators go on from step to step."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    steps = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)                  # so that the use of global chance can be told
        for step in range(3):
            chosen = candidate(logits + 0.3 * step * logits.roll(1, 1), list(temperatures), list(generators))
            steps.append(torch.as_tensor(chosen).tolist())
    return steps


def _by_mask(logits, temperatures, generators):
    t = torch.tensor(temperatures)
    hot = t > 0
    chosen = logits.argmax(-1)
    if hot.any():
        u = torch.cat([torch.rand(1, generator=g) for g, h in zip(generators, hot.tolist()) if h])
        chosen[hot] = draw((logits[hot] / t[hot, None]).softmax(-1), u)
    return chosen


def _everyone_draws(logits, temperatures, generators):
    u = torch.stack([torch.rand((), generator=g) for g in generators])
    t = torch.tensor(temperatures)
    drawn = draw((logits / t.where(t > 0, torch.ones(()))[:, None]).softmax(-1), u)
    return torch.where(t > 0, drawn, logits.argmax(-1))


def _one_source(logits, temperatures, generators):
    return choose_each(logits, temperatures, [generators[0]] * len(generators))


def _first_temperature(logits, temperatures, generators):
    return choose_each(logits, [temperatures[0]] * len(temperatures), generators)


def _multiplied_temperature(logits, temperatures, generators):
    return choose_each(logits, [1 / t if t else 0.0 for t in temperatures], generators)


def _never_greedy(logits, temperatures, generators):
    return choose_each(logits, [t or 1.0 for t in temperatures], generators)


def _always_greedy(logits, temperatures, generators):
    return logits.argmax(-1)


def _temperature_after(logits, temperatures, generators):
    chosen = []
    for row, t, g in zip(logits, temperatures, generators):
        if t == 0:
            chosen.append(int(row.argmax()))
            continue
        p = row.softmax(-1) / t
        chosen.append(int(draw(p[None] / p.sum(), torch.rand(1, generator=g))))
    return torch.tensor(chosen)


def _seeded_anew(logits, temperatures, generators):
    fresh = [torch.Generator().manual_seed(g.initial_seed()) for g in generators]
    return choose_each(logits, temperatures, fresh)


def _whole_batch_as_one(logits, temperatures, generators):
    t = torch.tensor(temperatures).clamp(min=1e-6)[:, None]
    p = (logits / t).flatten().softmax(-1).view_as(logits)
    u = torch.stack([torch.rand((), generator=g) if x else torch.zeros(()) for g, x in zip(generators, temperatures)])
    chosen = draw(p + 1e-30, u)
    return torch.where(torch.tensor(temperatures) > 0, chosen, logits.argmax(-1))


def _global_chance(logits, temperatures, generators):
    chosen = []
    for row, temperature in zip(logits, temperatures):
        if temperature == 0:
            chosen.append(int(row.argmax()))
        else:
            chosen.append(int(draw((row / temperature).softmax(-1)[None], torch.rand(1))))
    return torch.tensor(chosen)


def _multinomial(logits, temperatures, generators):
    return torch.tensor([
        int(row.argmax()) if t == 0 else int(torch.multinomial((row / t).softmax(-1), 1, generator=g))
        for row, t, g in zip(logits, temperatures, generators)])


CHOOSE_EACH = Exercise(
    name="choose_each", chapter=14, kind="function", entry="choose_each", title="Chance of one's own",
    difficulty="medium", importance="essential", minutes=10, reference=choose_each, run=_run_choose,
    fixtures=(four_requests_of_all_kinds, three_greedy_and_one_not, rows_of_large_logits),
    equivalents={"a mask": _by_mask, "everyone draws": _everyone_draws},
    misconceptions=(
        Misconception("one generator for all", _one_source,
            "All rows draw from the first request's chance: a seed repeats nothing while others "
            "are there. Each row has a generator of its own."),
        Misconception("the program's own chance", _global_chance,
            "The numbers come from the program's global chance, and the generators were not used."
            " Give the row's own one to the draw of the number."),
        Misconception("another way to draw", _multinomial,
            "These draws are fair, but others than the library's: a seed would not repeat its "
            "texts. Use one uniform number and the given function."),
        Misconception("one temperature for all", _first_temperature,
            "All rows are drawn with the first request's temperature. Each has its own."),
        Misconception("multiplied", _multiplied_temperature,
            "High temperatures make the text tame and low ones wild. Logits are divided by the "
            "temperature."),
        Misconception("zero as one", _never_greedy,
            "A request with temperature 0 is drawn. Zero means the likeliest token, without "
            "chance."),
        Misconception("nobody draws", _always_greedy,
            "Every row takes the likeliest token. Above temperature 0 it is drawn."),
        Misconception("temperature after the softmax", _temperature_after,
            "The temperature changes nothing: dividing probabilities by a number and scaling them"
            " back cancels. Divide the logits."),
        Misconception("seeded anew at each step", _seeded_anew,
            "Every step draws the same number. A generator goes on from step to step and is not "
            "begun anew."),
        Misconception("one softmax for the batch", _whole_batch_as_one,
            "The softmax went over all requests together, so their texts depend on each other. "
            "Each row is a distribution of its own."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Go through the rows one by one. What are the row's own temperature and generator?"),
        Hint("Division by zero",
             "A temperature of 0 needs no division and no chance: take the likeliest token."),
        Hint("Nearly right",
             "For the others: divide the logits by the temperature, softmax over the row, one "
             "uniform number from this row's generator, then draw."),
    ),
)

# ---------------------------------------------------------------- exercise 8: an open task with vectors


def nearest(query, vectors, k):
    """The rows of the k vectors that point most nearly where the query points, nearest first."""
    sizes = vectors.norm(dim=-1) * query.norm()
    return ((vectors @ query) / sizes).argsort(descending=True)[:k].tolist()


def vectors_of_different_length():
    chance = torch.Generator().manual_seed(14)
    return (torch.randn(6, generator=chance) + 0.2,
            torch.randn(9, 6, generator=chance) * torch.rand(9, 1, generator=chance).mul(8) + 0.3, 4)


def fewer_than_k():
    chance = torch.Generator().manual_seed(15)
    return torch.randn(5, generator=chance), 4 * torch.randn(3, 5, generator=chance) - 0.2, 5


def one_is_wanted():
    return torch.tensor([1.0, 2.0, 0.5]), torch.tensor([[9.0, 1.0, 1.0], [0.4, 0.9, 0.2], [-2.0, -4.0, -1.0]]), 1


def _nearest(score, largest=True):
    def nearest_(query, vectors, k):
        return score(query, vectors).argsort(descending=largest)[:k].tolist()
    return nearest_


def _cosine(query, vectors):
    return torch.cosine_similarity(query[None], vectors, dim=-1)


NEAREST = Exercise(
    name="nearest", chapter=14, kind="open", entry="nearest", title="A search engine in ten lines",
    difficulty="medium", importance="optional", minutes=14, reference=nearest,
    fixtures=(vectors_of_different_length, fewer_than_k, one_is_wanted),
    equivalents={
        "cosine": _nearest(_cosine),
        "normalised first": lambda query, vectors, k: torch.nn.functional.normalize(vectors, dim=-1).matmul(
            torch.nn.functional.normalize(query, dim=0)).topk(min(k, len(vectors))).indices.tolist(),
        "sorted": lambda query, vectors, k: sorted(
            range(len(vectors)), key=lambda i: -float(_cosine(query, vectors)[i]))[:k],
    },
    misconceptions=(
        Misconception("long vectors win", _nearest(lambda q, v: v @ q),
            "Long vectors win, whatever they point at. Divide by their lengths first."),
        Misconception("the farthest", _nearest(_cosine, largest=False),
            "These are the farthest ones. The nearest have the largest cosine, so sort downwards."),
        Misconception("the last ones upwards", lambda query, vectors, k: _cosine(query, vectors).argsort()[-k:].tolist(),
            "The right rows, but the nearest stands last. Nearest first."),
        Misconception("more than there are", lambda query, vectors, k: _cosine(query, vectors).topk(k).indices.tolist(),
            "It stops when k is larger than the number of rows. Then all of them are wanted."),
        Misconception("by distance", _nearest(lambda q, v: (v - q).norm(dim=-1), largest=False),
            "Sorted by distance, where length counts. Here the direction alone counts."),
        Misconception("without the sign", _nearest(lambda q, v: _cosine(q, v).abs()),
            "A vector that points the opposite way counts as near. Keep the sign."),
        Misconception("the scores instead of the rows", lambda query, vectors, k: (
            _cosine(query, vectors).sort(descending=True).values[:k].tolist()),
            "These are the cosines. Wanted are the numbers of the rows."),
    ),
    hints=(
        Hint("What does near mean here?",
             "Two vectors point the same way if their cosine is 1. What is it, from a product "
             "and two lengths?"),
        Hint("Wrong vectors come first",
             "Divide each product by the length of its own vector. The sign stays."),
        Hint("Nearly right",
             "Products, over lengths, sorted downwards, the first k row numbers as a list."),
    ),
)

EXERCISES = [WHOLE_CHARACTERS, CUT_AT_STOP, AS_EVENTS, CHAT_LOOP, BILL, READ_TEXT, WRITE_ALL, KEEP_THE_FIRST,
             CHOOSE_EACH, NEAREST]
