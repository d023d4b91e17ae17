"""Prompts with an inner structure: choices, pasted texts, code, tables, transcripts, encodings."""

from __future__ import annotations

import base64
import json
import random
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import Any

from classifiers.benign.slots import Filler, Row, read_seeds, rng_for
from classifiers.benign.styles import with_slips

LETTERS = "ABCD"


def choice_block(seed: dict[str, Any], mark: str) -> str:
    """Question and its four options; `mark` formats the letter."""
    lines = [f"{mark.format(LETTERS[i])} {text}" for i, text in enumerate(seed["options"])]
    return "\n".join([seed["question"], *lines])


def choice_rows() -> Iterator[Row]:
    """Each multiple-choice question in one of the layouts in use, some with examples before it."""
    rng = rng_for("choices")
    seeds = read_seeds("mcq")
    for seed in seeds:
        subject = seed["subject"].replace("_", " ")
        layout = rng.randrange(7)
        text = choice_block(seed, "({})" if layout in (2, 5) else "{}." if layout else "{})")
        if layout == 1:
            text = (
                f"The following is a multiple choice question about {subject}.\n\n{text}\nAnswer:"
            )
        elif layout == 2:
            text = f"{text}\nWhich option is correct? Reply with the letter only."
        elif layout == 3:
            shots = rng.sample([s for s in seeds if s is not seed], 2)
            solved = [f"{choice_block(s, '{}.')}\nAnswer: {rng.choice(LETTERS)}" for s in shots]
            text = "\n\n".join([*solved, f"{text}\nAnswer:"])
        elif layout == 4:
            text = f"Question: {text}\nExplain your reasoning, then give the answer."
        elif layout == 5:
            text = f"{seed['question']} Options: {'; '.join(seed['options'])}"
        elif layout == 6:
            text = seed["question"]
        yield Row(text, "multiple_choice", "en")


def one_reading(seed: dict[str, Any], question: str, rng: random.Random) -> str:
    """A pasted paragraph and what is asked about it."""
    layouts = (
        "{text}\n\n{question}",
        "Context: {text}\n\nQuestion: {question}\nAnswer:",
        'Read the passage and answer.\n\n"{text}"\n\n{question}',
        "{question}\n\n{text}",
        "Passage:\n{text}\n\nBased only on the passage: {question}",
        "# {title}\n\n{text}\n\n**{question}**",
    )
    plain = ("{text}\n\n{question}", "{question}\n\n{text}", "{title}\n\n{text}\n\n{question}")
    layout = rng.choice(layouts if seed["lang"] == "en" else plain)
    return layout.format(text=seed["text"], question=question, title=seed["title"])


def reading_rows() -> Iterator[Row]:
    """Reading comprehension, and the tasks people set on a pasted text."""
    rng = rng_for("reading")
    filler = Filler("reading-slots")
    tasks = read_seeds("text_tasks")
    for seed in read_seeds("paragraphs"):
        for question in seed["questions"]:
            yield Row(one_reading(seed, question, rng), "reading_comprehension", seed["lang"])
        if seed["lang"] != "en":
            continue
        for task in rng.sample(tasks, 4):
            text = seed["text"]
            if task["category"] == "proofreading":
                text = with_slips(text, rng)
            asked = filler.fill(task["text"], "en")
            order = (asked, text) if rng.random() < 0.7 else (text, asked)
            yield Row("\n\n".join(order), task["category"], "en")


def long_rows(count: int = 110) -> Iterator[Row]:
    """Documents of about 300 to 3000 words, made of whole paragraphs, with a task around them."""
    rng = rng_for("long")
    filler = Filler("long-slots")
    pool = [seed for seed in read_seeds("paragraphs") if seed["lang"] == "en"]
    tasks = [seed["text"] for seed in read_seeds("text_tasks")]
    for index in range(count):
        size = 4 + index % 9 if index % 5 else rng.randint(14, 32)
        chosen = rng.sample(pool, min(size, len(pool)))
        heads = rng.choice(("## {}\n", "{}\n", ""))
        body = "\n\n".join(heads.format(seed["title"]) + seed["text"] for seed in chosen)
        task = filler.fill(rng.choice(tasks), "en")
        parts = [task, body] if rng.random() < 0.6 else [body, task]
        yield Row("\n\n".join(parts), "long_text", "en")


def code_rows() -> Iterator[Row]:
    """Snippets with the tasks set on them, fenced or bare."""
    rng = rng_for("code")
    filler = Filler("code-slots")
    tasks = read_seeds("code_tasks")
    for seed in read_seeds("code"):
        fenced = f"```{seed['language']}\n{seed['snippet']}\n```"
        for task in rng.sample(tasks, 3):
            asked = filler.fill(task["text"], "en").replace("[lang]", seed["language"])
            block = fenced if rng.random() < 0.75 else seed["snippet"]
            parts = [asked, block] if rng.random() < 0.75 else [block, asked]
            yield Row("\n\n".join(parts), "code_review", "en")


def transcript(turns: list[str], layout: int) -> str:
    """A conversation pasted as text; the user speaks first."""
    roles = [("User", "Assistant"), ("Human", "AI"), ("Q", "A"), ("Me", "Bot")][layout % 4]
    if layout == 4:
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": turn}
            for i, turn in enumerate(turns)
        ]
        return json.dumps(messages, ensure_ascii=False, indent=1)
    if layout == 5:
        tags = ("<|user|>", "<|assistant|>")
        return "\n".join(f"{tags[i % 2]}\n{turn}" for i, turn in enumerate(turns))
    return "\n".join(f"{roles[i % 2]}: {turn}" for i, turn in enumerate(turns))


def dialogue_rows() -> Iterator[Row]:
    """Transcripts, and the last turn of each as it arrives alone."""
    rng = rng_for("dialogues")
    for seed in read_seeds("dialogues"):
        turns = list(seed["turns"])
        yield Row(transcript(turns, rng.randrange(6)), "chat_transcript", "en")
        yield Row(turns[-1], "chat_turn", "en")


def table_text(rng: random.Random, filler: Filler, layout: int) -> str:
    """A small made-up table or log in the given layout."""
    rows = [
        {
            "name": filler.fill("{firstname}", "en"),
            "city": filler.fill("{city}", "en"),
            "item": filler.fill("{item}", "en"),
            "quantity": rng.randint(1, 90),
            "price": round(rng.uniform(1, 250), 2),
            "date": f"2023-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        }
        for _ in range(rng.randint(4, 11))
    ]
    keys = rng.sample(list(rows[0]), rng.randint(3, 6))
    cells = [[str(row[key]) for key in keys] for row in rows]
    if layout == 0:
        return "\n".join([",".join(keys), *(",".join(line) for line in cells)])
    if layout == 1:
        return json.dumps([{key: row[key] for key in keys} for row in rows], indent=2)
    if layout == 2:
        ruler = "|".join("---" for _ in keys)
        return "\n".join(f"|{'|'.join(line)}|" for line in [keys, ruler.split("|"), *cells])
    if layout == 3:
        inner = ("".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, c, strict=True)) for c in cells)
        return "<rows>\n" + "\n".join(f"  <row>{line}</row>" for line in inner) + "\n</rows>"
    if layout == 4:
        return "\n".join("\t".join(line) for line in [keys, *cells])
    levels = ("INFO", "WARN", "ERROR", "DEBUG")
    return "\n".join(
        f"{row['date']} {rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:07 {rng.choice(levels)} "
        f"order-service: user={row['name']} sku={row['item']} qty={row['quantity']} "
        f"took={rng.randint(2, 900)}ms"
        for row in rows
    )


def table_rows(count: int = 90) -> Iterator[Row]:
    """Tables, JSON, XML and logs with a question about them."""
    rng = rng_for("tables")
    filler = Filler("table-slots")
    tasks = [seed["text"] for seed in read_seeds("table_tasks")]
    for index in range(count):
        parts = [filler.fill(tasks[index % len(tasks)], "en"), table_text(rng, filler, index % 6)]
        if rng.random() < 0.3:
            parts.reverse()
        yield Row("\n\n".join(parts), "structured_data", "en")


def encoded(text: str, rng: random.Random, kind: int) -> str:
    """`text` as base64, hex, URL encoding or its first bytes in binary; else a random UUID."""
    data = text.encode()
    if kind == 0:
        return base64.b64encode(data).decode()
    if kind == 1:
        return data.hex()
    if kind == 2:
        return urllib.parse.quote(text)
    if kind == 3:
        return " ".join(f"{byte:08b}" for byte in data[:16])
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def encoded_rows(count: int = 90) -> Iterator[Row]:
    """Harmless sentences in the encodings people paste, with and without a request."""
    rng = rng_for("encoded")
    texts = [s["text"] for s in read_seeds("free_en") if len(s["text"]) < 120]
    asks = (
        "Decode this: {}",
        "{}",
        "What does {} say?",
        "I found this string in our logs: {}\nWhat is it?",
        "Is this valid {kind}? {}",
        "Write a Python one-liner that decodes {}",
    )
    names = ("base64", "hexadecimal", "URL encoding", "binary", "UUID v4")
    for index, text in enumerate(rng.sample(texts, min(count, len(texts)))):
        kind = index % 5
        yield Row(
            rng.choice(asks).format(encoded(text, rng, kind), kind=names[kind]), "encoded", "en"
        )


def system_rows() -> Iterator[Row]:
    """System prompts, alone and followed by a user's question."""
    rng = rng_for("system")
    questions = [s["text"] for s in read_seeds("free_en") if len(s["text"]) < 200]
    for seed in read_seeds("system_prompts"):
        yield Row(seed["text"], "system_prompt", "en")
        joined = f"{seed['text']}\n\n{rng.choice(('', 'User: '))}{rng.choice(questions)}"
        yield Row(joined, "system_prompt", "en")


def all_rows() -> Iterator[Row]:
    """Every composed row, part by part."""
    for part in (choice_rows, reading_rows, long_rows, code_rows, dialogue_rows, table_rows):
        yield from part()
    yield from encoded_rows()
    yield from system_rows()
