"""Whatever a config or a file holds, dbjax takes it or says in one line why it does not.

DBJAX_EXAMPLES says how many examples of each are tried: 2000 for a night.
"""

import os
import runpy

from conftest import ROOT
from conftest import small_config
from conftest import synthetic_batch
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import task as task_lib
from dbjax.errors import UserError

LENGTH = int(os.environ.get("DBJAX_EXAMPLES", "0"))
BRIEF = dict(deadline=None, database=None, derandomize=not LENGTH,
             suppress_health_check=list(HealthCheck))


def _configs():
  """Of every config and variant its name, and its fields, flat."""
  found = {}
  for path in sorted((ROOT / "configs").glob("*.py")):
    for variant in ("", *runpy.run_path(str(path)).get("VARIANTS", ())):
      name = f"{path.stem}:{variant}" if variant else path.stem
      found[name] = config_lib.flatten(config_lib.read(name))
  return found


CONFIGS = _configs()

NUMBERS = st.one_of(
    st.sampled_from([10**400, -10**400, 10**18, 2**31, 2**63, 2**64, 7, 0, -1, 1, 2, 3]),
    st.integers(-10, 100))
ODD = st.one_of(
    NUMBERS, st.sampled_from([np.nan, np.inf, -np.inf, 1e308, -1e308, 1e-320, 0.0, -0.0, 0.5, 1.0]),
    st.floats(), st.booleans(), st.none(), st.binary(max_size=3), st.text(max_size=6),
    st.sampled_from(["", " ", "a:b", ":", "os:path", "subprocess:Popen", "x" * 10_000, "\0", "\n",
                     "../..", "1e400", "nan", "9" * 5000, "(1,2", "1,,2", "digits", "\ud800"]),
    st.sampled_from([object(), object, np.float32(3), np.zeros(2), np.zeros((2, 2)), 1j, len]))
VALUES = st.one_of(
    ODD, st.lists(ODD, max_size=3), st.tuples(ODD, ODD), st.sets(st.integers(), max_size=2),
    st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), ODD, max_size=2),
    st.lists(st.lists(ODD, max_size=2), max_size=2))


@st.composite
def mutated(draw):
  """The name of a config, and one to three of its fields with other values; some unknown."""
  name = draw(st.sampled_from(sorted(CONFIGS)))
  fields = st.one_of(st.sampled_from(sorted(CONFIGS[name])), st.sampled_from(sorted(CONFIGS[name])),
                     st.text(max_size=8), st.sampled_from(["model", "model.", "train.x", ".", ""]))
  return name, draw(st.dictionaries(fields, VALUES, min_size=1, max_size=3))


def _one_line(error):
  """The words of a UserError, which stand on one line that is not endless."""
  assert str(error) and "\n" not in str(error) and len(str(error)) < 5000
  return str(error)


@settings(max_examples=LENGTH or 40, **BRIEF)
@given(mutated())
def test_any_config_resolves_or_is_refused_in_one_line(change):
  name, fields = change
  try:
    config = config_lib.unflatten(CONFIGS[name] | fields)
  except UserError as e:
    _one_line(e)
    return
  for b in range(min(config.num_blocks, 2)):
    task_lib.make_task(config, b)


@settings(max_examples=LENGTH or 40, **BRIEF)
@given(mutated())
def test_any_override_is_taken_or_refused_in_one_line(change):
  name, fields = change
  try:
    config_lib.resolve(config_lib.read(name, fields))
  except UserError as e:
    _one_line(e)
