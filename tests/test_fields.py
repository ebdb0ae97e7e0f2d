"""Fields: their types and ranges, from Python and from text, and those of a class."""

import dataclasses
from typing import Annotated, Any

from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax import fields
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import JOINT
from dbjax.fields import WEIGHTS

INT, FLOAT = Field(3, "", above(0)), Field(0.5, "", fields.between(0, 1))
FLAG, NAME = Field(False), Field("a", "", fields.one_of("a", "b"))
NUMBERS, FLOATS = Field(()), Field((), item=float)


@pytest.mark.parametrize("field, text, value", [
    (INT, "7", 7), (FLOAT, "1e-3", 1e-3), (FLOAT, "1", 1.0), (FLAG, "True", True),
    (FLAG, "false", False), (NAME, "b", "b"), (NUMBERS, "1,2", (1, 2)), (NUMBERS, "(1, 2)", (1, 2)),
    (NUMBERS, "", ()), (NUMBERS, "[4]", (4,)), (FLOATS, "1,2.5", (1.0, 2.5))])
def test_text_is_read_as_the_type_has_it(field, text, value):
  found = field.parse("x", text)
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize("field, value", [
    (INT, np.int64(7)), (FLOAT, np.float32(0.25)), (NUMBERS, np.arange(3)), (NUMBERS, [1, 2]),
    (FLOAT, 1)])
def test_values_of_python_and_numpy_pass(field, value):
  found = field.check("x", value)
  assert not hasattr(found, "dtype")
  np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("field, value", [
    (INT, 0), (INT, 1.0), (INT, True), (INT, "3"), (INT, None), (FLOAT, 2), (FLOAT, float("nan")),
    (FLOAT, float("inf")), (FLOAT, 10**400), (FLOAT, "x"), (FLAG, 1), (FLAG, "True"), (NAME, "c"),
    (NAME, ("a",)), (NUMBERS, 3), (NUMBERS, (1.5,)), (NUMBERS, "12"), (FLOATS, (float("nan"),))])
def test_what_does_not_pass_is_one_line(field, value):
  with pytest.raises(UserError, match=r"^some\.name=.*: expected ") as error:
    field.check("some.name", value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("field, text", [
    (INT, "x"), (INT, "1.5"), (INT, ""), (FLOAT, "much"), (FLAG, "perhaps"), (NUMBERS, "1,x")])
def test_text_that_is_none_of_the_type_is_one_line(field, text):
  with pytest.raises(UserError, match="^--flag=.*: expected "):
    field.parse("--flag", text)


@pytest.mark.parametrize("field, value, words", [
    (INT, 2**63, "a whole number, above 0, at most 9.2e+18"),
    (NUMBERS, (1, -2**63), "whole numbers, at most 9.2e+18"),
    (Field(1.0), 1e39, "a finite number, at most 3.4e+38"),
    (FLOATS, (1e39,), "finite numbers, at most 3.4e+38"),
    (FLOAT, 10**400, "a finite number, from 0 to 1"),
    (INT, np.zeros((9, 9)), "a whole number, above 0"),
])
def test_numbers_that_are_too_large_say_so_and_are_not_written_out(field, value, words):
  with pytest.raises(UserError) as error:
    field.check("x", value)
  assert str(error.value).endswith(f": expected {words}")
  assert "\n" not in str(error.value) and len(str(error.value)) < 200
  with pytest.raises(UserError, match="^x=9{80}...: expected a whole number, above 0"):
    INT.parse("x", "9" * 5000)
  with pytest.raises(UserError, match="^x=a number of 16610 bits: expected a finite number"):
    Field(1.0).check("x", 10**5000)  # which Python does not write out
  assert INT.check("x", 2**63 - 1) == INT.parse("x", str(2**63 - 1)) == 2**63 - 1
  assert Field(1.0).check("x", -3e38) == -3e38


class Module(nn.Module):
  num_layers: int
  width: Annotated[int, above(0), "features"] = 8
  ratio: float = 4
  dropout: Annotated[float, WEIGHTS] = 0.0
  dtype: Any = np.float32
  remat: bool = False
  kernel_init: Any = nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Data:
  num_layers: int
  sizes: tuple[int, ...] = (1, 2)


class Plain:

  def __init__(self, num_layers: int, *, unroll: Annotated[int, FREE] = 1, name_of="x"):
    ...


class Others:

  def __init__(self, *args: int, num_layers: int, scales: tuple[float, ...] = (0.5,),
               names: tuple[str, ...] = (), ends=("a", "b"), sizes: tuple[int, ...],
               pair: tuple[int, str] = (1, "x"), nested=((1, 2),), width: int = None,
               rate: float = "x", dtype: Any = "bfloat16", **kwargs: int):
    ...


def test_tuples_of_a_class_and_what_is_no_field():
  found = fields.of_class(Others, offered={"num_layers": 2})
  assert {name: (field.default, field.item) for name, field in found.items()} == {
      "scales": ((0.5,), float), "names": ((), str), "ends": (("a", "b"), str),
      "sizes": (tuple, int), "dtype": ("bfloat16", int)}
  for name, field in found.items():  # defaults pass
    assert field.required or field.check(name, field.default) == field.default
  assert found["sizes"].required and found["sizes"].expected == "whole numbers"
  with pytest.raises(UserError, match="scales=.*: expected finite numbers"):
    found["scales"].check("scales", ("a",))


@pytest.mark.parametrize("dtype, name", [
    (jnp.bfloat16, "bfloat16"), (np.dtype("float32"), "float32"), (jnp.float32, "float32"),
    (None, "float32")])
def test_the_dtype_of_a_class_is_its_default(dtype, name):
  def net(num_layers: int, dtype: Any = dtype):
    ...

  assert fields.of_class(net)["dtype"].default == name


def test_the_fields_of_a_class_are_its_arguments():
  found = fields.of_class(Module)
  assert list(found) == ["num_layers", "width", "ratio", "dropout", "dtype", "remat"]
  assert found["num_layers"].required and found["num_layers"].kind is int
  assert found["width"].help == "features" and found["width"].expected == "a whole number, above 0"
  assert found["ratio"].kind is float and found["dtype"].default == "float32"
  assert [found[n].role for n in ("width", "dropout", "remat")] == [JOINT, WEIGHTS, FREE]
  assert fields.of_class(Data)["sizes"].check("sizes", [3]) == (3,)
  plain = fields.of_class(Plain, offered={"num_layers": 2})
  assert list(plain) == ["unroll", "name_of"] and plain["unroll"].role == FREE
