# Sourced after packages.sh and suites.sh: an emulated KVM host. QEMU's software CPU with AMD-V runs Debian's kernel
# with this machine's files, read-only, and accepts commands over ssh on the loopback.
#
# A host's DIRECTORY has its disk, its console, and QEMU's log and pid. The host ends with the shell that booted it,
# unless its HOLDER is another.
# shellcheck shell=bash

emulated_hosts_cache=$BULKHEAD_CACHE/kvm-host
emulated_host_mib=${BULKHEAD_KVM_HOST_MIB:-6144}
# Whose kernel the host runs: that of Debian 12 if it is empty, or "backports".
emulated_host_kernel_of=${BULKHEAD_KVM_HOST_KERNEL:-}
emulated_host_boot_seconds=300
# "TAP ADDRESS/PREFIX ROUTER": the host gets a second card on this TAP, with an address and a default route.
emulated_host_card=
# Off: features that TCG does not emulate well enough for nested guests, or warns about.
emulated_host_cpu='EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,-xsavec'
# The modules that are needed to mount the root file system.
emulated_host_modules=(virtio_pci virtio_blk virtio_net 9pnet_virtio 9p overlay ext4)

# emulated_host_boot DIRECTORY PROJECT SHARE KIND HOLDER...: starts a host and waits until it accepts commands. KIND:
# plain, or counted, where one nanosecond of the host's clock is one instruction. HOLDER: the command that starts QEMU.
emulated_host_boot() {
    local directory=$1 project=$2 share=$3 kind=$4 kernel version prepared port
    shift 4
    prepared=$(emulated_host_prepare) || return 1
    read -r kernel version <<<"$prepared"
    mkdir -p "$directory" "$share"
    emulated_host_initramfs "$kernel" "$version" "$project" "$directory/initramfs"
    truncate -s 24G "$directory/disk"
    mke2fs -q -F -t ext4 -O ^has_journal -E nodiscard "$directory/disk"
    dropbearkey -y -f "$emulated_hosts_cache/key" | grep ^ssh- >"$directory/authorized_keys"
    printf '%s\n' "$kernel" "$version" "$project" "$share" >"$directory/host"
    emulated_host_second_card "$directory"
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    emulated_host_qemu "$kind" || return 1
    # One CPU: with two, VMs that run side by side freeze, with QEMU 7.2 and 10 (CONTRIBUTING.md). No check of the timer:
    # on a machine that is busy its interrupts come late, and the kernel would give up.
    "$@" "${qemu[@]}" \
        -nodefaults -no-user-config -display none -no-reboot -M q35 -cpu "$emulated_host_cpu" \
        -smp 1 -m "$emulated_host_mib" -kernel "$kernel/boot/vmlinuz-$version" -initrd "$directory/initramfs" \
        -append 'console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off tsc=reliable no_timer_check' \
        -serial "file:$directory/console" \
        -virtfs local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap \
        -virtfs "local,path=$project,mount_tag=project,security_model=none,readonly=on,multidevs=remap" \
        -virtfs "local,path=$share,mount_tag=share,security_model=none,multidevs=remap" \
        -virtfs "local,path=$directory,mount_tag=control,security_model=none,multidevs=remap" \
        -drive "file=$directory/disk,format=raw,if=virtio,cache=unsafe,discard=unmap" \
        -netdev "user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:$port-:22" -device virtio-net-pci,netdev=n0,romfile= \
        "${second_card[@]}" \
        </dev/null >"$directory/qemu.log" 2>&1 &
    echo "$!" >"$directory/pid"
    echo "$port" >"$directory/port"
    emulated_host_wait "$directory" "$!"
}

# emulated_host_second_card DIRECTORY: sets `second_card` to QEMU's options for it, and tells the host of it.
emulated_host_second_card() {
    local tap address router
    second_card=()
    [ -n "$emulated_host_card" ] || return 0
    read -r tap address router <<<"$emulated_host_card"
    echo "$address $router" >"$1/card"
    # Two hosts on one network need different hardware addresses.
    second_card=(-netdev "tap,id=n1,ifname=$tap,script=no,downscript=no"
        -device "virtio-net-pci,netdev=n1,romfile=,mac=$(printf '52:54:00:99:00:%02x' "${tap//[!0-9]/}")")
}

# Prepares what all emulated hosts share: packages, a kernel and an ssh key. Prints the kernel's directory and version.
emulated_host_prepare() {
    mkdir -p "$emulated_hosts_cache"
    # Several hosts may boot at the same time.
    exec 9>"$emulated_hosts_cache/lock"
    flock 9
    need_packages qemu-system-x86 busybox-static cpio kmod e2fsprogs dropbear-bin >&2 || return 1
    [ -e "$emulated_hosts_cache/key" ] || dropbearkey -t ed25519 -f "$emulated_hosts_cache/key" >/dev/null 2>&1
    case $emulated_host_kernel_of in
        '') emulated_host_kernel ;;
        backports) emulated_host_kernel_of_backports ;;
        *) echo "BULKHEAD_KVM_HOST_KERNEL is $emulated_host_kernel_of, must be empty or backports" >&2; return 1 ;;
    esac
}

# Extracts the kernel of Debian's backports. Prints its directory and version.
emulated_host_kernel_of_backports() {
    local directory image version
    need_packages xz-utils >&2 || return 1
    directory=$(extracted_packages bookworm-backports linux-image-amd64) || return 1
    for image in "$directory"/boot/vmlinuz-*; do version=${image##*/vmlinuz-}; done
    if [ ! -e "$directory/lib/modules/$version/modules.dep" ]; then depmod -b "$directory" "$version" || return 1; fi
    echo "$directory $version"
}

# Extracts Debian's kernel without installing it. Prints its directory and version.
emulated_host_kernel() {
    local package version directory
    package=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    if [ -z "$package" ]; then
        update_package_lists
        package=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    fi
    version=${package#linux-image-}
    directory=$emulated_hosts_cache/kernel/$version
    if [ ! -e "$directory/complete" ]; then
        echo "fetching $package" >&2
        rm -rf "$directory" && mkdir -p "$directory/deb"
        (cd "$directory/deb" && { apt-get download -qq "$package" 2>/dev/null || { update_package_lists; apt-get download -qq "$package"; }; }) >&2 || return 1
        dpkg-deb -x "$directory"/deb/*.deb "$directory" && depmod -b "$directory" "$version" || return 1
        rm -rf "$directory/deb"
        touch "$directory/complete"
    fi
    echo "$directory $version"
}

# emulated_host_initramfs KERNEL_DIR VERSION PROJECT OUT: busybox, modules, and the first init.
emulated_host_initramfs() {
    local root module path
    root=$(mktemp -d)
    mkdir -p "$root"/{bin,proc,sys,dev,lower,upper,root,modules}
    cp /bin/busybox "$root/bin/busybox"
    for module in "${emulated_host_modules[@]}"; do
        modprobe -d "$1" -S "$2" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
    done | awk '!seen[$0]++' | while read -r path; do
        # Newer kernels have compressed modules, which busybox does not load.
        case $path in
            *.xz) path=${path%.xz} && xz -dc "$path.xz" >"$root/modules/${path##*/}" ;;
            *) cp "$path" "$root/modules/" ;;
        esac
        basename "$path" >>"$root/modules/order"
    done
    install -m 755 "$3/scripts/lib/emulated-host-initramfs" "$root/init"
    (cd "$root" && find . | cpio -o -H newc --quiet) >"$4"
    rm -rf "$root"
}

# emulated_host_qemu KIND: sets `qemu` to the emulator's command, with the options that say how its clock runs.
emulated_host_qemu() {
    local root
    if [ "$1" = plain ]; then
        qemu=(qemu-system-x86_64 -accel 'tcg,thread=multi')
        return 0
    fi
    # In QEMU 7.2, -icount does not work with nested guests.
    root=$(extracted_packages bookworm-backports qemu-system-x86) || return 1
    extracted_command "$root" qemu-system-x86_64
    qemu=("${extracted_command[@]}" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios"
        -accel 'tcg,thread=single' -icount 'shift=0,sleep=off')
}

# emulated_host_wait DIRECTORY PID
emulated_host_wait() {
    local waited=0
    until [ -e "$1/ready" ]; do
        if ! kill -0 "$2" 2>/dev/null || [ "$waited" -ge $((emulated_host_boot_seconds * 10)) ]; then
            echo "the emulated host did not boot; QEMU said: $(tail -n 5 "$1/qemu.log"); its console:" >&2
            tail -n 20 "$1/console" >&2 || true
            kill "$2" 2>/dev/null || true
            return 1
        fi
        sleep 0.1
        waited=$((waited + 1))
    done
}

# emulated_host_run DIRECTORY TIMEOUT NAME=VALUE... -- COMMAND...: runs a command over ssh, which carries standard
# input, both outputs and the exit code. Its environment has these variables and those of this shell that our programs
# read. TIMEOUT is in seconds; 0: none. Sets `emulated_host_client` to the client's pid, for a caller that must end it.
emulated_host_run() {
    local directory=$1 timeout=$2 line='' name code=0 errors filter limit=()
    shift 2
    line="cd $(printf %q "$PWD") && env"
    while IFS= read -r name; do
        line+=" $name=$(printf %q "${!name}")"
    done < <(compgen -e | grep -E '^(BULKHEAD_.*|CARGO_MANIFEST_DIR|RUST_.*|CI|LANG|PATH|HOME)$')
    while [ "$1" != -- ]; do
        line+=" $(printf %q "$1")"
        [ "$1" = BULKHEAD_KVM_COUNTED=1 ] && limit=(timeout "$timeout")
        shift
    done
    shift
    if [ "$timeout" = 0 ]; then
        limit=()
    elif [ ${#limit[@]} = 0 ]; then
        line+=" timeout --kill-after=10 $timeout"
    fi
    line+=$(printf ' %q' "$@")
    # The remote shell must outlive the command, because dbclient returns 0 for a session that a signal ended.
    line+='; exit $?'
    # Errors appear line by line, and all of them before this function returns.
    exec {errors}> >(exec grep --line-buffered -v '^dbclient: ' >&2)
    filter=$!
    # In the background, because bash runs a trap only after a foreground command has ended.
    "${limit[@]}" dbclient -i "$emulated_hosts_cache/key" -p "$(cat "$directory/port")" -y -y -K 15 -I 0 -T root@127.0.0.1 "$line" \
        <&0 2>&"$errors" {errors}>&- &
    emulated_host_client=$!
    wait "$emulated_host_client" || code=$?
    exec {errors}>&-
    wait "$filter" || true
    return "$code"
}

# Prints how many hosts fit: a software CPU uses one core, so as many as there are cores and memory for.
emulated_hosts() {
    awk -v cores="$(nproc)" -v host_kib=$((emulated_host_mib * 1024)) '
        /^MemAvailable:/ { fit = int($2 / host_kib); hosts = cores < fit ? cores : fit; print (hosts > 1 ? hosts : 1) }' /proc/meminfo
}
