"""Which templates want parts: the verdicts of vLLM 0.32 on the same templates."""

from __future__ import annotations

import pytest

from guard.chat_template import walks_parts
from server.engines.embedded.packaged import GEMMA3

LOOP = "{% for m in messages %}{% for c in BODY %}{{ c.text }}{% endfor %}{% endfor %}"
MACRO = (
    "{% macro show(given, other) %}{% for c in given %}{{ c.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ CALL }}{% endfor %}"
)
SETS = "{% set rest = messages[1:] %}{% set turns = rest | list %}"


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        (LOOP.replace("BODY", "m.content"), True),
        (LOOP.replace("BODY", "m['content'] | list"), True),
        (LOOP.replace("BODY", "m['content'][1:]"), True),
        (LOOP.replace("BODY", "m.tool_calls"), False),
        (LOOP.replace("BODY", "other.content"), False),
        (LOOP.replace("BODY", "content"), True),
        (SETS + LOOP.replace("BODY", "m.content").replace("in messages", "in turns"), True),
        (LOOP.replace("BODY", "m.content").replace("in messages", "in unrelated"), False),
        (MACRO.replace("CALL", "show(m.content)"), True),
        (MACRO.replace("CALL", "show(given=m.content)"), True),
        (MACRO.replace("CALL", "show(m.role, m.content)"), False),
        (MACRO.replace("CALL", "m.content").replace("given", "content"), False),
        # vLLM can't follow messages into a namespace, and then takes one string.
        (
            "{% set ns = namespace() %}{% set ns.turns = messages %}"
            + LOOP.replace("BODY", "m.content"),
            False,
        ),
        (GEMMA3.chat_template, True),
    ],
)
def test_parts_are_wanted_where_vllm_says_so(template: str, parts: bool) -> None:
    assert walks_parts(template) is parts
