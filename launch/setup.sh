# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv in the repository and installs what is missing.
#   set_up EXTRAS        "", "[plot]", "[test,tpu]"
# Nothing is installed again until the requirements change or the repository is moved, so the second
# run starts at once. A .venv that works and is another's is never removed.

repository=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

set_up() {
  mkdir -p "$repository/.runs" || return
  (
    # One at a time, for jobs that start together; where flock is not to be had, do without.
    if command -v flock >/dev/null; then flock 9 || true; fi
    make_venv "$1"
  ) 9>"$repository/.runs/setup.lock"
}

make_venv() {
  local python=${PYTHON:-python3} venv=$repository/.venv installed=$repository/.venv/installed$1
  local want code=0 old='import sys; sys.exit(3 * (sys.version_info < (3, 11)))'
  want=$repository$'\n'$(cd "$repository" && cat requirements.txt setup.cfg pyproject.toml) || return
  "$venv/bin/python" -c "$old" 2>/dev/null || code=$?
  if [ "$code" = 3 ]; then
    echo "error: $venv has a Python older than 3.11: move it away, and a new one is made" >&2
    return 2
  fi
  if [ "$code" = 0 ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if compgen -G "$venv/installed*" >/dev/null; then
      code=1  # this script made it, and may make it anew
    elif ! "$venv/bin/python" -m ensurepip >/dev/null 2>&1; then
      echo "error: $venv was not made by this script and has no pip: move it away" >&2
      return 2
    fi
  fi
  if [ "$code" != 0 ]; then
    if ! "$python" -c "$old"; then
      echo "error: $python is missing or older than Python 3.11: set PYTHON to a newer one" >&2
      return 2
    fi
    rm -rf "$venv"
    "$python" -m venv "$venv" || {
      rm -rf "$venv"
      echo "error: $python cannot make a virtual environment: install its venv package" >&2
      return 2
    }
  fi
  if [ "$(cat "$installed" 2>/dev/null)" != "$want" ]; then
    echo "setting up $venv ..."
    (cd "$repository" \
      && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".$1") || return
    echo "$want" > "$installed"
  fi
}
