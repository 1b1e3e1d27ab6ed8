#!/bin/sh
# compile.sh WORK: run by image_stage.py as root of a namespace. Compiles the agent's Python files by the image's own, emulated Python
# and leaves them in compiled.tar: a layer of its own, since it takes minutes and depends on the payload and on Python alone.
set -eu
cd "$1"
root=$PWD/root
mkdir -m 0755 root
trap 'umount root/proc 2>/dev/null || :; rm -rf root' EXIT
for layer in bootstrap payload; do
    tar --extract --numeric-owner --keep-directory-symlink --exclude='./dev/*' --exclude='./boot/*' --exclude='./usr/lib/modules/*' \
        --file="$(readlink -f $layer.tar)" --directory=root
done
# /dev stays empty: nothing of this machine's is ever mounted below a folder that is removed afterwards
: >root/dev/null
mount -t proc proc root/proc
# a file that this Python cannot compile is not one that the agent loads
chroot root /usr/bin/python3 -I -m compileall -q --invalidation-mode unchecked-hash /opt/spacemoe/agent || :
: >root/opt/spacemoe/agent/.compiled
find root/opt/spacemoe/agent -name __pycache__ -printf '%P/\n' -o -name .compiled -printf '%P\n' | LC_ALL=C sort >list
tar --create --file=compiled.tar --sort=name --numeric-owner --owner=0 --group=0 --mtime="@$SOURCE_DATE_EPOCH" \
    --transform='s,^,opt/spacemoe/agent/,' --directory=root/opt/spacemoe/agent --files-from=list
