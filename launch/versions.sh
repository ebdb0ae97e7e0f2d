#!/usr/bin/env bash
# Passes the quick suite with the oldest and with the newest libraries that requirements.txt admits,
# on each Python from 3.11 to 3.13 that this machine has. Arguments go to pytest.
#   bash launch/versions.sh                        the whole suite, six times
#   bash launch/versions.sh tests/test_block.py    one file of it, six times
#
# A Python is found on PATH, with pyenv or with uv: `uv python install 3.13` gets one. Environments
# stay in .venv-versions, 1 GB each, and are brought up to date by the next call. The last lines say
# what was run with which versions, and how it ended; the exit code is 1 if one of them failed.
set -euo pipefail
. "$(dirname -- "$0")/setup.sh"
cd "$repository"
environments=$repository/.venv-versions
mkdir -p "$environments"

# The lower bounds of requirements.txt, as constraints for pip; those take no extras.
sed -nE 's/^([A-Za-z0-9_-]+)(\[[a-z]+\])?>=([0-9.]+).*/\1==\3/p' requirements.txt \
  > "$environments/oldest.txt"
: > "$environments/newest.txt"

# find_python 3.12
find_python() {
  local python
  for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python \
    "$(uv python find "$1" 2>/dev/null)"; do
    if "$python" -c '' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

# install PYTHON VENV CONSTRAINTS
install() {
  [ -x "$2/bin/pytest" ] || "$1" -m venv --clear "$2" || return
  "$2/bin/python" -m pip install --quiet --disable-pip-version-check \
    --upgrade --upgrade-strategy eager --constraint "$3" -e ".[test]"
}

# The libraries that change most, as name==version, one a line.
versions() {
  "$1/bin/python" -m pip list --disable-pip-version-check --format=freeze \
    | grep -E '^(flax|jax|numpy|optax|orbax-checkpoint|scipy)=='
}

results=() code=0 log=""
for number in 3.11 3.12 3.13; do
  if ! python=$(find_python "$number"); then
    results+=("Python $number: not on this machine")
    continue
  fi
  for which in oldest newest; do
    venv=$environments/$number-$which log=$environments/$number-$which.log
    echo "--- Python $number, $which: $venv"
    if ! install "$python" "$venv" "$environments/$which.txt"; then
      results+=("Python $number, $which: cannot be installed")
      code=1
      continue
    fi
    versions "$venv" > "$venv/versions"
    "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@" 2>&1 | tee "$log" || code=1
    results+=("$("$venv/bin/python" -V), $which: $(paste -sd ' ' "$venv/versions"): \
$(tail -n 1 "$log")")
  done
  one=$(sort "$environments/$number"-*/versions 2>/dev/null | uniq -d | paste -sd ' ')
  results+=("Python $number, the oldest is the newest: ${one:-of none}")
done
printf '%s\n' "" "${results[@]}"
[ -n "$log" ] || code=1  # nothing was run
exit "$code"
