#!/bin/sh
# Write the lock files: hashed, for every supported Python and platform, and free of any registry's address.
#   sh requirements/lock.sh UV_VERSION [--upgrade]
set -eu

uv_version=$1
shift
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
sh requirements/venv.sh "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"

compile() {
    "$venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" "$@"
}
compile "$@" requirements/build.in --output-file requirements/build.txt
compile "$@" pyproject.toml --extra all --extra demo --output-file requirements/runtime.txt
compile "$@" pyproject.toml requirements/dev.in --extra all --extra demo --extra testing --output-file requirements/dev.txt
compile "$@" --resolution lowest-direct pyproject.toml requirements/floor.in --extra all --extra testing \
    --output-file requirements/floor.txt
echo "wrote requirements/build.txt, runtime.txt, dev.txt and floor.txt in requirements"
