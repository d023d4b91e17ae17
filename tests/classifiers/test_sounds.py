"""Names in other scripts are known by their sound; texts in other scripts name nobody by chance."""

import random

import pytest

from classifiers.encoder import OnnxEncoder
from classifiers.lexical_reading import FUZZY_FACTOR, PreparedText
from classifiers.lexicon import Lexicon
from classifiers.lexicon_index import LexiconIndex
from classifiers.sounds import Sounded, SoundIndex, agreement, is_foreign

POTTER, KING, BUFFETT = ("harry", "potter"), ("stephen", "king"), ("warren", "buffett")
NAMES = (
    POTTER,
    BUFFETT,
    ("taylor", "swift"),
    ("leonardo", "da", "vinci"),
    ("jaime", "vasquez"),
)


@pytest.fixture(scope="module")
def index() -> SoundIndex:
    return SoundIndex(NAMES)


def names(found: list[Sounded]) -> set[tuple[str, ...]]:
    return {sounded.name for sounded in found}


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("В какой школе учился Гарри Поттер?", "Гарри Поттер"),
        ("Расскажи о Гарри Поттере и его друзьях.", "Гарри Поттере"),
        ("哈利·波特在哪所学校学习魔法？", "哈利·波特"),
        ("哈利波特在哪所学校？", "哈利波特"),
        ("ハリー・ポッターはどの学校で学びますか", "ハリー・ポッター"),
        ("해리 포터는 어느 학교에 다니나요?", "해리 포터"),
        ("ما هي مدرسة هاري بوتر؟", "هاري بوتر"),
        ("Ποιος είναι ο Χάρι Πότερ;", "Χάρι Πότερ"),
        ("हैरी पॉटर किस स्कूल में पढ़ता है?", "हैरी पॉटर"),
        ("באיזה בית ספר למד הארי פוטר?", "הארי פוטר"),
        ("Tell me about Гарри Поттер, please", "Гарри Поттер"),
    ],
)
def test_a_name_is_found_where_it_is_written(index: SoundIndex, text: str, written: str) -> None:
    found = index.find(text)
    assert names(found) == {POTTER}
    start = text.index(written)
    assert found[0].start <= start < found[0].end
    assert text[found[0].start : found[0].end] in written + text[start + len(written) :]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Чем известен Уоррен Баффетт?", BUFFETT),
        ("Какие песни у Тейлор Свифт?", ("taylor", "swift")),
        ("テイラー・スウィフトの曲", ("taylor", "swift")),
        ("Леонардо да Винчи родился в 1452 году", ("leonardo", "da", "vinci")),
        ("泰勒·斯威夫特的歌", ("taylor", "swift")),
        ("Где родился Хайме Васкес?", ("jaime", "vasquez")),
    ],
)
def test_names_of_many_languages(index: SoundIndex, text: str, name: tuple[str, ...]) -> None:
    assert name in names(index.find(text))


@pytest.mark.parametrize(
    "text",
    [
        "В какой школе учился Пушкин и кто был его учителем?",
        "Гарри Трумэн был президентом США.",
        "Профессор Поттер преподаёт ботанику в Лидсе.",
        "今天天气很好，我们去公园散步，然后去商店买东西。",
        "請解釋一下相對論，並舉兩個例子。",
        "昨日、友達と一緒に映画を見に行きました。とても面白かったです。",
        "오늘은 날씨가 좋아서 친구와 공원에 갔습니다.",
        "كيف أتعلم الطبخ في البيت بسهولة؟",
        "Πώς φτιάχνω ψωμί στο σπίτι;",
        "मैं घर पर रोटी कैसे बना सकता हूँ?",
        "วันนี้อากาศดีมาก เราไปเดินเล่นในสวนสาธารณะกัน",
    ],
)
def test_other_texts_name_nobody(index: SoundIndex, text: str) -> None:
    assert index.find(text) == []


def test_latin_texts_are_left_to_the_lexicon(index: SoundIndex) -> None:
    for text in ("Harry Potter", "Où étudie Harry Potter ?", "Łódź, Šibenik, Straße"):
        assert not is_foreign(text) and index.find(text) == []


def test_the_more_names_are_looked_for_the_more_evidence_is_needed() -> None:
    rng = random.Random(0)
    letters = "abdefgiklmnoprstuvz"
    others = {
        ("".join(rng.choices(letters, k=6)), "".join(rng.choices(letters, k=7)))
        for _ in range(1000)
    }
    text = "В какой школе учился Гарри Поттер?"
    (alone,), (among,) = SoundIndex([POTTER]).find(text), SoundIndex([POTTER, *others]).find(text)
    assert alone.name == among.name == POTTER and 8 < alone.bits - among.bits < 11


def test_a_line_ends_a_name(index: SoundIndex) -> None:
    assert index.find("Список:\nГарри\nПоттер") == []


def test_short_and_single_names_are_left_out() -> None:
    assert SoundIndex([("voltaire",), ("bo", "oy")]).find("Вольтер и Бо Ой") == []


def test_an_ending_costs_less_than_another_sound() -> None:
    name = "HaLiPuTiL"
    assert agreement(name, name) > agreement(name, name + "uN") > agreement(name, "HaLiPuSiN")


def test_a_sounded_name_names_its_target(shared_encoder: OnnxEncoder) -> None:
    wizard = Lexicon({POTTER: 9.0, ("potter",): 7.0}, frozenset({POTTER, ("potter",)}),
                     parts=frozenset({("potter",)}))  # fmt: skip
    king = Lexicon({KING: 8.0}, frozenset({KING}))
    index = LexiconIndex([wizard, king], shared_encoder.is_common)
    text = "В какой школе учился Гарри Поттер?"
    reading = index.read(text)
    (match,) = reading.matches
    assert text[match.start : match.end] == "Гарри Поттер"
    pointers = reading.candidates()
    assert set(pointers) == {0} and pointers[0].full == pytest.approx(9.0 * FUZZY_FACTOR)


def test_a_text_in_another_script_takes_long(shared_encoder: OnnxEncoder) -> None:
    index = LexiconIndex([Lexicon({POTTER: 9.0}, frozenset({POTTER}))], shared_encoder.is_common)
    assert index.strange(PreparedText("Как испечь хлеб?"), 24)
    assert not index.strange(PreparedText("How do I bake bread?"), 24)
