"""What a command asks of this machine before JAX starts: memory, products, programs that are kept.

Commands do it by themselves. In a notebook call it first, before the first array is made:

    from dbjax import startup
    startup.prepare()

Memory: what a step needs for a moment, glibc gives back to the system after every step where it is
large, and takes anew, page by page. On Linux, where JAX computes on the CPU, it is told to keep
what it has. Only the heap of the main thread obeys, so JAX is told to run programs there, instead
of in a thread of its own: Python then waits for a step, and data are read meanwhile as before.
--nokeep_memory leaves both as they are, and so does glibc.malloc in GLIBC_TUNABLES.

Products: XLA has two libraries for products of matrices on the CPU. With the newer one the digits
took 11% longer to sample, so it is left out by XLA_FLAGS, unless these already name it. Training
steps leave it out wherever they run (`program.py`).

Programs: XLA's are kept in ~/.cache/dbjax (below XDG_CACHE_HOME, if that is set), at most 2 GB, the
least used go first; remove the directory to clear it. JAX_COMPILATION_CACHE_DIR says another place,
JAX_ENABLE_COMPILATION_CACHE=false keeps none.
"""

import ctypes
import glob
import os
from pathlib import Path
import platform
import sys
import zlib

import jax
import jaxlib

CACHE_BYTES = 2 * 10**9
_COMPILES_LONG = 0.2  # seconds: what takes less is not kept
_DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")  # GPUs, TPUs
# An option of XLA: which operations its newer library on the CPU takes over; empty means none.
FUSION = "xla_cpu_experimental_ynn_fusion_type"
# Of mallopt(3): their numbers in malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def prepare(keep_memory: bool = True):
  """Asks for all three. Call it before JAX starts.

  Args:
    keep_memory: False leaves the allocator as it is.
  """
  if on_cpu():
    if keep_memory:
      _keep_memory()
    _leave_library_out()
  _keep_programs()


def on_cpu() -> bool:
  """Whether JAX is going to compute on the CPU; found out without starting it."""
  asked = jax.config.values["jax_platforms"]  # JAX_PLATFORMS
  return asked == "cpu" if asked else not any(map(glob.glob, _DEVICES))


def _keep_memory():
  """Lets malloc take all from its heap, and give nothing back."""
  if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
    return
  if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):  # somebody knows better
    return
  libc = ctypes.CDLL(None)
  libc.mallopt(_MMAP_MAX, 0)
  libc.mallopt(_TRIM_THRESHOLD, -1)
  jax.config.update("jax_cpu_enable_async_dispatch", False)


def _leave_library_out():
  """Keeps XLA's newer library for products out, unless XLA_FLAGS already name it."""
  given = os.environ.get("XLA_FLAGS", "")
  if FUSION not in given:
    os.environ["XLA_FLAGS"] = f"{given} --{FUSION}=".lstrip()


def _keep_programs():
  if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"]:
    return
  base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  try:
    # Homes are shared by machines, and programs for one processor do not run on each.
    place = Path(base, "dbjax", f"{jaxlib.__version__}-{_processor():08x}")
    place.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # a home that is none, or cannot be written
    return
  jax.config.update("jax_compilation_cache_dir", str(place))
  jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _COMPILES_LONG)


def _processor() -> int:
  """A number for this kind of processor."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = [platform.machine(), platform.processor()]
  kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}
                or set(lines))
  return zlib.crc32("\n".join(kind).encode())
