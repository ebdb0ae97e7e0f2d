#!/usr/bin/env bash
# Sets up .venv if need be, then passes the tests. Arguments go to pytest.
#   bash launch/test.sh                   the quick suite
#   bash launch/test.sh -m slow           the slow ones
set -euo pipefail
. "$(dirname -- "$0")/setup.sh"
set_up "[test]"
cd "$repository"
exec .venv/bin/python -m pytest "$@"
