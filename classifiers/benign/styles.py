"""Ways in which people really type: lower case, slips, shouting, emoji, added instructions."""

from __future__ import annotations

import random

PREFIXES = (
    "hey, quick question: ",
    "Hello! ",
    "Hi there, I hope you can help. ",
    "pls help: ",
    "One more thing. ",
    "I was wondering: ",
    "For my homework: ",
    "My daughter asked me this: ",
    "Serious question. ",
    "Be honest with me. ",
    "ok so ",
    "Thanks, that was useful. Next: ",
)
SUFFIXES = (
    " Answer in one sentence.",
    " Keep it short.",
    " Explain step by step.",
    " Please answer in bullet points.",
    " No more than 50 words.",
    " Think carefully before you answer.",
    ' Respond in JSON with the keys "answer" and "confidence".',
    " thx in advance",
    " Give sources if you can.",
    " I need it for a presentation tomorrow.",
    " If you don't know, say so.",
    " Reply in Markdown.",
    " Let's think step by step.",
)
EMOJI = ("🙂", "🤔", "😂", "🙏", "🔥", "❓", "👀", "✨", "📚", "😅", "🎉", "👍")


def with_slips(text: str, rng: random.Random) -> str:
    """`text` with about one typing slip per 25 letters: swaps, drops, doubles."""
    letters = list(text)
    for _ in range(max(1, len(letters) // 25)):
        at = rng.randrange(max(1, len(letters) - 1))
        if not letters[at].isascii() or not letters[at].isalpha():
            continue
        match rng.randrange(3):
            case 0 if at + 1 < len(letters):
                letters[at], letters[at + 1] = letters[at + 1], letters[at]
            case 1:
                letters[at] = ""
            case _:
                letters[at] *= 2
    return "".join(letters)


def restyle(text: str, rng: random.Random) -> str:
    """One of the ways above, chosen by `rng`; the content stays what it was."""
    match rng.randrange(7):
        case 0:
            return text.lower().rstrip("?.!")
        case 1:
            return with_slips(text, rng)
        case 2:
            return text.upper()
        case 3:
            return f"{text} {rng.choice(EMOJI)}"
        case 4 | 5:
            return rng.choice(PREFIXES) + text
        case _:
            return text + rng.choice(SUFFIXES)
