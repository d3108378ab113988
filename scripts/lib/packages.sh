# Sourced: installs those Debian packages that are missing.
# shellcheck shell=bash

BULKHEAD_CACHE=${BULKHEAD_CACHE:-$HOME/.cache/bulkhead}

# need_packages NAME...: installs the packages that are not installed.
need_packages() {
    local name missing=()
    for name in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    if [ "$(id -u)" != 0 ]; then
        echo "these packages are missing and only root can install them: ${missing[*]}" >&2
        return 1
    fi
    echo "installing ${missing[*]}" >&2
    update_package_lists
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
}

# Only once in a run, because apt-get update takes seconds.
update_package_lists() {
    [ -n "${BULKHEAD_APT_UPDATED:-}" ] && return 0
    apt-get update -qq >&2
    export BULKHEAD_APT_UPDATED=1
}
