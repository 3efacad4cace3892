"""A chat template's work, bounded: one that never ends, or writes without end, raises an error.

A template is a program of whoever made the tokenizer. Its loops, calls, filters and operators are
made to look at the time and at the size of what they made, before it is compiled.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

MAX_RENDER_S = 10.0  # of this thread's own time; a chat of a thousand turns takes 0.1
MAX_VALUE_SIZE = 16 << 20  # characters or items: eight times what a row may hold
_MAX_BITS = 4096  # of an integer
_OPERATORS = frozenset(("+", "*", "**", "%"))  # by which values grow

_lock = threading.Lock()  # of who changes a template
_end_s: ContextVar[float | None] = ContextVar("_end_s", default=None)  # in time of the thread


class TemplateLimitError(Exception):
    """A template that works or writes more than any chat needs."""


@contextmanager
def limited_rendering() -> Iterator[None]:
    """Bound what bounded templates do inside, in this thread; TemplateLimitError beyond it."""
    token = _end_s.set(time.thread_time() + MAX_RENDER_S)
    try:
        yield
    finally:
        _end_s.reset(token)


def bound_template(compiled: Any, source: str) -> None:
    """Make a compiled template, and whoever shares it, heed `limited_rendering`. Done once."""
    with _lock:
        if compiled.environment.filters.get(_looped.__name__) is not _looped:
            _compile_again(compiled, source)


def _compile_again(compiled: Any, source: str) -> None:
    from jinja2 import nodes

    environment = compiled.environment
    environment.filters = {name: _bounded(f) for name, f in environment.filters.items()}
    environment.filters[_looped.__name__] = _looped
    environment.filters[_measured.__name__] = _measured
    environment.intercepted_binops = _OPERATORS
    environment.call_binop = functools.partial(_operate, environment.call_binop)
    environment.call = functools.partial(_call, environment.call)
    tree = environment.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, _looped)
    for concat in list(tree.find_all(nodes.Concat)):
        concat.nodes = [_filtered(nodes.Concat(concat.nodes, lineno=concat.lineno), _measured)]
    tree.set_environment(environment)
    again = environment.template_class.from_code(
        environment, environment.compile(tree), compiled.globals
    )
    compiled.root_render_func = functools.partial(_written, again.root_render_func)
    compiled.blocks = again.blocks


def _filtered(node: Any, function: Callable[..., Any]) -> Any:
    from jinja2 import nodes

    return nodes.Filter(node, function.__name__, [], [], None, None, lineno=node.lineno)


def _looped(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _look_at_time()
        yield item


def _written(render: Callable[..., Iterator[str]], *args: Any) -> Iterator[str]:
    n_written = 0
    for piece in render(*args):
        n_written += len(piece)
        if _end_s.get() is not None and n_written > MAX_VALUE_SIZE:
            raise TemplateLimitError(f"it writes more than {MAX_VALUE_SIZE:,} characters")
        yield piece


def _measured(value: Any) -> Any:
    """Return a value that is not too large."""
    _look_at_time()
    if _end_s.get() is not None and _size(value) > MAX_VALUE_SIZE:
        raise TemplateLimitError(f"it makes a value of more than {MAX_VALUE_SIZE:,} characters")
    return value


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with the mark that says what jinja2 passes to it
    def bounded(*args: Any, **kwargs: Any) -> Any:
        return _measured(function(*args, **kwargs))

    return bounded


def _call(call: Callable[..., Any], context: Any, function: Any, *args: Any, **kw: Any) -> Any:
    _look_at_time()
    return _measured(call(context, function, *args, **kw))


def _operate(operate: Callable[..., Any], context: Any, sign: str, left: Any, right: Any) -> Any:
    """Apply an operator whose result is not too large, as far as can be told before."""
    if _end_s.get() is not None:
        grows = sign == "*" and max(_size(left) * _number(right), _size(right) * _number(left))
        bits = sign == "**" and _number(left).bit_length() * _number(right)
        if grows > MAX_VALUE_SIZE or bits > _MAX_BITS:
            raise TemplateLimitError(f"it makes a value too large by {sign}")
    return _measured(operate(context, sign, left, right))


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _look_at_time() -> None:
    end_s = _end_s.get()
    if end_s is not None and time.thread_time() > end_s:
        raise TemplateLimitError(f"it takes more than {MAX_RENDER_S:g} s for a chat")
