# Sourced: runs a step of a script and says how long it took.
# shellcheck shell=bash

# stage NAME COMMAND...: the command's output and exit code are its own.
stage() {
    local name=$1 started=$EPOCHREALTIME code=0
    shift
    printf -- '--- %s\n' "$name" >&2
    # In a subshell with errexit set again: a condition around the call must not switch it off.
    ( set -e; "$@" ) || code=$?
    local micros=$((${EPOCHREALTIME/./} - ${started/./}))
    if [ "$code" != 0 ]; then
        printf -- '--- %s: failed with exit code %d after %d.%03d s\n' "$name" "$code" $((micros / 1000000)) $((micros / 1000 % 1000)) >&2
        return "$code"
    fi
    printf -- '--- %s: %d.%03d s\n' "$name" $((micros / 1000000)) $((micros / 1000 % 1000)) >&2
}
