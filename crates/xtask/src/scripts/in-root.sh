# Runs a program with another root file system. Its own mount namespace is there already (unshare --mount).
#   in-root.sh ROOT SCRATCH CWD [--bind FROM TO MODE]... -- PROGRAM [ARGUMENT]...
# ROOT itself is never written to: what the program writes outside of the binds goes to memory and ends with it.
# pivot_root and not chroot: containerd, runc and Nix's sandbox pivot themselves, which a chroot forbids.
set -eu
root=$1 scratch=$2 cwd=$3
shift 3
mount -t tmpfs -o mode=0755 drover "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
# The merged root has the mode of the upper directory.
chmod 0755 "$scratch/upper"
mount -t overlay -o "lowerdir=$root,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$scratch/root"
cd "$scratch/root"
mkdir -p proc dev sys tmp run
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
while [ "$1" != -- ]; do
	from=$2 to=.$3 mode=$4
	shift 4
	if [ -d "$from" ]; then
		mkdir -p "$to"
	else
		mkdir -p "${to%/*}"
		[ -e "$to" ] || : >"$to"
	fi
	mount --rbind "$from" "$to"
	[ "$mode" = rw ] || mount -o "remount,bind,$mode" "$to"
done
shift
mkdir .old
pivot_root . .old
# The old root is let go by the new root's own static busybox: the machine's programs lose their libraries by the pivot.
exec /bin/busybox sh -c 'cd "$1"; shift; /bin/busybox umount -l /.old; /bin/busybox rmdir /.old; exec "$@"' sh "$cwd" "$@"
