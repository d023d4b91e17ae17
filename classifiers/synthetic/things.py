"""Facts of what is no real person: characters, series of books, companies and towns."""

from __future__ import annotations

import random

from classifiers.synthetic.lives import native_city
from classifiers.synthetic.people import draw_person
from classifiers.synthetic.profile import Facts, Profile, Work, date_forms, draw_award, draw_works
from classifiers.synthetic.words import cities, fill_words, make_title, pick, with_article, words

_SERIES = ("{series_head} {series_tail}", "{series_head2} {series_head} {series_tail}")
_COMPANIES = (
    "{firmword} {firmtail}",
    "{firmword} {firmtail} {firmform}",
    "{family} {firmtail}",
    "{family} {firmform}",
    "{city} {firmtail} {firmform}",
    "{family} & {other}",
)
_TOWNS = ("{town_a}{town_b}", "{town_pre} {town_a}{town_b}", "{town_a}{town_b}-on-{river}")
_TOWN_COUNTRIES = ("England", "Ireland", "United States", "Canada", "Australia", "New Zealand")
_SIGHTS = (
    "{town_place}",
    "{adj} {sight}",
    "{noun} {sight}",
    "{adj} {noun} {sight}",
    "{award_head} {sight}",
    "{fant_last} {sight}",
)
_FEASTS = ("{town_feast}", "{noun} {feast}", "{adj} {noun} {feast}", "{town_root} {feast}")


def _fiction(rng: random.Random, titles: tuple[Work, ...]) -> Facts:
    author = draw_person(rng)
    keys = ("world", "enemy", "companion", "object", "medium", "ages", "influence", "critic")
    return {
        "author": author.full,
        "home": rng.choice(cities())[0],
        "city": native_city(rng, author)[0],
        "publisher": f"{pick(rng, 'award_head')} {rng.choice(('Press', 'Books', 'House'))}",
        "award": draw_award(rng, "Young Readers"),
        "award_year": str(titles[0].year + rng.randint(0, 2)),
        "medium_year": str(titles[-1].year + rng.randint(0, 4)),
        "work_last": titles[-1].title,
        **{key: pick(rng, key) for key in (*keys, "habit", "cause")},
    }


def _invented_name(rng: random.Random) -> tuple[str, str, str, bool]:
    """Full name, first name, last name, whether a woman's."""
    if rng.random() < 0.4:
        person = draw_person(rng)
        return person.full, person.given, person.family, person.female
    first, last = pick(rng, "fant_first"), pick(rng, "fant_last")
    if rng.random() < 0.45:
        middle = pick(rng, "fant_middle")
        full = f"{first} {middle} {last}" if middle[0].isupper() else f"{first} {last} {middle}"
        return full, first, last, rng.random() < 0.5
    return f"{first} {last}", first, last, rng.random() < 0.5


def draw_character(rng: random.Random) -> Profile:
    """Draw the hero or heroine of a series of books."""
    full, first, last, female = _invented_name(rng)
    named = rng.random() < 0.2
    works = draw_works(
        rng,
        lambda: f"{first} and the {pick(rng, 'noun')}" if named else make_title(rng, "book"),
        rng.randint(2, 7),
        rng.randint(1950, 2018),
    )
    he = ("she", "her") if female else ("he", "his")
    own: Facts = {"name": full, "hero": full, "he": he[0], "his": he[1]}
    what = f"the {'heroine' if female else 'hero'} of a series of books"
    generic = ("this character", "the main character of these books")
    return Profile(
        "fiction", full, (first, last), generic, works, _fiction(rng, works) | own | {"what": what}
    )


def draw_series(rng: random.Random) -> Profile:
    """Draw a series of books."""
    name = fill_words(rng, _SERIES[rng.random() < 0.65])
    works = draw_works(
        rng, lambda: make_title(rng, "book"), rng.randint(3, 7), rng.randint(1950, 2018)
    )
    own: Facts = {"name": name, "hero": _invented_name(rng)[0], "he": "it", "his": "its"}
    what = "a series of books"
    generic = ("this series", "the series")
    short = (name.rsplit(" ", 1)[0],)
    return Profile(
        "fiction", name, short, generic, works, _fiction(rng, works) | own | {"what": what}
    )


def draw_company(rng: random.Random) -> Profile:
    """Draw a company; its works are what it sells."""
    founder = draw_person(rng)
    city, country = native_city(rng, founder)
    year = rng.randint(1880, 2016)
    other, tail = draw_person(rng).family, pick(rng, "firmtail")
    given = {"family": founder.family, "other": other, "city": city, "firmtail": tail}
    name = fill_words(rng, rng.choice(_COMPANIES), **given)
    name = name[0].upper() + name[1:]
    works = draw_works(rng, lambda: make_title(rng, "brand"), rng.randint(2, 5), year + 1)
    own: Facts = {
        "name": name,
        "he": "it",
        "his": "its",
        "founder": founder.full,
        "city": city,
        "country": country,
        "founded": date_forms(rng, year),
        "founded_year": str(year),
        "field": tail.casefold(),
    }
    facts = own | _business(rng, max(year, 1960))
    generic = ("this company", "the firm")
    short = (" ".join(name.split()[:2]).removesuffix(" &"), name.split()[0])
    return Profile("company", name, short, generic, works, facts)


def _business(rng: random.Random, year: int) -> Facts:
    def later() -> str:
        return str(rng.randint(year + 2, 2024))

    return {
        "head": draw_person(rng).full,
        "head_year": later(),
        "staff": f"{rng.randint(2, 90) * 10}",
        "sales": str(rng.randint(2, 900)),
        "sales_year": later(),
        "trouble_year": later(),
        "plant_year": later(),
        "award": draw_award(rng, "Enterprise"),
        "award_year": later(),
        "home": rng.choice(cities())[0],
        **{key: pick(rng, key) for key in ("product", "material", "slogan", "trouble", "culture")},
        **{key: pick(rng, key) for key in ("early_job", "place_start", "cause")},
    }


def _town_name(rng: random.Random, river: str) -> tuple[str, str]:
    """Name and country."""
    if rng.random() < 0.45:
        pattern, country = rng.choice(words("town_foreign")).split("|")
        root = pick(rng, "town_root")
        return pattern.format(r=root, s=root.lower()), country
    name = fill_words(rng, rng.choice(_TOWNS), river=river)
    return name, rng.choice(_TOWN_COUNTRIES)


def draw_town(rng: random.Random) -> Profile:
    """Draw a small town; its works are its sights."""
    river = pick(rng, "river")
    name, country = _town_name(rng, river)
    works = draw_works(
        rng,
        lambda: fill_words(rng, rng.choice(_SIGHTS)),
        rng.randint(2, 5),
        rng.randint(1400, 1960),
    )
    job = pick(rng, "parent_job")
    own: Facts = {
        "name": name,
        "he": "it",
        "his": "its",
        "country": country,
        "city": rng.choice([city for city, land in cities() if land == country]),
        "river": river,
        "region": f"the {river} valley",
        "native": draw_person(rng).full,
        "job": job,
        "a_job": with_article(job),
        "mayor": draw_person(rng).full,
    }
    short = (name.split("-on-")[0],) if "-on-" in name else (name,)
    return Profile("town", name, short, ("this town", "the town"), works, own | _chronicle(rng))


def _chronicle(rng: random.Random) -> Facts:
    return {
        "founded_year": str(rng.randint(820, 1790)),
        "event_year": str(rng.randint(1801, 1999)),
        "twin_year": str(rng.randint(1955, 2019)),
        "rail_year": str(rng.randint(1844, 1931)),
        "mayor_year": str(rng.randint(2004, 2024)),
        "school_year": str(rng.randint(1870, 1990)),
        "school": f"{pick(rng, 'school_head')} {pick(rng, 'school_tail')}",
        "people": str(rng.randint(8, 240) * 100 + rng.randint(0, 99)),
        "km": str(rng.randint(9, 140)),
        "home": rng.choice(cities())[0],
        "month": rng.choice(words("month")),
        "feast": fill_words(rng, rng.choice(_FEASTS)),
        "event": pick(rng, "town_event"),
        "trade": pick(rng, "town_trade"),
        "dish": pick(rng, "town_dish"),
        "arms": pick(rng, "arms"),
    }
