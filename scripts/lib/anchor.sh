# Sourced after packages.sh and suites.sh: the QEMU that the benchmarks use, from Debian's backports.
# shellcheck shell=bash

# anchor_qemu: prints the command of the QEMU that counted hosts use, quoted for a shell.
anchor_qemu() {
    local root
    root=$(extracted_packages bookworm-backports qemu-system-x86) || return 1
    extracted_command "$root" qemu-system-x86_64
    # shellcheck disable=SC2154 # extracted_command() sets it
    printf '%q ' "${extracted_command[@]}" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios"
}
