"""The fields of a config: type, default, range, meaning, and what depends on them.

A field is declared once, by whoever uses it: those of every experiment in `config.COMMON`,
those of a task in its `FIELDS`, those of a network in the class itself, as the arguments
that it is constructed with:

    class Net:
      num_layers: int
      width: Annotated[int, above(0), "features of a token"] = 128
      chunk: Annotated[int, FREE] = 1

An annotation may add a range, a meaning (a string) and a role; a network's `remat` and `unroll`
are FREE, its other fields JOINT, if it says nothing else. A field has one of three roles:

WEIGHTS   A block's weights depend on it. A run that is resumed must have the same value.
JOINT     The same, and all blocks of one model must agree on it.
FREE      No weight depends on it: it says when, where, and in which parts things are computed.
"""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
import inspect
import math
import types
import typing
from typing import Any, NamedTuple

from dbjax.errors import UserError

_WORDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}
_PLURALS = {int: "whole numbers", float: "finite numbers", str: "names"}
_DTYPES = ("float32", "bfloat16")
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_MOST = {int: 2**63 - 1, float: 3.4e38}  # what numpy has room for; what float32 has
_SHOWN = 80  # characters, at most, of a value in the words of an error


class Role(str):
  """Who depends on a field: one of the three below."""


WEIGHTS, JOINT, FREE = Role("weights"), Role("joint"), Role("free")


class Range(NamedTuple):
  """Which values pass: a test, and what it says in words."""

  test: Callable[[Any], object]
  words: str


def above(least: float) -> Range:
  """Values above `least`."""
  return Range(lambda x: x > least, f"above {least:g}")


def at_least(least: float) -> Range:
  """Values from `least` up."""
  return Range(lambda x: x >= least, f"{least:g} or more")


def between(least: float, most: float) -> Range:
  """Values from `least` to `most`, both included."""
  return Range(lambda x: least <= x <= most, f"from {least:.12g} to {most:.12g}")


def below(most: float) -> Range:
  """Values from 0 to below `most`."""
  return Range(lambda x: 0 <= x < most, f"from 0 to below {most:g}")


def one_of(*names: str) -> Range:
  """These names and no others."""
  return Range(lambda x: x in names, "one of " + ", ".join(names))


def each(of: Range) -> Range:
  """Tuples of which each element passes."""
  return Range(lambda x: all(map(of.test, x)), f"{of.words} each")


ANY = Range(lambda x: True, "")


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of a config.

  Attributes:
    default: its value where a config does not set it; or a type: then every config must.
    help: what it means, in a few words.
    range: which values pass, of those of its type.
    role: WEIGHTS, JOINT or FREE.
    item: of a tuple, the type of its elements.
    per_block: a list of values, one for each block, may stand in the place of a value.
  """

  default: Any
  help: str = ""
  range: Range = ANY
  role: Role = WEIGHTS
  item: type = int
  per_block: bool = False

  @property
  def required(self) -> bool:
    """Whether a config must set it."""
    return isinstance(self.default, type)

  @property
  def kind(self) -> type:
    """Its type: int, float, bool, str or tuple."""
    return self.default if self.required else type(self.default)

  @property
  def expected(self) -> str:
    """What it must be, in words."""
    words = _PLURALS[self.item] if self.kind is tuple else _WORDS[self.kind]
    if self.kind is str and self.range.words:
      return self.range.words
    return ", ".join(filter(None, [words, self.range.words]))

  def check(self, name: str, value: Any) -> Any:
    """The value, as its type has it. Raises UserError if it does not pass."""
    several = value.tolist() if self.per_block and hasattr(value, "tolist") else value
    if self.per_block and isinstance(several, tuple | list) and several:
      return tuple(self._check_one(name, x) for x in several)
    return self._check_one(name, value)

  def _check_one(self, name: str, value: Any) -> Any:
    found = self._convert(value)
    if found is None or not self.range.test(found):
      raise self._refusal(name, shown(value), value)
    return found

  def parse(self, name: str, text: str) -> Any:
    """The value that is written in `text`, on a command line. Raises UserError."""
    if self.per_block and "," in text:
      return tuple(self.parse(name, x) for x in text.strip().strip("()[]").split(","))
    try:
      if self.kind is tuple:
        inside = text.strip().strip("()[]")
        value = tuple(_parse(self.item, x.strip()) for x in inside.split(",") if x.strip())
      else:
        value = _parse(self.kind, text)
    except ValueError:
      raise self._refusal(name, shorten(text)) from None
    return self.check(name, value)

  def _refusal(self, name: str, words: str, value: Any = None) -> UserError:
    kind, several = self.item if self.kind is tuple else self.kind, isinstance(value, tuple | list)
    huge = kind in _MOST and any(isinstance(x, int | float) and math.inf > abs(x) > _MOST[kind]
                                 for x in (value if several else [value]))
    limit = huge and (several or self.range.test(value))  # its own words say nothing of it
    return UserError(f"{name}={words}: expected {self.expected}"
                     + f", at most {_MOST.get(kind, 0):.2g}" * bool(limit))

  def _convert(self, value: Any) -> Any:
    """The value in this field's type, or None."""
    if hasattr(value, "tolist"):  # numpy's, jax's
      value = value.tolist()
    if self.kind is tuple:
      if not isinstance(value, tuple | list):
        return None
      items = tuple(_convert(self.item, x) for x in value)
      return None if None in items else items
    return _convert(self.kind, value)


def _convert(kind: type, value: Any) -> Any:
  if isinstance(value, bool):
    return value if kind is bool else None
  if kind is float and isinstance(value, int):
    pass
  elif not isinstance(value, kind):
    return None
  if kind in _MOST and not abs(value) <= _MOST[kind]:  # nan is not
    return None
  return float(value) if kind is float and abs(value) > _MOST[int] else value  # numpy has no room


def _parse(kind: type, text: str) -> Any:
  """What `text` says. Raises ValueError."""
  if kind is not bool:
    return kind(text)
  if text.lower() not in _BOOLS:
    raise ValueError(text)
  return _BOOLS[text.lower()]


def shorten(text: str) -> str:
  """Text as it stands in an error: on one line, and not long."""
  text = " ".join(text.split())
  return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def shown(value: Any) -> str:
  """A value, of any type, as it stands in an error."""
  try:
    return shorten(repr(value))
  except ValueError:  # Python does not write a whole number of thousands of digits
    return f"a number of {value.bit_length()} bits" if isinstance(value, int) else (
        type(value).__name__)


def described(x: Any) -> str:
  """The dtype and shape of an array."""
  return f"{x.dtype}{list(x.shape)}"


def check_all(given: Mapping[str, Any], known: Mapping[str, Field]) -> dict[str, Any]:
  """Options by name, each checked. Raises UserError where one is not known, or does not pass."""
  for name in given:
    if name not in known:
      raise UserError(f"{name}={shown(given[name])}: there is no such option, only "
                      f"{', '.join(known)}{did_you_mean(name, known)}")
  return {name: known[name].check(name, value) for name, value in given.items()}


def of_class(cls: Callable, offered: Mapping[str, Any] = types.MappingProxyType({})
             ) -> dict[str, Field]:
  """The fields that a class declares as the arguments of its constructor.

  Args:
    cls: a class (a Linen module, a dataclass, a plain one) or a function.
    offered: arguments that somebody else gives: they are no fields.

  Returns:
    {name: Field}, of arguments that are a number, a string, True or False, or a tuple of numbers
    or of strings; any other keeps its default. One called `dtype` is a string in a config:
    float32 or bfloat16.
  """
  found = {}
  hints = _hints(cls)
  for name, argument in inspect.signature(cls).parameters.items():
    if name in offered or name in ("parent", "name"):  # Linen's own
      continue
    if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
      continue
    hint, default = hints.get(name, Any), argument.default
    extras = getattr(hint, "__metadata__", ())
    kind = getattr(hint, "__origin__", hint) if extras else hint
    items = {x for x in typing.get_args(kind) if x is not ...}
    kind = tuple if typing.get_origin(kind) is tuple else kind
    if name == "dtype":
      words = getattr(default, "__name__", str(default))  # jnp.bfloat16, a dtype, or a string
      found[name] = Field(words if words in _DTYPES else _DTYPES[0],
                          "of the compute; parameters stay float32", one_of(*_DTYPES), WEIGHTS)
      continue
    if kind not in (int, float, bool, str, tuple) and isinstance(
        default, int | float | bool | str | tuple):
      kind = type(default)
    if kind not in (int, float, bool, str, tuple):
      continue
    usual: Any = int | float if kind is float else kind
    if default is inspect.Parameter.empty:
      default = kind
    elif not isinstance(default, usual):  # None, for instance
      continue
    elif kind is float:
      default = float(default)
    elif kind is tuple:
      items = items or set(map(type, default))
    if kind is tuple and not (len(items) < 2 and items <= _PLURALS.keys()):
      continue
    found[name] = Field(
        default, next((x for x in extras if type(x) is str), ""),
        next((x for x in extras if isinstance(x, Range)), ANY),
        next((x for x in extras if isinstance(x, Role)),
             FREE if name in ("remat", "unroll") else JOINT),
        next(iter(items), int) if kind is tuple else int)
  return found


def _hints(cls: Callable) -> dict[str, Any]:
  of = vars(cls)["__init__"] if isinstance(cls, type) and "__init__" in vars(cls) and not (
      dataclasses.is_dataclass(cls)) else cls
  try:
    return typing.get_type_hints(of, include_extras=True)
  except (NameError, TypeError):  # names that only a type checker sees
    return {}


def did_you_mean(name: str, known: Any) -> str:
  """"; did you mean ...?", where some known name is near; else nothing."""
  near = difflib.get_close_matches(name, list(known), 1)
  return f"; did you mean {near[0]}?" if near else ""
