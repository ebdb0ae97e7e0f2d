"""What a command asks of the machine: seen from outside, in processes of their own."""

import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from dbjax import startup
startup.prepare(sys.argv[1] == "keep")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
make = lambda: np.ones(2**24, np.float32).sum()  # 64 MB
make()
before = faults()
for _ in range(5):
  make()
print(faults() - before)
"""
CACHE = """
import jax
from dbjax import startup
startup.prepare()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.config.jax_compilation_cache_dir)
print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8)))))
"""


FLAGS = """
import os
from dbjax import startup
for given in (None, "--xla_dump_to=/x", "--xla_cpu_experimental_ynn_fusion_type=DOT"):
  os.environ.pop("XLA_FLAGS", None)
  os.environ.update({"XLA_FLAGS": given} if given else {})
  startup.prepare(False)
  print(os.environ.get("XLA_FLAGS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("platforms, how, kept", [
    ("cpu", "keep", True), ("cpu", "leave", False), ("cuda", "keep", False)])
def test_memory_stays_where_it_was_asked_to(python, platforms, how, kept):
  result = python("-c", FAULTS, how, env={"JAX_PLATFORMS": platforms, "GLIBC_TUNABLES": ""})
  pages = 2**26 // 4096 * 5  # all anew
  assert (int(result.stdout) < pages / 100) == kept, result


@pytest.mark.parametrize("platforms, expected", [
    ("cpu", ["--xla_cpu_experimental_ynn_fusion_type=",
             "--xla_dump_to=/x --xla_cpu_experimental_ynn_fusion_type=",
             "--xla_cpu_experimental_ynn_fusion_type=DOT"]),
    ("cuda", ["None", "--xla_dump_to=/x", "--xla_cpu_experimental_ynn_fusion_type=DOT"])])
def test_a_library_is_left_out_on_the_cpu_unless_flags_say_something_of_it(
    python, platforms, expected):
  assert python("-c", FLAGS, env={"JAX_PLATFORMS": platforms}).stdout.splitlines() == expected


def test_programs_are_kept_and_a_damaged_one_is_made_again(python, tmp_path):
  run = lambda: python("-c", CACHE, env={
      "XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": None, "JAX_PLATFORMS": "cpu"})
  place, value = run().stdout.split()
  assert place.startswith(str(tmp_path / "dbjax")) and value == "512.0"
  entries = list((tmp_path / "dbjax").rglob("*-cache"))
  assert entries
  for entry in entries:
    entry.write_bytes(entry.read_bytes()[:100])
  again = run()
  assert again.returncode == 0 and again.stdout.split() == [place, value], again


@pytest.mark.parametrize("env, expected", [
    ({"JAX_COMPILATION_CACHE_DIR": "/tmp/mine"}, "/tmp/mine"),
    ({"JAX_COMPILATION_CACHE_DIR": None, "XDG_CACHE_HOME": "/dev/null/none"}, "None")])
def test_another_place_for_programs_and_none(python, env, expected):
  result = python("-c", CACHE, env=env)
  assert result.stdout.split() == [expected, "512.0"], result


@pytest.mark.parametrize("platforms, devices, expected", [
    ("cpu", "/dev/null", True), ("cuda,cpu", "/dev/none", False), ("", "/dev/null", False),
    ("", "/dev/none[0-9]*", True)])
def test_where_jax_will_compute(python, platforms, devices, expected):
  script = f"from dbjax import startup; startup._DEVICES = {devices!r},; print(startup.on_cpu())"
  assert python("-c", script, env={"JAX_PLATFORMS": platforms}).stdout.split() == [str(expected)]
