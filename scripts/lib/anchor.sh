# Sourced after packages.sh and suites.sh: the programs that the benchmarks compare with, from Debian's newest suites.
# shellcheck shell=bash

# anchor_containerd: prints a directory with containerd, its shim and runc of sid. The programs are patched to use sid's
# libc: runc needs a newer one than this machine's, and executes itself again by its own path, so a wrapper would not
# do.
anchor_containerd() {
    local root directory program
    root=$(extracted_packages sid containerd runc) || return 1
    directory=$root/anchor
    if [ ! -e "$directory" ]; then
        rm -rf "$directory.new" && mkdir "$directory.new"
        for program in containerd containerd-shim-runc-v2 runc; do
            cp "$root/usr/bin/$program" "$directory.new/"
            patchelf --set-interpreter "$root/usr/lib64/ld-linux-x86-64.so.2" --set-rpath "$root/usr/lib/x86_64-linux-gnu" \
                "$directory.new/$program" || return 1
        done
        mv "$directory.new" "$directory"
    fi
    echo "$directory"
}

# anchor_qemu: prints the command of the QEMU that counted hosts use, quoted for a shell.
anchor_qemu() {
    local root
    root=$(extracted_packages bookworm-backports qemu-system-x86) || return 1
    extracted_command "$root" qemu-system-x86_64
    # shellcheck disable=SC2154 # extracted_command() sets it
    printf '%q ' "${extracted_command[@]}" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios"
}
