# Sourced by scripts/cluster: a cluster's network namespace, and its end. The namespace has a bridge with the address of
# the machine outside the nodes; nodes.sh adds their cards. cluster/places.py has the same addresses.
# shellcheck shell=bash

# cluster_namespace STATE: makes the namespace. STATE/namespace has its name.
cluster_namespace() {
    local name=bulkhead-${1##*/}
    echo "$name" >"$1/namespace"
    ip netns add "$name"
    ip -n "$name" link set lo up
    ip -n "$name" link add nodes type bridge
    ip -n "$name" addr add 10.99.0.1/24 dev nodes
    ip -n "$name" link set nodes up
    # Any node knows the way to a Service.
    ip -n "$name" route add 10.96.0.0/16 via 10.99.0.2
    # Pods of different nodes reach each other through here.
    ip netns exec "$name" sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
}

# cluster_door STATE: lets this machine reach a kept cluster. Its end is the end of the namespace.
cluster_door() {
    local name
    name=$(cat "$1/namespace")
    ip link add bulkhead-door type veth peer name door netns "$name"
    ip -n "$name" addr add 10.99.1.1/30 dev door
    ip -n "$name" link set door up
    ip addr add 10.99.1.2/30 dev bulkhead-door
    ip link set bulkhead-door up
    sed 's|https://10.99.0.1:|https://10.99.1.1:|' "$1/admin.conf" >"$1/kept.conf"
    chmod 600 "$1/kept.conf"
}

# cluster_end STATE: ends the processes of a cluster and removes all of it.
cluster_end() {
    local file pid
    [ -d "$1" ] || return 0
    for file in "$1"/pid "$1"/node-*/pid; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        kill -KILL "$pid" 2>/dev/null || continue
        timeout 10 tail --pid="$pid" -f /dev/null || true
    done
    for file in "$1"/node-*/cgroup; do
        [ -e "$file" ] || continue
        find "$(findmnt -n -o TARGET -t cgroup2 | head -n 1)/$(cat "$file")" -depth -type d -exec rmdir {} + || true
    done
    if [ -e "$1/namespace" ]; then ip netns del "$(cat "$1/namespace")" 2>/dev/null || true; fi
    rm -rf "$1"
}

# cluster_sweep DIRECTORY: removes what is left of clusters whose shell was killed.
cluster_sweep() {
    local state
    for state in "$1"/run.*; do
        [ -e "$state/owner" ] || continue
        kill -0 "$(cat "$state/owner")" 2>/dev/null || cluster_end "$state"
    done
}
