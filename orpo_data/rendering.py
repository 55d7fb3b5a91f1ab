"""What a chat template makes of a sequence of roles, before it is known what the messages say.

For one sequence of roles most templates write the same literals, with the contents between them. Where they fall is not
guessed from an example: jinja runs the template itself with a `Text` in the place of each content. A Text can be
written out, joined to other text, stripped and asked whether it is empty; whatever else a template wants of it
(compare, search, split, count, filter) raises ContentAsked. So a template that comes to its end has looked at nothing
but the roles, and what it wrote is a Layout that holds for every conversation of these roles whose `filled` messages
hold more than white space. Where it does not come to its end there is no layout, and each conversation is rendered by
itself: by this jinja too, which sets limits that the one of transformers has not.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial, wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orpo_data.layout import Layout, Parts, Roles, Slot, between, merged
from orpo_data.template_limits import Meter, TemplateLimitError, refuse_large

TEMPLATE_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError, RecursionError)
"""What a template's own expressions raise (1 / 0, "a" * 10**12), beside jinja2.TemplateError."""


class ContentAsked(jinja2.TemplateRuntimeError):
    """A template wants to know what a message says."""


class Text:
    """Text with at least one slot in it."""

    def __init__(self, parts: Parts, filled: set[int]) -> None:
        """`filled` collects what is taken for granted of the contents: one set for all texts of a run."""
        self.parts = parts
        self.filled = filled

    def __add__(self, other: Any) -> Any:
        return joined((self, other)) if isinstance(other, str | Text) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __bool__(self) -> bool:
        if isinstance(self.parts[0], Slot) and not any(isinstance(part, str) for part in self.parts):
            self.filled.add(self.parts[0].message)
        return True

    def strip(self) -> "Text":
        return self.lstrip().rstrip()

    def lstrip(self) -> "Text":
        return self._stripped(0, str.lstrip, "left")

    def rstrip(self) -> "Text":
        return self._stripped(-1, str.rstrip, "right")

    def _stripped(self, end: int, strip: Callable[[str], str], side: str) -> "Text":
        parts = list(self.parts)
        while isinstance(outer := parts[end], str):
            if kept := strip(outer):
                parts[end] = kept
                return Text(tuple(parts), self.filled)
            del parts[end]
        if len(parts) > 1:  # else stripping would go on behind an empty content
            self.filled.add(outer.message)
        parts[end] = replace(outer, **{side: True})
        return Text(tuple(parts), self.filled)


def _refuse(*arguments: Any, **named: Any) -> NoReturn:
    raise ContentAsked("the template looks into a message")


for _name in (
    *("getattr", "str", "repr", "format", "bytes", "hash", "len", "iter", "reversed", "contains"),
    *("eq", "ne", "lt", "le", "gt", "ge", "int", "float", "complex", "index", "mul", "rmul", "mod", "rmod"),
):
    setattr(Text, f"__{_name}__", _refuse)


def joined(values: Iterable[Any]) -> Any:
    """The values written one after the other, as jinja does: a Text if one of them is, else a str."""
    values = list(values)
    texts = [value for value in values if isinstance(value, Text)]
    if not texts:
        return "".join(map(str, values))
    parts = (part for value in values for part in (value.parts if isinstance(value, Text) else (str(value),)))
    return Text(merged(parts), texts[0].filled)


# --- jinja, with Text in it -------------------------------------------------------------------------------------------


class _Generator(NativeCodeGenerator):
    """Leaves it to `joined` to write values; those of `~` too."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - jinja's name
        self.write("concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """The `generation` tag marks the assistant's text for other uses: here it only stands around it."""

    tags = {"generation"}  # noqa: RUF012 - typed so by jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


_WORK = (nodes.Mul, nodes.Pow, nodes.Mod, nodes.Filter)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.meter = Meter()

    def concat(self, values: Iterable[Any]) -> Any:
        return joined(self._measured(values))

    def _measured(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, as long as they are not beyond all measure."""
        for value in values:
            self.meter.make(len(value) if isinstance(value, str) else 1)
            yield value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Every turn of a loop is counted, and what can be worked out beforehand is looked at now: the jinja of
        transformers does that when it opens a template, whether or not it will ever be asked for."""
        tree = super()._parse(source, name, filename)
        for node in tree.find_all(_WORK):
            if node.find(nodes.Name) is None:
                if any(node.find_all(_WORK)):
                    raise TemplateLimitError("the template calculates with constants")
                refuse_large(constant.value for constant in node.find_all(nodes.Const))
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.operate(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *arguments: Any, **named: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        own = getattr(method, "__self__", None)
        values = (*arguments, *named.values())
        self.meter.call(getattr(method, "__name__", ""), (own, *values) if isinstance(own, str) else values)
        return super().call(context, called, *arguments, **named)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, slice) and isinstance(obj, str | list):
            self.meter.make(len(obj))
        return _refuse() if isinstance(obj, Text) or isinstance(argument, Text) else super().getitem(obj, argument)


_SAME_FOR_EVERY_TEXT = {
    "string",
    "mapping",
    "iterable",
    "sequence",
    "number",
    "none",
    "defined",
    "undefined",
    "boolean",
}


def _environment() -> _Environment:
    """Jinja as transformers sets it up, except that filters and tests refuse a Text unless they are sure of it."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    tests: dict[str, Any] = environment.tests
    filters: dict[str, Any] = environment.filters
    for name, test in tests.items():
        tests[name] = _guarded(test, partial(_of_empty, test) if name in _SAME_FOR_EVERY_TEXT else _refuse)
    filters["tojson"] = _tojson
    for name, call in filters.items():
        if name not in ("default", "d"):
            measured = _measuring(environment.meter, name, call)
            filters[name] = _guarded(measured, {"trim": Text.strip, "string": _itself}.get(name, _refuse))
    filters["counted"] = environment.meter.count
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    del environment.globals["lipsum"], filters["random"]  # the same roles must give the same text
    return environment


def _guarded(call: Callable[..., Any], on_text: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, but `on_text` where one of the arguments is a Text."""

    @wraps(call)
    def guarded(*arguments: Any, **named: Any) -> Any:
        text = any(isinstance(argument, Text) for argument in (*arguments, *named.values()))
        return (on_text if text else call)(*arguments, **named)

    return guarded


def _measuring(meter: Meter, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def measuring(*arguments: Any, **named: Any) -> Any:
        values = (*arguments, *named.values())
        meter.call(name, tuple(value for value in values if not isinstance(value, _GIVEN_BY_JINJA)))
        return call(*arguments, **named)

    return measuring


_GIVEN_BY_JINJA = (jinja2.Environment, Context, nodes.EvalContext)


def _itself(text: Text) -> Text:
    return text


def _of_empty(test: Callable[[str], bool], text: Text) -> bool:
    return test("")


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """As transformers has it: jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class Renderer:
    """Runs one template, with messages or with what stands for any."""

    def __init__(self, template: str, variables: Mapping[str, Any]) -> None:
        """`variables` are the special tokens, as transformers hands them to a template."""
        self._text = template
        self._variables = variables

    @cached_property
    def _template(self) -> jinja2.Template:
        return self._environment.from_string(self._text)

    @cached_property
    def _environment(self) -> _Environment:
        return _environment()

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """What the template writes for these. Raises what its expressions raise, and TemplateLimitError."""
        return str(self._write(messages, add_generation_prompt))

    def layout(self, prompt: Roles, answer: Roles, after: str, tail: str) -> Layout | None:
        """None if what is written depends on what is said.

        `after` is what the template writes after every answer, `tail` what of it belongs to the answer.
        """
        filled = set[int]()
        try:
            head = self._run(prompt, filled, add_generation_prompt=True)
            said = between(head, self._run(prompt + answer, filled, add_generation_prompt=False), after)
        except (jinja2.TemplateError, *TEMPLATE_ERRORS):
            return None
        if said is None or not any(isinstance(part, str) for part in head):
            return None
        if not any(isinstance(part, str) and part.strip() for part in said):
            slots = [part.message for part in said if isinstance(part, Slot)]
            if not slots:
                return None
            filled.add(slots[0])  # something must be left of an answer
        return Layout(head, merged((*said, tail)), frozenset(filled))

    def _run(self, roles: Roles, filled: set[int], *, add_generation_prompt: bool) -> Parts:
        messages = [{"role": role, "content": Text((Slot(i),), filled)} for i, role in enumerate(roles)]
        written = self._write(messages, add_generation_prompt)
        return written.parts if isinstance(written, Text) else merged((written,))

    def _write(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> Any:
        template = self._template
        self._environment.meter.restart()
        return template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )
