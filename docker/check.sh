#!/usr/bin/env bash
# `make docker-check`, as root: install.sh in a clean Debian tree, then the node there, until statekv-health says that it is active.
# The tree is gone afterwards. pip's and apt's settings of this machine hold there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "$(id -u)" = 0 ] || { echo 'error: a clean tree is made by debootstrap and entered by chroot: run this as root' >&2; exit 1; }
command -v debootstrap > /dev/null || { echo 'error: debootstrap not found: apt install debootstrap' >&2; exit 1; }
# In a mount namespace of its own: what is mounted below goes with it.
[ -n "${IN_NAMESPACE:-}" ] || IN_NAMESPACE=1 exec unshare --mount --pid --fork "$0"

tree=$(mktemp --directory)
chmod 755 "$tree"        # for the user without rights
trap 'umount --recursive --lazy "$tree"/proc "$tree"/dev 2> /dev/null; rm -rf --one-file-system "$tree"' EXIT
echo '== debootstrap'
debootstrap --variant=minbase --include=ca-certificates bookworm "$tree" > "$tree.log" 2>&1 || { tail "$tree.log"; exit 1; }
mount -t proc proc "$tree/proc"
mount --rbind /dev "$tree/dev"
mount -t tmpfs -o size=512m tmpfs "$tree/dev/shm"
for path in /etc/apt/apt.conf.d /etc/apt/sources.list.d /etc/pip.conf /etc/xdg/pip /etc/ssl/certs/ca-certificates.crt /etc/resolv.conf \
    ${PIP_FIND_LINKS:-}; do
  [ -e "$path" ] || continue
  rm -rf "${tree:?}$path"
  mkdir -p "$tree$(dirname "$path")"
  cp --archive --dereference --no-target-directory "$path" "$tree$path"
done
# What git knows, as an image's build context has it.
mkdir -p "$tree/opt/statekv/source"
git ls-files --cached --others --exclude-standard -z | tar --create --null --files-from=- | tar --extract --directory "$tree/opt/statekv/source"

inside() { chroot "$tree" env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"; }
echo '== docker/install.sh'
inside /opt/statekv/source/docker/install.sh /opt/statekv/source /opt/statekv > "$tree.log" 2>&1 || { tail -40 "$tree.log"; exit 1; }
inside useradd --create-home --uid 10001 statekv
inside install --directory --owner statekv --mode 700 /memory
echo '== the node, as a user without rights'
# In place of the shell that calls it, so that a signal to a job reaches the program.
as_user() { exec chroot --userspec=10001 "$tree" env HOME=/home/statekv PATH=/usr/bin:/bin /opt/statekv/run "$@"; }
as_user statekv-node --ros-args -p memory_dir:=/memory -p 'cameras:=[front]' > "$tree.log" 2>&1 &
healthy=''
for _ in $(seq 30); do
  (as_user statekv-health) && { healthy=yes; break; }
  kill -0 %1 || break
done
[ -n "$healthy" ] || { tail -40 "$tree.log"; exit 1; }
kill -TERM %1
wait %1
rm "$tree.log"
echo "docker/install.sh: passed ($(du -sh --one-file-system "$tree" | cut -f1) in all)"
