# shellcheck shell=bash disable=SC2034
# Sourced by the scripts beside it: where the project is, and how to get what it needs from Debian.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A service or a bare environment may have none.
export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d : -f 6)}"
cache=${POINTWORK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pointwork}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root: $* (run it as root, or install sudo)"
    fi
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 "$@" </dev/null >/dev/null
}

# apt_update: fetches the package lists, once in the life of a script and of those it calls.
apt_update() {
    [ -z "${POINTWORK_APT_UPDATED:-}" ] || return 0
    apt update || say "warning: apt-get update failed; going on with the lists that are here"
    export POINTWORK_APT_UPDATED=1
}

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# need_packages PACKAGE...: installs those that are missing.
need_packages() {
    local package missing=()
    for package; do
        installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "missing: ${missing[*]} (install them; only Debian is done by itself)"
    say "installing ${missing[*]}"
    apt_update
    apt install -y --no-install-recommends "${missing[@]}" || die "could not install ${missing[*]}"
}

# need_rust: the compiler comes from the user; a linker for it comes from Debian.
need_rust() {
    [ ! -d "$HOME/.cargo/bin" ] || PATH=$PATH:$HOME/.cargo/bin
    command -v cargo >/dev/null || die "Rust is missing: install rustc and cargo, $(rust_version) or newer (rustup does it)"
    command -v cc >/dev/null || need_packages gcc libc6-dev
}

rust_version() { sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$project/Cargo.toml"; }

# need_unstarted PACKAGE...: as need_packages, for packages with services of which tests start their own. Services that are there
# stay as they are, and those installed now are not started.
need_unstarted() (
    for package; do installed "$package" || missing=1; done
    [ -n "${missing-}" ] || exit 0
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'as_root rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    need_packages "$@"
)

# need_openvswitch: Open vSwitch's programs, and what they are tested with.
need_openvswitch() {
    need_unstarted openvswitch-switch
    need_packages iproute2 ethtool
}

codename() { . /etc/os-release && printf '%s\n' "${VERSION_CODENAME:-}"; }

# The names that differ by architecture: Debian's packages and QEMU's binary.
case $(dpkg --print-architecture 2>/dev/null) in
    amd64) qemu_package=qemu-system-x86 qemu_binary=qemu-system-x86_64 kernel_package=linux-image-amd64 ;;
    arm64) qemu_package=qemu-system-arm qemu_binary=qemu-system-aarch64 kernel_package=linux-image-arm64 ;;
    *) die "guests are prepared for Debian on amd64 and arm64, not for this machine" ;;
esac

qemu_major() { { "$qemu_binary" --version 2>/dev/null || true; } | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p'; }

# need_qemu: QEMU 8 or newer where the release has it, or its backports; else the release's own, with a warning.
need_qemu() {
    local major
    major=$(qemu_major)
    [ "${major:-0}" -lt 8 ] || return 0
    if [ "$(codename)" = bookworm ] && add_backports; then
        say "installing $qemu_package from bookworm-backports"
        apt install -y --no-install-recommends -t bookworm-backports "$qemu_package" ||
            say "warning: QEMU could not be installed from bookworm-backports"
    fi
    need_packages "$qemu_package"
    major=$(qemu_major)
    [ "${major:-0}" -ge 8 ] || say "warning: QEMU ${major:-?} is older than 8, which the tests are written for"
}

# add_backports: makes bookworm-backports known to apt, from the same archive as the release itself.
add_backports() {
    local uri
    if ! apt_sources | grep ' bookworm-backports$' >/dev/null; then
        uri=$(apt_sources | awk '$2 == "bookworm" && !n++ { print $1 }')
        [ -n "$uri" ] || { say "warning: no apt source of bookworm to take backports from"; return 1; }
        printf '%s\n' "Types: deb" "URIs: $uri" "Suites: bookworm-backports" "Components: main" \
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg" |
            as_root tee /etc/apt/sources.list.d/pointwork-backports.sources >/dev/null
        unset POINTWORK_APT_UPDATED
    fi
    apt_update
    apt-cache policy "$qemu_package" | grep 'bookworm-backports/' >/dev/null
}

# apt_sources: one line "URI SUITE" for each binary source that is configured.
# shellcheck disable=SC2016 # the fields are apt's, not the shell's
apt_sources() { apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | sort -u; }
