#!/bin/sh
# Run a command once for each CPython from 3.7 to 3.13 that is on this machine, with PYTHON=<interpreter> behind it.
set -u
ran=0
failed=
for minor in 7 8 9 10 11 12 13; do
    found=$(command -v "python3.$minor" || true)
    # A shim of pyenv may stand for a version that is installed and not selected: the interpreter itself is better.
    if command -v pyenv >/dev/null; then
        for each in "$(pyenv root)"/versions/3."$minor".*/bin/python; do
            [ -x "$each" ] && found=$each
        done
    fi
    [ -n "$found" ] && "$found" -c '' 2>/dev/null || continue
    ran=$((ran + 1))
    echo "== Python 3.$minor"
    "$@" PYTHON="$found" || failed="$failed 3.$minor"
done
if [ "$ran" -eq 0 ]; then
    echo "no Python from 3.7 to 3.13 was found" >&2
    exit 1
fi
[ -z "$failed" ] && exit 0
echo "failed on:$failed" >&2
exit 1
