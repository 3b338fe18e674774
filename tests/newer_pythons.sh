#!/bin/sh
# Run the tests on the CPythons that this machine's distribution does not have yet: Debian's unstable suite has them.
#
#     sudo sh tests/newer_pythons.sh [FOLDER]
#
# debootstrap lays the suite into FOLDER, which is kept and used again, or else into a temporary folder, which is
# removed at the end. The archive is the one that this machine's own apt reads. It needs root, debootstrap, 1 GiB of
# disk and some minutes, and is not part of `make test`.
set -eu
PYTHONS="python3.14 python3.15"
APT="apt-get -qq -o Acquire::Check-Valid-Until=false -o Dpkg::Use-Pty=0"

# What is mounted below is seen in here alone, and is gone when this ends, however it ends.
if [ "${KF_OWN_MOUNTS:-}" != yes ]; then
    [ "$(id -u)" -eq 0 ] || { echo "only root may use chroot: run this as root" >&2; exit 2; }
    command -v debootstrap >/dev/null || { echo "install debootstrap first" >&2; exit 2; }
    KF_OWN_MOUNTS=yes exec unshare --mount --propagation private sh "$0" "$@"
fi

sources=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    root=$(cd "$1" && pwd)
else
    root=$(mktemp -d)
    chmod 755 "$root" # apt reads its lists as another user
    trap 'umount -R "$root/proc" "$root/dev/pts" "$root/dev/shm" 2>/dev/null; rm -rf --one-file-system "$root"' EXIT
    trap 'exit 130' INT TERM
fi

if [ ! -e "$root/etc/debian_version" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep '/debian/*$' | head -n 1)
    [ -n "$mirror" ] || { echo "apt on this machine reads no archive of Debian" >&2; exit 2; }
    debootstrap --variant=minbase unstable "$root" "$mirror"
fi
mount -t proc proc "$root/proc"
mkdir -p "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm"
ln -sf pts/ptmx "$root/dev/ptmx"
[ -e "$root/dev/fd" ] || ln -s /proc/self/fd "$root/dev/fd"

# How this machine reaches the network.
cp -L /etc/resolv.conf /etc/hosts "$root/etc"

inside() {
    chroot "$root" env HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"
}
packages="make procps ca-certificates openssl nginx-light redis-server"
for python in $PYTHONS; do
    packages="$packages $python $python-venv"
done
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d" # so that no service is started in there
chmod +x "$root/usr/sbin/policy-rc.d"
inside sh -c "$APT update && $APT install --no-install-recommends $packages"

# Whom this machine trusts when it installs packages: ca-certificates has brought Debian's own list.
[ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs"

# The files as they are now, without what earlier runs left beside them.
mkdir -p "$root/kfserver"
(cd "$sources" && tar -cf - --exclude=__pycache__ kfserver.py handlers.py README.md Makefile tests) |
    tar -xf - -C "$root/kfserver" --no-same-owner
inside sh -c "cd /kfserver && sh tests/each_python.sh make --no-print-directory test"
