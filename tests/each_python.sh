#!/bin/sh
# Run a command once for each version of CPython, 3.7 or later, that is on this machine, with PYTHON=<interpreter> as
# its last argument.
#
# They are looked for under the name python3.N in the folders of PYTHON_FOLDERS (separated by colons), in pyenv's
# versions and on PATH. Of several of one version the first that can run the tests is taken. Each that is not run is
# named, with the reason.
set -u
plan=$(mktemp)
trap 'rm -f "$plan"' EXIT

# One that the tests cannot be run with ends with a reason on stderr; another prints its minor version.
LOOK='
import platform, sys
if platform.python_implementation() != "CPython":
    sys.exit("not CPython")
if sys.version_info < (3, 7):
    sys.exit("older than 3.7")
try:
    import ensurepip, sqlite3, ssl, venv
except ImportError as error:
    sys.exit("it lacks a module: %s" % error)
print(sys.version_info[1])
'

folders() {
    echo "${PYTHON_FOLDERS:-}" | tr : '\n'
    if command -v pyenv >/dev/null; then
        ls -d "$(pyenv root)"/versions/*/bin 2>/dev/null | sort -rV # the newest first
        # pyenv's shims stand for these versions, and fail for those that are not selected.
        echo "$PATH" | tr : '\n' | grep -vxF "$(pyenv root)/shims"
    else
        echo "$PATH" | tr : '\n'
    fi
}

consider() {
    version=$("$1" -c "$LOOK" 2>&1)
    if [ $? -ne 0 ]; then
        echo "not run: $1: $(echo "$version" | tail -n 1)"
    elif grep -q "^$version " "$plan"; then
        echo "not run: $1: $(sed -n "s/^$version //p" "$plan") is run for 3.$version"
    else
        echo "$version $1" >>"$plan"
    fi
}

seen=:
IFS='
'
for folder in $(folders | grep .); do
    folder=$(cd "$folder" 2>/dev/null && pwd -P) || continue
    case "$seen" in *":$folder:"*) continue ;; esac
    seen=$seen$folder:
    for each in "$folder"/python3.[0-9] "$folder"/python3.[0-9][0-9]; do
        [ ! -x "$each" ] || consider "$each"
    done
done

if [ ! -s "$plan" ]; then
    echo "no CPython from 3.7 on was found; PYTHON_FOLDERS may name the folders that have one" >&2
    exit 1
fi
unset IFS
sort -n "$plan" -o "$plan"
failed=
while read -r minor found; do
    echo "== Python 3.$minor: $found"
    "$@" PYTHON="$found" </dev/null || failed="$failed 3.$minor"
done <"$plan"
[ -z "$failed" ] && exit 0
echo "failed on:$failed" >&2
exit 1
