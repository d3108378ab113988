# Sourced after packages.sh, suites.sh and emulated-host.sh, in a cluster's network namespace: its nodes. A node is an
# emulated host, or, where this machine's KVM works, this machine in namespaces and a cgroup of its own. STATE/node-N/ready
# exists once a node takes commands, and STATE/node-N/pid names the process with which all of the node ends.
# shellcheck shell=bash

# node_is_here STATE: whether the nodes are this machine.
node_is_here() { [ -e "$1/nodes-are-here" ]; }

# node_boot STATE NUMBER HOLDER...: makes a node. HOLDER: the command that starts its process.
node_boot() {
    local state=$1 number=$2
    shift 2
    if node_is_here "$state"; then
        node_boot_here "$state" "$number" "$@"
        return
    fi
    ip tuntap add dev "tap$number" mode tap
    node_attach "$number"
    # shellcheck disable=SC2034 # emulated_host_boot reads it
    emulated_host_card="tap$number 10.99.0.$((number + 1))/24 10.99.0.1"
    emulated_host_boot "$state/node-$number" "$PWD" "$state/share" plain "$@"
}

# node_attach NUMBER: puts the outer end of a node's card on the cluster's network.
node_attach() {
    ip link set "tap$1" master nodes
    ip link set "tap$1" up
    ip route add "10.87.$1.0/24" via "10.99.0.$(($1 + 1))"
}

# node_boot_here STATE NUMBER HOLDER...
node_boot_here() {
    local state=$1 number=$2 directory=$1/node-$2 pid
    shift 2
    mkdir -p "$directory"
    echo "bulkhead-${state##*/}-node-$number" >"$directory/cgroup"
    "$@" unshare --mount --net --propagation private scripts/lib/cluster/node-here "$directory" "$(cat "$directory/cgroup")" \
        </dev/null >"$directory/console" 2>&1 &
    pid=$!
    echo "$pid" >"$directory/pid"
    until [ -e "$directory/entered" ]; do
        kill -0 "$pid" 2>/dev/null || { echo "node $number did not start; it said:" >&2; cat "$directory/console" >&2; return 1; }
        sleep 0.1
    done
    ip link add "tap$number" type veth peer name eth0 netns "$pid"
    node_attach "$number"
    nsenter --net="/proc/$pid/ns/net" sh -c "ip link set lo up && ip link set eth0 up &&
        ip addr add 10.99.0.$((number + 1))/24 dev eth0 && ip route add default via 10.99.0.1 && echo 1 >/proc/sys/net/ipv4/ip_forward"
    touch "$directory/ready"
}

# node_run STATE NUMBER COMMAND...: runs a command on a node.
node_run() {
    local state=$1 number=$2 pid first
    shift 2
    if ! node_is_here "$state"; then
        emulated_host_run "$state/node-$number" 0 BULKHEAD_KVM_HOST=emulated -- "$@"
        return
    fi
    pid=$(cat "$state/node-$number/pid")
    first=$(cat "/proc/$pid/task/$pid/children")
    # shellcheck disable=SC2016 # the shell on the node expands them
    BULKHEAD_KVM_HOST=real nsenter --target "${first%% *}" --mount --net --pid --cgroup --wd="$PWD" \
        sh -c 'echo $$ >/sys/fs/cgroup/init/cgroup.procs && exec "$@"' node "$@"
}
