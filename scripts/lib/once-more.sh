# Sourced after stage.sh by scripts that run a program with tests: a test that failed runs once more by itself, and a line
# says how it went. $program is the program, $logs a directory for its output, and $report a file that gets the end of what
# failed tests said.
# shellcheck shell=bash
# shellcheck disable=SC2154 # the caller sets them
test_threads=1

# run_tests LOG NAME...: runs tests, $test_threads at a time. The output of passed tests is shown, because it has tables.
run_tests() {
    "$program" --test-threads="$test_threads" --show-output --exact "${@:2}" | tee "$1"
}

# not_passed LOG NAME...: prints the names of those tests that the log does not call passed or ignored.
not_passed() { printf '%s\n' "${@:2}" | grep -vxF -f <(sed -nE 's/^test (.*) \.\.\. (ok|ignored.*)$/\1/p' "$1"); }

# said LOG NAME: prints why a test failed, and the end of its output.
said() {
    local text
    text=$(awk -v first="---- $2 stdout ----" '/ stdout ----$/ || /^failures:$/ {inside = 0} $0 == first {inside = 1} inside' "$1")
    echo "=== $2 failed:"
    text=${text:-$(cat "$1")}
    # The message is not at the end if a kubelet's log, or a daemon's, stands after it.
    if [ "$(wc -l <<<"$text")" -gt 60 ]; then
        grep -m 1 -A 5 'panicked at' <<<"$text" || true
        echo '[...]'
    fi
    tail -n 60 <<<"$text"
}

# run_and_note TITLE NAME...: runs tests as a stage, and adds those that failed to the array `again`.
run_and_note() {
    local title=$1 log name failed
    shift
    log=$(mktemp "$logs/XXXXXX")
    stage "$title" run_tests "$log" "$@" && return
    mapfile -t failed < <(not_passed "$log" "$@")
    # A failure of none of them is a failure of the program.
    [ ${#failed[@]} -gt 0 ] || failed=("$@")
    for name in "${failed[@]}"; do said "$log" "$name" >>"$report"; done
    again+=("${failed[@]}")
}

# once_more NAME: runs a test that failed. Says in a line how it went.
once_more() {
    local test_threads=1
    if stage "once more: $1" run_tests "$logs/once-more" "$1"; then
        echo "UNSTABLE: $1 failed first and passed the second time"
    else
        said "$logs/once-more" "$1" >>"$report"
        echo "FAILED: $1 failed twice"
        return 1
    fi
}
