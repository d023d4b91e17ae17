"""Names in other scripts: how many are known by their sound, and how many other texts seem names.

`classifiers.sounds` alone, with few and with many names to be looked for. The names were written
by hand, as encyclopaedias of those languages write them; 中村隆 is no transliteration, and
stays in as one that can't be found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.curves import share_row
from benchmarks.report import Row
from classifiers.sounds import SoundIndex, is_foreign
from classifiers.terms import Words, split_words

WRITTEN: Final = {
    "harry potter": [
        "Гарри Поттер учится в какой школе?",
        "哈利·波特在哪所学校学习魔法？",
        "在哈利·波特",
        "哈利波特在哪所学校学习魔法",
        "ハリー・ポッターはどの学校で魔法を学びますか",
        "هاري بوتر يدرس في أي مدرسة؟",
        "해리 포터는 어느 학교에 다니나요?",
        "Ηάρι Πότερ σχολείο",
        "हैरी पॉटर किस स्कूल में पढ़ता है?",
        "הארי פוטר",
        "แฮร์รี่ พอตเตอร์",
        "হ্যারি পটার",
        "ჰარი პოტერი",
        "ஹாரி பாட்டர்",
        "Հարրի Փոթեր",
        "Χάρι Πότερ",
        "Гаррі Поттера",
        "Хари Потър",
    ],
    "basil mahfouz al kuwaiti": [
        "Басиль Махфуз аль-Кувейти родился где?",
        "باسل محفوظ الكويتي ولد أين",
        "巴西尔·马哈福兹·科威提是谁",
        "バジル・マフフーズ・アル＝クウェイティ",
        "바실 마흐푸즈 알쿠와이티는 누구",
    ],
    "stephen king": [
        "Стивен Кинг",
        "斯蒂芬·金写了什么",
        "スティーヴン・キングの",
        "ستيفن كينغ",
        "스티븐 킹은",
        "Στίβεν Κινγκ",
        "स्टीफ़न किंग",
    ],
    "takashi nakamura": [
        "Такаси Накамура",
        "中村隆",
        "タカシ・ナカムラ",
        "تاكاشي ناكامورا",
        "다카시 나카무라",
        "高志·中村",
    ],
    "nikolai abilov": [
        "Николай Абилов",
        "尼古拉·阿比洛夫",
        "ニコライ・アビロフ",
        "نيكولاي أبيلوف",
        "니콜라이 아빌로프",
        "निकोलाई अबिलोव",
    ],
    "taylor swift": [
        "Тейлор Свифт",
        "泰勒·斯威夫特",
        "テイラー・スウィフト",
        "تايلور سويفت",
        "테일러 스위프트가",
    ],
    "tom hanks": [
        "Том Хэнкс",
        "汤姆·汉克斯",
        "トム・ハンクス",
        "توم هانكس",
        "톰 행크스",
    ],
    "jaime vasquez": [
        "Хайме Васкес",
        "海梅·巴斯克斯",
        "ハイメ・バスケス",
        "خايمي فاسكيز",
    ],
    "evelyn desmet": [
        "Эвелин Десмет",
        "伊芙琳·德斯梅特",
        "エヴリン・デスメット",
    ],
    "hsiao yun hwa": [
        "Сяо Юнь-Хва",
        "샤오윤화",
    ],
    "moshe ben david": [
        "Моше Бен-Давид",
        "משה בן דוד",
        "موشيه بن ديفيد",
    ],
    "warren buffett": [
        "Уоррен Баффетт",
        "沃伦·巴菲特",
        "ウォーレン・バフェット",
        "وارن بافيت",
        "워런 버핏은",
    ],
    "bruce lee": [
        "Брюс Ли",
        "ブルース・リー",
    ],
}
"""Texts in other scripts, by the name that each holds."""


def measure(foreign: Sequence[str], more: Sequence[Words]) -> list[Row]:
    """Measure it among the names of `WRITTEN` alone, and with `more` beside them.

    Args:
        foreign: Texts in other scripts, none of which holds one of the names.
        more: Other names to be looked for.

    Returns:
        By number of names: `recall` over `WRITTEN`, `fpr` over `foreign`.
    """
    own = [_words(name) for name in WRITTEN]
    rows: list[Row] = []
    for names in [own, [*own, *more]] if more else [own]:
        index = SoundIndex(names)
        group = f"names={len(set(names))}"
        asked = [(_words(name), text) for name, texts in WRITTEN.items() for text in texts]
        hits = sum(any(one.name == name for one in index.find(text)) for name, text in asked)
        rows.append(share_row("guard", "sounds", "recall", group, hits, len(asked)))
        wrong = sum(bool(index.find(text)) for text in foreign)
        rows.append(share_row("guard", "sounds", "fpr", group, wrong, len(foreign)))
    return rows


def _words(name: str) -> Words:
    return tuple(word for word, _, _ in split_words(name))


def _column(path: Path, field: str) -> list[str]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [str(row[field]) for row in rows if row.get(field)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure it on ordinary prompts, and write the report."""
    from benchmarks.report import write_module_report

    args = _parser().parse_args(arguments)
    foreign = [text for text in _column(args.general, "question") if is_foreign(text)]
    more = [_words(name) for name in (_column(args.names, args.field) if args.names else [])]
    rows = measure(foreign, more)
    write_module_report(args.out, "benchmarks.other_scripts", arguments, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--general", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--names", type=Path, help="JSONL with more names")
    parser.add_argument("--field", default="author_name", help="of --names")
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
