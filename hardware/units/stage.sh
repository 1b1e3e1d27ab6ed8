#!/bin/sh
# stage.sh WORK: run by image_stage.py as root of a namespace. Lays the layers over each other, finishes them in the foreign root, and
# makes from them: boot.tar (kernel, device trees, firmware, modules, busybox), status (dpkg's), root.ext4 and, for a read-only root,
# data.ext4. Everything that depends on the day is set to SOURCE_DATE_EPOCH.
set -eu
cd "$1"
. ./settings
root=$PWD/root
mkdir -m 0755 root
trap 'umount root/proc 2>/dev/null || :; rm -rf root data' EXIT
for layer in bootstrap payload compiled overlay; do
    # with the mtimes of the layers; --keep-directory-symlink: /bin, /lib and /sbin are links
    tar --extract --numeric-owner --keep-directory-symlink --exclude='./dev/*' --file="$(readlink -f $layer.tar)" --directory=root
done

# what the running system would do at its first boot, and cannot on a read-only root; /dev stays empty: nothing of this machine's is
# ever mounted below a folder that is removed afterwards
: >root/dev/null
mount -t proc proc root/proc
chroot root /usr/bin/systemd-sysusers spacemoe.conf
umount root/proc
rm root/dev/null
mkdir -p root/boot/firmware root/var/lib/spacemoe/.system root/var/lib/systemd/timesync
chmod 0750 root/var/lib/spacemoe
chmod 0755 root/var/lib/spacemoe/.system
if [ -e shards.tar ]; then
    mkdir -p root/var/lib/spacemoe/bundle
    tar --extract --file=shards.tar --directory=root/var/lib/spacemoe/bundle
fi
chroot root chown -R spacemoe:spacemoe /var/lib/spacemoe
chroot root chown root:root /var/lib/spacemoe/.system
mkdir -p root/var/lib/spacemoe/.system/timesync
chroot root chown systemd-timesync:systemd-timesync /var/lib/systemd/timesync /var/lib/spacemoe/.system/timesync

# for the FAT partition and the initial RAM disk, which are made outside
version=$(ls root/usr/lib/modules)
cp root/var/lib/dpkg/status status
mkdir boot
cp root/boot/vmlinuz-"$version" boot/vmlinuz
cp -r root/usr/lib/linux-image-"$version"/broadcom boot/dtbs
cp -r root/usr/lib/raspi-firmware boot/firmware
cp root/usr/bin/busybox boot/busybox
cp -r root/usr/lib/modules/"$version" boot/modules
rm -rf boot/modules/build boot/modules/source
mkdir copyright
for file in root/usr/share/doc/*/copyright; do
    name=${file%/copyright}
    [ ! -f "$file" ] || cp -L "$file" copyright/"${name##*/}" 2>/dev/null || :
done

# a board never makes another kernel or RAM disk, and keeps no lists of packages
rm -rf root/boot/vmlinuz* root/boot/initrd* root/boot/System.map* root/boot/config-* root/vmlinuz* root/initrd.img*
rm -rf root/usr/lib/raspi-firmware root/usr/lib/linux-image-"$version"
rm -rf root/var/lib/apt/lists/* root/var/cache/apt/* root/var/cache/debconf/*-old root/var/lib/dpkg/*-old root/var/log/* root/run/* root/tmp/*
rm -f root/etc/ssh/ssh_host_* root/etc/hostname.* root/var/lib/systemd/random-seed root/etc/.pwd.lock root/etc/passwd- root/etc/group- root/etc/shadow- root/etc/gshadow-
: >root/usr/lib/clock-epoch
# what systemd does after an update of /usr (linker cache, accounts) has been done: not at the first boot again
touch root/etc/.updated root/var/.updated
# dates of passwords are the day of the build
sed -i "s/^\([^:]*:[^:]*\):[0-9]*:/\1:$((SOURCE_DATE_EPOCH / 86400)):/" root/etc/shadow
find root boot -newermt "@$SOURCE_DATE_EPOCH" -print0 | xargs -0r touch --no-dereference --date="@$SOURCE_DATE_EPOCH"
touch --date="@$SOURCE_DATE_EPOCH" root/usr/lib/clock-epoch root/usr root/etc/.updated root/var/.updated

make_ext4() { # FOLDER FILE LABEL UUID MIB OWNER
    truncate --size="${5}M" "$2"
    mke2fs -q -F -t ext4 -b 4096 -I 256 -i 16384 -m 1 -J size=16 -L "$3" -U "$4" -d "$1" \
        -O none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum \
        -E "hash_seed=$4,root_owner=$6,lazy_itable_init=0,lazy_journal_init=0,nodiscard" "$2"
}
# nothing of this machine's own settings
printf '[fs_types]\n%s = {\ninode_size = 256\n}\n' ext4 >mke2fs.conf
printf '%s = {\ninode_size = 256\n}\n' small big >>mke2fs.conf
export E2FSPROGS_FAKE_TIME="$SOURCE_DATE_EPOCH" MKE2FS_CONFIG="$PWD/mke2fs.conf"
if [ "$READ_ONLY" = 1 ]; then
    mkdir data
    cp -a root/var/lib/spacemoe/. data/
    chmod 0750 data
    chown --reference=root/var/lib/spacemoe data
    find root/var/lib/spacemoe -mindepth 1 -delete
    find data root/var/lib/spacemoe -newermt "@$SOURCE_DATE_EPOCH" -print0 | xargs -0r touch --no-dereference --date="@$SOURCE_DATE_EPOCH"
    # cp sets the folder's own times last
    touch --date="@$SOURCE_DATE_EPOCH" data root/var/lib/spacemoe
    used=$(du --summarize --block-size=1M data | cut -f1)
    make_ext4 data data.ext4 "$DATA_LABEL" "$DATA_UUID" $((used + DATA_FREE_MIB + 32)) "$(stat --format=%u:%g data)"
fi
used=$(du --summarize --block-size=1M root | cut -f1)
make_ext4 root root.ext4 "$ROOT_LABEL" "$ROOT_UUID" $(((used * 108 / 100 + ROOT_FREE_MIB + 63) / 64 * 64)) 0:0
tar --create --file=boot.tar --sort=name --numeric-owner --owner=0 --group=0 --mtime="@$SOURCE_DATE_EPOCH" --directory=boot .
rm -rf boot
