"""The equations of unlearning, as the papers have them: pure functions of tensors.

Whatever the model finds is the caller's business (`adapters.unlearning`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional


def gradient_ascent(log_probs: Tensor) -> Tensor:
    """Return the mean log-probability of the answers' tokens: -NLL.

    It has no lower bound, so that it ends in gibberish if it isn't stopped.
    Paper: Jang et al. 2022, arXiv 2210.01504: gradients up instead of down the language loss.

    Args:
        log_probs: Of each token of the forget answers, nats, shape (tokens,).
    """
    return log_probs.mean()


def npo(log_probs: Tensor, reference_log_probs: Tensor, beta: float = 0.1) -> Tensor:
    """Return negative preference optimisation: -(2/beta) E log sigma(-beta log(pi/pi_ref)(y|x)).

    DPO with only the rejected answer; its gradient fades as the answer becomes less likely than
    the reference finds it. As beta goes to 0 it is gradient ascent.
    Paper: Zhang et al. 2024, arXiv 2404.05868.

    Args:
        log_probs: Of the whole forget answers, nats, shape (rows,).
        reference_log_probs: The same by the untouched model.
        beta: Inverse temperature (> 0, .1 in the paper). Higher stops nearer to the reference.
    """
    ratio = log_probs - reference_log_probs
    return -(2 / beta) * functional.logsigmoid(-beta * ratio).mean()


def simnpo(nll: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """Return NPO without a reference, by length: -(2/beta) E log sigma(beta (NLL/|y| - delta)).

    Paper: Fan et al. 2024, arXiv 2410.07163. As in the code, `delta` is subtracted inside beta.

    Args:
        nll: Mean negative log-likelihood per token of each forget answer, nats, shape (rows,).
        beta: Inverse temperature (> 0; 4.5 for TOFU).
        delta: Margin, nats per token; higher forgets on for longer.
    """
    return -(2 / beta) * functional.logsigmoid(beta * (nll - delta)).mean()


@dataclass(frozen=True, slots=True)
class Divergence:
    """An f-divergence in FLAT's variational form.

    Attributes:
        activation: g*, of a probability v.
        conjugate: f*, of u = g*(v).
    """

    activation: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]


DIVERGENCES: Final[Mapping[str, Divergence]] = {
    "kl": Divergence(lambda v: v, lambda u: torch.exp(u - 1)),
    "tv": Divergence(lambda v: torch.tanh(v) / 2, lambda u: u),
    "js": Divergence(
        lambda v: torch.log(2 / (1 + torch.exp(-v))), lambda u: -torch.log(2 - torch.exp(u))
    ),
    "pearson": Divergence(lambda v: v, lambda u: u * u / 4 + u),
}
"""g* and f* by name: Kullback-Leibler, total variation, Jensen-Shannon, Pearson's chi squared."""


def flat(template: Tensor, forget: Tensor, divergence: Divergence) -> Tensor:
    """Return FLAT's adjusted loss: -E[g*(P(template)) - f*(g*(P(forget)))].

    Paper: Wang et al. 2024, arXiv 2410.11143. P is the mean of the tokens' probabilities, not
    their product, so that neither length nor a single token decides.

    Args:
        template: P of the template answers, shape (rows,).
        forget: P of the forget answers, shape (rows,).
        divergence: One of `DIVERGENCES`.
    """
    gained = divergence.activation(template)
    lost = divergence.conjugate(divergence.activation(forget))
    return -(gained - lost).mean()


def undial(
    logits: Tensor, reference_logits: Tensor, labels: Tensor, strength: float = 10.0
) -> Tensor:
    """Return the cross-entropy to softmax(reference logits - strength * onehot(label)).

    A fixed target, so that it converges instead of running away.
    Paper: Dong et al. 2024, arXiv 2402.10052.

    Args:
        logits: Of the model, shape (tokens, vocabulary).
        reference_logits: Of the untouched model, same shape.
        labels: The forget answers' tokens, shape (tokens,).
        strength: Taken off the token's logit (> 0). Higher leaves it less of its probability.
    """
    lowered = reference_logits.scatter_add(
        -1, labels[:, None], torch.full_like(reference_logits[:, :1], -strength)
    )
    return functional.cross_entropy(logits, lowered.softmax(-1))


def whp_logits(base: Tensor, reinforced: Tensor, strength: float = 1.0) -> Tensor:
    """Return the generic logits v_base - strength * ReLU(v_reinforced - v_base).

    What the reinforced model finds likelier than the base does is held back; what it doesn't stays.
    Paper: Eldan and Russinovich 2023, arXiv 2310.02238. Where ours come from says
    `adapters.unlearning.Whp`.

    Args:
        base: Shape (tokens, vocabulary).
        reinforced: Same shape.
        strength: The paper's alpha (>= 0); 0 is the base itself.
    """
    return base - strength * functional.relu(reinforced - base)


def preference(
    preferred: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor], beta: float = 0.1
) -> Tensor:
    """Return DPO's -(1/beta) E log sigma(beta log(pi/pi_ref)(y_w) - beta log(pi/pi_ref)(y_l)).

    Paper: Rafailov et al. 2023, arXiv 2305.18290, with 1/beta as in Zhang et al. 2024, arXiv
    2404.05868. With a refusal as y_w and the forget answer as y_l it is IdkDPO (Maini et al. 2024,
    arXiv 2401.06121).

    Args:
        preferred: Log-probabilities of whole preferred answers, nats, by the model and by the
            untouched one, each of shape (rows,).
        rejected: The same of the forget answers.
        beta: Inverse temperature (> 0).
    """
    gained, lost = preferred[0] - preferred[1], rejected[0] - rejected[1]
    return -functional.logsigmoid(beta * (gained - lost)).mean() / beta
