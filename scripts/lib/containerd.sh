# Sourced after packages.sh and suites.sh: containerd and runc of a suite of Debian. Benchmarks compare with them, and
# the end-to-end tests have them as delegates.
# shellcheck shell=bash

# The suites that the end-to-end tests use: containerd 1.6, and the newest one.
# shellcheck disable=SC2034 # scripts/test uses it
containerd_suites=(bookworm sid)

# containerd_of SUITE: prints a directory with containerd, its shim and runc. The programs are patched to use the
# suite's libc: a newer runc needs a newer one than this machine's, and it executes itself again by its own path, so a
# wrapper would not do.
containerd_of() {
    local root directory libraries program
    root=$(extracted_packages "$1" containerd runc) || return 1
    directory=$root/containerd
    libraries=$root/usr/lib/x86_64-linux-gnu
    if [ ! -e "$directory" ]; then
        rm -rf "$directory.new" && mkdir "$directory.new"
        for program in "$root"/usr/bin/{containerd,containerd-shim-runc-v2} "$root"/usr/*bin/runc; do
            # Older suites have /usr/sbin/runc, newer ones /usr/bin/runc.
            [ -e "$program" ] || continue
            cp "$program" "$directory.new/"
            patchelf --set-interpreter "$libraries/ld-linux-x86-64.so.2" --set-rpath "$libraries" \
                "$directory.new/${program##*/}" || return 1
        done
        mv "$directory.new" "$directory"
    fi
    echo "$directory"
}
