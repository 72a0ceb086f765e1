"""Chapter 14, the chat and the platform: its two core pieces and its exercises."""

from __future__ import annotations

import json
import re
from itertools import takewhile

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


def _ignored(raw):
    return raw.decode("utf-8", "ignore"), b""


def _two_places_back(raw):
    for n in (1, 2):
        if len(raw) >= n and raw[-n] >= 0xC0:
            needs = 2 if raw[-n] < 0xE0 else 3 if raw[-n] < 0xF0 else 4
            return (raw[:-n].decode("utf-8", "replace"), raw[-n:]) if needs > n else (
                raw.decode("utf-8", "replace"), b"")
    return raw.decode("utf-8", "replace"), b""


def _by_length(raw):
    text = raw.decode("utf-8", "ignore")
    return text, raw[len(text.encode()):]


def _by_length_with_marks(raw):
    text = raw.decode("utf-8", "replace").rstrip("\ufffd")
    return text, raw[len(text.encode()):]


def _back_from_the_end(needs, bytes_to_look_at=lambda raw: min(3, len(raw)), decode="replace"):
    """needs(byte): how many bytes the character has that it begins; 0 if it begins none."""
    def whole_characters(raw):
        for n in range(1, bytes_to_look_at(raw) + 1):
            if needs(raw[-n]) > n:
                return raw[:-n].decode("utf-8", decode), raw[-n:]
            if needs(raw[-n]):
                break
        return raw.decode("utf-8", decode), b""
    return whole_characters


def _size(byte):
    return 1 if byte < 0x80 else 0 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4


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
        Misconception("errors ignored", _ignored,
            "Half a character has vanished, and nothing waits: its letter will never be shown. "
            "Its bytes have to wait for the rest."),
        Misconception("two places back", _two_places_back,
            "Three of four bytes were shown as a mark. From f0 on a character has four bytes, and its "
            "first may stand three places before the end."),
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
        Misconception("any byte from 80 up begins", _back_from_the_end(
            lambda byte: max(_size(byte), 2) if byte >= 0x80 else 1),
            "A byte from 80 to bf at the end is taken for a first byte. First bytes begin at c0: go "
            "back over the others."),
        Misconception("strict behind the cut", _back_from_the_end(_size, decode="strict"),
            "The half character is cut off rightly, but a byte that belongs to no character stops it "
            "with an error. Decode what is left with the errors replaced."),
        Misconception("no byte to look back at", _back_from_the_end(_size, lambda raw: 3),
            "It looks back further than there are bytes: there may be none at all. Go back as far as "
            "there are some."),
        Misconception("a byte is a character", lambda raw: (raw.decode("latin-1"), b""),
            "Each byte became a character of its own, and accents are gone. The bytes are UTF-8."),
        Misconception("the number that waits", lambda raw: (
            whole_characters(raw)[0], len(whole_characters(raw)[1])),
            "The second answer says how many bytes wait. Return the bytes themselves: the next token "
            "completes them."),
        Misconception("the rest by its length, with marks", _by_length_with_marks,
            "A mark has three bytes, and the broken byte it stands for has one: what waits begins at "
            "the wrong place. Count in the bytes themselves."),
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
    return "one END two", ["END", "###"]


def a_stop_at_the_very_beginning():
    return "END two", ["END"]


def one_letter_may_begin_a_stop():
    return "one E", ["END"]


def ends_like_the_end_of_a_stop():
    return "one ND", ["END"]


def a_text_shorter_than_the_stop():
    return "aa", ["aab"]


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


def the_earliest_is_listed_first():
    return "a STOP b END c", ["STOP", "END"]


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


def a_short_stop_and_a_long_one():
    return "In the end: EN", ["\n", "END"]


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
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return (text[:min(ends)], "", True) if ends else cut_at_stop(text, stops)


def _first_listed(text, stops):
    for stop in stops:
        if stop in text:
            return text[:text.index(stop)], "", True
    return cut_at_stop(text, stops)


def _last_found(text, stops):
    found = _find(text, stops)
    return (text[:max(found)], "", True) if found else cut_at_stop(text, stops)


def _last_of_the_same(text, stops):
    found = [text.rindex(s) for s in stops if s in text]
    return (text[:min(found)], "", True) if found else cut_at_stop(text, stops)


def _not_at_the_beginning(text, stops):
    found = [text.find(stop) for stop in stops if text.find(stop) > 0]
    return (text[:min(found)], "", True) if found else _what_waits(text, stops)


def _what_waits(text, stops):
    keep = _longest(text, stops)
    return text[:len(text) - keep], text[len(text) - keep:], False


def _waiting_asked_first(text, stops):
    for at in range(len(text)):
        if any(stop.startswith(text[at:]) for stop in stops):
            return text[:at], text[at:], False
    return cut_at_stop(text, stops)


def _anywhere_in_a_stop(text, stops):
    if _find(text, stops):
        return cut_at_stop(text, stops)
    keep = max((n for n in range(1, len(text) + 1) if any(text[-n:] in stop for stop in stops)), default=0)
    return text[:len(text) - keep], text[len(text) - keep:], False


def _two_letters_at_least(text, stops):
    shown, held, stopped = cut_at_stop(text, stops)
    return (shown, held, stopped) if len(held) != 1 else (text, "", False)


def _from_before_the_beginning(text, stops):
    if _find(text, stops):
        return cut_at_stop(text, stops)
    for start in range(len(text) - max(map(len, stops), default=0), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:], False
    return text, "", False


def _minus_one_cuts(text, stops):
    found = [text.find(stop) for stop in stops]
    return (text[:min(found)], "", True) if max(found, default=-1) >= 0 else _what_waits(text, stops)


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


def _everything_waits(text, stops):
    found = _find(text, stops)
    return (text[:min(found)], "", True) if found else ("", text, False)


def _waits_among(ends):
    """ends(text, stops): where an end may begin that waits, if it begins a stop."""
    def cut_at_stop_(text, stops):
        if _find(text, stops):
            return cut_at_stop(text, stops)
        for start in ends(text, stops):
            if any(stop.startswith(text[start:]) for stop in stops):
                return text[:start], text[start:], False
        return text, "", False
    return cut_at_stop_


def _from_its_first_letter(text, stops):
    found = [at for at, letter in enumerate(text) if any(stop.startswith(letter) for stop in stops)]
    if _find(text, stops) or not found:
        return cut_at_stop(text, stops)
    return text[:found[0]], text[found[0]:], False


def _small_and_capital(text, stops):
    found = _find(text.lower(), [stop.lower() for stop in stops])
    return (text[:min(found)], "", True) if found else cut_at_stop(text, stops)


def _blank_lost(text, stops):
    shown, held, stopped = cut_at_stop(text, stops)
    return shown.rstrip() if stopped else shown, held, stopped


CUT_AT_STOP = Exercise(
    name="cut_at_stop", chapter=14, kind="piece", piece="streaming.cut_at_stop", entry="cut_at_stop",
    title="Stop before it is seen", difficulty="medium", importance="essential", minutes=9,
    reference=cut_at_stop,
    fixtures=(a_stop_in_the_middle, the_same_stop_twice, no_stop_anywhere, the_beginning_of_a_stop,
              one_letter_may_begin_a_stop, a_stop_at_the_very_beginning, ends_like_the_end_of_a_stop,
              a_text_shorter_than_the_stop, nearly_a_stop_and_another_beginning,
              the_earliest_of_two_wins, the_earliest_is_listed_first,
              the_longest_beginning_waits, a_stop_that_begins_with_itself, no_stops_at_all,
              nothing_to_look_at, a_stop_at_the_very_end_and_a_beginning_before,
              a_short_stop_and_a_long_one),
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
            "Of two different stops, the one that stands later in the text ended it. The earlier "
            "one does."),
        Misconception("the last of the same", _last_of_the_same,
            "The same stop stands twice in the text, and it was cut at the second. It ends at the"
            " first."),
        Misconception("not at the beginning", _not_at_the_beginning,
            "A stop at the very beginning of the text was not found. Its place is zero, which is "
            "a place like any other."),
        Misconception("what waits asked first", _waiting_asked_first,
            "Something waits although there is a whole stop in the text. First look for whole stops; "
            "only without one, ask what waits."),
        Misconception("anywhere in a stop", _anywhere_in_a_stop,
            "Text waits that lies somewhere within a stop. Only the beginning of a stop can still"
            " become one."),
        Misconception("two letters at least", _two_letters_at_least,
            "A single last letter that begins a stop was shown. One letter has to wait, too."),
        Misconception("from before the beginning", _from_before_the_beginning,
            "The text is shorter than the stop, and too little waits: the search began before the"
            " text's beginning. Begin at zero."),
        Misconception("minus one cuts", _minus_one_cuts,
            "The text lost its last character instead of its end: a search that fails gives minus"
            " one. Leave out the stops that are not there."),
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
        Misconception("everything waits", _everything_waits,
            "Without a stop nothing is ever shown: readers would wait for the whole answer. Only "
            "an end that begins a stop waits."),
        Misconception("as far back as the shortest stop", _waits_among(
            lambda text, stops: range(max(0, len(text) - min(map(len, stops), default=0)), len(text))),
            "The shortest stop decided how far back one looks, and a longer one began before. The "
            "longest decides."),
        Misconception("without stops an error", _waits_among(
            lambda text, stops: range(max(0, len(text) - max(map(len, stops))), len(text))),
            "Without any stop sequence it fails: of no lengths there is no largest. Then all of the "
            "text may be shown."),
        Misconception("from its first letter on", _from_its_first_letter,
            "Text waits from the first letter of a stop on, although what follows that letter is no "
            "stop. What waits must begin a stop up to its last letter."),
        Misconception("small and capital letters alike", _small_and_capital,
            "A word ended the text that only sounds like the stop: capital and small letters differ. "
            "Look for the stop as it is written."),
        Misconception("the blank before the stop lost", _blank_lost,
            "Blanks before the stop were removed. Show the text up to the stop as it is."),
        Misconception("what waits has stopped it", lambda text, stops: (
            *cut_at_stop(text, stops)[:2], cut_at_stop(text, stops)[2] or bool(cut_at_stop(text, stops)[1])),
            "Text that waits counts as stopped. It may still become something else: only a whole stop "
            "ends the text."),
        Misconception("waits and is shown", _waits_and_is_shown,
            "What waits was shown as well, and would be shown twice. Cut it off from what may be "
            "shown."),
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
    """A stream as a client reads it: an empty line ends an event, further ones say nothing, and
    one blank behind the colon belongs to the format."""
    *whole, rest = text.replace("\r\n", "\n").split("\n")
    read, lines = [], []
    for line in whole:
        if line:
            lines.append(line)
        elif lines:
            read.append(_event(lines))
            lines = []
    lines += [rest] * bool(rest)
    return read + (["\n".join([*lines, "(no empty line behind it)"])] if lines else [])


def _event(lines):
    if not all(line.startswith("data:") for line in lines):
        return "\n".join(lines)
    value = "\n".join(line.removeprefix("data:").removeprefix(" ") for line in lines)
    try:
        return json.loads(value) if value.startswith("{") else f"data: {value}"
    except ValueError:
        return "\n".join(lines)


def _compare_events(expected, actual):
    if expected == actual:
        return None
    if not isinstance(actual, str) or not isinstance(expected, str):
        return f"expected a str, got {type(actual).__name__}"
    theirs, ours = _events(actual), _events(expected)
    if theirs == ours:
        return None
    at = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
    got = theirs[at] if at < len(theirs) else "nothing"
    want = ours[at] if at < len(ours) else "nothing"
    return f"event {at} as a client reads it: expected {str(want)[:70]!r}, got {str(got)[:70]!r}"


def _events_with(line="data: {}\n\n", done="data: [DONE]\n\n", body=None):
    def as_events(pieces, reason):
        said = [{"delta": {"content": piece}, "finish_reason": None} for piece in pieces]
        said.append({"delta": {}, "finish_reason": reason})
        dump = body or (lambda choice: json.dumps({"choices": [choice]}))
        return "".join(line.replace("{}", dump(choice)) for choice in said) + done
    return as_events


def _one_event(pieces, reason):
    said = [{"delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    said.append({"delta": {}, "finish_reason": reason})
    return f"data: {json.dumps({'choices': said})}\n\ndata: [DONE]\n\n"


AS_EVENTS = Exercise(
    name="as_events", chapter=14, kind="complete", entry="as_events",
    title="The server's side of the wire", difficulty="easy", importance="essential", minutes=6,
    reference=as_events, fixtures=(three_pieces, a_piece_with_line_breaks_and_an_accent, no_piece_at_all),
    compare=_compare_events,
    equivalents={"accents as they are": _events_with(
        body=lambda choice: json.dumps({"choices": [choice]}, ensure_ascii=False)),
        "no blank": _events_with(line="data:{}\n\n", done="data:[DONE]\n\n"),
        "one line break more": _events_with(line="data: {}\n\n\n")},
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
        Misconception("DONE in a list", _events_with(done='data: ["DONE"]\n\n'),
            "The last event is a list in JSON. It is no JSON at all: brackets and a word, without "
            "quotation marks."),
        Misconception("on several lines", _events_with(
            body=lambda choice: json.dumps({"choices": [choice]}, indent=1)),
            "The JSON goes over several lines, and a client reads those that begin with data. Write "
            "it on one line."),
        Misconception("a list of events", lambda pieces, reason: [
            *(event + "\n\n" for event in as_events(pieces, reason).split("\n\n")[:-1])],
            "These are the events in a list. A stream is one text: join them."),
        Misconception("no colon", _events_with(line="data {}\n\n", done="data [DONE]\n\n"),
            "There is no colon behind the name of the field, so a client does not know where the "
            "name ends."),
        Misconception("no data in front", _events_with(line="{}\n\n", done="[DONE]\n\n"),
            "The events hold bare JSON. In this format each line begins with the name of its "
            "field, which is data."),
        Misconception("data for the last one alone", _events_with(line="{}\n\n"),
            "Only the last event begins with data. The others hold bare JSON, and a client passes"
            " over them."),
        Misconception("the choice alone", _events_with(body=json.dumps),
            "Each event holds a bare choice. A client looks for a list of choices first: put it "
            "into one, as the text above shows."),
        Misconception("choices without a list", _events_with(body=lambda c: json.dumps({"choices": c})),
            "The choices are no list. There is one choice here, in a list of its own."),
        Misconception("all in one event", _one_event,
            "All pieces came in one event, so nothing is shown before the end. Each piece has an "
            "event of its own."),
        Misconception("Python instead of JSON", _events_with(body=lambda c: str({"choices": [c]})),
            "The events hold a Python dictionary as Python prints it. JSON has other quotation "
            "marks and no None."),
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
        Misconception("a turn for every token", "with 7",
            "Every token becomes a turn of its own. The answer is one turn, kept when it is "
            "whole."),
        Misconception("written down before it is asked", "1 before 0",
            "The prompt is made before the new message is in it: the model answers what was said "
            "before."),
        Misconception("kept before it was written", "6 before 4",
            "The answer enters the history while it is still empty. It is kept when it is whole."),
        Misconception("the end not fetched", "6 before 5 or without 5",
            "The answer is kept before what still waited was added: the last characters are "
            "missing from the history."),
        Misconception("the answer not kept", "without 6",
            "The answer is not kept: at the next turn the model does not know what it said."),
        Misconception("the question not kept", "without 0",
            "The new message is not in the history, so the model never reads it."),
        Misconception("answered before the prompt", "3 before 1",
            "The model is asked before the prompt is made. Which line makes it of the turns?"),
        Misconception("an answer begun anew", "3 before 2",
            "The stream and the empty answer are made once, before the first token comes."),
        Misconception("fed above the loop", "4 before 3",
            "An indented line belongs to the loop, so it stands below the loop's first line."),
        Misconception("fetched before the tokens", "5 before 4",
            "What still waits is fetched before any token was fed. The stream is finished after "
            "its last token."),
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


def cut_behind_an_earlier_answer():
    return [1, 40, 2, 41, 42, 43], [7, 8, 9, 11], 4, {2, 3}


def ended_with_the_last_token_allowed():
    return [1, 40], [7, 8, 9, 2], 4, {2}


def ended_at_once():
    return [1, 40, 2, 5, 6], [2], 9, {2}


def ended_by_another_stop():
    return [1], [4, 4, 3], 30, {2, 3}


def _compared_with_the_set(prompt_ids, new_ids, limit, stop_ids):
    return "length", len(prompt_ids), len(new_ids), len(prompt_ids) + len(new_ids)


def _bill(counted=0, reason=None):
    def bill_(prompt_ids, new_ids, limit, stop_ids):
        told, read, written, _ = bill(prompt_ids, new_ids, limit, stop_ids)
        written += counted if told == "stop" else 0
        told = reason(prompt_ids, new_ids, limit, stop_ids) if reason else told
        return told, read, written, read + written
    return bill_


def _always_one_less(prompt_ids, new_ids, limit, stop_ids):
    told, read, _, _ = bill(prompt_ids, new_ids, limit, stop_ids)
    return told, read, len(new_ids) - 1, read + len(new_ids) - 1


def _stop_anywhere(prompt_ids, new_ids, limit, stop_ids):
    stopped = not stop_ids.isdisjoint([*prompt_ids, *new_ids])
    written = len(new_ids) - stopped
    return "stop" if stopped else "length", len(prompt_ids), written, len(prompt_ids) + written


BILL = Exercise(
    name="bill", chapter=14, kind="function", entry="bill", title="How it ended, and what it costs",
    difficulty="easy", importance="useful", minutes=7, reference=bill,
    fixtures=(ended_by_itself, cut_at_the_limit, ended_with_the_last_token_allowed, ended_at_once,
              ended_by_another_stop, cut_behind_an_earlier_answer),
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
        Misconception("only one stop id known", lambda prompt_ids, new_ids, limit, stop_ids: (
            bill(prompt_ids, new_ids, limit, {2})),
            "Only one of the stop ids was recognised. There may be several."),
        Misconception("a stop in the prompt", _stop_anywhere,
            "A stop token in the prompt was taken for the end. It ended an earlier text: look at the "
            "new tokens alone."),
        Misconception("longer than the limit", lambda prompt_ids, new_ids, limit, stop_ids: (
            "stop", len(prompt_ids), len(new_ids) - 1, len(prompt_ids) + len(new_ids) - 1),
            "Every text ended by itself, it says. No text is longer than its limit: look at the last "
            "token, not at the number."),
        Misconception("read and written exchanged", lambda prompt_ids, new_ids, limit, stop_ids: (
            *(told := bill(prompt_ids, new_ids, limit, stop_ids))[:1], told[2], told[1], told[3]),
            "Read and written are exchanged. The prompt was read, and its tokens come first."),
        Misconception("the prompt taken off", lambda prompt_ids, new_ids, limit, stop_ids: (
            *(told := bill(prompt_ids, new_ids, limit, stop_ids))[:2], told[2] - told[1], told[2]),
            "The prompt was taken off the new tokens. It is not among them."),
        Misconception("the prompt is free", lambda prompt_ids, new_ids, limit, stop_ids: (
            *bill(prompt_ids, new_ids, limit, stop_ids)[:3], bill(prompt_ids, new_ids, limit, stop_ids)[2]),
            "The total counts what was written alone. The prompt was read, and it is in the "
            "total."),
        Misconception("the first token of the prompt left out", lambda prompt_ids, new_ids, limit, stop_ids: (
            bill(prompt_ids[1:], new_ids, limit, stop_ids)),
            "The prompt is one token short. The mark that begins a text was read like any other "
            "token."),
        Misconception("compared with the set", _compared_with_the_set,
            "Every text ended at its limit, it says: the last token was compared with the whole "
            "set. Ask whether it is in it."),
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


def _run_read_text(candidate, chunks):
    """Of an error in JSON the kind counts, not the column: that differs with the way to cut a line."""
    try:
        return candidate(chunks)
    except json.JSONDecodeError as error:
        error.args = (error.msg,)
        raise


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


def a_comment_just_above_an_event():
    return (_cut(_wire(["a", "b"], extra=": keep alive\n"), 50),)


def a_text_that_says_done():
    return (_cut(_wire(["then comes ", "[DONE]", " and no more"]), 50),)


def a_text_with_rare_line_breaks():
    return (_cut(_wire(["one\u2028two", "\x85three"]), 50),)


def an_event_about_nothing():
    usage = 'data: {"choices": [], "usage": {"total_tokens": 5}}\n\n'
    return (_cut(_wire(["a", "b"], extra=usage), 50),)


def two_choices_in_an_event():
    two = ('data: {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}, '
           '{"index": 1, "delta": {"content": "y"}, "finish_reason": null}]}\n\n')
    return (_cut(_wire(["a", "b"], extra=two), 50),)


def a_text_with_a_quotation_mark():
    return (_cut(_wire(['He said "', "yes"]), 50),)


def _whole(chunks):
    return b"".join(chunks).decode()


def _each(chunks):
    return "".join(chunk.decode("utf-8", "replace") for chunk in chunks)


def _lines(text):
    return text.split("\n")


def _is_event(line):
    return line.startswith("data:") and line != "data: [DONE]"


def _content(choice):
    return choice["delta"].get("content", "")


def _all_of(choices):
    return choices


def _client(text=_whole, lines=_lines, takes=_is_event, cut=lambda line: line[5:], of=_all_of, content=_content):
    """A client, with one of its steps exchanged."""
    def read_text(chunks):
        said = ""
        for line in lines(text(chunks)):
            if takes(line):
                for choice in of(json.loads(cut(line))["choices"]):
                    said += content(choice)
        return said
    return read_text


def _a_chunk_is_an_event(chunks):
    said = ""
    for chunk in chunks:
        for line in filter(_is_event, chunk.decode().split("\n")):
            said += "".join(map(_content, json.loads(line[5:])["choices"]))
    return said


def _chunks_of_one_line(chunks):
    said = ""
    for chunk in chunks:
        line = chunk.decode("utf-8", "replace").strip()
        if line.startswith("data: {"):
            said += "".join(map(_content, json.loads(line[6:])["choices"]))
    return said


def _split_everywhere(chunks):
    said = ""
    for part in b"".join(chunks).decode().split("data: ")[1:]:
        if part.strip() != "[DONE]":
            for choice in json.loads(part)["choices"]:
                said += choice["delta"].get("content", "")
    return said


def _by_pattern(chunks):
    return "".join(re.findall(r'"content": "(.*?)"', _whole(chunks)))


def _read_step_by_step(chunks):
    raw, said = b"", []
    for chunk in chunks:
        raw += chunk
        while b"\n" in raw:
            line, raw = raw.split(b"\n", 1)
            if line.startswith(b"data: {"):
                said += [c["delta"].get("content") or "" for c in json.loads(line[6:])["choices"]]
    return "".join(said)


def _by_pattern_and_loaded(chunks):
    return "".join(json.loads(f'"{found}"') for found in re.findall(r'"content": "(.*?)"', _whole(chunks)))


def _until_a_reason(chunks):
    said = ""
    for line in filter(_is_event, _lines(_whole(chunks))):
        for choice in json.loads(line[5:])["choices"]:
            if choice.get("finish_reason"):
                return said
            said += _content(choice)
    return said


def _but_the_first_event(chunks):
    events = [json.loads(line[5:]) for line in filter(_is_event, _lines(_whole(chunks)))]
    return "".join(_content(choice) for event in events[1:] for choice in event["choices"])


def _contents(chunks):
    return [_content(choice) for line in filter(_is_event, _lines(_whole(chunks)))
            for choice in json.loads(line[5:])["choices"]]


READ_TEXT = Exercise(
    name="read_text", chapter=14, kind="function", entry="read_text", title="The client's side of the wire",
    difficulty="medium", importance="useful", minutes=10, reference=read_text,
    run=_run_read_text,
    fixtures=(one_event_in_each_chunk, cut_in_the_middle_of_characters, two_events_in_a_chunk_and_a_comment,
              a_comment_just_above_an_event, an_event_about_nothing, two_choices_in_an_event,
              a_text_that_says_done, a_text_with_rare_line_breaks, a_text_with_a_quotation_mark),
    equivalents={"as it arrives": _read_step_by_step},
    misconceptions=(
        Misconception("a chunk is an event", _a_chunk_is_an_event,
            "A chunk may end within a character or a line, and can't be decoded or read alone. "
            "Join the bytes first."),
        Misconception("a chunk is a line", _chunks_of_one_line,
            "Each chunk was read as one line. A chunk may hold several events, or a part of one: "
            "join the bytes, then take line after line."),
        Misconception("decoded chunk by chunk", _client(text=_each),
            "Some characters became replacement marks: a chunk may end within one. Join the bytes"
            " before you decode."),
        Misconception("half characters dropped",
            _client(text=lambda chunks: "".join(chunk.decode("utf-8", "ignore") for chunk in chunks)),
            "Some characters are lost: a chunk may end within one, and its halves were dropped. "
            "Join the bytes before you decode."),
        Misconception("DONE read as JSON", _client(takes=lambda line: line.startswith("data:")),
            "The last event is no JSON. Leave the one with [DONE] out."),
        Misconception("DONE anywhere", _client(
            takes=lambda line: line.startswith("data:") and "[DONE]" not in line),
            "A piece of the text that says [DONE] was taken for the end. Only a line that holds "
            "nothing else is the last event."),
        Misconception("DONE ends it anywhere", _client(lines=lambda text: takewhile(lambda line: "[DONE]" not in line, _lines(text))),
            "The text itself says [DONE], and reading stopped there. Compare whole lines."),
        Misconception("content demanded", _client(content=lambda choice: choice["delta"]["content"]),
            "The last delta is empty: it only tells why the text ended. Without a content there "
            "is nothing to add."),
        Misconception("comments read as data", _client(
            takes=lambda line: line != "" and line != "data: [DONE]"),
            "A line that does not begin with data was read as an event. Lines with a colon first "
            "are comments: pass over them."),
        Misconception("events between empty lines", _client(
            lines=lambda text: text.split("\n\n"), takes=lambda event: event.startswith("data: {")),
            "An event with a comment just above it was lost. Go line by line: what begins with "
            "data counts, wherever it stands."),
        Misconception("all kinds of line breaks", _client(lines=str.splitlines),
            "The text itself may hold rare marks that Python takes for line breaks. A line of a "
            "stream ends at the common line break alone."),
        Misconception("blanks lost", _client(content=lambda choice: _content(choice).strip()),
            "Blanks at the borders of the pieces are lost, and words run together. A piece is "
            "kept as it is."),
        Misconception("always a first choice", _client(of=lambda choices: [choices[0]]),
            "An event with an empty list of choices stopped the client. The one that reports "
            "usage has none."),
        Misconception("the first choice alone", _client(of=lambda choices: choices[:1]),
            "An event had two choices, and one of them was read. Go through all of them."),
        Misconception("cut at the word data", _split_everywhere,
            "The text itself may contain the word data and a colon. Only at the beginning of a "
            "line is it a field's name."),
        Misconception("the word data removed", _client(cut=lambda line: line.replace("data: ", "")),
            "The word data with its colon was removed from the text, too. Cut off the beginning "
            "of the line, nothing else."),
        Misconception("each chunk decoded", _client(text=lambda chunks: "".join(map(bytes.decode, chunks))),
            "A chunk may end within a character and can't be decoded alone. Join the bytes before "
            "you decode."),
        Misconception("a byte is a character", _client(text=lambda chunks: b"".join(chunks).decode("latin-1")),
            "Each byte became a character of its own: accents are wrong, and nothing else. The bytes "
            "are UTF-8."),
        Misconception("bytes as Python shows them", lambda chunks: "".join(
            _contents([str(chunk).encode() for chunk in chunks])),
            "No event was found: bytes turned into a string by their look keep a b, quotes and "
            "backslashes. Decode them."),
        Misconception("blanks lost at the ends", lambda chunks: "".join(_contents(chunks)).strip(),
            "The text has lost the blanks at its beginning or its end. They belong to it."),
        Misconception("blanks between the pieces", lambda chunks: " ".join(_contents(chunks)),
            "Blanks were put between the pieces, and words fall apart. A piece brings its own blanks."),
        Misconception("a message instead of a delta", _client(content=lambda choice: choice["message"]["content"]),
            "A streamed choice has no message: what is new stands in its delta."),
        Misconception("the first event passed over", _but_the_first_event,
            "The first event was passed over. It may hold text; where it holds none, it adds none."),
        Misconception("until a reason comes", _until_a_reason,
            "Reading ended at the first reason. One choice has ended there, another goes on, and "
            "the same event may hold text: read to the last one."),
        Misconception("found by a pattern and loaded", _by_pattern_and_loaded,
            "A quotation mark within the text ended the search for its end. Load the JSON of the "
            "whole line."),
        Misconception("found by a pattern", _by_pattern,
            "The contents were cut out of the line as they stand. Escapes such as those for "
            "quotation marks and line breaks remain: load the JSON."),
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


def _compare_texts(expected, actual):
    (rows, steps), (theirs, taken) = expected, actual
    if len(rows) != len(theirs):
        return f"expected {len(rows)} texts, got {len(theirs)}"
    for number, (row, other) in enumerate(zip(rows, theirs)):
        if row != other:
            at = next((i for i, pair in enumerate(zip(row, other)) if pair[0] != pair[1]), None)
            if at is None:
                return f"text {number} has {len(other)} tokens, expected {len(row)}"
            return f"text {number}, token {at}: expected {row[at]}, got {other[at]}"
    if steps != taken:
        return f"the texts are right, but it took {taken} steps of the model, expected {steps}"
    return None


def _nothing(paper, place, n, number):
    pass


def _write_all(entry=_nothing, seated_now=_nothing, token=lambda paper, chosen, place, n, number: chosen[place],
               before=_nothing, leaves=_nothing, every=_nothing, order=list):
    """The loop of the exercise, with what stands at each place where one may change it."""
    def write_all(paper, prompts, limits):
        waiting, rows = list(range(len(prompts))), [[] for _ in prompts]
        seated = {}
        while waiting or seated:
            for place in range(len(paper.memory)):
                every(paper, place, place, None)
                if place not in seated and waiting:
                    seated[place] = waiting.pop(0)
                    entry(paper, place, place, seated[place])
                    paper.read(place, prompts[seated[place]])
                    seated_now(paper, place, place, seated[place])
            chosen = paper.next_ids()
            for n, (place, number) in enumerate(order(seated.items())):
                one = token(paper, chosen, place, n, number)
                rows[number].append(one)
                before(paper, place, n, number)
                paper.read(place, [one])
                if len(rows[number]) == limits[number]:
                    del seated[place]
                    leaves(paper, place, n, number)
        return rows
    return write_all


def _forget(paper, place, n, number):
    paper.forget(place)


def _forget_number(paper, place, n, number):
    paper.forget(number)


def _by_turn(paper, chosen, place, n, number):
    return chosen[n]


def _one_after_the_other(paper, prompts, limits):
    rows = []
    for prompt, limit in zip(prompts, limits):
        rows.append([])
        paper.forget(0)
        paper.read(0, prompt)
        for _ in range(limit):
            rows[-1].append(paper.next_ids()[0])
            paper.read(0, rows[-1][-1:])
    return rows


WRITE_ALL = Exercise(
    name="write_all", chapter=14, kind="bug", entry="write_all", title="Two slips in a batch",
    difficulty="medium", importance="essential", minutes=12, reference=write_all, run=_run_write_all,
    fixtures=(five_prompts_two_places, four_prompts_three_places, fewer_prompts_than_places),
    compare=_compare_texts,
    equivalents={"forgets when a text leaves": _write_all(leaves=_forget)},
    misconceptions=(
        Misconception("unchanged", _write_all(token=_by_turn),
            "Texts differ from those written alone, in two ways: rows are mixed up once a place "
            "is empty, and newcomers find what was read before them."),
        Misconception("the memory of a finished text", _write_all(),
            "The first texts are right, later ones in the same place are not: they go on from "
            "what a finished text has left there."),
        Misconception("rows mixed up", _write_all(entry=_forget, token=_by_turn),
            "When a place is empty, texts get each other's tokens. A text's token stands at its "
            "place, not at its turn among those who are left."),
        Misconception("the number as place", _write_all(
            entry=_forget, token=lambda paper, chosen, place, n, number: chosen[number]),
            "The model answers for each place, and there are fewer places than prompts. The token"
            " of a text stands at its place, not at its prompt's number."),
        Misconception("the number forgotten", _write_all(entry=_forget_number),
            "What was emptied has the prompt's number, and there are fewer places. Empty the "
            "place where the text sits."),
        Misconception("forgotten after reading", _write_all(seated_now=_forget),
            "The newcomer's own prompt was forgotten, so the place has read nothing. Empty it "
            "before the prompt is read."),
        Misconception("forgotten at each token", _write_all(before=_forget),
            "The first tokens are right, then each text goes on from its last token alone. Empty "
            "a place once, between two texts."),
        Misconception("forgotten in each round", _write_all(every=_forget),
            "Every place is emptied in every round, and texts go on from nothing. Empty a place only "
            "when a newcomer takes it."),
        Misconception("by turn, in the order of places", _write_all(entry=_forget, token=_by_turn, order=sorted),
            "In the order of the places the tokens fit while all are taken. Once one stays empty, they "
            "are mixed up again: take each token by its place."),
        Misconception("asked for every text", _write_all(
            entry=_forget, token=lambda paper, chosen, place, n, number: paper.next_ids()[place]),
            "The texts are right, but the model is asked once for every text. One answer holds all "
            "places: ask once a round."),
        Misconception("one after the other", _one_after_the_other,
            "The texts are right, but each was written alone: too many steps. All places write in"
            " the same step."),
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
    """How many words all messages have together, and the mark that begins a text."""
    return 1 + sum(len(message["content"].split()) for message in messages)


TALE = "One morning Anna found a ring"
LONG_TALK = ("Who has it?", "Anna.", "Where is she?", "In the mill by the lake.", "And Leo?", "Not told.", "Why?")


def two_of_the_oldest_have_to_go():
    return _said("Be brief.", TALE, "Yes.", *LONG_TALK[:5]), 22, words_of


def without_a_system_message():
    return _said("", TALE, "Yes.", *LONG_TALK[:5]), 21, words_of


def all_of_it_fits_exactly():
    messages = _said("Be brief.", TALE, "Yes.", *LONG_TALK[:3])
    return messages, words_of(messages), words_of


def one_word_too_many():
    messages = _said("Be brief.", TALE, "Yes.", *LONG_TALK)
    return messages, words_of(messages) - 1, words_of


def only_the_first_and_the_last_are_left():
    return _said("Be brief.", TALE, "Yes.", *LONG_TALK), 12, words_of


def nothing_is_left_to_drop():
    return _said("Be brief.", TALE, "Yes.", "Who has it?"), 5, words_of


def nothing_is_left_and_no_system_message():
    return _said("", TALE, "Yes.", "Who has it?"), 5, words_of


def a_single_long_question():
    return _said("Be brief.", TALE), 5, words_of


def a_single_question_alone():
    return _said("", TALE), 5, words_of


def _run_keep(candidate, messages, longest, count):
    """Of an error about the length its kind counts; each has words of its own for it."""
    try:
        return candidate(messages, longest, count)
    except ValueError as error:
        error.args = ()
        raise


def _refused(messages, longest, count):
    if count(kept := keep_the_first(messages, longest, count)) > longest:
        raise ValueError
    return kept


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
    return system + rest[:2] + kept + newest if len(rest) > 1 else list(messages)


def _oldest_behind_the_system(messages, longest, count):
    kept = list(messages)
    while count(kept) > longest and len(kept) > 3:
        del kept[1:3]
    return kept


def _drops_behind_the_first(enough, newest=False):
    """enough(messages, first): how many messages are left alone."""
    def keep_the_first(messages, longest, count):
        first = 1 if messages[0]["role"] == "system" else 0
        kept = list(messages)
        while count(kept) > longest and len(kept) > enough(messages, first):
            if newest:
                del kept[-3:-1]
            else:
                del kept[first + 2:first + 4]
        return kept
    return keep_the_first


def _counted(what):
    """what(kept, first, count): what is compared with the length allowed."""
    def keep_the_first(messages, longest, count):
        first = 1 if messages[0]["role"] == "system" else 0
        kept = list(messages)
        while what(kept, first, count) > longest and len(kept) > first + 3:
            del kept[first + 2:first + 4]
        return kept
    return keep_the_first


def _first_turn_given_up(messages, longest, count):
    first = 1 if messages[0]["role"] == "system" else 0
    kept = keep_the_first(messages, longest, count)
    return kept if count(kept) <= longest else kept[:first] + kept[-1:]


def _all_at_once(messages, longest, count):
    first = 1 if messages[0]["role"] == "system" else 0
    long = count(messages) > longest and len(messages) > first + 3
    return messages[:first + 2] + messages[-1:] if long else list(messages)


def _head_and_last(messages, longest, count):
    first = 1 if messages[0]["role"] == "system" else 0
    head, middle, last = messages[:first + 2], messages[first + 2:-1], messages[-1:]
    while middle and count(head + middle + last) > longest:
        middle = middle[2:]
    return head + middle + last


def _always_a_system(messages, longest, count):
    kept = list(messages)
    while count(kept) > longest and len(kept) > 4:
        del kept[3:5]
    return kept


KEEP_THE_FIRST = Exercise(
    name="keep_the_first", chapter=14, kind="function", entry="keep_the_first",
    title="A history that keeps its beginning", difficulty="medium", importance="useful", minutes=12,
    reference=keep_the_first, run=_run_keep,
    fixtures=(two_of_the_oldest_have_to_go, without_a_system_message, all_of_it_fits_exactly,
              one_word_too_many, only_the_first_and_the_last_are_left, nothing_is_left_to_drop,
              nothing_is_left_and_no_system_message, a_single_long_question, a_single_question_alone),
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
        Misconception("the newest of the middle dropped", _drops_behind_the_first(
            lambda messages, first: first + 3, newest=True),
            "The newest turns before the last question were dropped. The oldest go first."),
        Misconception("the whole middle at once", _all_at_once,
            "All turns between the first and the last were dropped at once. Drop one, count "
            "again, and stop as soon as it fits."),
        Misconception("the last question dropped", _drops_behind_the_first(
            lambda messages, first: first + 2),
            "Nothing between was left to drop, and the last question was dropped. It stays, "
            "however long it is."),
        Misconception("the middle counted", _counted(lambda kept, first, count: count(kept[first + 2:-1])),
            "Only the middle was counted. The instructions, the first turn and the last question "
            "are part of the length."),
        Misconception("messages counted", _counted(lambda kept, first, count: len(kept)),
            "The number of messages was compared with the length allowed. Ask how long they are "
            "together."),
        Misconception("the system message not counted", _counted(lambda kept, first, count: count(kept[first:])),
            "The system message was left out of the count. The model reads it like all the others."),
        Misconception("each message counted alone", _counted(
            lambda kept, first, count: sum(count([message]) for message in kept)),
            "Each message was counted by itself, and the mark that begins a text with each of them. "
            "Count the whole list at once."),
        Misconception("too long is an error", _refused,
            "With nothing left to drop it fails, as the chapter's function does. Here what is there "
            "is returned, however long it is."),
        Misconception("the first turn given up", _first_turn_given_up,
            "With nothing left between, the first turn was dropped, too. It stays, however long it is."),
        Misconception("a single question twice", _head_and_last,
            "A single question is in the result twice: it is the first and the last. With nothing"
            " to drop, return what is there."),
        Misconception("exactly full is too long", _trim(strict=True),
            "A conversation of exactly the length allowed was shortened. It may have that many "
            "tokens."),
        Misconception("dropped once", _trim(once=True),
            "One turn was dropped, and the rest is still too long. Go on until it fits."),
        Misconception("the given list was cut", _in_place,
            "The list that was given has lost its messages: the page above would forget them, "
            "too. Work on a copy."),
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
            steps.append(chosen if isinstance(chosen, torch.Tensor) else torch.as_tensor(chosen))
        if steps[-1].is_floating_point():
            raise TypeError(f"the tokens are {steps[-1].dtype}, and whole numbers are wanted")
    return [step.tolist() for step in steps]


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


def _row_by_row(probabilities):
    """Draw each row from probabilities(logits, temperature) of the batch; 0 is greedy."""
    def choose_each(logits, temperatures, generators):
        chosen = logits.argmax(-1)
        for i, (t, generator) in enumerate(zip(temperatures, generators)):
            if t:
                uniform = torch.rand(1, generator=generator)
                chosen[i] = draw(probabilities(logits, t)[i:i + 1], uniform)[0]
        return chosen
    return choose_each


def _each_row(draws, likeliest=lambda logits, i: logits[i].argmax()):
    """draws(row, temperature, generator): how a row above temperature 0 gets its token."""
    def choose_each(logits, temperatures, generators):
        return torch.tensor([
            int(draws(logits[i:i + 1], t, generators[i])) if t else int(likeliest(logits, i))
            for i, t in enumerate(temperatures)])
    return choose_each


def _drawn(row, t, generator):
    return draw((row / t).softmax(-1), torch.rand(1, generator=generator))


def _down_the_batch(logits, temperatures, generators):
    t = torch.tensor(temperatures)[:, None]
    p = (logits / t.where(t > 0, torch.ones(()))).softmax(0)
    return torch.tensor([int(draw(p[i:i + 1], torch.rand(1, generator=generators[i]))) if temperatures[i]
                         else int(logits[i].argmax()) for i in range(len(logits))])


def _divided_by_zero(logits, temperatures, generators):
    return torch.cat([
        draw((row / t).softmax(-1)[None], torch.rand(1, generator=generator))
        for row, t, generator in zip(logits, torch.tensor(temperatures), generators)])


def _all_numbers_at_once(logits, temperatures, generators):
    uniform = torch.rand(len(temperatures), generator=generators[0])
    return torch.cat([
        draw((row / t).softmax(-1)[None], uniform[i:i + 1]) if t else row.argmax().view(1)
        for i, (row, t) in enumerate(zip(logits, temperatures))])


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
        Misconception("all numbers at once", _all_numbers_at_once,
            "The numbers of all rows were drawn at once from one generator. Each row draws one "
            "number from its own."),
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
        Misconception("zero divided", _divided_by_zero,
            "Logits were divided by a temperature of 0, and what is drawn then is no number's "
            "likeliest token. Take that without chance."),
        Misconception("softmax across requests", _row_by_row(lambda logits, t: (logits / t).softmax(0)),
            "The softmax went across the requests, so that their texts depend on each other. Each"
            " row is a distribution of its own."),
        Misconception("softmax down the batch", _down_the_batch,
            "The softmax went down the batch: over the requests, for each token. Each row is a "
            "distribution over the vocabulary."),
        Misconception("softmax over one row", _each_row(lambda row, t, generator: draw(
            (row / t).softmax(0), torch.rand(1, generator=generator))),
            "The softmax went over a dimension of size 1, and every probability is 1. It goes over "
            "the vocabulary, the last dimension."),
        Misconception("the likeliest of all rows", _each_row(_drawn, lambda logits, i: logits.argmax()),
            "The likeliest token was sought in the whole batch, whose numbers go beyond the "
            "vocabulary. Look within the row."),
        Misconception("a number for each token", _each_row(lambda row, t, generator: draw(
            (row / t).softmax(-1), torch.rand(row.shape[1], generator=generator)[:1])),
            "More than one number was drawn from a row's generator, so that all later steps differ. "
            "One is enough."),
        Misconception("a row without its batch", _each_row(lambda row, t, generator: draw(
            (row[0] / t).softmax(-1), torch.rand(1, generator=generator))),
            "The function that draws wants a batch of one row, two dimensions, and got a single one."),
        Misconception("numbers from a bell curve", _each_row(lambda row, t, generator: draw(
            (row / t).softmax(-1), torch.randn(1, generator=generator))),
            "The numbers come from a bell curve, and half of them are negative. Draw uniform ones, "
            "between 0 and 1."),
        Misconception("a dimension too many", lambda logits, temperatures, generators: (
            choose_each(logits, temperatures, generators)[:, None]),
            "Each token has kept a dimension of its own. Wanted is one plain number for each row."),
        Misconception("no softmax", _row_by_row(lambda logits, t: logits / t),
            "The numbers drawn from are logits: they may be negative, and their sum is not one. "
            "A softmax makes them probabilities."),
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
    chance = torch.Generator().manual_seed(34)          # no mistake on record gets this order
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
        Misconception("lengths of the columns", _nearest(lambda q, v: v @ q / (v.norm(dim=0) * q.norm())),
            "The lengths are those of the columns. Each vector is a row, and its length goes over the "
            "last dimension."),
        Misconception("columns normalised", _nearest(lambda q, v: v / v.norm(dim=0) @ q),
            "The columns were made equally long. Each vector is a row: divide it by its own length."),
        Misconception("in the order of the rows", lambda query, vectors, k: sorted(nearest(query, vectors, k)),
            "The right rows, sorted by their numbers. The nearest stands first."),
        Misconception("the nearest passed over", lambda query, vectors, k: nearest(query, vectors, k + 1)[1:],
            "The nearest was passed over. The query is none of the rows, so nothing has to be left out."),
        Misconception("squared length", _nearest(lambda q, v: v @ q / (v * v).sum(-1)),
            "Short vectors win: products were divided by the square of the length. The length is "
            "its root."),
        Misconception("all of them", lambda query, vectors, k: (
            _cosine(query, vectors).argsort(descending=True).tolist()),
            "All rows came back, in the right order. Only the first k are wanted."),
        Misconception("the vectors instead of their numbers", lambda query, vectors, k: (
            vectors[_cosine(query, vectors).argsort(descending=True)[:k]].tolist()),
            "These are the vectors themselves. Wanted are the numbers of their rows."),
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
