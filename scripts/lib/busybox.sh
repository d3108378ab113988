# Sourced after packages.sh and suites.sh: busybox as its authors release it, for the images of Kubernetes' suite, whose own
# are made from it. Debian's would not do: up to 1.37 its shell drops variables with a dash in their names, and the shell of
# 1.38 names a line in its messages. Specs look at both.
# shellcheck shell=bash

# upstream_busybox: prints the path of busybox 1.37, built from the sources that Debian's trixie has. Builds it if it has
# to, in about a minute.
upstream_busybox() {
    local directory=$BULKHEAD_CACHE/suites/trixie/upstream-busybox
    mkdir -p "${directory%/*}"
    (
        exec 8>"$BULKHEAD_CACHE/suites/lock"
        flock 8
        [ -e "$directory" ] || build_busybox "$directory" >&2
    ) || return 1
    echo "$directory/busybox"
}

# build_busybox DIRECTORY
build_busybox() {
    local work
    need_packages bzip2 gcc libc6-dev make || return 1
    work=$(mktemp -d "${1%/*}/fetch.XXXXXX")
    # shellcheck disable=SC2064 # the value of now
    trap "rm -rf '$work'" EXIT
    fetch_of_suite "$work" deb-src trixie busybox || return 1
    mkdir "$work/source" "$work/built"
    tar -xf "$work"/busybox_1.37.*.orig.tar.bz2 --strip-components=1 -C "$work/source" || return 1
    make -C "$work/source" -s defconfig >/dev/null || return 1
    # It does not compile with the headers of newer kernels.
    sed -i 's/^CONFIG_TC=y/# CONFIG_TC is not set/' "$work/source/.config"
    make -C "$work/source" -s -j"$(nproc)" busybox || return 1
    mv "$work/source/busybox" "$work/built/"
    mv "$work/built" "$1"
}
