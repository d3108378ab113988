# shellcheck shell=bash
# Sourced: builds programs that are linked statically, because they are alone in an initramfs or an empty root.

static_target=x86_64-unknown-linux-gnu

# build_static PACKAGE PROFILE FILE: installs the program of a package as a file.
build_static() {
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS='-C target-feature=+crt-static' \
        cargo build --locked --target "$static_target" --profile "$2" -p "$1"
    install -m 755 "target/$static_target/$2/$1" "$3"
}
