"""What a chat template's syntax proves: that a generation prompt is the same behind any turns.

Such a template writes the turns in one loop, none with a look at later ones, and what stands behind
the loop reads nothing of them. Most do; of the others every prompt has to be written.
"""

from collections.abc import Iterator, Sequence

from jinja2 import nodes

# Of the loop that writes the turns: what is known without a look at the turns to come
_OF_EARLIER_TURNS = frozenset(("first", "index", "index0", "previtem"))
_GIVEN = frozenset(("messages", "tools", "documents", "loop"))
_PLAIN = (
    *(nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Add, nodes.Concat),
    *(nodes.If, nodes.CondExpr, nodes.Test, nodes.Not, nodes.And, nodes.Or),
)


def asks_alike(template: nodes.Template) -> bool:
    """Say whether a template writes the same generation prompt behind whatever turns."""
    loops = [i for i, node in enumerate(template.body) if _is_loop_over_turns(node)]
    if len(loops) != 1:
        return False
    turns, behind = template.body[: loops[0] + 1], template.body[loops[0] + 1 :]
    written = {name.name for name in _names(template.body) if name.ctx != "load"}
    written |= {macro.name for macro in template.find_all(nodes.Macro)}
    of_behind = {name.name for name in _names(behind)}
    return (
        written.isdisjoint(_GIVEN | of_behind)
        and of_behind.isdisjoint(_GIVEN)
        and all(isinstance(node, _PLAIN) for node in _all(behind))
        and "add_generation_prompt" not in {name.name for name in _names(turns)}
        and _looks_back_only(turns)
    )


def _is_loop_over_turns(node: nodes.Node) -> bool:
    if not isinstance(node, nodes.For) or node.recursive or node.else_:
        return False
    return isinstance(node.iter, nodes.Name) and node.iter.name == "messages"


def _looks_back_only(turns: Sequence[nodes.Node]) -> bool:
    """Say that the turns are asked for by the loop alone, but for the first of them."""
    harmless = {id(turns[-1].iter)} if isinstance(turns[-1], nodes.For) else set[int]()
    for node in _all(turns):
        if not isinstance(node, nodes.Getattr | nodes.Getitem):
            continue
        if not isinstance(node.node, nodes.Name):
            continue
        key = node.attr if isinstance(node, nodes.Getattr) else _constant(node.arg)
        is_first_turn = node.node.name == "messages" and key == 0 and not isinstance(key, bool)
        if is_first_turn or (node.node.name == "loop" and key in _OF_EARLIER_TURNS):
            harmless.add(id(node.node))
    asked = (name for name in _names(turns) if name.name in ("messages", "loop"))
    return all(id(name) in harmless for name in asked)


def _constant(node: nodes.Node) -> object:
    return node.value if isinstance(node, nodes.Const) else None


def _all(found: Sequence[nodes.Node]) -> Iterator[nodes.Node]:
    for node in found:
        yield node
        yield from node.find_all(nodes.Node)


def _names(found: Sequence[nodes.Node]) -> Iterator[nodes.Name]:
    return (node for node in _all(found) if isinstance(node, nodes.Name))
