"""Facts of invented people: their lives and what they made."""

from __future__ import annotations

import random

from classifiers.synthetic.people import PersonName, draw_person
from classifiers.synthetic.profile import Facts, Profile, Work, date_forms, draw_award, draw_works
from classifiers.synthetic.words import cities, make_title, pick, read_seed, with_article, words

_PAST_PARTICIPLES = {"wrote": "written"}
_PLURALS = {"company": "companies"}


def native_city(rng: random.Random, name: PersonName) -> tuple[str, str]:
    """Draw (city, country), mostly where the name is at home."""
    if rng.random() < 0.8:
        country = name.country
        return rng.choice(read_seed("places")[country].split(";")), country
    return rng.choice(cities())


def draw_life(rng: random.Random, kind: str) -> Profile:
    """Draw a person of one of the kinds in `seeds/kinds.json`."""
    seed = read_seed("kinds")[kind]
    name = draw_person(rng)
    year = rng.randint(1901, 1998)
    works = draw_works(
        rng, lambda: make_title(rng, seed["titles"]), rng.randint(*seed["works"]), year + 22
    )
    job = rng.choice(seed["jobs"].split(";"))
    facts = _life(rng, name, year) | _craft(rng, seed, job, works)
    return Profile(
        "people",
        name.full,
        (name.family, name.given),
        (f"this {job}", f"the {job}", "this person"),
        works,
        facts | {"name": name.full, "first": name.given, "last": name.family},
    )


def _life(rng: random.Random, name: PersonName, year: int) -> Facts:
    city, country = native_city(rng, name)
    father, mother = rng.sample(words("parent_job"), 2)
    he = ("she", "her", "her") if name.female else ("he", "his", "him")
    children = ("no children", "one daughter", "one son", "two children", "three daughters")
    return {
        "he": he[0],
        "his": he[1],
        "him": he[2],
        "birth": date_forms(rng, year),
        "birth_year": str(year),
        "city": city,
        "country": country,
        "father_job": father,
        "a_father": with_article(father),
        "mother_job": mother,
        "a_mother": with_article(mother),
        "school": f"{pick(rng, 'school_head')} {pick(rng, 'school_tail')}",
        "school_year": str(year + rng.randint(19, 27)),
        "home": rng.choice(cities())[0],
        "move_year": str(min(year + rng.randint(24, 60), 2023)),
        "children": rng.choice(children),
        **{key: pick(rng, key) for key in ("hobby", "early_job", "turning", "language", "cause")},
    }


def _craft(rng: random.Random, seed: dict[str, str], job: str, works: tuple[Work, ...]) -> Facts:
    made, unit = seed["made"], seed["unit"]
    return {
        "job": job,
        "jobs": f"{job}s" if not job.startswith("member") else "politicians",
        "a_job": with_article(job),
        "unit": unit,
        "units": _PLURALS.get(unit, f"{unit}s"),
        "made": made,
        "made_pp": _PAST_PARTICIPLES.get(made, made),
        "field": rng.choice(seed["fields"].split(";")),
        "field_word": seed["field_word"],
        "style": rng.choice(seed["styles"].split(";")),
        "award": draw_award(rng, rng.choice(seed["award_for"].split(";"))),
        "award_year": str(min(works[0].year + rng.randint(0, 12), 2025)),
        "influence": pick(rng, "influence"),
        "critic": pick(rng, "critic"),
        "habit": pick(rng, "habit"),
    }
