#!/usr/bin/env bash
# Sets up .venv if need be, then passes the tests: two files at a time. Arguments go to pytest.
#   bash launch/test.sh                   the quick suite
#   EXTRAS="[test,tpu]" bash launch/test.sh -m slow     the slow ones, which need libtpu, no TPU
set -euo pipefail
. "$(dirname -- "$0")/setup.sh"
set_up "${EXTRAS-[test]}"
cd "$repository"
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
