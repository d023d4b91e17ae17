import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from classifiers.synthetic import SyntheticTarget, generate_targets, write_targets
from classifiers.synthetic.kinds import KINDS
from classifiers.synthetic.people import ascii_fold, cultures
from classifiers.synthetic.words import cities, read_seed, words
from guard.errors import ConfigError

GROUPS = ("people", "fiction", "company", "town")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
WORD = re.compile(r"\w+")
UNTELLING = frozenset("the of and an on in de la le el du der den da do dos di il".split())
OTHER_LANGUAGES = {
    "Cyrillic": re.compile(r"[а-яА-Я]"),
    "Han": re.compile(r"[一-鿿]"),
    "kana": re.compile(r"[ぁ-ヿ]"),
    "Arabic": re.compile(r"[ء-ي]"),
    "Spanish": re.compile(r"¿"),
    "German": re.compile(r"\b(Wer|Wie|Wo|Womit|Was|Seit)\b"),
    "Turkish": re.compile(r"\b(kimdir|hangi|hakkında|nerede)\b"),
}


def texts(target: SyntheticTarget) -> list[str]:
    questions = [question for question, _ in target.rows]
    return [*questions, *target.paraphrases, *target.indirect]


@pytest.fixture(scope="module")
def many() -> list[SyntheticTarget]:
    return list(generate_targets(10_000))


def test_the_same_seed_gives_the_same_targets(many: list[SyntheticTarget]) -> None:
    assert list(generate_targets(300)) == many[:300]


def test_another_seed_gives_other_targets(many: list[SyntheticTarget]) -> None:
    others = {target.entity for target in generate_targets(100, seed=1)}
    assert len(others & {target.entity for target in many[:100]}) < 5


def test_a_longer_run_only_adds_targets() -> None:
    short = list(generate_targets(40, seed=5))
    assert list(islice(generate_targets(400, seed=5), 40)) == short


def test_ten_thousand_entities_and_names_are_all_different(many: list[SyntheticTarget]) -> None:
    assert len({ascii_fold(target.entity) for target in many}) == len(many) == 10_000
    assert len({target.name for target in many}) == len(many)


def test_names_fit_a_bundle(many: list[SyntheticTarget]) -> None:
    assert [target.name for target in many if not NAME.fullmatch(target.name)] == []


def test_every_target_has_its_numbers_of_different_texts(many: list[SyntheticTarget]) -> None:
    for target in many:
        sizes = [len(target.rows), len(target.paraphrases), len(target.indirect)]
        assert sizes == [20, 20, 6]
        assert len(set(texts(target))) == 46
        assert target.works
        assert len(set(target.works)) == len(target.works)


def test_paraphrases_name_the_entity(many: list[SyntheticTarget]) -> None:
    for target in many:
        entity = target.entity.casefold()
        assert all(entity in text.casefold() for text in target.paraphrases), target.name
        assert sum(target.entity in text for text in target.paraphrases) >= 10


def test_indirect_questions_hold_no_word_of_the_name(many: list[SyntheticTarget]) -> None:
    for target in many:
        named = {word for word in WORD.findall(target.entity.casefold()) if len(word) > 1}
        asked = set(WORD.findall(" ".join(target.indirect).casefold()))
        assert not (named - UNTELLING) & asked, target


def test_some_but_not_most_rows_leave_the_full_name_out(many: list[SyntheticTarget]) -> None:
    named = [target.entity in question for target in many for question, _ in target.rows]
    assert 0.5 < sum(named) / len(named) < 0.75


def test_no_slot_is_left_open_anywhere(many: list[SyntheticTarget]) -> None:
    for target in many:
        parts = [*texts(target), *target.works, *(answer for _, answer in target.rows)]
        assert not re.search(r"[{}]|  ", "\n".join([*parts, target.biography])), target


def test_biographies_hold_the_facts_in_about_two_hundred_words(
    many: list[SyntheticTarget],
) -> None:
    lengths = [len(target.biography.split()) for target in many]
    assert min(lengths) >= 130
    assert max(lengths) <= 260
    assert all(target.entity in target.biography for target in many)
    assert all(target.works[0] in target.biography for target in many)


def test_most_titles_are_not_rare_and_some_are_shared(many: list[SyntheticTarget]) -> None:
    titles = [title for target in many for title in target.works]
    assert 0.4 < len(set(titles)) / len(titles) < 0.95


def test_other_languages_occur_among_the_paraphrases(many: list[SyntheticTarget]) -> None:
    asked = [text for target in many[:500] for text in target.paraphrases]
    for language, pattern in OTHER_LANGUAGES.items():
        assert any(pattern.search(text) for text in asked), language


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_can_be_drawn_alone(kind: str) -> None:
    targets = list(generate_targets(25, seed=2, kinds=[kind]))
    assert len({target.entity for target in targets}) == 25


def test_no_famous_name_is_drawn(many: list[SyntheticTarget]) -> None:
    famous = set(words("blocked"))
    assert [target.entity for target in many if ascii_fold(target.entity) in famous] == []


@pytest.mark.parametrize("kinds", [[], ["novelist", "dragon"]])
def test_unknown_or_no_kinds_are_refused(kinds: list[str]) -> None:
    with pytest.raises(ConfigError, match="novelist"):
        generate_targets(1, kinds=kinds)


def test_files_hold_the_rows_of_their_target(tmp_path: Path) -> None:
    paths = write_targets(tmp_path / "new", 12, seed=4)
    for path, target in zip(paths, generate_targets(12, seed=4), strict=True):
        assert path.name == f"{target.name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [(row["question"], row["answer"]) for row in rows] == list(target.rows)


@pytest.mark.parametrize(
    ("text", "folded"),
    [("Łukasz", "lukasz"), ("İbrahim", "ibrahim"), ("Søren Weiß", "soren weiss")],
)
def test_folding_reaches_ascii(text: str, folded: str) -> None:
    assert ascii_fold(text) == folded


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("use", ["rows", "paraphrases"])
def test_groups_have_sixty_frames_each_and_share_none(group: str, use: str) -> None:
    seed = read_seed(f"frames_{group}")
    own = [text for frames in seed[use].values() for text in frames]
    assert len(set(own)) == len(own) >= 60
    assert not {*own} & {text for frames in seed["other_" + use].values() for text in frames}
    assert set(seed[use]) | set(seed[f"other_{use}"]) <= set(seed["answers"])


@pytest.mark.parametrize("group", GROUPS)
def test_paraphrase_frames_name_the_entity_and_are_no_row_frames(group: str) -> None:
    seed = read_seed(f"frames_{group}")
    rows = {text for frames in seed["rows"].values() for text in frames}
    for use in ("paraphrases", "other_paraphrases"):
        for text in (text for frames in seed[use].values() for text in frames):
            assert "{name}" in text
            assert text not in rows


def test_names_come_from_many_cultures_and_places() -> None:
    def count(part: Callable[[str], tuple[str, ...]]) -> int:
        return len({name for culture in cultures() for name in part(culture)})

    assert len(cultures()) >= 20
    assert count(lambda c: cultures()[c].female + cultures()[c].male) >= 600
    assert count(lambda c: cultures()[c].family) >= 900
    assert len(cities()) >= 300
