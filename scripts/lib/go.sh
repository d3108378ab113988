# Sourced: finds a Go toolchain that is new enough, the machine's own or one from the Go module proxy.
# shellcheck shell=bash

# Debian 12 and its backports have none that is new enough. Pinned by hash, because curl does not use Go's checksum
# database.
go_version=go1.26.8
go_sha256=30c2b1bf7dcc88d3eb0a1364e47ddd9128edb3110a30e8a0ef61cd5856b31de7

# need_go VERSION: sets PATH so that `go` is at least VERSION (for example 1.26.6).
need_go() {
    local found
    found=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null || true)
    if [ -n "$found" ] && printf '%s\n' "$1" "${found#go}" | sort -VC; then
        return 0
    fi
    printf '%s\n' "$1" "${go_version#go}" | sort -VC || { echo "Go $1 is needed and scripts/lib/go.sh names ${go_version#go}: put a newer version and its hash there" >&2; return 1; }
    local directory=$BULKHEAD_CACHE/go/$go_version
    [ -x "$directory/bin/go" ] || fetch_go "$directory"
    export PATH=$directory/bin:$PATH
}

fetch_go() {
    local proxy=${GOPROXY:-https://proxy.golang.org} module=golang.org/toolchain work
    proxy=${proxy%%[,|]*}
    echo "fetching $go_version" >&2
    need_packages ca-certificates curl python3
    mkdir -p "$BULKHEAD_CACHE/go"
    work=$(mktemp -d "$BULKHEAD_CACHE/go/fetch.XXXXXX")
    curl -sSfL --retry 3 -o "$work/zip" "$proxy/$module/@v/v0.0.1-$go_version.linux-amd64.zip"
    echo "$go_sha256  $work/zip" | sha256sum --quiet -c -
    python3 -m zipfile -e "$work/zip" "$work"
    # The module's archive does not store file modes.
    chmod +x "$work/$module@v0.0.1-$go_version.linux-amd64"/{bin,pkg/tool/linux_amd64}/*
    rm -rf "$1" && mv "$work/$module@v0.0.1-$go_version.linux-amd64" "$1"
    rm -rf "$work"
}
