# Sourced after packages.sh: fetches programs from another suite of Debian (bookworm-backports, sid) and extracts them
# into the cache with all libraries that they need, or fetches the source of one. This machine's packages are not changed.
# shellcheck shell=bash

# extracted_packages SUITE NAME...: prints a directory with these packages and their dependencies. Fetches them if it
# has to.
extracted_packages() {
    local suite=$1 directory
    shift
    directory=$BULKHEAD_CACHE/suites/$suite/$(IFS=+; echo "$*")
    mkdir -p "${directory%/*}"
    (
        exec 8>"$BULKHEAD_CACHE/suites/lock"
        flock 8
        [ -e "$directory" ] || extract_packages "$directory" "$suite" "$@" >&2
    ) || return 1
    echo "$directory"
}

# extracted_command DIRECTORY PROGRAM: sets `extracted_command` to a command that runs PROGRAM with the libraries in
# DIRECTORY.
extracted_command() {
    local libraries=$1/usr/lib/x86_64-linux-gnu
    # shellcheck disable=SC2034 # the caller uses it
    extracted_command=("$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$1/usr/bin/$2")
}

# extract_packages DIRECTORY SUITE NAME...
extract_packages() {
    local directory=$1 suite=$2 work archive
    shift 2
    work=$(mktemp -d "${directory%/*}/fetch.XXXXXX")
    # shellcheck disable=SC2064 # the value of now
    trap "rm -rf '$work'" EXIT
    mkdir -p "$work"/root/usr/{bin,sbin,lib,lib64}
    fetch_of_suite "$work" deb "$suite" "$@" || return 1
    # Links for both layouts: older packages have /lib, newer ones /usr/lib.
    ln -s usr/bin usr/sbin usr/lib usr/lib64 "$work/root/"
    for archive in "$work"/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$archive" | tar -x --keep-directory-symlink -C "$work/root" || return 1
    done
    mv "$work/root" "$directory"
}

# fetch_of_suite WORK deb|deb-src SUITE NAME...: fetches packages with all that they depend on into WORK/apt/archives, or
# the sources of packages into WORK.
fetch_of_suite() {
    local work=$1 kind=$2 suite=$3 mirror
    shift 3
    mirror=$(debian_mirror) || return 1
    echo "fetching $* of Debian's $suite" >&2
    mkdir -p "$work"/apt/{lists,archives}/partial "$work"/apt/none
    # For this apt nothing is installed, so it fetches every library.
    : >"$work/apt/status"
    printf "$kind [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg arch=amd64] $mirror %s main\n" "${suite%-backports}" "$suite" |
        uniq >"$work/apt/sources"
    local get=(install -y -t "$suite" --no-install-recommends)
    [ "$kind" = deb ] || get=(source)
    local apt=(apt-get -qq -o "Dir::State::lists=$work/apt/lists" -o "Dir::State::status=$work/apt/status"
        -o "Dir::State::extended_states=$work/apt/extended" -o "Dir::Cache=$work/apt" -o "Dir::Etc::sourcelist=$work/apt/sources"
        -o "Dir::Etc::sourceparts=$work/apt/none" -o Dir::Etc::preferences=/dev/null -o "Dir::Etc::preferencesparts=$work/apt/none"
        -o Acquire::Languages=none -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0)
    if ! "${apt[@]}" update || ! (cd "$work" && "${apt[@]}" "${get[@]}" --download-only "$@"); then
        echo "cannot fetch $* of Debian's $suite from $mirror: configure a mirror of Debian that has $suite" >&2
        return 1
    fi
}

# Prints the mirror in this machine's apt sources.
debian_mirror() {
    local codename mirror
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2016 # apt's own variables
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(CODENAME)' 'Created-By: Packages' |
        awk -v suite="$codename" '!found && ($2 == suite || $3 == suite) {print $1; found = 1}')
    [ -n "$mirror" ] || { echo "apt's sources name no mirror of Debian $codename: add one" >&2; return 1; }
    echo "${mirror%/}"
}
