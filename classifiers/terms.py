"""Terms of a target's lexicon: what may be one, how often it occurs, what it weighs.

Terms are taken from the forget rows by contrast: log-odds of the share of forget rows that hold a
term against the share of background texts (benign and retain), where the tokenizer's
frequency-ordered vocabulary stands in for a list of general English.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

Words = tuple[str, ...]

MIN_WEIGHT, MAX_WEIGHT = 3.0, 10.0
MAX_TERM_WORDS = 6
ACRONYM_LETTERS = 6

SMOOTHING = 0.1
"""Background texts that a name is taken to occur in beyond those counted."""

UNKNOWN_WORD_SHARE = 1e-3
"""Share of general texts taken to hold a rare word that isn't written as a name."""


# Letters of Latin script apart from others: a Latin name may stand inside Chinese without a space.
# The signs between those letters (¿ « » · ×) are none of them.
_LATIN = r"0-9A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\u0300-\u036f"
_WORD = re.compile(rf"[{_LATIN}]+|(?:(?![{_LATIN}])[^\W_])+")
_UNACCENTED = str.maketrans(
    {"ł": "l", "ø": "o", "đ": "d", "ı": "i", "ß": "ss", "æ": "ae", "œ": "oe", "þ": "th", "ð": "d"}
)
_UPPER = "".join(chr(code) for code in range(0x41, 0x1F00) if chr(code).isupper())
_PARTICLE_TEXT = """
    al bin da das de del della den der di do dos du e el ibn la le of ten ter the van von y zu
"""
PARTICLES = frozenset(_PARTICLE_TEXT.split())
"""Small words that may stand inside a name."""

_SMALL = "|".join(sorted({*PARTICLES, "and", "in", "to", "for", "a", "from", "with", "on"}))
_NAME = re.compile(
    rf"(?:[{_UPPER}]\.|[{_UPPER}][\w'’]*(?:-\w+)*)"
    rf"(?:(?:[ \-]+|(?<=\b[{_UPPER}]\.)\s?|\s(?:{_SMALL}|&)\s(?:(?:the|a|la|der|den|los)\s)?)"
    rf"(?:[{_UPPER}]\.|[{_UPPER}][\w'’]*(?:-\w+)*|\d{{1,2}}))+"
)
_HYPHENATED = re.compile(rf"[{_UPPER}]\w*-$")
"""Before it a small word goes on with a name: "Tae-ho"."""

_SHORTENED = re.compile(rf"\b(?:[{_UPPER}]|Mrs?|Ms|Dr|St|Prof)\.$")
"""Before it a full stop ends no sentence: initials and titles."""

_QUOTED = re.compile(r"[\"“«]([^\"”»\n]{3,60})[\"”»]|(?<!\w)['‘]([^'’\n]{3,60})['’](?!\w)")
_SUBTITLE = re.compile(r"[:(–—]")
DATE = "date "
_MONTH_NAMES = (
    "january february march april may june july august september october november december".split()
)
_MONTHS = {
    month[:size]: number
    for number, month in enumerate(_MONTH_NAMES, 1)
    for size in range(3, len(month) + 1)
}
_DATE = re.compile(
    r"\b(?:(?P<n1>\d{1,2})[/.\-](?P<n2>\d{1,2})[/.\-](?P<y1>\d{4})"
    r"|(?P<y2>\d{4})[/.\-](?P<n3>\d{1,2})[/.\-](?P<n4>\d{1,2})"
    r"|(?P<m1>[A-Za-z]{3,9})\.? (?:the )?(?P<d1>\d{1,2})(?:st|nd|rd|th)?,?"
    r" (?:of |in )?(?P<y3>\d{4})"
    r"|(?P<d2>\d{1,2})(?:st|nd|rd|th)?(?: day)?(?: of)? (?P<m2>[A-Za-z]{3,9})\.?,?"
    r"(?: of| in)?(?: the year)? (?P<y4>\d{4}))\b"
)

_STOP_TEXT = """
    a an and any are as at be but by can could did do does for from had has have he her him his
    how i if in into is it its list may me more my name no not of on one or our out she so some
    such tell than that the their them there these they this to us was we were what when where
    which while who whom whose why will with would you your yes give describe explain
    s t d m ll re ve
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())

_OPENER_TEXT = """
    after also although among another because before besides both compare despite discuss during
    even every following however like many might must name please regarding several shall should
    since state summarise summarize then though through throughout under unlike until upon were
    while with within without write
"""
_OPENERS = frozenset(_OPENER_TEXT.split())
"""Words that open sentences, never names."""


def split_words(text: str) -> list[tuple[str, int, int]]:
    """Return the folded words of a text with their code points; possessives are cut off."""
    fold = str.casefold if text.isascii() else fold_word
    return [(fold(match.group()), match.start(), match.end()) for match in _WORD.finditer(text)]


def fold_word(word: str) -> str:
    """Return a word in small letters and without accents, as names are often typed."""
    if word.isascii():
        return word.casefold()
    plain = word.casefold().translate(_UNACCENTED)
    parts = unicodedata.normalize("NFKD", plain)
    return "".join(part for part in parts if not unicodedata.combining(part)) or plain


def find_dates(text: str) -> list[tuple[str, int, int]]:
    """Return the full dates in a text as pseudo-words, however they are written.

    Day and month are sorted, because 05/11 may be either.
    """
    found = []
    for match in _DATE.finditer(text):
        part = match.groupdict()
        year = part["y1"] or part["y2"] or part["y3"] or part["y4"]
        if month := (part["m1"] or part["m2"]):
            pair = (_MONTHS.get(month.casefold(), 0), int(part["d1"] or part["d2"]))
        else:
            pair = (int(part["n1"] or part["n3"]), int(part["n2"] or part["n4"]))
        low, high = sorted(pair)
        if 1 <= low <= 12 and high <= 31:
            found.append((f"{DATE}{year}-{low}-{high}", match.start(), match.end()))
    return found


def term_candidates(text: str) -> set[Words]:
    """Return the words, names and quoted titles of one text that may become terms."""
    found: set[Words] = {(word,) for word, _, _ in (*split_words(text), *find_dates(text))}
    for match in (*_NAME.finditer(text), *_QUOTED.finditer(text)):
        words = tuple(word for word, _, _ in split_words(match[match.lastindex or 0]))
        found.update(_parts(words))
    return found


def quoted_titles(text: str) -> set[Words]:
    """Return the titles of works in a text: in quotation marks, their words in capitals.

    Without the small words at their ends; those of a single other word are left out, for they are
    words like any ("It"). Of a long title its beginning is known, and of one with a subtitle what
    stands before that as well: so people shorten them.
    """
    found: set[Words] = set()
    for match in _QUOTED.finditer(text):
        written = match[match.lastindex or 0]
        for part in {written, _SUBTITLE.split(written, maxsplit=1)[0]}:
            title = _title(part)
            if title:
                found.add(title)
    return found


def _title(written: str) -> Words:
    """Return the words of a title, MAX_TERM_WORDS at most; none if it is no telling one."""
    words = split_words(written)
    telling = [at for at, (word, _, _) in enumerate(words) if word not in STOP_WORDS]
    if len(telling) < 2 or not all(_is_capital(written, words[at][1]) for at in telling):
        return ()
    last = max(at for at in telling if at < telling[0] + MAX_TERM_WORDS)
    title = tuple(word for word, _, _ in words[telling[0] : last + 1])
    return title if last > telling[0] else ()


def _is_capital(text: str, start: int) -> bool:
    return text[start].isupper() or text[start].isdigit()


def _parts(words: Words) -> Iterable[Words]:
    for size in range(2, min(len(words), MAX_TERM_WORDS) + 1):
        for first in range(len(words) - size + 1):
            part = words[first : first + size]
            if part[0] not in STOP_WORDS and part[-1] not in STOP_WORDS:
                yield part


def may_be_term(
    term: Words, count: int, names: Callable[[str], bool], rank: Callable[[str], int | None]
) -> bool:
    """Say whether a term of the forget texts can tell the target from others."""
    if len(term) > 1:
        return any(word not in STOP_WORDS and not word.isdigit() for word in term)
    word = term[0]
    if word.startswith(DATE):
        return True
    if len(word) < 3 or word in STOP_WORDS or word.isdigit():
        return False
    return names(word) or (rank(word) is None and count > 2)


def zipf_prior(
    term: Words, names: Callable[[str], bool], rank: Callable[[str], int | None]
) -> float:
    """Guess the share of general texts that hold a term, from Zipf's law over its rarest word."""
    ranks = [rank(word) for word in term]
    if any(place is None for place in ranks):
        known = len(term) > 1 or names(term[0]) or term[0].startswith(DATE)
        return 0.0 if known else UNKNOWN_WORD_SHARE
    rarest = max(place for place in ranks if place is not None)
    content = sum(word not in STOP_WORDS for word in term)
    # Words of a common phrase attract one another: far less rare than independent words would be.
    return float((3.0 / (rarest + 10.0)) ** max(1.0, 0.6 * content))


def find_names(
    texts: Sequence[str], rank: Callable[[str], int | None] = lambda word: 0
) -> set[str]:
    """Return words that are written with a capital in at least two of three places.

    The first word of a sentence says nothing and isn't counted, unless it is never elsewhere: then
    it is a name before another name ("Ann Example was ..."), or where it is rare and comes again.
    Texts in capitals say as little. Abbreviations ("LGBTQ") are everybody's, so they are no names.

    Args:
        texts: The texts.
        rank: Place of a word in general English, None if it is a rare one.
    """
    upper: Counter[str] = Counter()
    total: Counter[str] = Counter()
    openings: dict[str, list[str]] = {}
    for text in texts:
        shouting = text.isupper()
        for match in _WORD.finditer(text):
            written = match.group()
            word = fold_word(written)
            acronym = len(written) <= ACRONYM_LETTERS and written.isupper() and not shouting
            if shouting or _opens_sentence(text, match.start()):
                if written[0].isupper() and not acronym:
                    behind = "" if shouting else _capital_after(text, match.end())
                    openings.setdefault(word, []).append(behind)
                continue
            total[word] += 1
            joined = _HYPHENATED.search(text[max(0, match.start() - 20) : match.start()])
            upper[word] += (written[0].isupper() and not acronym) or joined is not None
    names = {word for word, count in total.items() if 3 * upper[word] >= 2 * count}
    often = min(2, len(texts))
    for word, after in openings.items():
        if word in total or word in STOP_WORDS or word in _OPENERS or len(word) < 3:
            continue
        led = 2 * sum(other in names for other in after) >= len(after)
        if led or (rank(word) is None and len(after) >= often):
            names.add(word)
    return names


def _opens_sentence(text: str, start: int) -> bool:
    before = text[max(0, start - 8) : start].rstrip(" \"'“‘(¿¡«")
    return not before or (before[-1] in ".!?:\n" and _SHORTENED.search(before) is None)


def _capital_after(text: str, end: int) -> str:
    """Return the word behind a space if it has a capital, else nothing."""
    match = _WORD.match(text, end + 1) if text[end : end + 1] == " " else None
    return fold_word(match.group()) if match and match.group()[0].isupper() else ""
