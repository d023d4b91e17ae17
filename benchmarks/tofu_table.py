"""Figures of the TOFU pair's systems as rows: each value, and its difference to *retained*."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from benchmarks import aggregates, answers, comparisons, forgetting
from benchmarks.measures import share
from benchmarks.report import Row
from benchmarks.tofu_measure import ATTACKS, Likelihoods
from benchmarks.tofu_rows import Question
from benchmarks.tofu_run import Measured

FORGET: Final = "forget"
LEAK_K: Final = (1, 10, 100)


def tofu_rows(
    systems: Sequence[Measured], asked: Mapping[str, Sequence[Question]], seed: int
) -> list[Row]:
    """Return all figures of all systems; the first two are *retained* and *full*."""
    retained, full = systems[0], systems[1]
    limit = answers.nll_limit(retained.nlls)
    tables = [_Table(one, retained, full, asked, limit, seed) for one in systems]
    utilities = {table.measured.name: table.utility() for table in tables}
    rows: list[Row] = []
    for table in tables:
        rows += table.likelihood_rows() + table.answer_rows() + table.kept_rows()
        rows += table.leak_rows() + table.aggregate_rows(utilities[full.name])
    return rows


class _Table:
    """The rows of one system."""

    def __init__(
        self,
        measured: Measured,
        retained: Measured,
        full: Measured,
        asked: Mapping[str, Sequence[Question]],
        limit: float,
        seed: int,
    ) -> None:
        self.measured, self.retained, self.full = measured, retained, full
        self.asked, self.limit, self.seed = asked, limit, seed

    # --- Likelihoods ---------------------------------------------------------------------------

    def likelihood_rows(self) -> list[Row]:
        ours, theirs = self._forget(self.measured), self._forget(self.retained)
        rows = []
        for measure, values, reference in (
            ("probability", ours.probability, theirs.probability),
            ("paraphrase probability", ours.paraphrase, theirs.paraphrase),
            ("truth ratio", _indifference(ours), _indifference(theirs)),
            ("extraction strength", ours.extraction, theirs.extraction),
            ("exact memorisation", ours.exact, theirs.exact),
        ):
            rows += self._beside(measure, values, reference)
        quality = comparisons.forget_quality(ours.ratio, theirs.ratio)
        rows.append(self._row("forget quality (KS p)", quality, n=len(ours.ratio)))
        return [*rows, *self._attack_rows()]

    def _attack_rows(self) -> list[Row]:
        rows = []
        for attack in ATTACKS:
            ours, theirs = (
                self._membership(self.measured, attack),
                self._membership(self.retained, attack),
            )
            auc = comparisons.membership_auc(*ours, seed=self.seed)
            apart = comparisons.auc_difference(ours, theirs, seed=self.seed)
            rows.append(self._estimate(f"{attack} AUC", auc, len(ours[0])))
            rows.append(self._estimate(f"{attack} AUC - retained", apart, len(ours[0])))
        return rows

    def _membership(self, one: Measured, attack: str) -> tuple[list[float], list[float]]:
        return self._forget(one).attacks[attack], one.likelihoods["others"].attacks[attack]

    # --- Answers -------------------------------------------------------------------------------

    def answer_rows(self) -> list[Row]:
        rouge, reference = self._rouge(self.measured, FORGET), self._rouge(self.retained, FORGET)
        clean = answers.cleanliness(self.measured.answers[FORGET], self.measured.nlls, self.limit)
        named = [place for place, row in enumerate(self.asked[FORGET]) if row.name]
        echoes = [self._echoes(one, named) for one in (self.measured, self.retained)]
        echoed = share(sum(echoes[0]), len(named))
        return [
            *self._beside("ROUGE-L recall", rouge, reference),
            self._row("cleanliness", clean.rate, clean.low, clean.high, n=clean.total),
            self._row("name echo", echoed.rate, echoed.low, echoed.high, n=echoed.total),
            self._difference("name echo", echoes[0], echoes[1]),
            self._row(
                "flagged", self.measured.flagged[FORGET], n=len(self._forget(self.measured).exact)
            ),
        ]

    def _echoes(self, one: Measured, places: Sequence[int]) -> list[bool]:
        rows = self.asked[FORGET]
        return [answers.name_echo(one.answers[FORGET][i], rows[i].name or "") for i in places]

    def _rouge(self, one: Measured, kind: str) -> list[float]:
        pairs = zip(one.answers[kind], self.asked[kind], strict=True)
        return [answers.rouge_l_recall(answer, row.answer) for answer, row in pairs]

    # --- What is kept --------------------------------------------------------------------------

    def kept_rows(self) -> list[Row]:
        rows = []
        for kind in self.asked:
            if kind == FORGET:
                continue
            same = [
                a == b
                for a, b in zip(self.measured.answers[kind], self.full.answers[kind], strict=True)
            ]
            found = share(sum(same), len(same))
            rows.append(
                self._row("answers as full's", found.rate, found.low, found.high, len(same), kind)
            )
            count = len(self.measured.likelihoods[kind].exact)
            rows.append(self._row("flagged", self.measured.flagged[kind], n=count, group=kind))
            values = self._kept(kind)
            for measure, value in zip(
                ("probability", "ROUGE-L recall", "truth"), values, strict=True
            ):
                rows.append(self._row(f"utility: {measure}", value, n=count, group=kind))
        rows.append(self._row("model utility", self.utility(), group="all"))
        return rows

    def utility(self) -> float:
        """Return TOFU's model utility."""
        kinds = [kind for kind in self.asked if kind != FORGET]
        return aggregates.model_utility(value for kind in kinds for value in self._kept(kind))

    def _kept(self, kind: str) -> tuple[float, float, float]:
        found = self.measured.likelihoods[kind]
        likely = found.probability if kind == "retain" else found.option
        truth = [forgetting.truth_utility(ratio) for ratio in found.ratio]
        rouge = self._rouge(self.measured, kind)
        return float(np.mean(likely)), float(np.mean(rouge)), float(np.mean(truth))

    # --- Leaks and aggregates ------------------------------------------------------------------

    def leak_rows(self) -> list[Row]:
        rows = []
        for plan, counts in self.measured.leaks.items():
            samples = int(plan.split("x")[0])
            theirs = self.retained.leaks.get(plan)
            if theirs is None:
                continue
            for k in LEAK_K:
                if k > samples or (k == LEAK_K[0] and samples > 50):
                    continue
                value = comparisons.mean_leak_at_k(samples, counts, k)
                apart = comparisons.leak_difference(samples, counts, theirs, k, seed=self.seed)
                rows.append(self._row(f"leak@{k}", value, n=len(counts)))
                rows.append(self._estimate(f"leak@{k} - retained", apart, len(counts)))
        return rows

    def aggregate_rows(self, full_utility: float) -> list[Row]:
        ours = self._forget(self.measured)
        memory = aggregates.memorisation_score(
            float(np.mean(ours.extraction)),
            float(np.mean(ours.exact)),
            float(np.mean(ours.paraphrase)),
            float(np.mean(_indifference(ours))),
        )
        aucs = [
            {a: comparisons.membership_auc(*self._membership(one, a)).value for a in ATTACKS}
            for one in (self.measured, self.retained)
        ]
        privacy = aggregates.privacy_score(aucs[0], aucs[1])
        clean = [
            answers.cleanliness(one.answers[FORGET], one.nlls, self.limit).rate
            for one in (self.measured, self.full)
        ]
        utility = aggregates.utility_score(self.utility(), clean[0], full_utility, clean[1])
        values = {"Mem": memory, "Priv": privacy, "Util": utility}
        values["Agg"] = aggregates.aggregate(memory, privacy, utility)
        return [self._row(name, value, group="aggregate") for name, value in values.items()]

    # --- Rows ----------------------------------------------------------------------------------

    def _forget(self, one: Measured) -> Likelihoods:
        return one.likelihoods[FORGET]

    def _beside(
        self, measure: str, values: Sequence[float], reference: Sequence[float]
    ) -> list[Row]:
        mean = float(np.mean(values))
        return [
            self._row(measure, mean, n=len(values)),
            self._difference(measure, values, reference),
        ]

    def _difference(self, measure: str, values: Sequence[float], reference: Sequence[float]) -> Row:
        apart = comparisons.paired_difference(values, reference, seed=self.seed)
        return self._estimate(f"{measure} - retained", apart, len(values))

    def _estimate(self, measure: str, found: comparisons.Estimate, count: int) -> Row:
        return self._row(measure, found.value, found.low, found.high, count)

    def _row(
        self,
        measure: str,
        value: float,
        low: float | None = None,
        high: float | None = None,
        n: int = 0,
        group: str = FORGET,
    ) -> Row:
        one = self.measured
        return Row(one.name, one.route, measure, group, value, low, high, n)


def _indifference(found: Likelihoods) -> list[float]:
    return [forgetting.truth_indifference(ratio) for ratio in found.ratio]
