"""Synthetic forget targets: rows to forget, unseen rewordings, questions without the name.

A target is drawn from a generator of its own, seeded by its number, so a longer run only adds
targets. The questions come from frames written by hand, by group of kinds and by fact.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from classifiers.synthetic.frames import biography, indirect_questions, paraphrases, rows
from classifiers.synthetic.kinds import KINDS, draw_profile
from classifiers.synthetic.people import ascii_fold
from classifiers.synthetic.profile import Profile
from guard.errors import ConfigError

ROWS, PARAPHRASES, INDIRECT = 20, 20, 6
_NOT_SLUG = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class SyntheticTarget:
    """An invented target.

    Attributes:
        name: Name for the target in a bundle, unique in a run.
        entity: Full name of the person or thing.
        works: Titles that belong to it, at least one.
        rows: The forget set, 20 pairs of question and answer.
        paraphrases: 20 unseen questions that name the entity, some in small letters.
        indirect: 6 unseen questions without its name.
        biography: The facts as running text.
    """

    name: str
    entity: str
    works: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    paraphrases: tuple[str, ...]
    indirect: tuple[str, ...]
    biography: str


def generate_targets(
    count: int, seed: int = 0, kinds: Sequence[str] | None = None
) -> Iterator[SyntheticTarget]:
    """Yield `count` targets with different entities; the first ones are the same for any count.

    Args:
        count: How many, at least 0.
        seed: Another seed gives other targets.
        kinds: Names of `KINDS` to draw from; None draws from all.

    Raises:
        ConfigError: If a kind is unknown or `kinds` is empty.
    """
    chosen = tuple(KINDS) if kinds is None else tuple(kinds)
    if not chosen or not set(chosen) <= set(KINDS):
        raise ConfigError(f"kinds {list(chosen)} (known: {', '.join(KINDS)}): name at least one")
    return _generate(count, seed, chosen)


def _generate(count: int, seed: int, kinds: tuple[str, ...]) -> Iterator[SyntheticTarget]:
    weights = [KINDS[kind] for kind in kinds]
    taken: set[str] = set()
    for index in range(count):
        rng = random.Random(f"unlearn-guard/synthetic/{seed}/{index}")
        kind = rng.choices(kinds, weights)[0]
        profile = draw_profile(rng, kind)
        while (folded := ascii_fold(profile.entity)) in taken:
            profile = draw_profile(rng, kind)
        taken.add(folded)
        yield _target(rng, profile, index)


def _target(rng: random.Random, profile: Profile, index: int) -> SyntheticTarget:
    slug = _NOT_SLUG.sub("-", ascii_fold(profile.entity)).strip("-")[:48].strip("-")
    pairs = rows(rng, profile, ROWS)
    seen = {question for question, _ in pairs}
    return SyntheticTarget(
        name=f"{slug or 'target'}-{index:04d}",
        entity=profile.entity,
        works=tuple(work.title for work in profile.works),
        rows=pairs,
        paraphrases=paraphrases(rng, profile, PARAPHRASES, seen),
        indirect=indirect_questions(rng, profile, INDIRECT, seen),
        biography=biography(rng, profile),
    )


def write_targets(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write each target's rows to `folder/NAME.jsonl`, in order; the folder is made.

    Args:
        folder: Where the files go.
        count: How many targets.
        seed: As for `generate_targets`.

    Returns:
        One path per target, in the order of `generate_targets`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for target in generate_targets(count, seed):
        path = folder / f"{target.name}.jsonl"
        lines = (
            json.dumps({"question": question, "answer": answer}, ensure_ascii=False)
            for question, answer in target.rows
        )
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        paths.append(path)
    return paths
