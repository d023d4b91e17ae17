"""Does a chat template want a content in parts or as one text? Read as vLLM 0.32 reads it.

vLLM looks at the template's syntax tree: if some loop runs over a message's content, contents are
handed over in parts, else joined into one string. Guessing otherwise would give other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import nodes


def loops_over_content(template: nodes.Template) -> bool:
    """Return True if the template loops over a message's content.

    Args:
        template: The parsed template.
    """
    try:
        names = set(_message_names(template))
    except _UnknownTarget:
        return False  # where vLLM can't follow the messages, it takes one string
    in_macros = _macro_loops(template, names)
    for loop in template.find_all(nodes.For):
        if any(_reads(loop.iter, name, "content") for name in names):
            return True
        bare = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        if bare is not None and bare in in_macros.get(id(loop), {"content"}):
            return True
    return False


class _UnknownTarget(Exception):
    """Messages are assigned to something else than a plain name."""


def _message_names(template: nodes.Template) -> Iterator[str]:
    """Yield the names that loops give a single message."""
    lists = ["messages"]
    for known in lists:  # grows while it is read
        for assigned in template.find_all(nodes.Assign):
            if _reads(assigned.node, known):
                name = _name(assigned.target)
                lists += [] if name in lists else [name]
    for loop in template.find_all(nodes.For):
        if any(_reads(loop.iter, known) for known in lists):
            yield _name(loop.target)


def _macro_loops(template: nodes.Template, messages: set[str]) -> dict[int, set[str]]:
    """Return, for each loop inside a macro, the macro's parameters that are given a content."""
    found: dict[int, set[str]] = {}
    for macro in template.find_all(nodes.Macro):
        parameters = [argument.name for argument in macro.args]
        given: set[str] = set()
        for call in template.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
                arguments = [*zip(parameters, call.args, strict=False)]
                arguments += [(word.key, word.value) for word in call.kwargs]
                given |= {
                    name
                    for name, value in arguments
                    if name in parameters and any(_reads(value, m, "content") for m in messages)
                }
        found.update({id(loop): given for loop in macro.find_all(nodes.For)})
    return found


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """True if `node` is the variable, or its `key`, perhaps filtered, tested or sliced."""
    while True:
        if isinstance(node, nodes.Filter | nodes.Test) or (
            isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        ):
            node = node.node
        else:
            break
    if key is None:
        return isinstance(node, nodes.Name) and node.name == name
    if isinstance(node, nodes.Getattr):
        return node.attr == key and _reads_plainly(node.node, name)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return bool(node.arg.value == key) and _reads_plainly(node.node, name)
    return False


def _reads_plainly(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _UnknownTarget
    return target.name
