# Sourced after packages.sh, suites.sh and go.sh: the images of the suite of workloads.
# shellcheck shell=bash

# What makes and serves them, and what a daemon's tests need on a KVM host.
# shellcheck disable=SC2034 # for the caller
workload_packages=(busybox-static containernetworking-plugins docker-registry e2fsprogs git iproute2 python3 util-linux)
workload_storage=${BULKHEAD_CACHE:-$HOME/.cache/bulkhead}/workload-images
# shellcheck disable=SC2034 # for the caller
workload_registry=$workload_storage/registry

# workload_images [NAME...]: makes those images, or all, of which the cache does not have the present version.
workload_images() {
    local mirror
    mirror=$(debian_mirror) || return 1
    need_go 1.25
    python3 -B tests/images/workload_images.py --storage "$workload_storage" --mirror "$mirror" "$@"
}

# workload_subset tests|images: prints what scripts/lib/workloads/subset.txt names.
workload_subset() {
    local column=1
    [ "$1" = tests ] || column=2
    awk -v column="$column" '!/^#/ && NF {print $column}' scripts/lib/workloads/subset.txt | sort -u
}
