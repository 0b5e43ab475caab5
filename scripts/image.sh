# shellcheck shell=bash disable=SC2154
# Sourced by the scripts that build what machines of the tests boot, from Debian packages that are unpacked and not
# installed: Debian's own kernel, and an initramfs of busybox, some tools and modules. The result is cached outside the
# project and built again when the packages or the scripts change. The caller sets `kind` (the image's name), `tools` (Debian
# packages), `binaries` and `files` (what is taken from them), `boot_modules` (loaded at boot, in this order, with what they
# depend on) and `more_modules` (there for modprobe), then calls `make_image`, which prints the directory with `vmlinuz`
# and `initramfs`.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
here=$project/scripts

# libraries PACKAGE...: the library packages that these depend on, directly or through one another.
libraries() {
    apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances "$@" | awk -v roots="$*" '
        /^[^ ]/ { package = $1; next }
        /Depends:/ { needs[package] = needs[package] " " $NF }
        END {
            left = split(roots, queue, " ")
            for (at = 1; at <= left; at++)
                for (i = split(needs[queue[at]], next_ones, " "); i > 0; i--)
                    if (next_ones[i] ~ /^z?lib/ && !seen[next_ones[i]]++) {
                        queue[++left] = next_ones[i]
                        print next_ones[i]
                    }
        }' | sort
}

resolve() {
    kernel=$(apt-cache depends "$kernel_package" 2>/dev/null | awk '/Depends: linux-image-/ { print $2; exit }')
    [ -n "$kernel" ] || return 1
    mapfile -t packages < <(libraries "${tools[@]}")
    packages+=("${tools[@]}" "$kernel")
    listing=$(apt-get --print-uris download "${packages[@]}" | cut -d ' ' -f 2-) && [ -n "$listing" ]
}

make_image() {
    need_packages cpio kmod xz-utils zstd
    resolve || { apt_update; resolve; } || die "apt knows no $kernel_package or not all of ${tools[*]}: check the machine's apt sources"

    key=$({ cat "$here/$kind-image" "$here/image.sh" "$here/guest-init"; printf '%s\n' "$listing"; } | sha256sum | cut -c 1-16)
    image=$cache/$kind-$key
    mkdir -p "$cache"
    exec 9>"$cache/lock"
    flock 9
    if [ -e "$image/initramfs" ]; then
        touch "$image"
        printf '%s\n' "$image"
        return
    fi

    say "building the $kind image from Debian's packages"
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/packages" "$work/root" "$work/kernel" "$work/image"

    # Lists that have grown stale name packages that are gone: they are fetched again, once.
    if ! (cd "$work/packages" && apt-get -qq -o APT::Sandbox::User=root download "${packages[@]}" >&2); then
        [ -z "${POINTWORK_APT_UPDATED:-}" ] || die "could not download the packages of the $kind image"
        apt_update
        rm -rf "$work"
        exec "$here/$kind-image"
    fi

    # The merged /usr is laid out before anything is unpacked into it.
    mkdir -p "$work/root/usr/bin" "$work/root/usr/sbin" "$work/root/usr/lib" "$work/root/usr/lib64"
    ln -s usr/bin usr/sbin usr/lib usr/lib64 "$work/root"
    for package in "$work"/packages/*.deb; do
        case $package in
            */linux-image-*) dpkg-deb --fsys-tarfile "$package" | tar -x -C "$work/kernel" ;;
            *) dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$work/root" ;;
        esac
    done

    # The tree that the guest gets.
    guest=$work/guest
    mkdir -p "$guest"/{dev,proc,sys,run,tmp,root,etc,usr/bin,usr/sbin,usr/lib/modules}
    ln -s usr/bin usr/sbin usr/lib "$guest"
    install -m 755 "$here/guest-init" "$guest/init"
    printf 'root:x:0:0:root:/root:/bin/sh\n' >"$guest/etc/passwd"

    # Each tool, and the libraries that the packages' own loader finds for it among the packages.
    triplet=$(basename "$(dirname "$(find "$work/root/usr/lib" -name libc.so.6)")")
    loader=$(find "$work/root/usr/lib" "$work/root/usr/lib64" -type f -name 'ld-linux*.so.*')
    # systemd's own libraries lie beside the others.
    places=$work/root/usr/lib/$triplet:$work/root/usr/lib:$work/root/usr/lib/$triplet/systemd
    mkdir -p "$guest/usr/lib/$triplet"
    # What systemd starts units by, from Debian 13 on.
    [[ " ${tools[*]} " != *" systemd "* ]] || [ ! -e "$work/root/usr/lib/systemd/systemd-executor" ] ||
        binaries+=(usr/lib/systemd/systemd-executor)
    for binary in "${binaries[@]}"; do
        install -D "$work/root/$binary" "$guest/$binary"
        while read -r library; do
            case $library in
                "$work"/*) cp -n "$library" "$guest/usr/lib/$triplet/" ;;
                *) die "$binary needs $library, which is in none of its packages" ;;
            esac
        done < <("$loader" --library-path "$places" --list "$work/root/$binary" | awk '$2 == "=>" && $1 !~ "/" { print $3 }')
    done
    for file in "${files[@]}"; do
        install -D -m 644 "$work/root/$file" "$guest/$file"
    done
    # What no list names: the C library opens it by itself when a thread is cancelled, as iperf3 does.
    cp "$work/root/usr/lib/$triplet/libgcc_s.so.1" "$guest/usr/lib/$triplet/"
    # Busybox stands in for what is not there.
    for applet in $("$loader" --library-path "$places" "$work/root/usr/bin/busybox" --list); do
        [ -e "$guest/usr/bin/$applet" ] || [ -e "$guest/usr/sbin/$applet" ] || ln -s busybox "$guest/usr/bin/$applet"
    done
    # The loader's path is part of every binary.
    interpreter=$(head -c 4096 "$work/root/usr/bin/ip" | grep -a -o '/lib[^ ]*/ld-linux[^[:cntrl:]]*')
    mkdir -p "$guest/usr${interpreter%/*}"
    [ -e "$guest${interpreter%/*}" ] || ln -s "usr${interpreter%/*}" "$guest${interpreter%/*}"
    cp "$loader" "$guest$interpreter"

    # The modules, uncompressed: the guest loads them in the order that modprobe gives here.
    version=$(basename "$work"/kernel/boot/vmlinuz-* | sed 's/^vmlinuz-//')
    modules=$(find "$work/kernel" -type d -path "*/lib/modules/$version")
    find "$modules" -name '*.ko.xz' -exec xz -d {} + -o -name '*.ko.zst' -exec zstd -q -d --rm {} +
    PATH=$PATH:/usr/sbin:/sbin
    depmod -b "${modules%/lib/modules/*}" "$version"
    order() {
        modprobe -d "${modules%/lib/modules/*}" -S "$version" --show-depends "$1" | awk '$1 == "insmod" { print $2 }'
    }
    for module in "${boot_modules[@]}" "${more_modules[@]}"; do
        order "$module" >"$work/order"
        while read -r file; do
            inside=/lib/modules/$version/${file#"$modules"/}
            install -D -m 644 "$file" "$guest/usr$inside"
            case " ${boot_modules[*]} " in
                *" $module "*) grep -x "$inside" "$guest/usr/lib/modules/boot" >/dev/null 2>&1 ||
                    printf '%s\n' "$inside" >>"$guest/usr/lib/modules/boot" ;;
            esac
        done <"$work/order"
    done
    cp "$modules"/modules.{builtin,builtin.modinfo,order} "$guest/usr/lib/modules/$version/"
    depmod -b "$guest" "$version"

    # Neither is compressed: unpacking takes an emulated guest longer than all the rest of its boot. A bzImage's own kernel is
    # found by its header (Linux, Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length).
    number() { od -A n -t "u$2" -j "$1" -N "$2" "$bzimage" | tr -d ' '; }
    bzimage=$work/kernel/boot/vmlinuz-$version
    vmlinux=$work/image/vmlinuz
    cp "$bzimage" "$vmlinux"
    if [ "$(dd if="$bzimage" bs=1 skip=$((0x202)) count=4 2>/dev/null | tr -d '\0')" = HdrS ]; then
        start=$((($(number $((0x1f1)) 1) + 1) * 512 + $(number $((0x248)) 4)))
        # The last four bytes are the unpacked size, not part of the stream.
        tail -c +$((start + 1)) "$bzimage" | head -c $(($(number $((0x24c)) 4) - 4)) >"$work/payload" || true
        case $(head -c 4 "$work/payload" | od -A n -t x1 | tr -d ' \n') in
            fd377a58) xz -d --single-stream <"$work/payload" >"$vmlinux" ;;
            28b52ffd) zstd -q -d <"$work/payload" >"$vmlinux" ;;
        esac
        [ "$(dd if="$vmlinux" bs=1 skip=1 count=3 2>/dev/null)" = ELF ] || cp "$bzimage" "$vmlinux"
    fi
    (cd "$guest" && find . -print0 | LC_ALL=C sort -z |
        cpio --quiet --null --create --format=newc --owner=0:0 --reproducible) >"$work/image/initramfs"
    printf '%s\n' "$listing" >"$work/image/packages"

    # Whole or not at all; images that nothing has used for a week make room.
    find "$cache" -maxdepth 1 -name "$kind-*" -mtime +7 -exec rm -rf {} +
    mv "$work/image" "$image"
    printf '%s\n' "$image"
}
