# Sourced: runs a step of a script and says how long it took.
# shellcheck shell=bash

# stage NAME COMMAND...: the command's output and exit code are its own. Do not call it in a condition with a function of
# several commands: bash switches errexit off in all of it then. try_stage is for that.
stage() {
    local name=$1 started=$EPOCHREALTIME code had_options=$-
    shift
    printf -- '--- %s\n' "$name" >&2
    # Not in a condition, which would switch errexit off in all of the command, a subshell's `set -e` or not.
    set +e
    ( set -e; "$@" )
    code=$?
    case $had_options in *e*) set -e ;; esac
    local micros=$((${EPOCHREALTIME/./} - ${started/./}))
    if [ "$code" != 0 ]; then
        printf -- '--- %s: failed with exit code %d after %d.%03d s\n' "$name" "$code" $((micros / 1000000)) $((micros / 1000 % 1000)) >&2
        return "$code"
    fi
    printf -- '--- %s: %d.%03d s\n' "$name" $((micros / 1000000)) $((micros / 1000 % 1000)) >&2
}

# try_stage NAME COMMAND...: runs a stage. Sets $tried to its exit code, and returns 0.
try_stage() {
    set +e
    stage "$@"
    # shellcheck disable=SC2034 # for the caller
    tried=$?
    set -e
}
