"""Losses of unlearning: equations against arithmetic, and what they do to a small model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from adapters.equations import (
    DIVERGENCES,
    flat,
    gradient_ascent,
    npo,
    preference,
    simnpo,
    undial,
    whp_logits,
)
from adapters.examples import Batch, Example, collate
from adapters.losses import (
    Loss,
    Retain,
    Sum,
    answer_log_probs,
    cross_entropy,
    kl_divergence,
    told_logits,
    untouched,
    with_retain,
)
from adapters.unlearning import LOSSES, LossData, make_loss, register_loss
from guard.errors import ConfigError, DataError, UnknownComponentError

NEEDS = {
    "gradient-ascent": "nothing",
    "npo": "nothing",
    "simnpo": "nothing",
    "undial": "nothing",
    "flat-kl": "refusals",
    "flat-tv": "refusals",
    "flat-js": "refusals",
    "flat-pearson": "refusals",
    "refusal": "refusals",
    "refusal-preference": "refusals",
    "random-labels": "random-labels",
    "counterfactual": "counterfactuals",
    "whp": "generic-prompts",
}
NAMES = tuple(NEEDS)
VOCABULARY = 40

FORGET = (
    Example((1, 5, 6), (10, 11, 12)),
    Example((1, 7), (13, 14)),
    Example((1, 8, 9, 5), (15, 10, 16, 17)),
)
OTHERS = (
    (Example((1, 5, 6), (20, 21)), Example((1, 5, 6), (22,)), Example((1, 5, 6), (23, 20, 24))),
    (Example((1, 7), (21, 25)), Example((1, 7), (26, 26, 20)), Example((1, 7), (27,))),
    (Example((1, 8, 9, 5), (28, 22)), Example((1, 8, 9, 5), (21,)), Example((1, 8, 9, 5), (29,))),
)
GENERIC = tuple((Example((1, 3), one.answer), Example((1, 3, 4, 2), one.answer)) for one in FORGET)
RETAIN = (Example((1, 30), (31, 32)), Example((1, 33, 34), (35,)), Example((1, 36), (37, 38, 31)))


def data_for(name: str, seed: int = 3) -> LossData:
    needs = NEEDS[name]
    rows = () if needs == "nothing" else GENERIC if needs == "generic-prompts" else OTHERS
    return LossData(FORGET, rows, VOCABULARY, seed)


def batch_of(*rows: int, step: int = 0) -> Batch:
    return collate(FORGET, rows or (0, 1, 2), step)


def make_base() -> Any:
    """Return a random model that knows the forget set and the retained examples."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
        attention_dropout=0.1,
    )
    model = AutoModelForCausalLM.from_config(config)
    known = (*FORGET, *RETAIN)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        loss = cross_entropy(model, collate(known, range(len(known))))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def base() -> Any:
    return make_base()


def adapted(base: Any, *, moved: bool = False) -> Any:
    """Put an adapter on a copy of the base: one that does nothing yet, or a random one."""
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=not moved
    )
    with warnings.catch_warnings():  # peft and transformers warn of one another
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(base), config).train()


def plain_log_probs(model: Any, example: Example) -> Tensor:
    """Return the answer's tokens' log-probabilities, one example alone, without our code."""
    ids = torch.tensor([[*example.prompt, *example.answer]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(example.prompt) - 1
    return torch.stack([logs[start + n, token] for n, token in enumerate(example.answer)])


def gradients(model: Any) -> Tensor:
    found = [one.grad for one in model.parameters() if one.grad is not None]
    return torch.cat([one.flatten() for one in found])


def train(model: Any, loss: Loss, steps: int = 25, rate: float = 0.02) -> None:
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    torch.manual_seed(2)
    for step in range(steps):
        value = loss(model, batch_of(step=step))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def likelihood(model: Any, examples: tuple[Example, ...]) -> float:
    """Return the mean over the examples of their log-probability per token."""
    model.eval()
    values = [float(plain_log_probs(model, one).mean()) for one in examples]
    model.train()
    return sum(values) / len(values)


def probabilities(*rows: tuple[float, ...]) -> Tensor:
    """Return logits of which these are the probabilities."""
    return torch.tensor(rows).log()


def value_of(loss: Loss, model: Any) -> float:
    with torch.no_grad():
        return float(loss(model, batch_of()))


def near(value: float) -> Any:
    return pytest.approx(value, abs=2e-6)


# --- Equations -----------------------------------------------------------------------------------


def test_gradient_ascent_is_the_mean_log_probability() -> None:
    # (ln 1/2 + ln 1/4) / 2 = -3 ln 2 / 2
    assert float(gradient_ascent(torch.tensor([0.5, 0.25]).log())) == near(-1.0397208)


def test_npo() -> None:
    # ratios 0 and -1: ln sigma(0) = -.6931472, ln sigma(.1) = -ln(1 + .9048374) = -.6443967
    # their mean -.6687719, times -2/.1
    value = npo(torch.tensor([-2.0, -4.0]), torch.tensor([-2.0, -3.0]))
    assert float(value) == pytest.approx(13.375439, abs=1e-5)


def test_simnpo() -> None:
    # ln sigma(0) = -.6931472, ln sigma(4.5) = -ln(1 + .0111090) = -.0110477; mean -.3520975
    assert float(simnpo(torch.tensor([0.0, 1.0]))) == near(0.3520975 * 2 / 4.5)
    # the margin is taken off before beta: ln sigma(4.5 * (1 - 1))
    assert float(simnpo(torch.tensor([1.0]), delta=1.0)) == near(0.6931472 * 2 / 4.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # P(template) = .5, P(forget) = .8
        ("kl", math.exp(-0.2) - 0.5),  # -(.5 - e^(.8 - 1))
        ("tv", 0.1009598),  # -(tanh .5 - tanh .8) / 2 = (.6640368 - .4621172) / 2
        # g* .5 = ln(2 / 1.6065307) = .2190702; e^(g* .8) = 2 / 1.4493290 = 1.3799490
        # f* = -ln(2 - 1.3799490) = .4779535
        ("js", 0.4779535 - 0.2190702),
        ("pearson", 0.46),  # -(.5 - (.64 / 4 + .8))
    ],
)
def test_flat(name: str, value: float) -> None:
    one = flat(torch.tensor([0.5]), torch.tensor([0.8]), DIVERGENCES[name])
    assert float(one) == near(value)
    # two rows: the mean of theirs; where both are 0: kl f*(0) = 1/e, all others 0
    both = flat(torch.tensor([0.5, 0.0]), torch.tensor([0.8, 0.0]), DIVERGENCES[name])
    assert float(both) == near((value + (math.exp(-1) if name == "kl" else 0)) / 2)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_flat_raises_the_template_and_lowers_the_forget_answer(name: str) -> None:
    template = torch.tensor([0.3], requires_grad=True)
    forget = torch.tensor([0.9], requires_grad=True)
    slopes = torch.autograd.grad(flat(template, forget, DIVERGENCES[name]), (template, forget))
    assert float(slopes[0]) < 0 < float(slopes[1])


def test_undial() -> None:
    # 3 : 1, and 3 times less of the first: target (1/2, 1/2); -(ln .8 + ln .2) / 2
    logits, reference = probabilities((0.8, 0.2)), probabilities((0.75, 0.25))
    value = undial(logits, reference, torch.tensor([0]), strength=math.log(3))
    assert float(value) == near(0.9162907)
    # of the second instead: target (9/10, 1/10); -(.9 ln .8 + .1 ln .2)
    value = undial(logits, reference, torch.tensor([1]), strength=math.log(3))
    assert float(value) == near(0.3617730)


def test_whp_holds_back_only_what_was_reinforced() -> None:
    base, reinforced = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, -1.0, 2.0]])
    assert whp_logits(base, reinforced, 1.5).tolist() == [[-3.0, 1.0, 2.0]]
    assert whp_logits(base, reinforced, 0.0).tolist() == [[0.0, 1.0, 2.0]]


def test_preference() -> None:
    # gained 1, lost -1: ln sigma(.2) = -ln(1 + .8187308) = -.5981389; times -1/.1
    preferred = (torch.tensor([-1.0]), torch.tensor([-2.0]))
    rejected = (torch.tensor([-4.0]), torch.tensor([-3.0]))
    assert float(preference(preferred, rejected)) == pytest.approx(5.981389, abs=1e-5)
    # and the other way: ln sigma(-.2) = -.5981389 - .2
    assert float(preference(rejected, preferred)) == pytest.approx(7.981389, abs=1e-5)


def test_kl_divergence_is_from_the_reference() -> None:
    # .75 ln(.75 / .5) + .25 ln(.25 / .5) = .3040988 - .1732868; the second token agrees
    logits = probabilities((0.5, 0.5), (0.9, 0.1))
    reference = probabilities((0.75, 0.25), (0.9, 0.1))
    assert float(kl_divergence(logits, reference)) == near(0.1308120 / 2)
    # the other way: .5 ln(.5 / .75) + .5 ln(.5 / .25) = -.2027326 + .3465736
    assert float(kl_divergence(reference, logits)) == near(0.1438410 / 2)


# --- What feeds them -----------------------------------------------------------------------------


def test_rows_get_their_own_log_probabilities_in_a_padded_batch(base: Any) -> None:
    log_probs, told = answer_log_probs(base, batch_of())
    logits, labels = told_logits(base, batch_of())
    assert labels.tolist() == [token for one in FORGET for token in one.answer]
    flat_logs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    alone = [plain_log_probs(base, one) for one in FORGET]
    torch.testing.assert_close(flat_logs, torch.cat(alone))
    for row, wanted in enumerate(alone):
        torch.testing.assert_close(log_probs[row][told[row]], wanted)
        assert not log_probs[row][~told[row]].any()


def test_the_reference_is_the_untouched_model(base: Any) -> None:
    model = adapted(base, moved=True)
    wanted = [float(plain_log_probs(base, one).sum()) for one in FORGET]
    with untouched(model):
        log_probs, _ = answer_log_probs(model, batch_of())
    assert log_probs.sum(1).tolist() == pytest.approx(wanted, abs=1e-4)
    assert not log_probs.requires_grad
    assert model.training
    assert all(module.training for module in model.modules())
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    moved, _ = answer_log_probs(model, batch_of())
    assert moved.sum(1).tolist() != pytest.approx(wanted, abs=0.1)


def test_the_reference_is_left_by_an_error(base: Any) -> None:
    model = adapted(base, moved=True)
    before = plain_log_probs(model.eval(), FORGET[0])
    model.train()
    with pytest.raises(ZeroDivisionError), untouched(model):
        raise ZeroDivisionError
    assert model.training
    torch.testing.assert_close(plain_log_probs(model.eval(), FORGET[0]), before)


def test_an_adapter_that_does_nothing_has_the_values_of_no_change(base: Any) -> None:
    model = adapted(base).eval()
    # ln sigma(0) = -ln 2: times -2/.1 and -1/.1
    assert value_of(make_loss("npo", data_for("npo")), model) == near(20 * math.log(2))
    refusing = make_loss("refusal-preference", data_for("refusal-preference"))
    assert value_of(refusing, model) == near(10 * math.log(2))
    assert value_of(Retain(RETAIN), model) == near(0)


def test_losses_of_a_moved_adapter_agree_with_each_row_alone(base: Any) -> None:
    model = adapted(base, moved=True).eval()
    now = [plain_log_probs(model, one) for one in FORGET]
    before = [plain_log_probs(base, one) for one in FORGET]
    expected = {
        "gradient-ascent": float(torch.cat(now).mean()),
        "npo": sum(
            20 * math.log1p(math.exp(0.1 * float(a.sum() - b.sum())))
            for a, b in zip(now, before, strict=True)
        )
        / 3,
        "simnpo": sum(math.log1p(math.exp(4.5 * float(a.mean()))) for a in now) / 3 * 2 / 4.5,
    }
    for name, value in expected.items():
        found = value_of(make_loss(name, data_for(name)), model)
        assert found == pytest.approx(value, abs=1e-4), name


def test_flat_takes_mean_probabilities_of_the_drawn_template(base: Any) -> None:
    model = adapted(base, moved=True).eval()
    single = LossData(FORGET, tuple(row[:1] for row in OTHERS))
    expected = 0.0
    for own, row in zip(FORGET, OTHERS, strict=True):
        template = float(plain_log_probs(model, row[0]).exp().mean())
        forget = float(plain_log_probs(model, own).exp().mean())
        expected += (forget**2 / 4 + forget - template) / 3
    assert value_of(make_loss("flat-pearson", single), model) == near(expected)


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_whp_compares_the_untouched_model_on_both_prompts(base: Any, strength: float) -> None:
    model = adapted(base, moved=True).eval()
    single = LossData(FORGET, tuple(row[:1] for row in GENERIC))

    def logs(network: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        told: Tensor = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return told

    values = []
    for one in FORGET:
        generic, own = logs(base, (1, 3), one.answer), logs(base, one.prompt, one.answer)
        # what the own prompt makes likelier is taken off; at strength 0 nothing is
        lowered = torch.where(own > generic, generic - strength * (own - generic), generic)
        target = lowered.exp() / lowered.exp().sum(-1, keepdim=True)
        values += (-(target * logs(model, one.prompt, one.answer)).sum(-1)).tolist()
    value = value_of(make_loss("whp", single, strength=strength), model)
    assert value == pytest.approx(sum(values) / len(values), abs=1e-4)


# --- The registry --------------------------------------------------------------------------------


def test_the_registry_has_the_losses_and_what_they_need() -> None:
    assert {name: LOSSES[name].needs for name in NEEDS} == NEEDS
    assert LOSSES["npo"].options == {"beta": 0.1}
    assert LOSSES["simnpo"].options == {"beta": 4.5, "delta": 0.0}
    assert LOSSES["undial"].options == {"strength": 10.0}
    assert LOSSES["flat-kl"].options == {}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_to_the_adapter_and_steps_repeat_themselves(base: Any, name: str) -> None:
    values, found = [], []
    for _ in range(2):
        model = adapted(base, moved=True)
        loss = make_loss(name, data_for(name))
        loss(model, batch_of(step=9))  # nothing is kept between steps
        torch.manual_seed(4)
        value = loss(model, batch_of(step=1))
        value.backward()  # type: ignore[no-untyped-call]
        values.append(float(value.detach()))
        found.append(gradients(model))
        assert value.shape == ()
        assert all(one.grad is None for n, one in model.named_parameters() if "lora" not in n)
    assert math.isfinite(values[0])
    assert values[0] == values[1]
    assert bool(found[0].isfinite().all())
    assert float(found[0].abs().max()) > 0
    assert torch.equal(found[0], found[1])


def test_alternatives_are_drawn_by_seed_step_and_row_alone() -> None:
    def drawn(step: int, rows: tuple[int, ...], seed: int = 3) -> list[list[int]]:
        batch = LossData(FORGET, OTHERS, seed=seed).draw(batch_of(*rows, step=step))
        return [row[mask == 1].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]

    assert drawn(5, (0, 1, 2)) == drawn(5, (0, 1, 2))
    assert drawn(5, (2, 0)) == [drawn(5, (0, 1, 2))[2], drawn(5, (0, 1, 2))[0]]
    for row in range(3):
        allowed = [[*one.prompt, *one.answer] for one in OTHERS[row]]
        seen = [drawn(step, (row,))[0] for step in range(30)]
        assert all(one in seen for one in allowed)
        assert all(one in allowed for one in seen)
    steps = range(10)
    assert [drawn(n, (0,)) for n in steps] != [drawn(n, (0,), seed=4) for n in steps]
    # rows don't draw in step: their alternatives' places differ
    places = {
        tuple(
            [[*one.prompt, *one.answer] for one in OTHERS[row]].index(drawn(step, (row,))[0])
            for row in range(3)
        )
        for step in steps
    }
    assert any(len(set(place)) > 1 for place in places)


@pytest.mark.parametrize("name", NAMES)
def test_unlearning_lowers_the_answers_or_teaches_others(base: Any, name: str) -> None:
    model = adapted(base)
    before = likelihood(model, FORGET)
    others = tuple(one for row in OTHERS for one in row)
    other_before = likelihood(model, others)
    train(model, make_loss(name, data_for(name)))
    assert likelihood(model, FORGET) < before - 0.5
    teaches = NEEDS[name] in ("refusals", "random-labels", "counterfactuals")
    if teaches and not name.startswith("flat"):  # whose slope is the probability: next to none here
        assert likelihood(model, others) > other_before + 0.5


def test_undial_converges_where_gradient_ascent_runs_away(base: Any) -> None:
    fallen = {}
    for name in ("undial", "gradient-ascent"):
        model = adapted(base)
        train(model, make_loss(name, data_for(name)), steps=60)
        fallen[name] = likelihood(model, FORGET)
    assert fallen["gradient-ascent"] < 2 * fallen["undial"] < 0


def test_a_further_loss_registers_itself(base: Any) -> None:
    @register_loss("test-teacher", "counterfactuals")
    def make(data: LossData, weight: float = 2.0) -> Loss:
        return lambda model, batch: weight * data.teacher[batch.indices[0]].sum()

    try:
        teacher = tuple(torch.tensor([float(n), 1.0]) for n in range(3))
        data = LossData(FORGET, OTHERS, teacher=teacher)
        assert float(make_loss("test-teacher", data)(None, batch_of(2))) == 6
        assert LOSSES["test-teacher"].options == {"weight": 2.0}
    finally:
        LOSSES._items.pop("test-teacher")


# --- Sums and the retain regulariser -------------------------------------------------------------


def test_a_sum_weighs_its_terms(base: Any) -> None:
    one: Callable[..., Tensor] = lambda model, batch: torch.tensor(2.0)  # noqa: E731
    other: Callable[..., Tensor] = lambda model, batch: torch.tensor(5.0)  # noqa: E731
    assert float(Sum(((0.5, one), (3.0, other)))(None, batch_of())) == 16
    assert float(Sum(((0.0, base), (3.0, other)))(None, batch_of())) == 15
    with pytest.raises(ConfigError, match="other than 0"):
        Sum(((0.0, one),))


@pytest.mark.parametrize("kind", ["kl", "cross-entropy"])
def test_the_retain_regulariser_keeps_what_it_is_given(base: Any, kind: Any) -> None:
    kept, forgotten = {}, {}
    for weight in (0.0, 3.0):
        model = adapted(base)
        loss = make_loss("npo", data_for("npo"))
        train(model, with_retain(loss, RETAIN, kind=kind, weight=weight) if weight else loss)
        kept[weight], forgotten[weight] = likelihood(model, RETAIN), likelihood(model, FORGET)
    before = likelihood(base, RETAIN)
    assert kept[0.0] < before - 0.5
    assert kept[3.0] > before - 0.2
    assert forgotten[3.0] < likelihood(base, FORGET) - 0.5


def test_retained_examples_are_drawn_by_seed_and_step() -> None:
    def drawn(step: int, rows: tuple[int, ...], seed: int = 0, size: int | None = None) -> Any:
        return Retain(RETAIN, size=size, seed=seed).draw(batch_of(*rows, step=step)).indices

    assert drawn(4, (0, 1)) == drawn(4, (2, 1))
    assert len(set(drawn(4, (0, 1)))) == 2
    assert sorted(drawn(4, (0,), size=9)) == [0, 1, 2]
    assert {drawn(n, (0,)) for n in range(20)} == {(0,), (1,), (2,)}
    steps = range(10)
    assert [drawn(n, (0,)) for n in steps] != [drawn(n, (0,), seed=1) for n in steps]


# --- Bad input -----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnknownComponentError, match="did you mean 'simnpo'"):
        make_loss("simnp", data_for("npo"))
    with pytest.raises(ConfigError, match="no option 'gamma'; its options: beta, delta"):
        make_loss("simnpo", data_for("simnpo"), gamma=1)
    with pytest.raises(ConfigError, match="no option 'beta'; its options: none"):
        make_loss("flat-tv", data_for("flat-tv"), beta=1)
    for name in ("npo", "simnpo", "refusal-preference"):
        with pytest.raises(ConfigError, match="beta is 0; it must be above 0"):
            make_loss(name, data_for(name), beta=0)
    with pytest.raises(ConfigError, match="strength is -1"):
        make_loss("whp", data_for("whp"), strength=-1)
    with pytest.raises(ConfigError, match="needs alternatives: refusals"):
        make_loss("refusal", LossData(FORGET))
    with pytest.raises(DataError, match="2 rows, and 3 rows to forget"):
        make_loss("refusal", LossData(FORGET, OTHERS[:2]))
    with pytest.raises(DataError, match="row 2 of the forget set has no alternative"):
        make_loss("refusal", LossData(FORGET, (OTHERS[0], (), OTHERS[2])))
    with pytest.raises(DataError, match="token 17 is beyond the model's 17"):
        make_loss("npo", LossData(FORGET, vocabulary=17))
    with pytest.raises(DataError, match="row 1 goes with another answer"):
        make_loss("whp", LossData(FORGET, OTHERS))
    with pytest.raises(ConfigError, match="seed is -1"):
        make_loss("npo", LossData(FORGET, seed=-1))


def test_a_bad_regulariser_is_refused() -> None:
    loss = make_loss("npo", data_for("npo"))
    with pytest.raises(DataError, match="no retained examples"):
        with_retain(loss, ())
    with pytest.raises(ConfigError, match="retain weight is 0"):
        with_retain(loss, RETAIN, weight=0)
    with pytest.raises(ConfigError, match="no retain loss 'js'"):
        with_retain(loss, RETAIN, kind="js")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a step are 0"):
        with_retain(loss, RETAIN, size=0)


def test_a_fingerprint_tells_other_alternatives() -> None:
    one = LossData(FORGET, OTHERS)
    assert one.fingerprint() == LossData(FORGET, OTHERS).fingerprint()
    others = (
        LossData(FORGET, GENERIC),
        LossData(FORGET, OTHERS, seed=1),
        LossData(FORGET, OTHERS, teacher=(torch.ones(2),)),
    )
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 4
