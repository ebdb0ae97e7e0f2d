# Sourced by the scripts beside it: makes .venv and installs what is missing.
#   set_up EXTRAS        "" or "[test]"
# The list is installed again only when it has changed, so the second run starts at once.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

set_up() {
  local python=${PYTHON:-python3} installed=.venv/installed$1 want
  want=$(cat requirements.txt setup.cfg pyproject.toml)
  if [ ! -x .venv/bin/python ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "error: $python is older than Python 3.11: set PYTHON to a newer one" >&2
      return 2
    }
    "$python" -m venv .venv
  fi
  if [ "$(cat "$installed" 2>/dev/null)" != "$want" ]; then
    echo "setting up .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$1"
    echo "$want" > "$installed"
  fi
}
