# Sourced: runs a step of a script and says how long it took.
# shellcheck shell=bash

# stage NAME COMMAND...: the command's output and exit code are its own.
stage() {
    local name=$1 started=$EPOCHREALTIME code
    shift
    printf -- '--- %s\n' "$name" >&2
    # Not in a condition, which would switch errexit off in all of the command, a subshell's `set -e` or not.
    set +e
    ( set -e; "$@" )
    code=$?
    set -e
    local micros=$((${EPOCHREALTIME/./} - ${started/./}))
    if [ "$code" != 0 ]; then
        printf -- '--- %s: failed with exit code %d after %d.%03d s\n' "$name" "$code" $((micros / 1000000)) $((micros / 1000 % 1000)) >&2
        return "$code"
    fi
    printf -- '--- %s: %d.%03d s\n' "$name" $((micros / 1000000)) $((micros / 1000 % 1000)) >&2
}
