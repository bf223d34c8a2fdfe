#!/bin/sh
# Make a virtual environment with the first Python that is new enough and complete.
#   PYTHON=/path/to/python sh requirements/venv.sh FOLDER
# Without PYTHON, python3 and then python3.14 to python3.11 are tried.
set -eu

venv=$1
[ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null && exit 0

incomplete=
tried=
for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    tried="$tried $python ($version)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        incomplete="$incomplete python$version-venv"
        continue
    fi
    echo "making $venv with $python ($version)"
    exec "$python" -m venv --clear "$venv"
done

if [ -n "$incomplete" ]; then
    echo "cannot make $venv: this Python comes without venv and ensurepip; on Debian and Ubuntu: apt install$incomplete" >&2
else
    echo "cannot make $venv: expected Python 3.11 or newer, found${tried:- none};" \
        "install one, or name it: make PYTHON=/path/to/python3" >&2
fi
exit 1
