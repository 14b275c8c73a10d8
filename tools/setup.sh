#!/bin/sh
# Sets the project up, or does nothing if it is: finds a Python 3.12, which then takes the steps of tools/bootstrap.
set -eu
cd "$(dirname "$0")/.."
python=$(tools/find_python.sh)
exec "$python" -m tools.bootstrap
