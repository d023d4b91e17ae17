import pytest

from classifiers.terms import (
    MAX_TERM_WORDS,
    UNKNOWN_WORD_SHARE,
    find_dates,
    find_names,
    fold_word,
    may_be_term,
    quoted_titles,
    split_words,
    term_candidates,
    zipf_prior,
)

RANKS = {
    "john": 200,
    "smith": 1500,
    "the": 0,
    "way": 90,
    "of": 1,
    "kings": 2500,
    "garden": 1800,
    "gardens": 1800,
}


def folded(text: str) -> list[str]:
    return [word for word, _, _ in split_words(text)]


def long_terms(text: str) -> set[str]:
    return {" ".join(term) for term in term_candidates(text) if len(term) > 1}


# --- Words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("José Łukasz Ødegård Straße", ["jose", "lukasz", "odegard", "strasse"]),
        ("Zoe\u0308 and Zoë", ["zoe", "and", "zoe"]),
        ("Đặng Ærø İstanbul", ["dang", "aero", "istanbul"]),
        ("请问Harry Potter是谁", ["请问", "harry", "potter", "是谁"]),
        ("Ангела Меркель", ["ангела", "меркель"]),
        ("Tolkien's and O’Brien's", ["tolkien", "s", "and", "o", "brien", "s"]),
        ("foo_bar 3rd", ["foo", "bar", "3rd"]),
        ("", []),
        (" \n?!", []),
    ],
)
def test_words_are_folded(text: str, words: list[str]) -> None:
    assert folded(text) == words


@pytest.mark.parametrize("text", ["¿Potter?", "«Potter»", "¡Potter!", "·Potter·", "×Potter÷"])
def test_signs_between_latin_letters_are_no_part_of_a_word(text: str) -> None:
    assert split_words(text) == [("potter", 1, 7)]


def test_places_are_code_points_of_the_text_as_written() -> None:
    text = "🎉 Straße, José’s"
    written = [text[start:end] for _, start, end in split_words(text)]
    assert written == ["Straße", "José", "s"]


def test_a_word_is_never_folded_to_nothing() -> None:
    assert fold_word("\u0301") == "\u0301"
    assert fold_word("É") == "e"


# --- Dates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "08/09/1956", "8.9.1956", "08-09-1956", "09/08/1956", "1956-09-08", "1956-9-8",
        "1956/09/08", "1956.09.08", "September 8, 1956", "September 8th, 1956", "Sept. 8, 1956",
        "Sep 8 1956", "September the 8th, 1956", "SEPTEMBER 8 1956", "September 8th of 1956",
        "September 8 in 1956", "8 September 1956", "8th September, 1956", "8th of September, 1956",
        "8 Sept., 1956", "8th day of September in the year 1956",
    ],
)  # fmt: skip
def test_a_date_is_one_word_however_it_is_written(text: str) -> None:
    before = "born on "
    assert find_dates(f"{before}{text}.") == [
        ("date 1956-8-9", len(before), len(before) + len(text))
    ]


@pytest.mark.parametrize(
    "text",
    [
        "99/99/2020", "13/13/2000", "31/31/2000", "00/05/2000", "1956", "September 1956",
        "08/09/56",
        "1234-56-78", "May I go?", "Market 5 2001", "Maybe 5, 2001", "1 decade 2001",
        "5 maybe 2001", "5 apples 2001", "Sunday 8 1956",
    ],
)  # fmt: skip
def test_what_only_resembles_a_date_is_none(text: str) -> None:
    assert find_dates(text) == []


def test_different_days_are_different_words() -> None:
    dates = [find_dates(text)[0][0] for text in ("1 May 2000", "2 May 2000", "1 May 2001")]
    assert len(set(dates)) == 3
    assert len(find_dates("from 1999-12-31 to 01/01/2000")) == 2


def test_dates_are_candidates() -> None:
    assert ("date 1956-8-9",) in term_candidates("She was born on 8 Sep 1956.")


# --- Names and titles ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("We read Ludwig van Beethoven.", "ludwig van beethoven"),
        ("We read Juan de la Cruz.", "juan de la cruz"),
        ("We met Abu Ali ibn Sina there.", "abu ali ibn sina"),
        ("We met Basil Al-Kuwaiti.", "basil al kuwaiti"),
        ("Jean-Paul Sartre wrote it.", "jean paul sartre"),
        ("Émile Żółw sang.", "emile zolw"),
        ("Then George W. Bush spoke.", "george w bush"),
        ("Then J. R. R. Tolkien spoke.", "j r r tolkien"),
        ("Then J.R.R. Tolkien spoke.", "j r r tolkien"),
        ("Then Mary O’Neil spoke.", "mary o neil"),
        ("The Goblet of Fire is a book.", "goblet of fire"),
        ("On Apollo 11 they flew.", "apollo 11"),
        ("Вчера Ангела Меркель сказала", "ангела меркель"),
        ("We read Vincent van Gogh's letters.", "vincent van gogh"),
    ],
)
def test_names_are_candidates(text: str, name: str) -> None:
    assert name in long_terms(text)


@pytest.mark.parametrize(
    "text", ["We saw Paris. London is far.", "We met Anna! Bob left.", "With Ann\nBob came.", "a b"]
)
def test_no_name_runs_across_the_end_of_a_sentence(text: str) -> None:
    assert long_terms(text) == set()


@pytest.mark.parametrize("marks", ['""', "“”", "«»", "''", "‘’"])
def test_quoted_titles_are_candidates_without_capitals(marks: str) -> None:
    assert "quiet river days" in long_terms(f"She read {marks[0]}quiet river days{marks[1]} once.")
    assert "quiet river days" not in long_terms("She read quiet river days once.")


def test_an_apostrophe_opens_no_title() -> None:
    assert long_terms("it's what the dog's owner wants") == set()


def test_parts_of_long_titles_are_bounded_and_begin_with_content() -> None:
    text = "We saw " + " ".join(f"Word{letter}x" for letter in "abcdefghij")
    found = [term for term in term_candidates(text) if len(term) > 1]
    assert max(map(len, found)) == MAX_TERM_WORDS
    for term in long_terms("We read Harry and the Goblet of Fire."):
        assert term.split()[0] not in ("and", "the", "of")
        assert term.split()[-1] not in ("and", "the", "of")


# --- Which words are names -----------------------------------------------------------------------


def test_words_with_capitals_are_names_and_others_are_not() -> None:
    texts = ["We saw Rowling there.", "And rowling again, and Rowling.", "A Blue car, a blue car."]
    assert find_names(texts) == {"rowling"}


def test_the_first_word_of_a_sentence_says_nothing() -> None:
    assert find_names(["Gardens grow. The gardens grow here.", 'He said: "Gardens grow."']) == set()


def test_abbreviations_are_no_names_but_shouted_neighbours_are() -> None:
    assert find_names(["We like NASA and LGBTQ people and THE GUARDIANS."]) == {"guardians"}


def test_a_name_that_only_begins_sentences_is_a_name_before_another() -> None:
    texts = ["Harry Potter is a wizard.", "Harry Potter has an owl."]
    assert find_names(texts) == {"harry", "potter"}
    assert "although" not in find_names(["Although Potter left, we saw Potter."])


def test_a_rare_word_that_only_begins_sentences_is_a_name_if_it_comes_again() -> None:
    assert "zorblax" in find_names(["Zorblax is far.", "Zorblax has rings."], RANKS.get)
    assert "zorblax" not in find_names(["Zorblax is far.", "It has rings."], RANKS.get)
    assert "zorblax" in find_names(["Zorblax is far."], RANKS.get)
    assert "garden" not in find_names(["Garden work.", "Garden tools."], RANKS.get)


@pytest.mark.parametrize("before", ["J.", "Mr.", "Dr.", "St."])
def test_initials_and_titles_end_no_sentence(before: str) -> None:
    assert "watson" in find_names([f"We met {before} Watson there."])
    assert "watson" not in find_names(["We met him. Watson there."])


def test_a_text_in_capitals_says_nothing() -> None:
    assert find_names(["WE SAW THE GARDENS", "IN THE GARDENS AGAIN"], RANKS.get) == set()
    assert "zorblax" in find_names(["WE SAW ZORBLAX", "ON ZORBLAX AGAIN"], RANKS.get)
    assert "zorex" in find_names(["WE SAW ZOREX", "ON ZOREX AGAIN"], RANKS.get)


def test_names_inside_chinese() -> None:
    assert {"harry", "potter"} <= find_names(["我喜欢 Harry Potter 的书"])


# --- Terms ---------------------------------------------------------------------------------------


def is_name(word: str) -> bool:
    return word in {"smith", "zorblax"}


@pytest.mark.parametrize(
    ("term", "count", "expected"),
    [
        (("smith",), 1, True),
        (("garden",), 9, False),
        (("quux",), 3, True),
        (("quux",), 2, False),
        (("the",), 9, False),
        (("ab",), 9, False),
        (("1984",), 9, False),
        (("date 1956-8-9",), 1, True),
        (("way", "of", "kings"), 1, True),
        (("of", "11"), 1, False),
    ],
)
def test_what_may_be_a_term(term: tuple[str, ...], count: int, expected: bool) -> None:
    assert may_be_term(term, count, is_name, RANKS.get) is expected


def test_the_prior_falls_with_the_rank_of_the_rarest_word() -> None:
    def prior(*term: str) -> float:
        return zipf_prior(term, is_name, RANKS.get)

    assert prior("the") > prior("way") > prior("garden") > 0
    assert prior("john", "smith") < prior("smith")
    assert prior("the", "way") == prior("way")
    assert prior("quux") == UNKNOWN_WORD_SHARE
    assert prior("zorblax") == prior("john", "quux") == prior("date 1956-8-9") == 0.0


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ('She wrote "The City That Crumbled" in 1999.', {("city", "that", "crumbled")}),
        ("In 'On the Mountain Peak' and “Reel Lives”", {("mountain", "peak"), ("reel", "lives")}),
        ('It is called "Shadow" or "The Of".', set()),
        ('He said "that is not a title at all" to her.', set()),
        ('Known as "The King of the small town"', set()),
        ("The City That Crumbled was written in 1999.", set()),
        (
            'She wrote "Reel Lives: The Diary of a Projectionist".',
            {("reel", "lives", "the", "diary"), ("reel", "lives")},
        ),
        (
            'He wrote "In Night\'s Silence, the Stars Will Be Our Lamps".',
            {("night", "s", "silence", "the", "stars")},
        ),
        ('It is "The Rules: Advanced guidebook".', set()),
        ('It is "Rules of Script: Advanced guidebook".', {("rules", "of", "script")}),
    ],
)
def test_titles_of_works_stand_in_quotes_and_in_capitals(
    text: str, titles: set[tuple[str, ...]]
) -> None:
    assert quoted_titles(text) == titles
