# finish-rootfs.sh ROOT: what the packages' own scripts would have set up, for packages that were only unpacked.
set -eu
root=$1
mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/root" "$root/etc" "$root/var/lib" "$root/var/log" "$root/nix"
chmod 1777 "$root/tmp"
[ -e "$root/bin/sh" ] || [ ! -e "$root/bin/dash" ] || ln -s dash "$root/bin/sh"
cat >"$root/etc/passwd" <<'X'
root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
X
cat >"$root/etc/group" <<'X'
root:x:0:
tty:x:5:
www-data:x:33:
nogroup:x:65534:
X
: >"$root/etc/resolv.conf"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
echo '127.0.0.1 localhost' >"$root/etc/hosts"
if [ -e "$root/usr/bin/nix-store" ]; then
	mkdir -p "$root/etc/nix"
	# One user, no daemon: every test says itself what store it means and whether it wants the sandbox.
	cat >"$root/etc/nix/nix.conf" <<'X'
build-users-group =
experimental-features = nix-command
substituters =
sandbox = false
X
fi
if [ -d "$root/usr/share/ca-certificates" ]; then
	mkdir -p "$root/etc/ssl/certs"
	find "$root/usr/share/ca-certificates" -name '*.crt' | LC_ALL=C sort | while read -r crt; do
		cat "$crt"
	done >"$root/etc/ssl/certs/ca-certificates.crt"
fi
# Programs find their libraries by the loader's cache; its own configuration does when it was never run.
ldconfig -r "$root"
# The package lists, the packages and the documentation are not needed any more; the copyright notices stay.
rm -rf "$root/var/lib/apt" "$root/var/cache/apt" "$root/usr/share/locale" "$root/usr/share/man"
rm -rf "$root/usr/share/perl" "$root/usr/lib/x86_64-linux-gnu/perl"
find "$root/usr/share/doc" ! -type d ! -name copyright -delete
